"""The room's operators in plain torch, for any floating type: what runs where Triton does not, and what a kernel is read beside.

R rows sorted by grove, N groves, I inputs, O outputs, n coefficients of a function, M columns, F functions a grove, G cells, P = k + 1 powers.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_train.kernels.edge_spline.functions import Functions

# Rows: the k + 1 B-splines that live on a cell, in order; columns: powers of the position in it (de Boor 1978).
_PIECES = {
    1: ((1.0, -1.0), (0.0, 1.0)),
    2: ((0.5, -1.0, 0.5), (0.5, 1.0, -1.0), (0.0, 0.0, 0.5)),
    3: ((1 / 6, -1 / 2, 1 / 2, -1 / 6), (2 / 3, 0.0, -1.0, 1 / 2), (1 / 6, 1 / 2, 1 / 2, -1 / 2), (0.0, 0.0, 0.0, 1 / 6)),
}


def edge_layer(u: Tensor, base: Tensor, coefficients: Tensor, offsets: Tensor, functions: Functions) -> Tensor:
    """u [R, I], base [N, I, O], coefficients [N, I n, O] -> y [R, O]."""
    features, silu = _features(u, functions)
    y = u.new_zeros(len(u), base.shape[2])
    for grove, rows in _groves(offsets):
        y[rows] = silu[rows] @ base[grove] + features[rows] @ coefficients[grove]
    return y


def edge_layer_grad_input(grad: Tensor, u: Tensor, base: Tensor, coefficients: Tensor, offsets: Tensor, functions: Functions) -> Tensor:
    """Gradient of u [R, I], from that of y [R, O]."""
    wide = _wide(u)
    first, _, slopes = active(wide, functions)
    sigmoid = wide.sigmoid()
    silu_slope = sigmoid * (1 + wide * (1 - sigmoid))
    out = torch.zeros_like(wide)
    for grove, rows in _groves(offsets):
        by_function = (grad[rows] @ coefficients[grove].T).to(wide.dtype).unflatten(1, (-1, functions.count))
        spline = (by_function.gather(2, _numbers(first[rows], functions)) * slopes[rows]).sum(-1)
        out[rows] = spline + silu_slope[rows] * (grad[rows] @ base[grove].T)
    return out.to(u.dtype)


def edge_layer_grad_weights(grad: Tensor, u: Tensor, base: Tensor, offsets: Tensor, functions: Functions) -> tuple[Tensor, Tensor]:
    """Gradients of base [N, I, O] and of the coefficients [N, I n, O], from that of y [R, O]."""
    features, silu = _features(u, functions)
    grad_base = torch.zeros_like(base)
    grad_coefficients = base.new_zeros(base.shape[0], features.shape[1], base.shape[2])
    for grove, rows in _groves(offsets):
        grad_base[grove] = silu[rows].T @ grad[rows]
        grad_coefficients[grove] = features[rows].T @ grad[rows]
    return grad_base, grad_coefficients


def edge_layer_decode(u: Tensor, base: Tensor, coefficients: Tensor, groves: Tensor, functions: Functions) -> Tensor:
    """u [B, I] -> y [B, O], row b by the functions of grove groves[b]; of the coefficients only the k + 1 active ones of every input are read."""
    wide = _wide(u)
    first, weights, _ = active(wide, functions)
    input_of = torch.arange(u.shape[1], device=u.device)[:, None]
    chosen = coefficients[groves.long()[:, None, None], input_of * functions.count + _numbers(first, functions)]
    spline = torch.einsum("bij,bijo->bo", weights, chosen.to(wide.dtype))
    return (spline + torch.einsum("bi,bio->bo", F.silu(wide), base[groves.long()].to(wide.dtype))).to(u.dtype)


def grouped_activation(h: Tensor, table: Tensor, offsets: Tensor, low: float, step: float) -> Tensor:
    """silu(h) + f(h): h [R, M], table [N, F, G + 2, P] -> [R, M]."""
    position, columns, _ = _polynomials(h, table, offsets, low, step)
    return (F.silu(h.to(position.dtype)) + _horner(columns, position)).to(h.dtype)


def grouped_activation_grad(grad: Tensor, h: Tensor, table: Tensor, offsets: Tensor, low: float, step: float) -> tuple[Tensor, Tensor]:
    """Gradients of h [R, M] and of the table [N, F, G + 2, P], from that of silu(h) + f(h)."""
    position, columns, index = _polynomials(h, table, offsets, low, step)
    wide, upstream = h.to(position.dtype), grad.to(position.dtype)
    sigmoid = wide.sigmoid()
    powers = torch.arange(1, table.shape[3], dtype=position.dtype, device=h.device)
    slope = _horner(columns[..., 1:] * (powers / step), position)
    grad_h = upstream * (sigmoid * (1 + wide * (1 - sigmoid)) + slope)
    moments = torch.stack([upstream * position**power for power in range(table.shape[3])], dim=-1)
    grad_table = torch.zeros_like(table).flatten(0, 2).index_add_(0, index.flatten(), moments.flatten(0, 1))
    return grad_h.to(h.dtype), grad_table.view_as(table)


def active(x: Tensor, functions: Functions) -> tuple[Tensor, Tensor, Tensor]:
    """The k + 1 functions that are not zero at x [...]: number of the first (int64 [...]), their values and their slopes [..., k + 1].

    Outside the grid the slope at its end carries a function on. A NaN lies in cell 0, so that it indexes nowhere else, and gives NaN.
    """
    scaled = (x - functions.low) * functions.inverse_step
    cell = scaled.floor().nan_to_num_().clamp_(0, functions.grid - 1)
    position = scaled - cell
    inside = position.clamp(0.0, 1.0)
    order = functions.order
    pieces = torch.tensor(_PIECES[order], dtype=torch.float64) if functions.kind == "bspline" else torch.eye(order + 1, dtype=torch.float64)
    pieces = pieces.to(x.device, x.dtype)
    powers = torch.stack([inside**power for power in range(order + 1)], dim=-1)
    slopes = powers[..., :-1] @ (pieces[:, 1:] * torch.arange(1, order + 1, dtype=x.dtype, device=x.device)).T
    values = powers @ pieces.T + slopes * (position - inside)[..., None]
    return cell.long() * functions.stride, values, slopes * functions.inverse_step


def _features(u: Tensor, functions: Functions) -> tuple[Tensor, Tensor]:
    """Every basis function [R, I n] and silu [R, I] at u [R, I], evaluated in at least fp32."""
    wide = _wide(u)
    first, values, _ = active(wide, functions)
    basis = values.new_zeros(*u.shape, functions.count).scatter(-1, _numbers(first, functions), values)
    return basis.flatten(1).to(u.dtype), F.silu(wide).to(u.dtype)


def _numbers(first: Tensor, functions: Functions) -> Tensor:
    """[...] -> [..., k + 1]: the active functions from the first on."""
    return first[..., None] + torch.arange(functions.order + 1, device=first.device)


def _polynomials(h: Tensor, table: Tensor, offsets: Tensor, low: float, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """Position in its cell [R, M], polynomial there [R, M, P] and flat number of the cell in the table [R, M] of every element."""
    groves, functions, cells, powers = table.shape
    scaled = (h.to(table.dtype) - low) * (1 / step)
    cell = scaled.floor().clamp(-1, cells - 2).nan_to_num(0.0)
    grove = torch.searchsorted(offsets[1:].contiguous(), torch.arange(len(h), device=h.device, dtype=offsets.dtype), right=True).clamp(max=groves - 1)
    function = torch.arange(h.shape[1], device=h.device) // (h.shape[1] // functions)
    index = (grove[:, None] * functions + function) * cells + cell.long() + 1
    return scaled - cell, table.reshape(-1, powers)[index], index


def _horner(columns: Tensor, position: Tensor) -> Tensor:
    value = columns[..., -1]
    for power in range(columns.shape[-1] - 2, -1, -1):
        value = torch.addcmul(columns[..., power], value, position)
    return value


def _groves(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Every grove that has rows, and where they are."""
    bounds = offsets.tolist()
    for grove, (begin, end) in enumerate(pairwise(bounds)):
        if end > begin:
            yield grove, slice(begin, end)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
