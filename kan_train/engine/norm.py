"""Global gradient norm and clipping of replicated gradients, where DeepSpeed's is missing (stage 0 in fp32 reports none)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, fp32 scalar; not finite where a gradient is not."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0, dtype=torch.float32)))


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], norm: float, clip_norm: float) -> None:
    """Scale all gradients so that their norm, `norm`, becomes at most `clip_norm`; 0 clips nothing."""
    if clip_norm <= 0 or norm <= clip_norm:
        return
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], clip_norm / (norm + 1e-6))
