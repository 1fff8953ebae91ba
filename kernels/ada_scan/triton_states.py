"""Triton kernels beside the scan itself: sums within chunks, states at the borders of segments, dL/d log a (docs/kernels/ada_scan.md).

B batch, T time, H heads, D head width, C tokens of a chunk, S segments.  Operands are contiguous [B, T, H, D]; states [B, S, H, D, D] and sums are fp32.
"""

import triton
import triton.language as tl

from kan_train.kernels.ada_scan.triton_parts import chunk_decay, place, rows, write_state


@triton.jit
def chunk_sums(LOG_DECAY, SUMS, T, H, C: tl.constexpr):
    """Sums of log a [B, T, H] over the tokens of each chunk up to and with each: one chunk of one head a program."""
    pid = tl.program_id(0)
    head = pid % H
    pid = pid // H
    chunks = tl.cdiv(T, C)
    t = (pid % chunks) * C + tl.arange(0, C)
    at = ((pid // chunks).to(tl.int64) * T + t) * H + head
    tl.store(SUMS + at, tl.cumsum(tl.load(LOG_DECAY + at, mask=t < T, other=0.0).to(tl.float32), 0), mask=t < T)


@triton.jit
def chunk_documents(RESETS, STARTS, ENDS, T, C: tl.constexpr):
    """Within one chunk of RESETS [B, T]: the latest document's first token up to each token, -1 if none; the next one's behind it, C if none."""
    pid = tl.program_id(0)
    chunks = tl.cdiv(T, C)
    i = tl.arange(0, C)
    t = (pid % chunks) * C + i
    token = (pid // chunks).to(tl.int64) * T
    starts_here = (tl.load(RESETS + token + t, mask=t < T, other=0) != 0)[None, :]
    start = tl.max(tl.where(starts_here & (i[None, :] <= i[:, None]), i[None, :], -1), 1)
    end = tl.min(tl.where(starts_here & (i[None, :] > i[:, None]), i[None, :], C), 1)
    tl.store(STARTS + token + t, start, mask=t < T)
    tl.store(ENDS + token + t, end, mask=t < T)


@triton.jit
def segment_states(
    KEY, VALUE, LOG_DECAY, SUMS, STARTS, ENDS, STATES, KEPT, T, H, segments, segment_chunks,
    D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr, REVERSE: tl.constexpr, DECAY: tl.constexpr,
    HAS_RESETS: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a segment makes of a state: kept * state + added; added into STATES [B, S, H, D, D], kept into KEPT [B, S, H]."""
    tile, batch, head, segment, first = place(segment_chunks, segments, H, T, TILES, C)
    token = batch * T + first
    row = token * H + head
    KEY += row * D
    VALUE += row * D
    channels = tl.arange(0, BD)
    columns = tile * BC + tl.arange(0, BC)
    t = tl.arange(0, C)
    chunks = tl.minimum(segment_chunks, tl.cdiv(T - first, C))
    rate = tl.full((), 0.0, tl.float32)
    if DECAY == 1:
        rate = tl.load(LOG_DECAY + head).to(tl.float32)
    state = tl.zeros((BD, BC), tl.float32)
    kept = 1.0
    for n in range(0, chunks):
        start = n * C
        if REVERSE:
            start = (chunks - 1 - n) * C
        left = T - first - start
        key = rows(KEY + start * H * D, t, channels, left, H, D, D == BD, FULL)
        value = rows(VALUE + start * H * D, t, columns, left, H, D, D % BC == 0, FULL)
        _, _, _, into, out, through = chunk_decay(SUMS, STARTS, ENDS, rate, row + start * H, token + start, left, H, C, DECAY, HAS_RESETS, FULL)
        if REVERSE:
            out = into
        state = tl.dot(tl.trans(key), (value * out[:, None]).to(value.dtype), state * through, input_precision=PRECISION)
        kept = kept * through
    at = (batch * segments + segment) * H + head
    write_state(STATES + at * D * D, state, tile, D, BD, BC)
    if tile == 0:
        tl.store(KEPT + at, kept)


@triton.jit
def carry(
    STATES, KEPT, FIRST, LAST, H, segments, first_scale, last_scale, SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_FIRST: tl.constexpr, REVERSE: tl.constexpr
):
    """In place, what segments add becomes the states that enter them, from first_scale * FIRST (or zero) on; LAST is last_scale times the one behind."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(SIZE, BLOCK)
    at = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    pid = pid // blocks
    head = pid % H
    batch = (pid // H).to(tl.int64)
    mask = at < SIZE
    state = tl.zeros((BLOCK,), tl.float32)
    if HAS_FIRST:
        state = first_scale * tl.load(FIRST + (batch * H + head) * SIZE + at, mask=mask, other=0.0)
    for n in range(0, segments):
        segment = n
        if REVERSE:
            segment = segments - 1 - n
        index = (batch * segments + segment) * H + head
        added = tl.load(STATES + index * SIZE + at, mask=mask, other=0.0)
        kept = tl.load(KEPT + index)
        tl.store(STATES + index * SIZE + at, state, mask=mask)
        state = kept * state + added
    tl.store(LAST + (batch * H + head) * SIZE + at, last_scale * state, mask=mask)


@triton.jit
def decay_gradient(
    Q_ROWS, K_ROWS, STATES, LAST, GRADS, OUT, T, H, segments, segment_chunks, grad_scale,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr, HAS_GRADS: tl.constexpr,
):  # fmt: skip
    """dL/d log a, OUT [B, T, H] fp32: reference.decay_gradient over one segment, from <S, dL/dS> behind it.

    STATES [B, S, H, D, D] enter the segments, LAST [B, H, D, D] leaves them all; GRADS, times grad_scale, is dL/dS behind each segment.
    """
    _, batch, head, segment, first = place(segment_chunks, segments, H, T, 1, C)
    row = (batch * T + first) * H + head
    index = batch * segments + segment
    carried = 0.0
    if HAS_GRADS:
        STATE = STATES + ((index + 1) * H + head) * D * D
        if segment == segments - 1:
            STATE = LAST + (batch * H + head) * D * D
        columns = tl.arange(0, BD)
        total = tl.zeros((BR, BD), tl.float32)
        for start in range(0, D, BR):
            rows = start + tl.arange(0, BR)
            at = rows[:, None] * D + columns[None, :]
            mask = (rows[:, None] < D) & (columns[None, :] < D)
            grad = tl.load(GRADS + (index * H + head) * D * D + at, mask=mask, other=0.0)
            total += tl.load(STATE + at, mask=mask, other=0.0) * grad
        carried = grad_scale * tl.sum(tl.sum(total, 1), 0)
    t = tl.arange(0, C)
    chunks = tl.minimum(segment_chunks, tl.cdiv(T - first, C))
    for n in range(0, chunks):
        start = (chunks - 1 - n) * C
        mask = first + start + t < T
        at = row + (start + t) * H
        grad = tl.zeros((C,), tl.float32)
        through = tl.zeros((C,), tl.float32)
        for tile in tl.static_range(TILES):
            q_rows = Q_ROWS + (at * TILES + tile) * 2
            k_rows = K_ROWS + (at * TILES + tile) * 2
            grad += tl.load(q_rows, mask=mask, other=0.0) - tl.load(k_rows, mask=mask, other=0.0)
            through += tl.load(q_rows + 1, mask=mask, other=0.0) - tl.load(k_rows + 1, mask=mask, other=0.0)
        tl.store(OUT + at, tl.sum(grad, 0) - tl.cumsum(grad, 0) + grad + carried, mask=mask)
        carried += tl.sum(through, 0)
