"""Kernels of the full per-edge layer: forward, gradient of the input, gradients of the weights   (docs/kernels/edge_spline.md).

R rows sorted by grove, N groves, I inputs, O outputs, n coefficients of a function. All tensors contiguous; `offsets` int32 [N + 1] is read on the device
alone. The basis exists only as a tile of registers, fp32 until it is rounded to the type of the product that it enters.
"""

import triton
import triton.language as tl

from kan_train.kernels.edge_spline.cells import basis_tile, row_tiles, rows_of, silu, silu_slope, slope_sum


@triton.jit
def edge_forward(
    u, base, coefficients, offsets, y, groves, inputs, outputs, low, inverse_step,
    SPLINE: tl.constexpr, ORDER: tl.constexpr, GRID: tl.constexpr, COUNT: tl.constexpr, OCTETS: tl.constexpr, LAST: tl.constexpr,
    GROVES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BASE_I: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [R, O] = silu(u) base + B(u) coefficients, grove by grove: persistent programs take tiles of BLOCK_R rows and BLOCK_O outputs in turn."""
    tiles_until = row_tiles(offsets, groves, GROVES, BLOCK_R)
    columns = tl.cdiv(outputs, BLOCK_O)
    for tile in range(tl.program_id(0), tl.max(tiles_until, 0) * columns, tl.num_programs(0)):
        row_tile = tile // columns
        grove, begin, end = rows_of(tiles_until, row_tile, offsets, BLOCK_R)
        row = begin + tl.arange(0, BLOCK_R)
        column = (tile - row_tile * columns) * BLOCK_O + tl.arange(0, BLOCK_O)
        row_in = (row < end)[:, None]
        column_in = (column < outputs)[None, :]
        u_rows = u + row.to(tl.int64) * inputs
        total = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
        for start in range(0, inputs, BASE_I):
            i = start + tl.arange(0, BASE_I)
            x = tl.load(u_rows[:, None] + i[None, :], mask=row_in & (i < inputs)[None, :], other=0.0).to(tl.float32)
            w_rows = base + (grove * inputs + i) * outputs
            w = tl.load(w_rows[:, None] + column[None, :], mask=(i < inputs)[:, None] & column_in, other=0.0)
            total = tl.dot(silu(x).to(w.dtype), w, total, input_precision=PRECISION)
        for step in range(0, tl.cdiv(inputs, BLOCK_I) * OCTETS):
            block = step // OCTETS
            first = (step - block * OCTETS) * 8
            i = block * BLOCK_I + tl.arange(0, BLOCK_I)
            x = tl.load(u_rows[:, None] + i[None, :], mask=row_in & (i < inputs)[None, :], other=0.0).to(tl.float32)
            k = tl.arange(0, BLOCK_I * 8)
            k_input = block * BLOCK_I + k // 8
            function = first + k % 8
            c_rows = coefficients + ((grove * inputs + k_input) * COUNT + function) * outputs
            c_in = (k_input < inputs) & (function < COUNT)
            c = tl.load(c_rows[:, None] + column[None, :], mask=c_in[:, None] & column_in, other=0.0)
            features = basis_tile(x, low, inverse_step, first, SPLINE, ORDER, GRID, LAST).to(c.dtype)
            total = tl.dot(features, c, total, input_precision=PRECISION)
        y_rows = y + row.to(tl.int64) * outputs
        tl.store(y_rows[:, None] + column[None, :], total.to(y.dtype.element_ty), mask=row_in & column_in)


@triton.jit
def edge_grad_input(
    grad, u, base, coefficients, offsets, grad_u, groves, inputs, outputs, low, inverse_step,
    SPLINE: tl.constexpr, ORDER: tl.constexpr, GRID: tl.constexpr, COUNT: tl.constexpr, OCTETS: tl.constexpr, LAST: tl.constexpr,
    GROVES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_u [R, I] = silu'(u) (grad base^T) + sum_g B_g'(u) (grad coefficients^T)_g: both products in one pass over grad, the derivatives in the epilogue."""
    tiles_until = row_tiles(offsets, groves, GROVES, BLOCK_R)
    blocks = tl.cdiv(inputs, BLOCK_I)
    for tile in range(tl.program_id(0), tl.max(tiles_until, 0) * blocks, tl.num_programs(0)):
        row_tile = tile // blocks
        block = tile - row_tile * blocks
        grove, begin, end = rows_of(tiles_until, row_tile, offsets, BLOCK_R)
        row = begin + tl.arange(0, BLOCK_R)
        row_in = (row < end)[:, None]
        i = block * BLOCK_I + tl.arange(0, BLOCK_I)
        k = tl.arange(0, BLOCK_I * 8)
        k_input = block * BLOCK_I + k // 8
        grad_rows = grad + row.to(tl.int64) * outputs
        w_rows = base + (grove * inputs + i) * outputs
        slopes = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
        from_base = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
        x_at = row.to(tl.int64)[:, None] * inputs + i[None, :]
        x_in = row_in & (i < inputs)[None, :]
        for octet in range(OCTETS):
            function = octet * 8 + k % 8
            c_rows = coefficients + ((grove * inputs + k_input) * COUNT + function) * outputs
            c_in = ((k_input < inputs) & (function < COUNT))[:, None]
            products = tl.zeros((BLOCK_R, BLOCK_I * 8), tl.float32)
            # Every eight of functions passes over grad anew and brings the small product along; only the last one's is used.
            from_base = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
            for start in range(0, outputs, BLOCK_O):
                o = start + tl.arange(0, BLOCK_O)
                o_in = (o < outputs)[None, :]
                g = tl.load(grad_rows[:, None] + o[None, :], mask=row_in & o_in, other=0.0)
                c = tl.load(c_rows[:, None] + o[None, :], mask=c_in & o_in, other=0.0)
                w = tl.load(w_rows[:, None] + o[None, :], mask=(i < inputs)[:, None] & o_in, other=0.0)
                products = tl.dot(g, tl.trans(c), products, input_precision=PRECISION)
                from_base = tl.dot(g, tl.trans(w), from_base, input_precision=PRECISION)
            x = tl.load(u + x_at, mask=x_in, other=0.0).to(tl.float32)
            slopes += slope_sum(products, x, low, inverse_step, octet * 8, SPLINE, ORDER, GRID, LAST)
        x = tl.load(u + x_at, mask=x_in, other=0.0).to(tl.float32)
        total = slopes * inverse_step + silu_slope(x) * from_base
        tl.store(grad_u + x_at, total.to(grad_u.dtype.element_ty), mask=x_in)


@triton.jit
def edge_grad_weights(
    grad, u, offsets, grad_base, grad_coefficients, groves, splits, inputs, outputs, low, inverse_step,
    SPLINE: tl.constexpr, ORDER: tl.constexpr, GRID: tl.constexpr, COUNT: tl.constexpr, OCTETS: tl.constexpr, LAST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_base [splits, N, I, O] and grad_coefficients [splits, N, I n, O]: what one of `splits` equal parts of a grove's rows adds to them.

    A program owns its tile of the result and adds up rows in their order: no atomics, and zeros where a grove has no rows.
    """
    # Programs that read the same tile of grad follow each other, so that all but the first find it in cache.
    program = tl.program_id(0)
    blocks = tl.cdiv(inputs, BLOCK_I)
    columns = tl.cdiv(outputs, BLOCK_O)
    octet = program % OCTETS
    program = program // OCTETS
    block = program % blocks
    program = program // blocks
    column = (program % columns) * BLOCK_O + tl.arange(0, BLOCK_O)
    program = program // columns
    grove = program % groves
    split = program // groves
    begin = tl.load(offsets + grove)
    end = tl.load(offsets + grove + 1)
    share = tl.cdiv(tl.cdiv(end - begin, splits), BLOCK_R) * BLOCK_R
    begin += split * share
    end = tl.minimum(begin + share, end)

    column_in = (column < outputs)[None, :]
    i = block * BLOCK_I + tl.arange(0, BLOCK_I)
    by_function = tl.zeros((BLOCK_I * 8, BLOCK_O), tl.float32)
    # Transposed: outputs are as many as the tensor cores' rows ask for, inputs are not.
    by_base = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(begin, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        row_in = (row < end)[:, None]
        g_rows = grad + row.to(tl.int64) * outputs
        u_rows = u + row.to(tl.int64) * inputs
        g = tl.load(g_rows[:, None] + column[None, :], mask=row_in & column_in, other=0.0)
        x = tl.load(u_rows[:, None] + i[None, :], mask=row_in & (i < inputs)[None, :], other=0.0).to(tl.float32)
        features = basis_tile(x, low, inverse_step, octet * 8, SPLINE, ORDER, GRID, LAST).to(g.dtype)
        by_function = tl.dot(tl.trans(features), g, by_function, input_precision=PRECISION)
        by_base = tl.dot(tl.trans(g), silu(x).to(g.dtype), by_base, input_precision=PRECISION)

    part = (split * groves + grove).to(tl.int64) * inputs
    k = tl.arange(0, BLOCK_I * 8)
    k_input = block * BLOCK_I + k // 8
    function = octet * 8 + k % 8
    c_rows = grad_coefficients + ((part + k_input) * COUNT + function) * outputs
    c_in = ((k_input < inputs) & (function < COUNT))[:, None]
    tl.store(c_rows[:, None] + column[None, :], by_function.to(grad_coefficients.dtype.element_ty), mask=c_in & column_in)
    w_rows = grad_base + (part + i) * outputs
    w_in = (i < tl.where(octet == 0, inputs, 0))[:, None]
    tl.store(w_rows[:, None] + column[None, :], tl.trans(by_base).to(grad_base.dtype.element_ty), mask=w_in & column_in)


@triton.jit
def sum_parts(parts, out, elements, count, BLOCK: tl.constexpr):
    """out [elements] = the sum of parts [count, elements] (fp32) in their order: the second stage of every reduction in this room."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, count):
        total += tl.load(parts + tl.cast(part, tl.int64) * elements + at, mask=inside, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
