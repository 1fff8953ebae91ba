"""The Triton kernel of the chunkwise scan (docs/kernels/ada_scan.md).  B batch, T time, H heads, D head width, C tokens of a chunk, S segments.

One program walks the chunks of one segment of one head with a state [D, BC] in registers: BC of the D columns of the values. It computes the sum of
reference.py, which is o, dq, dk or dv by its operands: contiguous [B, T, H, D] of one type. States [B, S, H, D, D] and all that is summed are fp32.
"""

import triton
import triton.language as tl

from kan_train.kernels.ada_scan.triton_parts import chunk_decay, place, read_state, rows, silu, silu_slope, write_state


@triton.jit
def scan(
    READ0, KEY0, VALUE0, OUT0, READ1, KEY1, VALUE1, OUT1, OTHER, ROWS, LOG_DECAY, SUMS, STARTS, ENDS, STATES, LAST,
    T, H, segments, segment_chunks, scale, state_scale, last_scale,
    D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr, TWO: tl.constexpr, REVERSE: tl.constexpr,
    TRANSPOSED: tl.constexpr, DECAY: tl.constexpr, HAS_RESETS: tl.constexpr, HAS_STATE: tl.constexpr, WRITE_LAST: tl.constexpr, SILU: tl.constexpr,
    WRITE_ROWS: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT = scale * sum(READ, KEY, VALUE; state_scale * STATES), in reverse from the last chunk on. TWO sums share a launch and, through L2, their
    operands: the second is dk where the first is dv, and begins with the transposed state.

    SILU: READ of o is silu(q) (1); OTHER of dq is q, dq is for q, and silu(q) is left in OUT1 for the launches behind (2). WRITE_ROWS stores the row
    products of OUT and OTHER [B, T, H, D] (q for dq, k for dk), all of them and their part through the states: ROWS [B, T, H, TILES, 2] fp32.
    """
    part, batch, head, segment, first = place(segment_chunks, segments, H, T, TILES * (2 if TWO else 1), C)
    tile = part % TILES
    second = part // TILES
    token = batch * T + first
    row = token * H + head
    at = (batch * segments + segment) * H + head
    READ, KEY, VALUE, OUT = READ0, KEY0, VALUE0, OUT0
    if TWO:  # noqa: SIM102  (one is known when compiling, the other when running)
        if second == 1:
            READ, KEY, VALUE, OUT = READ1, KEY1, VALUE1, OUT1
    state = tl.zeros((BD, BC), tl.float32)
    if HAS_STATE:
        if TWO:
            if second == 1:
                state = read_state(STATES + at * D * D, tile, D, BD, BC, True) * state_scale
            else:
                state = read_state(STATES + at * D * D, tile, D, BD, BC, False) * state_scale
        else:
            state = read_state(STATES + at * D * D, tile, D, BD, BC, TRANSPOSED) * state_scale
    READ += row * D
    KEY += row * D
    VALUE += row * D
    OUT += row * D
    if WRITE_ROWS or SILU == 2:
        OTHER += row * D
    if WRITE_ROWS:
        ROWS += (row * TILES + tile) * 2
    channels = tl.arange(0, BD)
    columns = tile * BC + tl.arange(0, BC)
    t = tl.arange(0, C)
    chunks = tl.minimum(segment_chunks, tl.cdiv(T - first, C))
    rate = tl.full((), 0.0, tl.float32)
    if DECAY == 1:
        rate = tl.load(LOG_DECAY + head).to(tl.float32)
    for n in range(0, chunks):
        start = n * C
        if REVERSE:
            start = (chunks - 1 - n) * C
        left = T - first - start
        read = rows(READ + start * H * D, t, channels, left, H, D, D == BD, FULL)
        key = rows(KEY + start * H * D, t, channels, left, H, D, D == BD, FULL)
        value = rows(VALUE + start * H * D, t, columns, left, H, D, D % BC == 0, FULL)
        if SILU == 1:
            read = silu(read)
        sums, document_start, document_end, into, out, through = chunk_decay(
            SUMS, STARTS, ENDS, rate, row + start * H, token + start, left, H, C, DECAY, HAS_RESETS, FULL
        )
        products = tl.dot(read, tl.trans(key), tl.zeros((C, C), tl.float32), input_precision=PRECISION)
        if REVERSE:  # the token that reads is the earlier one
            into, out = out, into
            visible = t[:, None] <= t[None, :]
            if HAS_RESETS:
                visible = visible & (t[None, :] < document_end[:, None])
            delta = sums[None, :] - sums[:, None]
        else:
            visible = t[:, None] >= t[None, :]
            if HAS_RESETS:
                visible = visible & (t[None, :] >= document_start[:, None])
            delta = sums[:, None] - sums[None, :]
        products = tl.where(visible, products, 0.0) if DECAY == 0 else products * tl.exp(tl.where(visible, delta, float("-inf")))
        o = tl.dot(read, state.to(read.dtype), tl.zeros((C, BC), tl.float32), input_precision=PRECISION) * into[:, None]
        at_columns = start * H * D + (t * H)[:, None] * D + columns[None, :]
        if WRITE_ROWS or SILU == 2:
            # In the two-sum launch dk alone has row products: the loads and stores of dv's programs are masked off.
            rows_left = left
            if TWO:
                rows_left = left * second
            other = rows(OTHER + start * H * D, t, columns, rows_left, H, D, D % BC == 0, FULL and not TWO)
            if SILU == 2:
                slope = silu_slope(other.to(tl.float32))
                other = silu(other)
                tl.store(OUT1 + row * D + at_columns, other, mask=(t[:, None] < left) & (columns[None, :] < D))
        if WRITE_ROWS:
            tl.store(ROWS + (start * H + t * H) * TILES * 2 + 1, scale * tl.sum(other * o, 1), mask=t < rows_left)
        o = tl.dot(products.to(value.dtype), value, o, input_precision=PRECISION) * scale
        if WRITE_ROWS:
            tl.store(ROWS + (start * H + t * H) * TILES * 2, tl.sum(other * o, 1), mask=t < rows_left)
        if SILU == 2:
            o = o * slope
        tl.store(OUT + at_columns, o.to(OUT.dtype.element_ty), mask=(t[:, None] < left) & (columns[None, :] < D))
        state = tl.dot(tl.trans(key), (value * out[:, None]).to(value.dtype), state * through, input_precision=PRECISION)
    if WRITE_LAST:  # noqa: SIM102
        if second == 0:
            write_state(LAST + at * D * D, state * last_scale, tile, D, BD, BC)
