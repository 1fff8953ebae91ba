"""The operator kan_train::gated_groves and its gradient. Shapes as in the room's `__init__`; own is [T K, I].

Forward: F(W_up u) * (W_v x) with both products, the activation and their product in one kernel; W_out; the gated sum. Backward: h and v are all that was
kept, F and its slope are evaluated again. Three launches and seven (ten for `reuse`), whatever the number of groves.
"""

from typing import Any

import torch
from torch import Tensor

from kan_train.kernels.grove_gemm import reference
from kan_train.kernels.grove_gemm.products import contiguous, runs_kernels


@torch.library.custom_op("kan_train::gated_groves", mutates_args=())
def gated_groves(
    x: Tensor, own: Tensor | None, up: Tensor, value: Tensor, out: Tensor, gate: Tensor, table: Tensor | None, token_of_row: Tensor, choice_of_row: Tensor,
    row_of_choice: Tensor, offsets: Tensor, low: float, step: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y [T, D], and h and v [R, M], or empty tensors where they need not be kept."""
    if not runs_kernels(x):
        y, h, v = reference.gated_groves(x, own, up, value, out, gate, table, token_of_row, choice_of_row, row_of_choice, offsets, low, step)
        return y, h if keep else h.new_empty(0, h.shape[1]), v if keep else v.new_empty(0, v.shape[1])
    from kan_train.kernels.grove_gemm import triton as launch

    offsets, table = offsets.contiguous(), _table(table)
    product, h, v = launch.gated_product(
        x.contiguous(), contiguous(own), up.contiguous(), value.contiguous(), table, token_of_row.contiguous(), choice_of_row.contiguous(), offsets,
        low, step, keep,
    )  # fmt: skip
    rows = launch.product(product, out.contiguous(), offsets)
    return launch.combined(rows, row_of_choice.contiguous(), gate.contiguous(), x.dtype), h, v


@gated_groves.register_fake
def _(
    x: Tensor, own: Tensor | None, up: Tensor, value: Tensor, out: Tensor, gate: Tensor, table: Tensor | None, token_of_row: Tensor, choice_of_row: Tensor,
    row_of_choice: Tensor, offsets: Tensor, low: float, step: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = token_of_row.shape[0] if keep else 0
    return x.new_empty(row_of_choice.shape[0], out.shape[2]), x.new_empty(rows, up.shape[2]), x.new_empty(rows, up.shape[2])


@torch.library.custom_op("kan_train::gated_groves_backward", mutates_args=())
def gated_groves_backward(
    grad_y: Tensor, x: Tensor, own: Tensor | None, up: Tensor, value: Tensor, out: Tensor, gate: Tensor, table: Tensor | None, h: Tensor, v: Tensor,
    token_of_row: Tensor, choice_of_row: Tensor, row_of_choice: Tensor, offsets: Tensor, low: float, step: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, own, up, value, out, gate and table; empty tensors for what there is not."""
    if not runs_kernels(x):
        grads = reference.gated_groves_backward(
            grad_y, x, own, up, value, out, gate, table, h, v, token_of_row, choice_of_row, row_of_choice, offsets, low, step
        )
        return [x.new_empty(0) if grad is None else grad for grad in grads]
    from kan_train.kernels.grove_gemm import triton as launch

    grad_y, x, own, up, value, out, gate = (part.contiguous() if part is not None else None for part in (grad_y, x, own, up, value, out, gate))
    token_of_row, choice_of_row, row_of_choice, offsets = (part.contiguous() for part in (token_of_row, choice_of_row, row_of_choice, offsets))
    wide, groves = _table(table), len(up)
    grad_h, grad_v, product, grad_gate, grad_table = launch.gated_gradients(
        grad_y, gate, out, wide, h, v, token_of_row, choice_of_row, row_of_choice, offsets, low, step
    )
    (grad_out,) = launch.gradients_of_weights(product, (grad_y,), offsets, groves, out.dtype, grad_gather=token_of_row)
    del product
    grad_own = x.new_empty(0)
    if own is None:
        grad_up, grad_value = launch.gradients_of_weights(x, (grad_h, grad_v), offsets, groves, up.dtype, x_gather=token_of_row)
        grad_rows = launch.product(grad_h, up, offsets, transposed=True, second=(grad_v, value))
    else:
        (grad_up,) = launch.gradients_of_weights(own, (grad_h,), offsets, groves, up.dtype, x_gather=choice_of_row)
        (grad_value,) = launch.gradients_of_weights(x, (grad_v,), offsets, groves, value.dtype, x_gather=token_of_row)
        # A choice has one row, or none where it was dropped: a sum of at most one term.
        grad_own = launch.combined(launch.product(grad_h, up, offsets, transposed=True), row_of_choice.view(-1, 1), None, own.dtype)
        grad_rows = launch.product(grad_v, value, offsets, transposed=True)
    grad_x = launch.combined(grad_rows, row_of_choice, None, x.dtype)
    of_table = x.new_empty(0) if table is None or grad_table is None else grad_table.to(table.dtype)
    return [grad_x, grad_own, grad_up, grad_value, grad_out, grad_gate, of_table]


@gated_groves_backward.register_fake
def _(
    grad_y: Tensor, x: Tensor, own: Tensor | None, up: Tensor, value: Tensor, out: Tensor, gate: Tensor, table: Tensor | None, h: Tensor, v: Tensor,
    token_of_row: Tensor, choice_of_row: Tensor, row_of_choice: Tensor, offsets: Tensor, low: float, step: float,
) -> list[Tensor]:  # fmt: skip
    return [x.new_empty(0) if part is None else part.new_empty(part.shape) for part in (x, own, up, value, out, gate, table)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.low, ctx.step, _ = inputs
    _, h, v = output
    ctx.mark_non_differentiable(h, v)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors[:7], h, v, *tensors[7:])


def _backward(ctx: Any, grad_y: Tensor | None, *_others: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 14
    saved = ctx.saved_tensors
    grads = torch.ops.kan_train.gated_groves_backward(grad_y, *saved, ctx.low, ctx.step)
    wanted = (grad if part is not None else None for grad, part in zip(grads, saved[:7], strict=True))
    return *wanted, *(None,) * 7


gated_groves.register_autograd(_backward, setup_context=_keep)


def _table(table: Tensor | None) -> Tensor | None:
    """Without gaps, in fp32: a polynomial's coefficients in bf16 would be steps at the cells' borders."""
    return None if table is None else table.float().contiguous()
