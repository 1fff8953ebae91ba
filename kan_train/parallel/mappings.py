"""Megatron's mapping functions of tensor and sequence parallelism, for activations [B, T, ...]; the identity on an axis of one rank.

Each says what happens to values on the way forward; in brackets what happens to their gradients on the way back. Megatron splits tokens along the
first dimension, so that they are transposed on the way in and out. Megatron is imported when an axis has several ranks, and never before; the mappings that
decoding takes, which has no gradients, do without it.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kan_train.parallel.place import Axis


def copy_in(x: Tensor, axis: Axis) -> Tensor:
    """`x`, which all ranks hold alike, into work of which each does a part (gradients are summed). Also for parameters used on a part of the tokens."""
    if axis.size == 1 or not torch.is_grad_enabled():
        return x
    from megatron.core.tensor_parallel.mappings import _CopyToModelParallelRegion

    return _ContiguousGradient.apply(_CopyToModelParallelRegion.apply(x, axis.group))


def sum_out(x: Tensor, axis: Axis) -> Tensor:
    """The sum of the ranks' parts `x`, on all of them (gradients as they are). Without gradients `x` itself may become it."""
    if axis.size == 1:
        return x
    if not torch.is_grad_enabled():
        return axis.sum(x.contiguous())
    from megatron.core.tensor_parallel.mappings import _ReduceFromModelParallelRegion

    return _ReduceFromModelParallelRegion.apply(x.contiguous(), axis.group)


def gather_tokens(x_BtD: Tensor, axis: Axis, *, partial_gradients: bool) -> Tensor:
    """[B, T/n, D] -> [B, T, D] (gradients: summed and split where each rank has a part of them, only split where all have the same)."""
    if axis.size == 1:
        return x_BtD
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region as gather

    x_TBD = gather(x_BtD.transpose(0, 1).contiguous(), tensor_parallel_output_grad=partial_gradients, group=axis.group)
    return x_TBD.transpose(0, 1)


def sum_and_split_tokens(x_BTD: Tensor, axis: Axis) -> Tensor:
    """[B, T, D], a part of a sum on each rank -> the sum's own tokens [B, T/n, D] (gradients are gathered)."""
    if axis.size == 1:
        return x_BTD
    from megatron.core.tensor_parallel.mappings import reduce_scatter_to_sequence_parallel_region as reduce_scatter

    return reduce_scatter(x_BTD.transpose(0, 1).contiguous(), group=axis.group).transpose(0, 1)


def split_tokens(x_BTD: Tensor, axis: Axis) -> Tensor:
    """[B, T, D], the same on all ranks -> each rank's tokens [B, T/n, D] (gradients are gathered)."""
    if axis.size == 1:
        return x_BTD
    from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region as scatter

    return scatter(x_BTD.transpose(0, 1).contiguous(), group=axis.group).transpose(0, 1)


def gather_last(x: Tensor, axis: Axis) -> Tensor:
    """[..., n] -> [..., n * ranks], on all of them (gradients are split)."""
    if axis.size == 1:
        return x
    if not torch.is_grad_enabled():
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
        dist.all_gather(parts, x.contiguous(), group=axis.group)
        return torch.cat(parts, dim=-1)
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region as gather

    return gather(x.contiguous(), group=axis.group)


class _ContiguousGradient(torch.autograd.Function):
    """Megatron's all-reduce sums a copy of a gradient that is not contiguous, such as a slice of a larger one, and hands the gradient on as it was."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()
