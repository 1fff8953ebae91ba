"""What the Triton kernels of the room share.  T time, H heads, D head width, BD the power of two that holds D, C tokens of a chunk."""

import triton
import triton.language as tl


@triton.jit
def silu(x):
    wide = x.to(tl.float32)
    return (wide * tl.sigmoid(wide)).to(x.dtype)


@triton.jit
def silu_slope(x):
    sigmoid = tl.sigmoid(x)
    return sigmoid * (1.0 + x * (1.0 - sigmoid))


@triton.jit
def place(segment_chunks, segments, heads, time, PROGRAMS: tl.constexpr, C: tl.constexpr):
    """This program's number within its segment, batch, head, segment, and first token. Neighbours share a segment: they read the same rows from L2."""
    pid = tl.program_id(0)
    part = pid % PROGRAMS
    pid = pid // PROGRAMS
    head = pid % heads
    pid = pid // heads
    segment = pid % segments
    batch = (pid // segments).to(tl.int64)
    return part, batch, head, segment, segment * segment_chunks * C


@triton.jit
def loaded(X, step, left, behind, C: tl.constexpr, FULL: tl.constexpr):
    """A number of each token of a chunk, `behind` for those behind the sequence's end."""
    i = tl.arange(0, C)
    return tl.load(X + i * step) if FULL else tl.load(X + i * step, mask=i < left, other=behind)


@triton.jit
def chunk_decay(SUMS, STARTS, ENDS, rate, row, token, left, H, C: tl.constexpr, DECAY: tl.constexpr, HAS_RESETS: tl.constexpr, FULL: tl.constexpr):
    """Of each token of a chunk: the sum of log a up to it, the start and the end of its document; and what is left of the entering state at each token,
    of each token at the end of the chunk, and of the entering state there.

    `left` tokens of the sequence remain; what is behind its end is as its last token. All is loaded, not summed up here: a small load is repeated in
    every register layout that needs it, while a sum would be converted through shared memory, and the matrix made of it too.
    """
    i = tl.arange(0, C)
    last = tl.minimum(left, C) - 1
    if DECAY == 2:
        whole = tl.load(SUMS + row + last * H)
        sums = loaded(SUMS + row, H, left, whole, C, FULL)
    elif DECAY == 1:
        whole = rate * (last + 1).to(tl.float32)
        sums = rate * (tl.minimum(i, last) + 1).to(tl.float32)
    else:
        whole = 0.0
        sums = tl.zeros((C,), tl.float32)
    into, out, through = tl.exp(sums), tl.exp(whole - sums), tl.exp(whole + 0.0 * rate)
    start, end = i, i
    if HAS_RESETS:
        start = loaded(STARTS + token, 1, left, -1, C, FULL)
        end = loaded(ENDS + token, 1, left, C, C, FULL)
        into = tl.where(start < 0, into, 0.0)
        out = tl.where(end == C, out, 0.0)
        through = tl.where(tl.load(STARTS + token + last) < 0, through, 0.0)
    return sums, start, end, into, out, through


@triton.jit
def rows(X, t, columns, left, H, D: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr):
    """Rows t < left of one head, X at its first; zero behind them, and in the columns beyond D. FULL: none are behind, EVEN: none beyond."""
    at = (t * H)[:, None] * D + columns[None, :]
    if FULL and EVEN:
        x = tl.load(X + at)
    elif EVEN:
        x = tl.load(X + at, mask=t[:, None] < left, other=0.0)
    else:
        x = tl.load(X + at, mask=(t[:, None] < left) & (columns[None, :] < D), other=0.0)
    return x


@triton.jit
def read_state(STATE, tile, D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, TRANSPOSED: tl.constexpr):
    rows = tl.arange(0, BD)
    columns = tile * BC + tl.arange(0, BC)
    if TRANSPOSED:  # read along memory, turned in registers
        state = tl.trans(tl.load(STATE + columns[:, None] * D + rows[None, :], mask=(columns[:, None] < D) & (rows[None, :] < D), other=0.0))
    else:
        state = tl.load(STATE + rows[:, None] * D + columns[None, :], mask=(rows[:, None] < D) & (columns[None, :] < D), other=0.0)
    return state


@triton.jit
def write_state(STATE, state, tile, D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr):
    rows = tl.arange(0, BD)
    columns = tile * BC + tl.arange(0, BC)
    tl.store(STATE + rows[:, None] * D + columns[None, :], state, mask=(rows[:, None] < D) & (columns[None, :] < D))
