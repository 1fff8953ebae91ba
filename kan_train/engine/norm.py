"""Global gradient norm and clipping of gradients that ZeRO does not shard, where DeepSpeed's is missing (stage 0 in fp32 reports none)."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from kan_train.parallel.params import is_split
from kan_train.parallel.place import ALONE, Axis

ROW = 4096
"""Elements summed in fp32 before fp64 takes over: over five million at once PyTorch's CPU kernel is off by 1e-4."""


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter], tensor_axis: Axis = ALONE.tensor) -> Tensor:
    """Euclidean norm of all gradients together, fp64 scalar, exact to about 1e-8; not finite where a gradient is not.

    Parameters that are split over `tensor_axis` count on each of its ranks, the others once.
    """
    counted = [p for p in parameters if p.grad is not None and (tensor_axis.is_first or is_split(p))]
    norms = [norm for p in counted if p.grad is not None for norm in _row_norms(p.grad.reshape(-1))]
    device = counted[0].device if counted else None
    own = torch.linalg.vector_norm(torch.cat(norms).double()) if norms else torch.zeros((), dtype=torch.float64, device=device)
    return own if tensor_axis.size == 1 else tensor_axis.sum(own.square()).sqrt()


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
