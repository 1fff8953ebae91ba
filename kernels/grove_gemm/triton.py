"""Launchers: they choose tiles, allocate results, and start kernels whose number does not depend on N. Nothing here reads `offsets`.

Tensors are contiguous, matrices of one 16-bit type or fp32; index tensors int32 or int64, offsets int32.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from kan_train.kernels import backend
from kan_train.kernels.grove_gemm.cases import aot_cases as aot_cases
from kan_train.kernels.grove_gemm.configurations import Tiles, columns_together, configurations, few, part_columns, sum_blocks
from kan_train.kernels.grove_gemm.triton_gated import gated_backward, gated_forward
from kan_train.kernels.grove_gemm.triton_products import grouped_product, weight_gradients
from kan_train.kernels.grove_gemm.triton_sums import combine, combine_gradients, sum_gate, sum_table


def product(
    x: Tensor, weight: Tensor, offsets: Tensor, gather: Tensor | None = None, *, transposed: bool = False, second: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """[R, C] = x[gather] weight[grove], weights [N, I, C] or, transposed, [N, C, I]; second: another x and weight whose product is added. One launch."""
    groves, inner, columns = weight.shape if not transposed else (weight.shape[0], weight.shape[2], weight.shape[1])
    rows = len(x) if gather is None else len(gather)
    y = x.new_empty(rows, columns)
    if not y.numel():
        return y
    x2, weight2 = second if second is not None else (None, None)
    tiles = _tiles(x)["few_product" if few(rows, groves) and not transposed else "product"]
    described = _described(tiles, weight, weight2)
    with backend.on(x.device):
        grouped_product[_persistent(tiles, rows, groves, columns, x.device)](
            x, x2, weight, weight2, y, offsets, gather, len(x), groves, inner, columns,
            GATHER=gather is not None, TWO=second is not None, TRANSPOSED=transposed, DESCRIPTORS=described, **_constants(tiles, x, groves),
        )  # fmt: skip
    return y


def gradients_of_weights(
    x: Tensor, grads: tuple[Tensor, ...], offsets: Tensor, groves: int, dtype: torch.dtype, x_gather: Tensor | None = None, grad_gather: Tensor | None = None
) -> tuple[Tensor, ...]:
    """For one or two grads [., C] of one shape: [N, I, C] = x[x_gather]^T grad[grad_gather] summed over the rows of every grove. One launch."""
    (inner, columns), two = (x.shape[1], grads[0].shape[1]), len(grads) == 2
    outs = tuple(x.new_empty(groves, inner, columns, dtype=dtype) for _ in grads)
    if not outs[0].numel():
        return outs
    tiles = _tiles(x)["two_weights" if two else "weights" if x_gather is None and grad_gather is None else "gathered_weights"]
    constants = _constants(tiles, x, groves)
    del constants["GROVES"]
    with backend.on(x.device):
        weight_gradients[(groves * triton.cdiv(inner, tiles.rows) * triton.cdiv(columns, tiles.columns),)](
            x, grads[0], grads[1] if two else None, outs[0], outs[1] if two else None, offsets, x_gather, len(x), grad_gather, len(grads[0]), inner, columns,
            GATHER_X=x_gather is not None, GATHER_GRAD=grad_gather is not None, TWO=two, **constants,
        )  # fmt: skip
    return outs


def combined(rows: Tensor, row_of_choice: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[T, D] = each token the sum of its choices' rows [R, D], times its gates [T, K] where given. One launch."""
    (tokens, choices), width = row_of_choice.shape, rows.shape[1]
    y = rows.new_empty(tokens, width, dtype=dtype)
    if y.numel():
        block = sum_blocks(backend.target(rows.device), width)
        with backend.on(rows.device):
            combine[(triton.cdiv(tokens, block.rows), triton.cdiv(width, block.columns))](
                y, rows, gate, row_of_choice, tokens, len(rows), width,
                GATE=gate is not None, CHOICES=choices, TOKENS=block.rows, COLUMNS=block.columns, num_warps=block.warps, num_stages=block.stages,
            )  # fmt: skip
    return y


def combined_gradients(grad_y: Tensor, rows: Tensor, gate: Tensor, choice_of_row: Tensor, row_of_choice: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows [R, D] and of the gate [T, K]. Two launches."""
    (count, width), choices = rows.shape, row_of_choice.shape[1]
    grad_rows, parts = torch.empty_like(rows), rows.new_empty(count, 1, dtype=torch.float32)
    if grad_rows.numel():
        block = sum_blocks(backend.target(rows.device), width)
        with backend.on(rows.device):
            combine_gradients[(triton.cdiv(count, block.rows),)](
                grad_y, rows, gate, choice_of_row, grad_rows, parts, count, gate.numel(), width,
                CHOICES=choices, ROWS=block.rows, COLUMNS=block.columns, num_warps=block.warps, num_stages=block.stages,
            )  # fmt: skip
    return grad_rows, summed_gate(parts, row_of_choice, gate)


def summed_gate(parts: Tensor, row_of_choice: Tensor, gate: Tensor) -> Tensor:
    """The gradient of the gate [T, K] from its parts [R, n]. One launch."""
    grad = torch.empty_like(gate)
    if grad.numel():
        with backend.on(gate.device):
            sum_gate[(triton.cdiv(gate.numel(), 256),)](grad, parts, row_of_choice, gate.numel(), *parts.shape, BLOCK=256, num_warps=4)
    return grad


def gated_product(
    x: Tensor, own: Tensor | None, up: Tensor, value: Tensor, table: Tensor | None, token_of_row: Tensor, choice_of_row: Tensor, offsets: Tensor,
    low: float, step: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """F(h) v [R, M], and h and v where they are kept (else empty). One launch."""
    (groves, own_width, hidden), rows = up.shape, len(token_of_row)
    y = x.new_empty(rows, hidden)
    h, v = (x.new_empty(rows if keep else 0, hidden) for _ in range(2))
    if y.numel():
        tiles = _tiles(x)["few_gated" if few(rows, groves) else "gated"]
        cells, powers, per_function = _of_table(table, hidden)
        with backend.on(x.device):
            gated_forward[_persistent(tiles, rows, groves, hidden, x.device)](
                x, own, up, value, table, y, h, v, offsets, token_of_row, choice_of_row, len(x), 0 if own is None else len(own), groves,
                x.shape[1], own_width, hidden, per_function, len(h), low, 1 / step,
                REUSE=own is not None, TABLE=table is not None, CELLS=cells, POWERS=powers,
                DESCRIPTORS=_described(tiles, up, value), **_constants(tiles, x, groves),
            )  # fmt: skip
    return y, h, v


def gated_gradients(
    grad_y: Tensor, gate: Tensor, out: Tensor, table: Tensor | None, h: Tensor, v: Tensor, token_of_row: Tensor, choice_of_row: Tensor,
    row_of_choice: Tensor, offsets: Tensor, low: float, step: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of h and v, gate F(h) v, each [R, M]; gradients of the gate [T, K] and of the table. Three launches, two without a table."""
    (groves, hidden, width), rows = out.shape, len(h)
    grad_h, grad_v, gated = (torch.empty_like(h) for _ in range(3))
    tiles = _tiles(h)["back"]
    gate_parts = h.new_empty(rows, triton.cdiv(hidden, tiles.columns), dtype=torch.float32)
    cells, powers, per_function = _of_table(table, hidden)
    together = columns_together(per_function, tiles)
    table_parts = None
    if table is not None:
        table_parts = h.new_empty(_most_row_tiles(tiles, rows, groves), hidden // together, cells * powers, dtype=torch.float32)
    if rows:
        with backend.on(h.device):
            gated_backward[_persistent(tiles, rows, groves, hidden, h.device)](
                grad_y, out, gate, h, v, table, grad_h, grad_v, gated, gate_parts, table_parts, offsets, token_of_row, choice_of_row,
                len(grad_y), gate.numel(), groves, width, hidden, per_function, low, 1 / step,
                TABLE=table is not None, CELLS=cells, POWERS=powers, TOGETHER=together, DESCRIPTORS=_described(tiles, out), PART=part_columns(tiles),
                **_constants(tiles, h, groves),
            )  # fmt: skip
    grad_table = None
    if table is not None:
        assert table_parts is not None
        grad_table, functions = torch.empty_like(table), table.shape[1]
        with backend.on(h.device):
            sum_table[(groves * functions,)](
                grad_table, table_parts, offsets, groves, functions, per_function // together,
                SLOTS=cells * powers, WIDE=triton.next_power_of_2(cells * powers), ROWS=tiles.rows, GROVES=triton.next_power_of_2(groves), BLOCK=16,
                num_warps=1,
            )  # fmt: skip
    return grad_h, grad_v, gated, summed_gate(gate_parts, row_of_choice, gate), grad_table


def _tiles(x: Tensor) -> dict[str, Tiles]:
    return configurations(backend.target(x.device), x.dtype, backend.dot_precision(x))


def _constants(tiles: Tiles, x: Tensor, groves: int) -> dict[str, Any]:
    return {
        "PRECISION": backend.dot_precision(x), "ROWS": tiles.rows, "COLUMNS": tiles.columns, "INNER": tiles.inner,
        "GROVES": triton.next_power_of_2(groves), "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip


def _described(tiles: Tiles, *weights: Tensor | None) -> bool:
    """Whether the weights can go by descriptor: begun, and every row begun, at a multiple of 16 bytes."""
    fit = all(weight is None or (weight.shape[-1] * weight.itemsize % 16 == 0 and weight.data_ptr() % 16 == 0) for weight in weights)
    if tiles.descriptors and fit:
        backend.descriptor_memory()
    return tiles.descriptors and fit


def _most_row_tiles(tiles: Tiles, rows: int, groves: int) -> int:
    """No routing has more: every grove with rows may end in a tile that is not full."""
    return rows // tiles.rows + min(groves, rows)


def _persistent(tiles: Tiles, rows: int, groves: int, columns: int, device: torch.device) -> tuple[int]:
    return (min(tiles.blocks * backend.processors(device), _most_row_tiles(tiles, rows, groves) * triton.cdiv(columns, tiles.columns)),)


def _of_table(table: Tensor | None, hidden: int) -> tuple[int, int, int]:
    """Cells, powers, and columns for each function."""
    return (1, 1, hidden) if table is None else (table.shape[2], table.shape[3], hidden // table.shape[1])
