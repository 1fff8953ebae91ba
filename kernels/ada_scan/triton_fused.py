"""Triton kernels around the scan (docs/kernels/ada_scan.md): diffused keys, gated norm, one recurrent step.

B batch, T time, H heads, D head width, W taps.  Operands are contiguous [B, T, H, D]; the arithmetic is fp32. Weight gradients leave as partial sums,
one row a program, that the launcher adds up: no atomics, the same bits in every run.
"""

import triton
import triton.language as tl

from kan_train.kernels.ada_scan.triton_parts import silu, silu_slope


@triton.jit
def _reach(RESETS, reach, token, t, T, lag, HAS_RESETS: tl.constexpr):
    """`reach` without the tokens t whose tap of this lag, one further back than the last one, starts to cross a document's first token."""
    if HAS_RESETS:
        newest = t - lag + 1
        started = tl.load(RESETS + token + newest, mask=(newest >= 0) & (newest < T), other=0)
        reach = reach & (started == 0)
    return reach


@triton.jit
def _tapped(KEYS, BEFORE, batch, source, reach, channels, head, T, H, D: tl.constexpr, W: tl.constexpr, HAS_BEFORE: tl.constexpr):
    """Rows `source` of the keys where `reach` holds, from BEFORE [B, W-1, H, D] where they are negative; zero elsewhere."""
    mask = channels[None, :] < D
    x = tl.load(KEYS + ((batch * T + source) * H + head)[:, None] * D + channels[None, :], mask=(reach & (source >= 0))[:, None] & mask, other=0.0).to(
        tl.float32
    )
    if HAS_BEFORE:
        earlier = ((batch * (W - 1) + source + W - 1) * H + head)[:, None] * D + channels[None, :]
        x += tl.load(BEFORE + earlier, mask=(reach & (source < 0))[:, None] & mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _diffused(
    KEYS, TAPS, BEFORE, RESETS, batch, t, channels, head, T, H,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, W: tl.constexpr, HAS_RESETS: tl.constexpr, HAS_BEFORE: tl.constexpr,
):  # fmt: skip
    """k' at tokens t; zero where they lie outside the sequence."""
    reach = (t >= 0) & (t < T)
    y = tl.zeros((BT, BD), tl.float32)
    for lag in tl.static_range(W):
        if lag > 0:
            reach = _reach(RESETS, reach, batch * T, t, T, lag, HAS_RESETS)
        x = _tapped(KEYS, BEFORE, batch, t - lag, reach, channels, head, T, H, D, W, HAS_BEFORE)
        tap = tl.load(TAPS + (head * D + channels) * W + lag, mask=channels < D, other=0.0).to(tl.float32)
        y += x * tap[None, :]
    return y


@triton.jit
def _diffused_keys(
    KEYS, TAPS, BEFORE, RESETS, PHI, T, H, eps,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, W: tl.constexpr, HAS_RESETS: tl.constexpr, HAS_BEFORE: tl.constexpr, FEATURE: tl.constexpr,
):  # fmt: skip
    """PHI = phi(k') for BT tokens of one head."""
    pid = tl.program_id(0)
    head = pid % H
    pid = pid // H
    blocks = tl.cdiv(T, BT)
    batch = (pid // blocks).to(tl.int64)
    t = (pid % blocks) * BT + tl.arange(0, BT)
    channels = tl.arange(0, BD)
    y = _diffused(KEYS, TAPS, BEFORE, RESETS, batch, t, channels, head, T, H, D, BD, BT, W, HAS_RESETS, HAS_BEFORE)
    if FEATURE:
        y = silu(y)
        y = y * tl.rsqrt(tl.sum(y * y, 1) + eps)[:, None]
    at = ((batch * T + t) * H + head)[:, None] * D + channels[None, :]
    tl.store(PHI + at, y.to(PHI.dtype.element_ty), mask=(t < T)[:, None] & (channels < D)[None, :])


@triton.jit
def _diffused_keys_backward(
    GRAD, KEYS, TAPS, BEFORE, RESETS, GRAD_KEYS, GRAD_BEFORE, GRAD_TAPS, T, H, eps, programs, blocks,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, HAS_RESETS: tl.constexpr, HAS_BEFORE: tl.constexpr,
    FEATURE: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys, of those before the first, and partial sums of the taps' in GRAD_TAPS [B, programs, H, W, D] fp32.

    dL/dk' is formed anew for each of the W tokens that read a key: that costs arithmetic and first-level cache, while keeping it would cost a
    pass over memory. Blocks start W-1 tokens early, for the keys before the first.
    """
    pid = tl.program_id(0)
    head = pid % H
    pid = pid // H
    program = pid % programs
    batch = (pid // programs).to(tl.int64)
    channels = tl.arange(0, BD)
    taps = tl.arange(0, BW)
    total = tl.zeros((BW, BD), tl.float32)
    for block in range(program, blocks, programs):
        t = block * BT - (W - 1) + tl.arange(0, BT)
        grad_keys = tl.zeros((BT, BD), tl.float32)
        reach = t < T
        for lag in tl.static_range(W):
            reader = t + lag
            inside = (reader >= 0) & (reader < T)
            if HAS_RESETS and lag > 0:
                started = tl.load(RESETS + batch * T + reader, mask=inside, other=0)
                reach = reach & (started == 0)
            at = ((batch * T + reader) * H + head)[:, None] * D + channels[None, :]
            grad = tl.load(GRAD + at, mask=inside[:, None] & (channels < D)[None, :], other=0.0).to(tl.float32)
            if FEATURE:
                y = _diffused(KEYS, TAPS, BEFORE, RESETS, batch, reader, channels, head, T, H, D, BD, BT, W, HAS_RESETS, HAS_BEFORE)
                s = silu(y)
                inverse = tl.rsqrt(tl.sum(s * s, 1) + eps)[:, None]
                phi = s * inverse
                grad = inverse * (grad - phi * tl.sum(grad * phi, 1)[:, None]) * silu_slope(y)
            tap = tl.load(TAPS + (head * D + channels) * W + lag, mask=channels < D, other=0.0).to(tl.float32)
            grad_keys += tl.where((reach & inside)[:, None], grad * tap[None, :], 0.0)
            if lag == 0:
                seen = inside
                for back in tl.static_range(W):
                    if back > 0:
                        seen = _reach(RESETS, seen, batch * T, t, T, back, HAS_RESETS)
                    x = _tapped(KEYS, BEFORE, batch, t - back, seen, channels, head, T, H, D, W, HAS_BEFORE)
                    total += tl.where((taps == back)[:, None], tl.sum(grad * x, 0)[None, :], 0.0)
        mask = (channels < D)[None, :]
        at = ((batch * T + t) * H + head)[:, None] * D + channels[None, :]
        tl.store(GRAD_KEYS + at, grad_keys.to(GRAD_KEYS.dtype.element_ty), mask=((t >= 0) & (t < T))[:, None] & mask)
        if HAS_BEFORE:
            at = ((batch * (W - 1) + t + W - 1) * H + head)[:, None] * D + channels[None, :]
            tl.store(GRAD_BEFORE + at, grad_keys.to(GRAD_BEFORE.dtype.element_ty), mask=(t < 0)[:, None] & mask)
    at = (((batch * programs + program) * H + head) * W + taps)[:, None] * D + channels[None, :]
    tl.store(GRAD_TAPS + at, total, mask=(taps < W)[:, None] & (channels < D)[None, :])


@triton.jit
def _gated_norm(O, WEIGHT, GATE, OUT, rows, H, eps, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_GATE: tl.constexpr):  # noqa: E741
    """OUT = O / sqrt(mean(O^2) + eps) * WEIGHT * silu(GATE) for BT of the `rows` tokens of one head."""
    pid = tl.program_id(0)
    head = pid % H
    t = (pid // H).to(tl.int64) * BT + tl.arange(0, BT)
    channels = tl.arange(0, BD)
    at = (t * H + head)[:, None] * D + channels[None, :]
    mask = (t < rows)[:, None] & (channels < D)[None, :]
    y = tl.load(O + at, mask=mask, other=0.0).to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, 1) / D + eps)[:, None]
    if HAS_WEIGHT:
        y = y * tl.load(WEIGHT + head * D + channels, mask=channels < D, other=0.0).to(tl.float32)[None, :]
    if HAS_GATE:
        y = y * silu(tl.load(GATE + at, mask=mask, other=0.0).to(tl.float32))
    tl.store(OUT + at, y.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def _gated_norm_backward(
    GRAD, O, WEIGHT, GATE, GRAD_O, GRAD_WEIGHT, GRAD_GATE, rows, H, eps, programs, blocks,  # noqa: E741
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """Gradients of O and GATE, and partial sums of WEIGHT's in GRAD_WEIGHT [programs, H, D] fp32."""
    pid = tl.program_id(0)
    head = pid % H
    program = pid // H
    channels = tl.arange(0, BD)
    total = tl.zeros((BT, BD), tl.float32)
    for block in range(program, blocks, programs):
        t = (block * BT + tl.arange(0, BT)).to(tl.int64)
        at = (t * H + head)[:, None] * D + channels[None, :]
        mask = (t < rows)[:, None] & (channels < D)[None, :]
        x = tl.load(O + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(GRAD + at, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        normal = x * inverse
        scaled = normal
        if HAS_WEIGHT:
            weight = tl.load(WEIGHT + head * D + channels, mask=channels < D, other=0.0).to(tl.float32)[None, :]
            scaled = normal * weight
        if HAS_GATE:
            gate = tl.load(GATE + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(GRAD_GATE + at, (grad * scaled * silu_slope(gate)).to(GRAD_GATE.dtype.element_ty), mask=mask)
            grad = grad * silu(gate)
        if HAS_WEIGHT:
            total += grad * normal
            grad = grad * weight
        grad = inverse * (grad - normal * (tl.sum(grad * normal, 1) / D)[:, None])
        tl.store(GRAD_O + at, grad.to(GRAD_O.dtype.element_ty), mask=mask)
    if HAS_WEIGHT:
        tl.store(GRAD_WEIGHT + (program * H + head) * D + channels, tl.sum(total, 0), mask=channels < D)


@triton.jit
def _step(
    Q, K, V, LOG_DECAY, STATE, NEW, OUT, H, scale,
    D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, TILES: tl.constexpr, DECAY: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """NEW = a STATE + k v^T, OUT = scale NEW^T q, for BC columns of one head's state; NEW may be STATE."""
    pid = tl.program_id(0)
    tile = pid % TILES
    row = (pid // TILES).to(tl.int64)
    rows = tl.arange(0, BD)
    columns = tile * BC + tl.arange(0, BC)
    at = row * D * D + rows[:, None] * D + columns[None, :]
    mask = (rows[:, None] < D) & (columns[None, :] < D)
    state = tl.load(STATE + at, mask=mask, other=0.0)
    q = tl.load(Q + row * D + rows, mask=rows < D, other=0.0)
    if SILU:
        q = silu(q)
    k = tl.load(K + row * D + rows, mask=rows < D, other=0.0).to(tl.float32)
    v = tl.load(V + row * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    if DECAY == 1:
        state = state * tl.exp(tl.load(LOG_DECAY + row % H).to(tl.float32))
    if DECAY == 2:
        state = state * tl.exp(tl.load(LOG_DECAY + row).to(tl.float32))
    state += k[:, None] * v[None, :]
    tl.store(NEW + at, state, mask=mask)
    tl.store(OUT + row * D + columns, (scale * tl.sum(q.to(tl.float32)[:, None] * state, 0)).to(OUT.dtype.element_ty), mask=columns < D)
