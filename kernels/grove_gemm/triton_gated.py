"""The gated grove's activation fused into its products: F(h) v with h = W_up u, v = W_v x, F = silu + f   (docs/model.md, section 2).

f is a polynomial a cell, one function for `per_function` columns: table [N, F, CELLS, POWERS] in fp32, CELLS = G + 2, POWERS = k + 1, the outer cells linear.
"""

import triton
import triton.language as tl

from kan_train.kernels.grove_gemm.triton_products import add_product, gathered, locate, tile_ends, weight_tile


@triton.jit
def spline(h, table, first, low, inverse_step, CELLS: tl.constexpr, POWERS: tl.constexpr):
    """f(h), f'(h), and h in units of cells; first [1, columns]: where the column's function begins in the table."""
    scaled = (h - low) * inverse_step
    # Where h is not a number, maximum takes the other side: nothing is read outside the table.
    cell = tl.minimum(tl.maximum(tl.floor(scaled), -1.0), CELLS - 2.0)
    u = scaled - cell
    place = table + first + (cell.to(tl.int32) + 1) * POWERS
    value = tl.load(place + (POWERS - 1))
    slope = tl.zeros_like(value)
    for lower in tl.static_range(1, POWERS):
        slope = slope * u + value
        value = value * u + tl.load(place + (POWERS - 1 - lower))
    return value, slope * inverse_step, scaled


@triton.jit
def function_of_column(c, grove, hidden, per_function, CELLS: tl.constexpr, POWERS: tl.constexpr):
    """Where each column's function begins in the table."""
    function = tl.minimum(c, hidden - 1) // per_function
    return (grove * (hidden // per_function) + function) * (CELLS * POWERS)


@triton.jit
def gated_forward(
    x, own, up, value, table, product, h_out, v_out, offsets, token_of_row, choice_of_row, tokens, choices, groves,
    width, own_width, hidden, per_function, kept, low, inverse_step,
    REUSE: tl.constexpr, TABLE: tl.constexpr, CELLS: tl.constexpr, POWERS: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROVES: tl.constexpr,
):  # fmt: skip
    """product [R, M] = F(h) v; of h and v the first `kept` rows are stored, all or none.

    W_up and W_v share the gathered tile of x; REUSE: W_up has its own input, by choice.
    """
    up_descriptor = up
    value_descriptor = value
    if DESCRIPTORS:
        up_size = tl.cast(own_width, tl.int64) * hidden
        size = tl.cast(width, tl.int64) * hidden
        up_descriptor = tl.make_tensor_descriptor(up, [groves, own_width, hidden], [up_size, tl.cast(hidden, tl.int64), 1], [1, INNER, COLUMNS])
        value_descriptor = tl.make_tensor_descriptor(value, [groves, width, hidden], [size, tl.cast(hidden, tl.int64), 1], [1, INNER, COLUMNS])
    ends = tile_ends(offsets, groves, ROWS, GROVES)
    column_tiles = tl.cdiv(hidden, COLUMNS)
    for tile in range(tl.program_id(0), tl.max(ends, 0) * column_tiles, tl.num_programs(0)):
        row_tile = tile // column_tiles
        column = (tile - row_tile * column_tiles) * COLUMNS
        grove, row, stop = locate(row_tile, ends, offsets, ROWS)
        rows = row + tl.arange(0, ROWS)
        inside = rows < stop
        token, there = gathered(token_of_row, rows, inside, tokens, True)
        h = tl.zeros((ROWS, COLUMNS), tl.float32)
        v = tl.zeros((ROWS, COLUMNS), tl.float32)
        if REUSE:
            choice, chosen = gathered(choice_of_row, rows, inside, choices, True)
            h = add_product(h, own, choice, chosen, up, up_descriptor, grove, column, own_width, hidden, False, DESCRIPTORS, PRECISION, COLUMNS, INNER)
            v = add_product(v, x, token, there, value, value_descriptor, grove, column, width, hidden, False, DESCRIPTORS, PRECISION, COLUMNS, INNER)
        else:
            x_rows = x + token[:, None] * width
            for start in range(0, width, INNER):
                i = start + tl.arange(0, INNER)
                a = tl.load(x_rows + i[None, :], mask=there[:, None] & (i < width)[None, :], other=0.0)
                b = weight_tile(up, up_descriptor, grove, start, column, width, hidden, False, DESCRIPTORS, COLUMNS, INNER)
                h = tl.dot(a, b, h, input_precision=PRECISION)
                b = weight_tile(value, value_descriptor, grove, start, column, width, hidden, False, DESCRIPTORS, COLUMNS, INNER)
                v = tl.dot(a, b, v, input_precision=PRECISION)
        # In quarters: with the spline of the whole tile at once, registers would spill.
        h_parts = quarters(h, ROWS, COLUMNS)
        v_parts = quarters(v, ROWS, COLUMNS)
        for part in tl.static_range(4):
            activate(
                h_parts[part], v_parts[part], product, h_out, v_out, table, rows, inside, grove, column + part * (COLUMNS // 4),
                hidden, per_function, kept, low, inverse_step, TABLE, CELLS, POWERS, COLUMNS // 4,
            )  # fmt: skip


@triton.jit
def activate(
    h, v, product, h_out, v_out, table, rows, inside, grove, column, hidden, per_function, kept, low, inverse_step,
    TABLE: tl.constexpr, CELLS: tl.constexpr, POWERS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store F(h) v of a tile, and h and v of the rows that are kept.

    Inference takes the same code: without these stores the spline is evaluated in the accumulators' layout, spills, and for fp16 waits for every wgmma.
    """
    c = column + tl.arange(0, COLUMNS)
    mask = inside[:, None] & (c < hidden)[None, :]
    place = rows.to(tl.int64)[:, None] * hidden + c[None, :]
    # Rounded before the activation: the backward pass sees these values, and has to differentiate what was computed.
    h = h.to(product.dtype.element_ty)
    v = v.to(product.dtype.element_ty)
    tl.store(h_out + place, h, mask=mask & (rows < kept)[:, None])
    tl.store(v_out + place, v, mask=mask & (rows < kept)[:, None])
    h = h.to(tl.float32)
    activated = h * tl.sigmoid(h)
    if TABLE:
        first = function_of_column(c, grove, hidden, per_function, CELLS, POWERS)
        f, _slope, _scaled = spline(h, table, first[None, :], low, inverse_step, CELLS, POWERS)
        activated += f
    tl.store(product + place, (activated * v.to(tl.float32)).to(product.dtype.element_ty), mask=mask)


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns: the halves of every thread's registers, nothing moves."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def quarters(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Four parts of a tile's columns, from left to right."""
    left, right = halves(tile, ROWS, COLUMNS)
    first, second = halves(left, ROWS, COLUMNS // 2)
    third, fourth = halves(right, ROWS, COLUMNS // 2)
    return first, second, third, fourth


@triton.jit
def parts(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr):
    """The tile's columns in four or eight parts of PART columns, from left to right."""
    if COLUMNS == 8 * PART:
        left, right = halves(tile, ROWS, COLUMNS)
        all_parts = quarters(left, ROWS, COLUMNS // 2) + quarters(right, ROWS, COLUMNS // 2)
    else:
        all_parts = quarters(tile, ROWS, COLUMNS)
    return all_parts


@triton.jit
def gated_backward(
    grad_y, out, gate, h_in, v_in, table, grad_h, grad_v, product, gate_parts, table_parts, offsets, token_of_row, choice_of_row, tokens, choices, groves,
    width, hidden, per_function, low, inverse_step,
    TABLE: tl.constexpr, CELLS: tl.constexpr, POWERS: tl.constexpr, TOGETHER: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr, INNER: tl.constexpr, GROVES: tl.constexpr,
):  # fmt: skip
    """From grad_y [T, D] the gradients of h and v, and gate F(h) v, each [R, M]; F and its slope are evaluated again.

    gate_parts [R, column tiles]: <F(h) v, W_out grad_y> over the tile's columns, whose sum is the gate's gradient.
    table_parts [row tiles, M / TOGETHER, CELLS, POWERS]: sums of the gradient of f(h) times the powers of u over the tile's rows and TOGETHER columns.
    """
    descriptor = out
    if DESCRIPTORS:
        size = tl.cast(width, tl.int64) * hidden
        descriptor = tl.make_tensor_descriptor(out, [groves, hidden, width], [size, tl.cast(width, tl.int64), 1], [1, COLUMNS, INNER])
    ends = tile_ends(offsets, groves, ROWS, GROVES)
    column_tiles = tl.cdiv(hidden, COLUMNS)
    for tile in range(tl.program_id(0), tl.max(ends, 0) * column_tiles, tl.num_programs(0)):
        row_tile = tile // column_tiles
        column_tile = tile - row_tile * column_tiles
        column = column_tile * COLUMNS
        grove, row, stop = locate(row_tile, ends, offsets, ROWS)
        rows = row + tl.arange(0, ROWS)
        inside = rows < stop
        token, there = gathered(token_of_row, rows, inside, tokens, True)
        grad = tl.zeros((ROWS, COLUMNS), tl.float32)
        grad = add_product(grad, grad_y, token, there, out, descriptor, grove, column, width, hidden, True, DESCRIPTORS, PRECISION, COLUMNS, INNER)
        choice, chosen = gathered(choice_of_row, rows, inside, choices, True)
        gate_row = tl.load(gate + choice, mask=chosen, other=0.0).to(tl.float32)
        grad_parts = parts(grad, ROWS, COLUMNS, PART)
        of_gate = tl.zeros((ROWS,), tl.float32)
        for part in tl.static_range(COLUMNS // PART):
            of_gate += differentiate(
                grad_parts[part], gate_row, h_in, v_in, table, grad_h, grad_v, product, table_parts, rows, inside, grove, row_tile,
                column + part * PART, hidden, per_function, low, inverse_step, TABLE, CELLS, POWERS, TOGETHER, ROWS, PART,
            )  # fmt: skip
        tl.store(gate_parts + rows.to(tl.int64) * column_tiles + column_tile, of_gate, mask=inside)


@triton.jit
def differentiate(
    grad, gate_row, h_in, v_in, table, grad_h, grad_v, product, table_parts, rows, inside, grove, row_tile, column,
    hidden, per_function, low, inverse_step,
    TABLE: tl.constexpr, CELLS: tl.constexpr, POWERS: tl.constexpr, TOGETHER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What `gated_backward` stores of a tile, from the gradient of F(h) v before the gate; returns <F(h) v, grad> over its columns [ROWS]."""
    c = column + tl.arange(0, COLUMNS)
    mask = inside[:, None] & (c < hidden)[None, :]
    place = rows.to(tl.int64)[:, None] * hidden + c[None, :]
    h = tl.load(h_in + place, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_in + place, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(h)
    activated = h * sigmoid
    slope = activated * (1.0 - sigmoid) + sigmoid
    scaled = h
    if TABLE:
        first = function_of_column(c, grove, hidden, per_function, CELLS, POWERS)
        f, f_slope, scaled = spline(h, table, first[None, :], low, inverse_step, CELLS, POWERS)
        activated += f
        slope += f_slope
    both = activated * v
    of_gate = tl.sum(both * grad, 1)
    tl.store(product + place, (both * gate_row[:, None]).to(product.dtype.element_ty), mask=mask)
    grad = grad * gate_row[:, None]
    tl.store(grad_v + place, (activated * grad).to(grad_v.dtype.element_ty), mask=mask)
    grad = grad * v
    tl.store(grad_h + place, (slope * grad).to(grad_h.dtype.element_ty), mask=mask)
    if TABLE:
        store_moments(table_parts, row_tile, column, hidden, tl.where(mask, grad, 0.0), scaled, CELLS, POWERS, TOGETHER, ROWS, COLUMNS)
    return of_gate


@triton.jit
def store_moments(
    table_parts, row_tile, column, hidden, grad, scaled,
    CELLS: tl.constexpr, POWERS: tl.constexpr, TOGETHER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile's sums of grad u^p a cell: registers and shuffles alone, every sum in one order."""
    groups = hidden // TOGETHER
    group = column // TOGETHER + tl.arange(0, COLUMNS // TOGETHER)
    place = table_parts + (row_tile.to(tl.int64) * groups + group) * (CELLS * POWERS)
    for cell in range(0, CELLS):
        left = cell - 1.0
        here = ((scaled >= left) | (cell == 0)) & ((scaled < left + 1.0) | (cell == CELLS - 1))
        u = tl.where(here, scaled - left, 0.0)
        moment = tl.where(here, grad, 0.0)
        for power in tl.static_range(POWERS):
            part = tl.sum(tl.sum(tl.reshape(moment, (ROWS, COLUMNS // TOGETHER, TOGETHER)), 2), 0)
            tl.store(place + (cell * POWERS + power), part, mask=group < groups)
            moment = moment * u
