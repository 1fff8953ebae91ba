"""The per-edge layer for few rows: a gathered matrix-vector product that reads k + 1 of the n coefficients of every function."""

import triton
import triton.language as tl

from kan_train.kernels.edge_spline.cells import active_weights, locate, silu


@triton.jit
def edge_decode(
    u, base, coefficients, grove_of_row, y, rows, groves, inputs, outputs, share, low, inverse_step,
    SPLINE: tl.constexpr, ORDER: tl.constexpr, GRID: tl.constexpr, COUNT: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """y [splits, B, O]: what inputs split * share : (split + 1) * share add to the outputs of every row, in fp32 up to the last rounding."""
    program = tl.program_id(0)
    columns = tl.cdiv(outputs, BLOCK_O)
    column = (program % columns) * BLOCK_O + tl.arange(0, BLOCK_O)
    program = program // columns
    row = program % rows
    split = program // rows
    # A number outside 0 .. N - 1 marks a row without a grove (a dropped choice): it gives zeros and reads nothing.
    grove = tl.load(grove_of_row + row).to(tl.int64)
    stop = tl.minimum((split + 1) * share, inputs)
    stop = tl.where((grove >= 0) & (grove < groves), stop, 0)
    column_in = (column < outputs)[None, :]
    total = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
    for start in range(split * share, stop, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        inside = (i < stop)[:, None] & column_in
        x = tl.load(u + row.to(tl.int64) * inputs + i, mask=i < stop, other=0.0).to(tl.float32)
        cell, within, beyond = locate(x, low, inverse_step, GRID)
        w0, w1, w2, w3 = active_weights(within, beyond, SPLINE, ORDER)
        first = cell if SPLINE else cell * (ORDER + 1)
        w_rows = base + (grove * inputs + i) * outputs
        c_rows = coefficients + ((grove * inputs + i) * COUNT + first) * outputs
        total += silu(x)[:, None] * tl.load(w_rows[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        for j in tl.static_range(ORDER + 1):
            c = tl.load((c_rows + j * outputs)[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
            if j == 0:
                total += w0[:, None] * c
            elif j == 1:
                total += w1[:, None] * c
            elif j == 2:
                total += w2[:, None] * c
            else:
                total += w3[:, None] * c
    y_row = y + (split * rows + row).to(tl.int64) * outputs
    tl.store(y_row + column, tl.sum(total, 0).to(y.dtype.element_ty), mask=column < outputs)
