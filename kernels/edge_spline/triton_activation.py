"""The grouped activation silu(h) + f(h), one f for W neighbouring columns, and its gradients   (docs/kernels/edge_spline.md).

h [R, M] with rows sorted by grove; table [N, F, C, P] fp32: C = G + 2 cells, the outer ones left and right of the grid, P powers; M = F W.
"""

import triton
import triton.language as tl

from kan_train.kernels.edge_spline.cells import row_tiles, rows_of, silu, silu_slope


@triton.jit
def _locate(h, low, inverse_step, CELLS: tl.constexpr):
    """Cell 0 .. CELLS - 1 and the position in it; a NaN is in cell 1, so that it indexes nowhere else, and its position stays NaN."""
    scaled = (h - low) * inverse_step
    cell = tl.where(scaled >= 0.0, tl.minimum(tl.floor(scaled), CELLS - 2.0), tl.where(scaled < 0.0, -1.0, 0.0))
    return cell.to(tl.int32) + 1, scaled - cell


@triton.jit
def activation_forward(
    h, table, offsets, y, groves, columns, low, inverse_step,
    CELLS: tl.constexpr, POWERS: tl.constexpr, FUNCTIONS: tl.constexpr, WIDTH: tl.constexpr,
    GROVES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """y = silu(h) + f(h): persistent programs take tiles of BLOCK_R rows and BLOCK_M columns in turn; the polynomials are gathered from cache."""
    tiles_until = row_tiles(offsets, groves, GROVES, BLOCK_R)
    blocks = tl.cdiv(columns, BLOCK_M)
    for tile in range(tl.program_id(0), tl.max(tiles_until, 0) * blocks, tl.num_programs(0)):
        row_tile = tile // blocks
        grove, begin, end = rows_of(tiles_until, row_tile, offsets, BLOCK_R)
        row = begin + tl.arange(0, BLOCK_R)
        m = (tile - row_tile * blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (row < end)[:, None] & (m < columns)[None, :]
        at = row.to(tl.int64)[:, None] * columns + m[None, :]
        x = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        cell, position = _locate(x, low, inverse_step, CELLS)
        polynomial = table + grove * (FUNCTIONS * CELLS * POWERS) + ((m // WIDTH)[None, :] * CELLS + cell) * POWERS
        value = tl.load(polynomial + (POWERS - 1), mask=inside, other=0.0)
        for power in tl.static_range(POWERS - 1):
            value = value * position + tl.load(polynomial + (POWERS - 2 - power), mask=inside, other=0.0)
        tl.store(y + at, (silu(x) + value).to(y.dtype.element_ty), mask=inside)


@triton.jit
def activation_backward(
    grad, h, table, offsets, grad_h, grad_table, groves, splits, columns, low, inverse_step,
    CELLS: tl.constexpr, POWERS: tl.constexpr, FUNCTIONS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_W: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """grad_h, and grad_table [splits, N, F, C, P]: what one of `splits` equal parts of a grove's rows adds to it, in one pass over grad and h.

    A program owns BLOCK_F functions of a grove's part: sums of grad * position^p over the elements of a cell, in the same order every time.
    """
    program = tl.program_id(0)
    function_blocks: tl.constexpr = (FUNCTIONS + BLOCK_F - 1) // BLOCK_F
    f_first = (program % function_blocks) * BLOCK_F
    program = program // function_blocks
    grove = program % groves
    split = program // groves
    begin = tl.load(offsets + grove)
    end = tl.load(offsets + grove + 1)
    share = tl.cdiv(tl.cdiv(end - begin, splits), BLOCK_R) * BLOCK_R
    begin += split * share
    end = tl.minimum(begin + share, end)

    lane = tl.arange(0, BLOCK_F * BLOCK_W)
    f = f_first + lane // BLOCK_W
    number = tl.arange(0, SUMS)
    sums = tl.zeros((SUMS, BLOCK_F), tl.float32)
    of_grove = table + grove.to(tl.int64) * (FUNCTIONS * CELLS * POWERS)
    for start in range(begin, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        for w_first in range(0, WIDTH, BLOCK_W):
            w = w_first + lane % BLOCK_W
            inside = (row < end)[:, None] & ((w < WIDTH) & (f < FUNCTIONS))[None, :]
            at = row.to(tl.int64)[:, None] * columns + (f * WIDTH + w)[None, :]
            x = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
            cell, position = _locate(x, low, inverse_step, CELLS)
            polynomial = of_grove + (f[None, :] * CELLS + cell) * POWERS
            slope = (POWERS - 1) * tl.load(polynomial + (POWERS - 1), mask=inside, other=0.0)
            for power in tl.static_range(POWERS - 2):
                slope = slope * position + (POWERS - 2 - power) * tl.load(polynomial + (POWERS - 2 - power), mask=inside, other=0.0)
            tl.store(grad_h + at, (g * (silu_slope(x) + slope * inverse_step)).to(grad_h.dtype.element_ty), mask=inside)
            square = position * position
            for c in range(CELLS):
                chosen = tl.where(cell == c, g, 0.0)
                for power in tl.static_range(POWERS):
                    if power == 0:
                        moment = chosen
                    elif power == 1:
                        moment = chosen * position
                    elif power == 2:
                        moment = chosen * square
                    else:
                        moment = chosen * (square * position)
                    of_rows = tl.sum(tl.reshape(moment, (BLOCK_R, BLOCK_F, BLOCK_W)), 2)
                    sums += tl.where((number == c * POWERS + power)[:, None], tl.sum(of_rows, 0)[None, :], 0.0)

    f_out = f_first + tl.arange(0, BLOCK_F)
    part = (split * groves + grove).to(tl.int64) * FUNCTIONS
    out = grad_table + (part + f_out)[None, :] * (CELLS * POWERS) + number[:, None]
    tl.store(out, sums, mask=(number < CELLS * POWERS)[:, None] & (f_out < FUNCTIONS)[None, :])
