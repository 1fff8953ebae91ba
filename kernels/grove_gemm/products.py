"""The operators kan_train::grouped_gemm and kan_train::combine_rows, and their gradients. Shapes as in the room's `__init__`."""

from typing import Any

import torch
from torch import Tensor

from kan_train.kernels import backend
from kan_train.kernels.grove_gemm import reference

_KERNEL_TYPES = (torch.float16, torch.bfloat16, torch.float32)


def runs_kernels(x: Tensor) -> bool:
    """Whether operators on x launch kernels."""
    return x.dtype in _KERNEL_TYPES and backend.runs_triton(x.device)


@torch.library.custom_op("kan_train::grouped_gemm", mutates_args=())
def grouped_gemm(x: Tensor, weight: Tensor, offsets: Tensor, token_of_row: Tensor | None, row_of_choice: Tensor | None) -> Tensor:
    if not runs_kernels(x):
        return reference.grouped_gemm(x, weight, offsets, token_of_row)
    from kan_train.kernels.grove_gemm import triton as launch

    return launch.product(x.contiguous(), weight.contiguous(), offsets.contiguous(), contiguous(token_of_row))


@grouped_gemm.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor, token_of_row: Tensor | None, row_of_choice: Tensor | None) -> Tensor:
    return x.new_empty((x if token_of_row is None else token_of_row).shape[0], weight.shape[2])


@torch.library.custom_op("kan_train::grouped_gemm_backward", mutates_args=())
def grouped_gemm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, token_of_row: Tensor | None, row_of_choice: Tensor | None, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, empty where they are not needed."""
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    if not runs_kernels(x):
        both = reference.grouped_gemm_backward(grad, x, weight, offsets, token_of_row, row_of_choice if need_x else None)
        return both[0] if need_x else grad_x, both[1] if need_weight else grad_weight
    from kan_train.kernels.grove_gemm import triton as launch

    grad, x, weight, offsets = grad.contiguous(), x.contiguous(), weight.contiguous(), offsets.contiguous()
    if need_x:
        grad_x = launch.product(grad, weight, offsets, transposed=True)
        if token_of_row is not None:
            assert row_of_choice is not None
            grad_x = launch.combined(grad_x, row_of_choice.contiguous(), None, x.dtype)
    if need_weight:
        (grad_weight,) = launch.gradients_of_weights(x, (grad,), offsets, len(weight), weight.dtype, x_gather=contiguous(token_of_row))
    return grad_x, grad_weight


@grouped_gemm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, token_of_row: Tensor | None, row_of_choice: Tensor | None, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


def _keep_grouped(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_weight = ctx.needs_input_grad[:2]
    grad_x, grad_weight = torch.ops.kan_train.grouped_gemm_backward(grad, *ctx.saved_tensors, need_x, need_weight)
    return grad_x if need_x else None, grad_weight if need_weight else None, None, None, None


grouped_gemm.register_autograd(_grouped_backward, setup_context=_keep_grouped)


@torch.library.custom_op("kan_train::combine_rows", mutates_args=())
def combine_rows(y: Tensor, gate: Tensor, choice_of_row: Tensor, row_of_choice: Tensor) -> Tensor:
    if not runs_kernels(y):
        return reference.combine(y, gate, row_of_choice)
    from kan_train.kernels.grove_gemm import triton as launch

    return launch.combined(y.contiguous(), row_of_choice.contiguous(), gate.contiguous(), y.dtype)


@combine_rows.register_fake
def _(y: Tensor, gate: Tensor, choice_of_row: Tensor, row_of_choice: Tensor) -> Tensor:
    return y.new_empty(row_of_choice.shape[0], y.shape[1])


@torch.library.custom_op("kan_train::combine_rows_backward", mutates_args=())
def combine_rows_backward(grad: Tensor, y: Tensor, gate: Tensor, choice_of_row: Tensor, row_of_choice: Tensor) -> tuple[Tensor, Tensor]:
    if not runs_kernels(y):
        return reference.combine_backward(grad, y, gate, choice_of_row, row_of_choice)
    from kan_train.kernels.grove_gemm import triton as launch

    return launch.combined_gradients(grad.contiguous(), y.contiguous(), gate.contiguous(), choice_of_row.contiguous(), row_of_choice.contiguous())


@combine_rows_backward.register_fake
def _(grad: Tensor, y: Tensor, gate: Tensor, choice_of_row: Tensor, row_of_choice: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def _keep_combined(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.kan_train.combine_rows_backward(grad, *ctx.saved_tensors), None, None


combine_rows.register_autograd(_combine_backward, setup_context=_keep_combined)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor without gaps, if there is one."""
    return None if tensor is None else tensor.contiguous()
