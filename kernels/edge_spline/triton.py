"""Launchers: they choose tiles, allocate results, and start kernels whose number does not depend on N. Tensors are contiguous and of one type.

Nothing here reads `offsets`: grids follow from shapes, and programs that find no tile end at once.
"""

import torch
import triton
from torch import Tensor

from kan_train.kernels.backend import dot_precision, on, processors, target
from kan_train.kernels.edge_spline import configurations as choose
from kan_train.kernels.edge_spline.functions import Functions
from kan_train.kernels.edge_spline.triton_activation import activation_backward, activation_forward
from kan_train.kernels.edge_spline.triton_cases import aot_cases
from kan_train.kernels.edge_spline.triton_decode import edge_decode
from kan_train.kernels.edge_spline.triton_layer import edge_forward, edge_grad_input, edge_grad_weights, sum_parts

__all__ = [
    "aot_cases", "edge_layer", "edge_layer_decode", "edge_layer_grad_input", "edge_layer_grad_weights", "grouped_activation", "grouped_activation_grad",
]  # fmt: skip

_SUM_BLOCK = 1024


def edge_layer(u: Tensor, base: Tensor, coefficients: Tensor, offsets: Tensor, functions: Functions) -> Tensor:
    """One launch; writes y [R, O] alone."""
    (rows, inputs), (groves, _, outputs) = u.shape, base.shape
    y = u.new_empty(rows, outputs)
    if y.numel():
        tiles = choose.forward_tiles(target(u.device), u.itemsize, outputs, functions.octets, rows <= choose.FEW_ROWS * groves)
        grid = persistent(u.device, most_row_tiles(rows, groves, tiles.rows) * triton.cdiv(outputs, tiles.outputs))
        with on(u.device):
            edge_forward[grid](
                u, base, coefficients, offsets, y, groves, inputs, outputs, functions.low, functions.inverse_step,
                **choose.layer_constants(functions), **tiles.constants, BASE_I=choose.BASE_INPUTS, GROVES=choose.grove_lanes(groves),
                PRECISION=dot_precision(u),
                num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
    return y


def edge_layer_grad_input(grad: Tensor, u: Tensor, base: Tensor, coefficients: Tensor, offsets: Tensor, functions: Functions) -> Tensor:
    """One launch; reads grad once for every 16 inputs and eight functions (from cache but for the first time)."""
    (rows, inputs), (groves, _, outputs) = u.shape, base.shape
    grad_u = torch.empty_like(u)
    if grad_u.numel():
        tiles = choose.grad_input_tiles(target(u.device), u.itemsize, functions.octets, rows <= choose.FEW_ROWS * groves)
        grid = persistent(u.device, most_row_tiles(rows, groves, tiles.rows) * triton.cdiv(inputs, tiles.inputs))
        with on(u.device):
            edge_grad_input[grid](
                grad, u, base, coefficients, offsets, grad_u, groves, inputs, outputs, functions.low, functions.inverse_step,
                **choose.layer_constants(functions), **tiles.constants, GROVES=choose.grove_lanes(groves), PRECISION=dot_precision(u),
                num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
    return grad_u


def edge_layer_grad_weights(grad: Tensor, u: Tensor, base: Tensor, offsets: Tensor, functions: Functions) -> tuple[Tensor, Tensor]:
    """One launch where the tiles of all groves fill the device; else parts of the rows are added up in fp32 and summed by a second stage, in their order."""
    (rows, inputs), (groves, _, outputs) = u.shape, base.shape
    shape = (groves, inputs * functions.count, outputs)
    grad_base, grad_coefficients = torch.empty_like(base), base.new_empty(shape)
    tiles = choose.grad_weights_tiles(target(u.device), u.itemsize)
    programs = groves * triton.cdiv(inputs, tiles.inputs) * functions.octets * triton.cdiv(outputs, tiles.outputs)
    splits = choose.parts(programs, processors(u.device), rows // (4 * groves * tiles.rows))
    base_parts, coefficient_parts = grad_base, grad_coefficients
    if splits > 1:
        base_parts = base.new_empty(splits, *base.shape, dtype=torch.float32)
        coefficient_parts = base.new_empty(splits, *shape, dtype=torch.float32)
    with on(u.device):
        edge_grad_weights[(programs * splits,)](
            grad, u, offsets, base_parts, coefficient_parts, groves, splits, inputs, outputs, functions.low, functions.inverse_step,
            **choose.layer_constants(functions), **tiles.constants, PRECISION=dot_precision(u),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        if splits > 1:
            _sum(base_parts, grad_base)
            _sum(coefficient_parts, grad_coefficients)
    return grad_base, grad_coefficients


def edge_layer_decode(u: Tensor, base: Tensor, coefficients: Tensor, groves: Tensor, functions: Functions) -> Tensor:
    """One launch; two where there are too few rows and outputs to fill the device, the inputs then being cut into parts."""
    (rows, inputs), outputs = u.shape, base.shape[2]
    y = u.new_empty(rows, outputs)
    if not y.numel():
        return y
    tiles = choose.decode_tiles(target(u.device))
    programs = rows * triton.cdiv(outputs, tiles.outputs)
    splits = choose.parts(programs, processors(u.device), inputs // (2 * tiles.inputs))
    share = triton.cdiv(triton.cdiv(inputs, splits), tiles.inputs) * tiles.inputs
    parts = y if splits == 1 else u.new_empty(splits, rows, outputs, dtype=torch.float32)
    known = choose.layer_constants(functions)
    with on(u.device):
        edge_decode[(programs * splits,)](
            u, base, coefficients, groves, parts, rows, base.shape[0], inputs, outputs, share, functions.low, functions.inverse_step,
            **{name: known[name] for name in ("SPLINE", "ORDER", "GRID", "COUNT")}, BLOCK_I=tiles.inputs, BLOCK_O=tiles.outputs,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        if splits > 1:
            _sum(parts, y)
    return y


def grouped_activation(h: Tensor, table: Tensor, offsets: Tensor, low: float, step: float) -> Tensor:
    """One launch: reads h and writes silu(h) + f(h); the table stays in cache."""
    (rows, columns), groves = h.shape, table.shape[0]
    y = torch.empty_like(h)
    if y.numel():
        shape = choose.activation_constants(target(h.device), *table.shape[1:], columns)
        tiles = most_row_tiles(rows, groves, shape["BLOCK_R"]) * triton.cdiv(columns, shape["BLOCK_M"])
        with on(h.device):
            activation_forward[persistent(h.device, tiles, resident=8)](
                h, table, offsets, y, groves, columns, low, 1 / step, **shape, GROVES=choose.grove_lanes(groves), num_warps=4, num_stages=1
            )
    return y


def grouped_activation_grad(grad: Tensor, h: Tensor, table: Tensor, offsets: Tensor, low: float, step: float) -> tuple[Tensor, Tensor]:
    """Gradients of h and, in two stages, of the table: parts of a grove's rows, then the sum of the parts in their order."""
    (rows, columns), groves = h.shape, table.shape[0]
    grad_h, grad_table = torch.empty_like(h), torch.empty_like(table)
    shape = choose.activation_sum_constants(*table.shape[1:], columns)
    programs = groves * triton.cdiv(table.shape[1], shape["BLOCK_F"])
    # Programs of one warp: 32 of them fit on a processor.
    splits = choose.parts(programs, 8 * processors(h.device), rows // (4 * groves * shape["BLOCK_R"]))
    parts = grad_table if splits == 1 else table.new_empty(splits, *table.shape)
    with on(h.device):
        activation_backward[(programs * splits,)](
            grad, h, table, offsets, grad_h, parts, groves, splits, columns, low, 1 / step, **shape, num_warps=1, num_stages=1
        )
        if splits > 1:
            _sum(parts, grad_table)
    return grad_h, grad_table


def _sum(parts: Tensor, out: Tensor) -> None:
    sum_parts[(triton.cdiv(out.numel(), _SUM_BLOCK),)](parts, out, out.numel(), parts.shape[0], BLOCK=_SUM_BLOCK, num_warps=4)


def most_row_tiles(rows: int, groves: int, block: int) -> int:
    """Tiles that `rows` rows can make at most: every grove may end with one that is not full."""
    return min(rows, rows // block + groves)


def persistent(device: torch.device, tiles: int, resident: int = 1) -> tuple[int]:
    """Grid of programs that stay and take tiles in turn: as many as the device runs at once, never more than there can be tiles."""
    return (max(1, min(tiles, processors(device) * resident)),)
