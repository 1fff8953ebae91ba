"""Context parallelism: each of n ranks holds one contiguous chunk of every sequence, in order; what it needs from the others is collected here.

Two things cross the ranks. A linear recurrence crosses as its state: each rank gathers what the others' chunks add to it and how much of it they keep,
and combines those before it. Softmax attention needs every key before a token, so that keys and values are gathered whole. Every function is one
collective forwards and one backwards on every rank of the axis, the first and the last too: ranks that skipped one would leave the others waiting.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kan_train.parallel.place import Axis


def carry_in(added: Tensor, kept: Tensor | None, axis: Axis) -> Tensor:
    """The state before this rank's chunk, of a recurrence that chunk r takes from x to kept_r * x + added_r, starting at zero.

    added is any shape, alike on all ranks; kept has its dtype and broadcasts to it, or is None where chunks keep nothing: then the state is what the
    previous rank added, and zero on the first. One all-gather of both together; backwards one of the state's gradient, which runs the same
    recurrence from the last rank down. In the dtype of added.
    """
    return _CarryIn.apply(added, kept, axis)


def gather_chunks(x: Tensor, axis: Axis, *, dim: int) -> Tensor:
    """The chunks of all ranks one after the other along `dim`; `x`, any dtype, alike in shape on all ranks.

    One all-gather; backwards one reduce-scatter, because every rank's outputs depend on every chunk.
    """
    return x if axis.size == 1 else _GatherChunks.apply(x, axis, dim)


class _CarryIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, added: Tensor, kept: Tensor | None, axis: Axis) -> Tensor:
        ctx.axis = axis
        added_by, kept_by = _gather_pair(added, kept, axis)
        state = torch.zeros_like(added)
        for rank in range(axis.rank):
            state = _advance(state, added_by[rank], kept_by, rank)
        ctx.save_for_backward(kept_by, state if kept is not None else None)
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        kept_by, state = ctx.saved_tensors
        grads = _all_gather(grad_state, ctx.axis)
        # With G_r = dL/d(state after chunk r): G of the last rank is zero, G_{r-1} = kept_r G_r + dL/d(state before chunk r, on rank r).
        grad_added = torch.zeros_like(grad_state)
        for rank in reversed(range(ctx.axis.rank + 1, ctx.axis.size)):
            grad_added = _advance(grad_added, grads[rank], kept_by, rank)
        grad_kept = (grad_added * state).sum_to_size(kept_by.shape[1:]) if ctx.needs_input_grad[1] else None
        return grad_added, grad_kept, None


def _advance(state: Tensor, added: Tensor, kept_by: Tensor | None, rank: int) -> Tensor:
    return added if kept_by is None else torch.addcmul(added, kept_by[rank], state)


class _GatherChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return torch.cat(_all_gather(x, axis).unbind(), dim=dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        chunks = torch.stack(grad.chunk(ctx.axis.size, dim=ctx.dim))
        own = torch.empty_like(chunks[0])
        if not chunks.is_meta:
            dist.reduce_scatter_tensor(own, chunks.flatten(0, 1), group=ctx.axis.group)
        return own, None, None


def _gather_pair(added: Tensor, kept: Tensor | None, axis: Axis) -> tuple[Tensor, Tensor | None]:
    """Both from all ranks, [n, ...] each: one message costs less than two."""
    if kept is None:
        return _all_gather(added, axis), None
    both = _all_gather(torch.cat((added.flatten(), kept.flatten())), axis)
    # The clone lets the large part go when the state is known: the backward pass needs the small one alone.
    kept_by = both[:, added.numel() :].clone()
    return both[:, : added.numel()].unflatten(1, added.shape), kept_by.unflatten(1, kept.shape)


def _all_gather(x: Tensor, axis: Axis) -> Tensor:
    """[n, *shape of x]; on the meta device the shape alone, without a group."""
    gathered = x.new_empty(axis.size, *x.shape)
    if not x.is_meta:
        dist.all_gather_into_tensor(gathered.view(-1), x.contiguous().view(-1), group=axis.group)
    return gathered
