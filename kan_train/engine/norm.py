"""Global gradient norm and clipping of replicated gradients, where DeepSpeed's is missing (stage 0 in fp32 reports none)."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

ROW = 4096
"""Elements summed in fp32 before fp64 takes over: over five million at once PyTorch's CPU kernel is off by 1e-4."""


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, fp64 scalar, exact to about 1e-8; not finite where a gradient is not."""
    norms = [norm for p in parameters if p.grad is not None for norm in _row_norms(p.grad.reshape(-1))]
    return torch.linalg.vector_norm(torch.cat(norms).double()) if norms else torch.zeros((), dtype=torch.float64)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], norm: float, clip_norm: float) -> None:
    """Scale all gradients so that their norm, `norm`, becomes at most `clip_norm`; 0 clips nothing."""
    if clip_norm <= 0 or norm <= clip_norm:
        return
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], clip_norm / (norm + 1e-6))


def _row_norms(flat: Tensor) -> Iterator[Tensor]:
    whole = flat.numel() // ROW * ROW
    if whole:
        yield torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1)
    if whole < flat.numel():
        yield torch.linalg.vector_norm(flat[whole:]).view(1)
