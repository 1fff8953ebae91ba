"""The same functions in plain torch, grove by grove, in any floating type. Sums and activations are at least fp32.

It reads `offsets` on the host: this is what runs on a CPU, and what the kernels are compared with, not what a GPU should wait for.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_gemm(x: Tensor, weight: Tensor, offsets: Tensor, gather: Tensor | None) -> Tensor:
    """[R, M]: every row x[gather] times its grove's matrix [N, D, M]."""
    x = _rows(x, gather)
    y = x.new_zeros(len(x), weight.shape[2])
    for grove, rows in _groves(offsets):
        y[rows] = x[rows] @ weight[grove]
    return y


def grouped_gemm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, gather: Tensor | None, row_of_choice: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    x_rows = _rows(x, gather)
    grad_rows, grad_weight = torch.zeros_like(x_rows), torch.zeros_like(weight)
    for grove, rows in _groves(offsets):
        grad_rows[rows] = grad[rows] @ weight[grove].T
        grad_weight[grove] = x_rows[rows].T @ grad[rows]
    return (grad_rows if row_of_choice is None else combine(grad_rows, None, row_of_choice)), grad_weight


def combine(rows: Tensor, gate: Tensor | None, row_of_choice: Tensor) -> Tensor:
    """[T, D]: each token the sum of its choices' rows [R, D], times the gate [T, K]; a row number of R adds nothing."""
    parts = _wide(_padded(rows)[row_of_choice])
    if gate is not None:
        parts = parts * gate[..., None]
    return parts.sum(1).to(rows.dtype)


def combine_backward(grad_y: Tensor, rows: Tensor, gate: Tensor, choice_of_row: Tensor, row_of_choice: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows and gate."""
    grad = _wide(_padded(grad_y)[choice_of_row // gate.shape[1]])
    grad_rows = grad * _padded(gate.flatten())[choice_of_row][:, None]
    by_row = (grad * rows).sum(1)
    return grad_rows.to(rows.dtype), _padded(by_row)[row_of_choice].to(gate.dtype)


def gated_groves(
    x: Tensor, own: Tensor | None, up: Tensor, value: Tensor, out: Tensor, gate: Tensor, table: Tensor | None, token_of_row: Tensor, choice_of_row: Tensor,
    row_of_choice: Tensor, offsets: Tensor, low: float, step: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y [T, D], and W_up u and W_v x [R, M], which the backward pass needs."""
    h = grouped_gemm(x, up, offsets, token_of_row) if own is None else grouped_gemm(own, up, offsets, choice_of_row)
    v = grouped_gemm(x, value, offsets, token_of_row)
    activated, _, _ = _activation(h, table, offsets, low, step)
    return combine(grouped_gemm((activated * v).to(x.dtype), out, offsets, None), gate, row_of_choice), h, v


def gated_groves_backward(
    grad_y: Tensor, x: Tensor, own: Tensor | None, up: Tensor, value: Tensor, out: Tensor, gate: Tensor, table: Tensor | None, h: Tensor, v: Tensor,
    token_of_row: Tensor, choice_of_row: Tensor, row_of_choice: Tensor, offsets: Tensor, low: float, step: float,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, own, up, value, out, gate and table, in this order."""
    grad_rows = _rows(grad_y, token_of_row)
    grad_product, _ = grouped_gemm_backward(grad_rows, h, out, offsets, None, None)
    activated, slope, (cell, u) = _activation(h, table, offsets, low, step)
    product = activated * v
    grad_gate = _padded((product * grad_product).sum(1))[row_of_choice].to(gate.dtype)
    gate_rows = _padded(gate.flatten())[choice_of_row][:, None]
    _, grad_out = grouped_gemm_backward(grad_rows, (product * gate_rows).to(h.dtype), out, offsets, None, None)
    grad_product = _wide(grad_product) * gate_rows
    grad_f = grad_product * v
    grad_h, grad_v = (slope * grad_f).to(h.dtype), (activated * grad_product).to(h.dtype)
    grad_x, grad_value = grouped_gemm_backward(grad_v, x, value, offsets, token_of_row, None)
    source, index = (x, token_of_row) if own is None else (own, choice_of_row)
    grad_u, grad_up = grouped_gemm_backward(grad_h, source, up, offsets, index, None)
    grad_own = None
    if own is None:
        grad_x = grad_x + grad_u
    else:
        grad_own = combine(grad_u, None, row_of_choice.flatten()[:, None])
    grad_table = None
    if table is not None:
        powers = torch.stack([grad_f * u**power for power in range(table.shape[3])], dim=-1).to(table.dtype)
        grad_table = torch.zeros_like(table).flatten(0, 2).index_add_(0, cell.flatten(), powers.flatten(0, 1)).view_as(table)
    return combine(grad_x, None, row_of_choice), grad_own, grad_up, grad_value, grad_out, grad_gate, grad_table


def _activation(h: Tensor, table: Tensor | None, offsets: Tensor, low: float, step: float) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """F(h) and F'(h); of the spline the number of each element's cell in the flat table, and the position in it."""
    h = _wide(h)
    sigmoid = h.sigmoid()
    silu = h * sigmoid
    slope = silu * (1 - sigmoid) + sigmoid
    if table is None:
        return F.silu(h), slope, (h, h)
    _, functions, cells, powers = table.shape
    scaled = (h - low) / step
    cell = scaled.floor().clamp(-1, cells - 2).nan_to_num(0.0)
    u = scaled - cell
    grove = torch.searchsorted(offsets[1:].contiguous(), torch.arange(len(h), device=h.device, dtype=offsets.dtype), right=True).clamp(max=len(table) - 1)
    function = torch.arange(h.shape[1], device=h.device) // (h.shape[1] // functions)
    flat = (grove[:, None] * functions + function) * cells + cell.long() + 1
    coefficients = _wide(table).flatten(0, 2)[flat]
    value = sum((coefficients[..., power] * u**power for power in range(powers)), torch.zeros_like(u))
    rise = sum((power * coefficients[..., power] * u ** (power - 1) for power in range(1, powers)), torch.zeros_like(u))
    return silu + value, slope + rise / step, (flat, u)


def _groves(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    ends = offsets.tolist()
    for grove, (start, stop) in enumerate(pairwise(ends)):
        if stop > start:
            yield grove, slice(start, stop)


def _rows(x: Tensor, gather: Tensor | None) -> Tensor:
    return x if gather is None else _padded(x)[gather]


def _padded(rows: Tensor) -> Tensor:
    """With a line of zeros past the end, which an index of padding finds."""
    return torch.cat((rows, rows.new_zeros(1, *rows.shape[1:])))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
