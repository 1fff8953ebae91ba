"""Products grouped by grove.  R rows sorted by grove, N groves, I the dimension that is summed, C columns of the product.

Programs are as many as the device runs at once; each walks through the output's tiles, whose number and places follow from `offsets` on the device.
"""

import triton
import triton.language as tl


@triton.jit
def tile_ends(offsets, groves, ROWS: tl.constexpr, GROVES: tl.constexpr):
    """Tiles of ROWS rows up to the end of every grove [GROVES], a power of two of at least `groves`."""
    grove = tl.arange(0, GROVES)
    start = tl.load(offsets + grove, mask=grove < groves, other=0)
    stop = tl.load(offsets + grove + 1, mask=grove < groves, other=0)
    return tl.cumsum((stop - start + (ROWS - 1)) // ROWS, 0)


@triton.jit
def locate(row_tile, ends, offsets, ROWS: tl.constexpr):
    """A row tile's grove, its first row, and the end of the grove's rows."""
    before = ends <= row_tile
    grove = tl.sum(before.to(tl.int32), 0)
    first = tl.max(tl.where(before, ends, 0), 0)
    return grove, tl.load(offsets + grove) + (row_tile - first) * ROWS, tl.load(offsets + grove + 1)


@triton.jit
def gathered(index, rows, inside, limit, GATHER: tl.constexpr):
    """Where the rows of an operand come from, int64, and whether they are there: an index of `limit` is padding."""
    source = rows.to(tl.int64)
    if GATHER:
        source = tl.load(index + rows, mask=inside, other=0).to(tl.int64)
        inside = inside & (source < limit)
    return source, inside


@triton.jit
def weight_tile(
    weight, descriptor, grove, start, column, inner, columns,
    TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """[INNER, COLUMNS] of weight[grove] [I, C], or of the transpose of weight[grove] [C, I]. A descriptor of three dimensions ends where the grove ends."""
    i = start + tl.arange(0, INNER)
    c = column + tl.arange(0, COLUMNS)
    matrix = weight + grove.to(tl.int64) * inner * columns
    if TRANSPOSED:
        if DESCRIPTORS:
            tile = tl.reshape(descriptor.load([grove, column, start]), (COLUMNS, INNER))
        else:
            tile = tl.load(matrix + c[:, None] * inner + i[None, :], mask=(c < columns)[:, None] & (i < inner)[None, :], other=0.0)
        tile = tl.trans(tile)
    else:
        if DESCRIPTORS:
            tile = tl.reshape(descriptor.load([grove, start, column]), (INNER, COLUMNS))
        else:
            tile = tl.load(matrix + i[:, None] * columns + c[None, :], mask=(i < inner)[:, None] & (c < columns)[None, :], other=0.0)
    return tile


@triton.jit
def add_product(
    total, x, source, inside, weight, descriptor, grove, column, inner, columns,
    TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """total + x[source] times a grove's matrix."""
    x_rows = x + source[:, None] * inner
    for start in range(0, inner, INNER):
        i = start + tl.arange(0, INNER)
        a = tl.load(x_rows + i[None, :], mask=inside[:, None] & (i < inner)[None, :], other=0.0)
        b = weight_tile(weight, descriptor, grove, start, column, inner, columns, TRANSPOSED, DESCRIPTORS, COLUMNS, INNER)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def grouped_product(
    x, x2, weight, weight2, y, offsets, gather, limit, groves, inner, columns,
    GATHER: tl.constexpr, TWO: tl.constexpr, TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROVES: tl.constexpr,
):  # fmt: skip
    """y [R, C] = x[gather] weight[grove]  (+ x2 weight2[grove], of the same shapes); weights [N, I, C], or [N, C, I] where TRANSPOSED."""
    descriptor = weight
    descriptor2 = weight2
    if DESCRIPTORS:
        # By tl.cast: an argument of 1 is a constant, which has no method `to`.
        size = tl.cast(inner, tl.int64) * columns
        if TRANSPOSED:
            descriptor = tl.make_tensor_descriptor(weight, [groves, columns, inner], [size, tl.cast(inner, tl.int64), 1], [1, COLUMNS, INNER])
            if TWO:
                descriptor2 = tl.make_tensor_descriptor(weight2, [groves, columns, inner], [size, tl.cast(inner, tl.int64), 1], [1, COLUMNS, INNER])
        else:
            descriptor = tl.make_tensor_descriptor(weight, [groves, inner, columns], [size, tl.cast(columns, tl.int64), 1], [1, INNER, COLUMNS])
            if TWO:
                descriptor2 = tl.make_tensor_descriptor(weight2, [groves, inner, columns], [size, tl.cast(columns, tl.int64), 1], [1, INNER, COLUMNS])
    ends = tile_ends(offsets, groves, ROWS, GROVES)
    column_tiles = tl.cdiv(columns, COLUMNS)
    for tile in range(tl.program_id(0), tl.max(ends, 0) * column_tiles, tl.num_programs(0)):
        row_tile = tile // column_tiles
        column = (tile - row_tile * column_tiles) * COLUMNS
        grove, row, stop = locate(row_tile, ends, offsets, ROWS)
        rows = row + tl.arange(0, ROWS)
        inside = rows < stop
        source, there = gathered(gather, rows, inside, limit, GATHER)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        total = add_product(
            total, x, source, there, weight, descriptor, grove, column, inner, columns, TRANSPOSED, DESCRIPTORS, PRECISION, COLUMNS, INNER
        )  # fmt: skip
        if TWO:
            total = add_product(
                total, x2, source, there, weight2, descriptor2, grove, column, inner, columns, TRANSPOSED, DESCRIPTORS, PRECISION, COLUMNS, INNER
            )  # fmt: skip
        c = column + tl.arange(0, COLUMNS)
        tl.store(y + rows.to(tl.int64)[:, None] * columns + c[None, :], total.to(y.dtype.element_ty), mask=inside[:, None] & (c < columns)[None, :])


@triton.jit
def weight_gradients(
    x, grad, grad2, out, out2, offsets, x_gather, x_limit, grad_gather, grad_limit, inner, columns,
    GATHER_X: tl.constexpr, GATHER_GRAD: tl.constexpr, TWO: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out [N, I, C]: of every grove x[x_gather]^T grad[grad_gather], summed over its rows; TWO: out2 from grad2 beside it, x read once.

    A program a tile of a grove's matrix: their number follows from shapes, and the device hands a free processor the next, however unequal the groves are.
    """
    column_tiles = tl.cdiv(columns, COLUMNS)
    row_tiles = tl.cdiv(inner, ROWS)
    tile = tl.program_id(0)
    grove = tile // (row_tiles * column_tiles)
    rest = tile - grove * (row_tiles * column_tiles)
    i = (rest // column_tiles) * ROWS + tl.arange(0, ROWS)
    c = (rest % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    stop = tl.load(offsets + grove + 1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    total2 = total
    for first in range(tl.load(offsets + grove), stop, INNER):
        rows = first + tl.arange(0, INNER)
        inside = rows < stop
        x_source, x_there = gathered(x_gather, rows, inside, x_limit, GATHER_X)
        g_source, g_there = gathered(grad_gather, rows, inside, grad_limit, GATHER_GRAD)
        a = tl.load(x + x_source[:, None] * inner + i[None, :], mask=x_there[:, None] & (i < inner)[None, :], other=0.0)
        a = tl.trans(a)
        g_place = g_source[:, None] * columns + c[None, :]
        g_mask = g_there[:, None] & (c < columns)[None, :]
        total = tl.dot(a, tl.load(grad + g_place, mask=g_mask, other=0.0), total, input_precision=PRECISION)
        if TWO:
            total2 = tl.dot(a, tl.load(grad2 + g_place, mask=g_mask, other=0.0), total2, input_precision=PRECISION)
    place = grove.to(tl.int64) * inner * columns + i[:, None] * columns + c[None, :]
    mask = (i < inner)[:, None] & (c < columns)[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)
    if TWO:
        tl.store(out2 + place, total2.to(out2.dtype.element_ty), mask=mask)
