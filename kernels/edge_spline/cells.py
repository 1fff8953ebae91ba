"""Pieces of kernels: where a value lies on the grid, the closed forms of the functions that are active there, and whose rows a tile holds.

Compile-time constants of every kernel: SPLINE (B-splines, or powers of the position), ORDER k, GRID G, COUNT n, OCTETS eights that hold n, LAST the
largest number that the first active function can have where one eight holds all (its selects are then pruned), -1 where it takes several.
"""

import triton
import triton.language as tl


@triton.jit
def row_tiles(offsets, groves, GROVES: tl.constexpr, BLOCK_R: tl.constexpr):
    """[GROVES]: how many tiles of BLOCK_R rows there are up to and including every grove; no tile holds rows of two."""
    grove = tl.arange(0, GROVES)
    begin = tl.load(offsets + grove, mask=grove < groves, other=0)
    end = tl.load(offsets + grove + 1, mask=grove < groves, other=0)
    return tl.cumsum((end - begin + (BLOCK_R - 1)) // BLOCK_R, 0)


@triton.jit
def rows_of(tiles_until, tile, offsets, BLOCK_R: tl.constexpr):
    """Grove (int64) of a row tile, its first row, and the row where its grove ends."""
    passed = tiles_until <= tile
    grove = tl.sum(passed.to(tl.int32), 0)
    first_tile = tl.max(tl.where(passed, tiles_until, 0), 0)
    begin = tl.load(offsets + grove) + (tile - first_tile) * BLOCK_R
    return grove.to(tl.int64), begin, tl.load(offsets + grove + 1)


@triton.jit
def locate(x, low, inverse_step, GRID: tl.constexpr):
    """Cell 0 .. GRID - 1 of x, the position in it clamped to [0, 1], and what of the position lies beyond the grid.

    A NaN is in cell 0, so that it indexes nowhere else, and beyond the grid by NaN, so that it is not lost.
    """
    scaled = (x - low) * inverse_step
    cell = tl.where(scaled > 0.0, tl.minimum(tl.floor(scaled), GRID - 1.0), 0.0)
    position = scaled - cell
    inside = tl.where(position > 0.0, tl.minimum(position, 1.0), 0.0)
    return cell.to(tl.int32), inside, position - inside


@triton.jit
def active_values(v, SPLINE: tl.constexpr, ORDER: tl.constexpr):
    """The ORDER + 1 functions that are not zero on a cell, at position v in it; always four results, the last ones unused for lower orders.

    B-splines: their uniform pieces (de Boor 1978).
    """
    one = v * 0.0 + 1.0
    rest = 1.0 - v
    if not SPLINE:
        return one, v, v * v, v * v * v
    elif ORDER == 1:
        return rest, v, v, v
    elif ORDER == 2:
        return 0.5 * rest * rest, 0.5 + v * rest, 0.5 * v * v, v
    else:
        near = 0.6666666666666666 + v * v * (0.5 * v - 1.0)
        far = 0.16666666666666666 + v * (0.5 + v * (0.5 - 0.5 * v))
        return rest * rest * rest * 0.16666666666666666, near, far, v * v * v * 0.16666666666666666


@triton.jit
def active_slopes(v, SPLINE: tl.constexpr, ORDER: tl.constexpr):
    """Derivatives of `active_values` in v."""
    one = v * 0.0 + 1.0
    rest = 1.0 - v
    if not SPLINE:
        return v * 0.0, one, 2.0 * v, 3.0 * v * v
    elif ORDER == 1:
        return -one, one, one, one
    elif ORDER == 2:
        return -rest, 1.0 - 2.0 * v, v, v
    else:
        return -0.5 * rest * rest, v * (1.5 * v - 2.0), 0.5 + v * (1.0 - 1.5 * v), 0.5 * v * v


@triton.jit
def active_weights(inside, beyond, SPLINE: tl.constexpr, ORDER: tl.constexpr):
    """Values of the active functions, outside the grid carried on by the slope at its end."""
    a0, a1, a2, a3 = active_values(inside, SPLINE, ORDER)
    s0, s1, s2, s3 = active_slopes(inside, SPLINE, ORDER)
    return a0 + s0 * beyond, a1 + s1 * beyond, a2 + s2 * beyond, a3 + s3 * beyond


@triton.jit
def _place(out, first, weight, base, J: tl.constexpr, S: tl.constexpr, SPLINE: tl.constexpr, ORDER: tl.constexpr, LAST: tl.constexpr):
    """`out`, or the weight of active function J where that is the one in slot S of the eight that begins with function `base`."""
    if J <= ORDER:
        if LAST < 0:
            out = tl.where(first == base + (S - J), weight, out)
        # The first active function of a cell of independent polynomials is a multiple of their length.
        elif (S >= J and S - J <= LAST) and (SPLINE or (S - J) % (ORDER + 1) == 0):
            out = tl.where(first == S - J, weight, out)
    return out


@triton.jit
def slot(first, w0, w1, w2, w3, base, S: tl.constexpr, SPLINE: tl.constexpr, ORDER: tl.constexpr, LAST: tl.constexpr):
    """Value of function `base + S`, of which w0 .. w3 are those active at x, the first of them number `first`.

    Selects, shared by all eight slots: about six operations a basis function, less than half of evaluating each from its own closed form.
    """
    out = tl.zeros_like(w0)
    out = _place(out, first, w0, base, 0, S, SPLINE, ORDER, LAST)
    out = _place(out, first, w1, base, 1, S, SPLINE, ORDER, LAST)
    out = _place(out, first, w2, base, 2, S, SPLINE, ORDER, LAST)
    return _place(out, first, w3, base, 3, S, SPLINE, ORDER, LAST)


@triton.jit
def basis_tile(x, low, inverse_step, base, SPLINE: tl.constexpr, ORDER: tl.constexpr, GRID: tl.constexpr, LAST: tl.constexpr):
    """x fp32 [R, I] -> fp32 [R, 8 I]: column 8 i + s is function `base + s` of input i. Never leaves registers but for the operand of a product."""
    cell, inside, beyond = locate(x, low, inverse_step, GRID)
    w0, w1, w2, w3 = active_weights(inside, beyond, SPLINE, ORDER)
    first = cell if SPLINE else cell * (ORDER + 1)
    # A join puts two values of one thread side by side: the last one made is the lowest bit of the column.
    even = tl.join(
        tl.join(slot(first, w0, w1, w2, w3, base, 0, SPLINE, ORDER, LAST), slot(first, w0, w1, w2, w3, base, 4, SPLINE, ORDER, LAST)),
        tl.join(slot(first, w0, w1, w2, w3, base, 2, SPLINE, ORDER, LAST), slot(first, w0, w1, w2, w3, base, 6, SPLINE, ORDER, LAST)),
    )
    odd = tl.join(
        tl.join(slot(first, w0, w1, w2, w3, base, 1, SPLINE, ORDER, LAST), slot(first, w0, w1, w2, w3, base, 5, SPLINE, ORDER, LAST)),
        tl.join(slot(first, w0, w1, w2, w3, base, 3, SPLINE, ORDER, LAST), slot(first, w0, w1, w2, w3, base, 7, SPLINE, ORDER, LAST)),
    )
    return tl.reshape(tl.join(even, odd), (x.shape[0], x.shape[1] * 8))


@triton.jit
def slope_sum(products, x, low, inverse_step, base, SPLINE: tl.constexpr, ORDER: tl.constexpr, GRID: tl.constexpr, LAST: tl.constexpr):
    """products fp32 [R, 8 I], laid out as `basis_tile` -> [R, I]: sum over the eight functions of product times derivative, a cell being of length 1."""
    first, inside, _ = locate(x, low, inverse_step, GRID)
    w0, w1, w2, w3 = active_slopes(inside, SPLINE, ORDER)
    first = first if SPLINE else first * (ORDER + 1)
    even, odd = tl.split(tl.reshape(products, (x.shape[0], x.shape[1], 2, 2, 2)))
    p04, p26 = tl.split(even)
    p15, p37 = tl.split(odd)
    p0, p4 = tl.split(p04)
    p2, p6 = tl.split(p26)
    p1, p5 = tl.split(p15)
    p3, p7 = tl.split(p37)
    out = p0 * slot(first, w0, w1, w2, w3, base, 0, SPLINE, ORDER, LAST)
    out += p1 * slot(first, w0, w1, w2, w3, base, 1, SPLINE, ORDER, LAST)
    out += p2 * slot(first, w0, w1, w2, w3, base, 2, SPLINE, ORDER, LAST)
    out += p3 * slot(first, w0, w1, w2, w3, base, 3, SPLINE, ORDER, LAST)
    out += p4 * slot(first, w0, w1, w2, w3, base, 4, SPLINE, ORDER, LAST)
    out += p5 * slot(first, w0, w1, w2, w3, base, 5, SPLINE, ORDER, LAST)
    out += p6 * slot(first, w0, w1, w2, w3, base, 6, SPLINE, ORDER, LAST)
    return out + p7 * slot(first, w0, w1, w2, w3, base, 7, SPLINE, ORDER, LAST)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def silu_slope(x):
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))
