"""The room in plain torch: what runs where there is no Triton, in any dtype, with the gradients written out (docs/kernels/ada_scan.md).

B batch, T time, H heads, d head width, C tokens of a chunk, w taps.  With S_t = a_t S_{t-1} + k_t v_t^T, a_t = 0 at the first token of a document,
and c_i the sum of log a over the tokens of a chunk up to and with i,

    o_i = scale * ( sum_{j<=i} exp(c_i - c_j) (q_i . k_j) v_j  +  exp(c_i) S^T q_i ),      S' = exp(c_C) S + sum_j exp(c_C - c_j) k_j v_j^T

All four of o, dq, dk and dv are this one sum with other operands: with G = dL/do and R = dL/dS, which runs from the last chunk to the first,

    o = sum(q, k, v; S)    dq = sum(G, v, k; S^T)    dv = sum_reverse(k, q, G; R)    dk = sum_reverse(v, G, q; R^T)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

UNIT_EPS = 1e-6
"""Added to the sum of squares under the root of phi(k)."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def scan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, resets: Tensor | None, state: Tensor | None, chunk: int, scale: float, silu_q: bool
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, d] in the dtype of q, and the last state [B, H, d, d], wide."""
    wide = wide_dtype(q.dtype)
    o, _, last = _chunks(_features(q, silu_q), k, v, _per_token(log_decay, q), resets, _or_zero(state, q), chunk, reverse=False)
    return (o * scale).to(q.dtype), _own(last, wide)


def scan_backward(
    grad_o: Tensor,
    grad_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    resets: Tensor | None,
    state: Tensor | None,
    last: Tensor,
    chunk: int,
    scale: float,
    silu_q: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay (empty if None) and of the state before the first token; `last` is what `scan` returned."""
    wide, decay = wide_dtype(q.dtype), _per_token(log_decay, q)
    grad = grad_o.to(wide) * scale
    features, grad_state = _features(q, silu_q), _or_zero(grad_last, q)
    arguments = (decay, resets)
    grad_q, through_q, _ = _chunks(grad, v, k, *arguments, _or_zero(state, q).mT, chunk, reverse=False)
    grad_v, _, first = _chunks(k, features, grad, *arguments, grad_state, chunk, reverse=True)
    grad_k, through_k, _ = _chunks(v, grad, features, *arguments, grad_state.mT, chunk, reverse=True)
    grad_decay = q.new_empty(0, dtype=wide)
    if log_decay is not None:
        q_dq, q_dq_through, k_dk, k_dk_through = ((x * g).sum(dim=-1) for x, g in ((features, grad_q), (features, through_q), (k, grad_k), (k, through_k)))
        grad_decay = decay_gradient(q_dq, q_dq_through, k_dk, k_dk_through, (last * grad_state).sum(dim=(-2, -1)), chunk)
        grad_decay = (grad_decay.sum(dim=(0, 1)) if log_decay.dim() == 1 else grad_decay).to(log_decay.dtype)
    if silu_q:
        grad_q = grad_q * _silu_slope(q.to(wide))
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_decay, _own(first, wide)


def decay_gradient(q_dq: Tensor, q_dq_through: Tensor, k_dk: Tensor, k_dk_through: Tensor, carried: Tensor, chunk: int) -> Tensor:
    """dL/d log a [B, T, H] from row products [B, T, H] of q . dL/dq and k . dL/dk, and `carried` = <S, dL/dS> after the last token [B, H].

    c_i enters as q_i exp(c_i) and k_i exp(-c_i) alone, so dL/dc_i = q_i . dL/dq_i - k_i . dL/dk_i, and log a_t is part of every c_i of its chunk
    with i >= t and, through the state that leaves the chunk, of all later ones together: <S, dL/dS> there. At a boundary between chunks that
    scalar follows from the one behind it by the parts of the row products that go through the states, and by no other: the parts within a
    chunk cancel exactly in their sum, but would leave their rounding.
    """
    grad = torch.empty_like(q_dq)
    for start in reversed(range(0, q_dq.shape[1], chunk)):
        part = slice(start, start + chunk)
        within = (q_dq[:, part] - k_dk[:, part]).flip(1).cumsum(dim=1).flip(1)
        grad[:, part] = within + carried[:, None]
        carried = carried + (q_dq_through[:, part] - k_dk_through[:, part]).sum(dim=1)
    return grad


def last_state(k: Tensor, v: Tensor, log_decay: Tensor | None, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the tokens make of a state S, kept * S + added: added [B, H, d, d] and kept [B, H, 1, 1], wide."""
    left, kept = _left_at_the_end(_per_token(log_decay, k), resets)
    return torch.einsum("bthd,bthe->bhde", k.to(left.dtype), v * left[..., None]).contiguous(), kept[..., None, None]


def last_state_backward(
    grad_added: Tensor, grad_kept: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of k, v and log_decay (empty if None). With u_t the sum of log a after t, dL/du_t = k_t . dL/dk_t, all of one sign: no cancellation."""
    left, kept = _left_at_the_end(_per_token(log_decay, k), resets)
    wide = left.dtype
    grad_k = torch.einsum("bthe,bhde->bthd", v * left[..., None], grad_added.to(wide))
    grad_v = torch.einsum("bthd,bhde->bthe", k.to(wide), grad_added.to(wide)) * left[..., None]
    grad_decay = k.new_empty(0, dtype=wide)
    if log_decay is not None:
        before = F.pad((k * grad_k).sum(dim=-1), (0, 0, 1, 0))[:, :-1].cumsum(dim=1)
        grad_decay = before + (kept * grad_kept[..., 0, 0])[:, None]
        grad_decay = (grad_decay.sum(dim=(0, 1)) if log_decay.dim() == 1 else grad_decay).to(log_decay.dtype)
    return _own(grad_k, k.dtype), _own(grad_v, v.dtype), grad_decay


def step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float, silu_q: bool) -> tuple[Tensor, Tensor]:
    """One token: o [B, H, d] in the dtype of q, and the new state."""
    wide = state.dtype
    if log_decay is not None:
        state = state * log_decay.to(wide).exp()[..., None, None]
    state = state + k.to(wide)[..., :, None] * v.to(wide)[..., None, :]
    return ((_features(q, silu_q).to(wide)[..., None, :] @ state)[..., 0, :] * scale).to(q.dtype), state


def diffused_keys(keys: Tensor, kernel: Tensor, resets: Tensor | None, before: Tensor | None, feature: bool) -> Tensor:
    """phi(k'), k'_t = sum_{j<w} kernel[..., j] K_{t-j}, phi(x) = silu(x) / sqrt(|silu(x)|^2 + 1e-6); k' itself without `feature`."""
    y = _convolved(_taps_inputs(keys, kernel.shape[-1], resets, before), kernel)
    if feature:
        y = F.silu(y)
        y = y * (y.square().sum(dim=-1, keepdim=True) + UNIT_EPS).rsqrt()
    return y.to(keys.dtype)


def diffused_keys_backward(
    grad_phi: Tensor, keys: Tensor, kernel: Tensor, resets: Tensor | None, before: Tensor | None, feature: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of keys, kernel and before (empty if None)."""
    taps, time = kernel.shape[-1], keys.shape[1]
    inputs = _taps_inputs(keys, taps, resets, before)
    grad = grad_phi.to(inputs[0].dtype)
    if feature:
        y = _convolved(inputs, kernel)
        silu = F.silu(y)
        inverse = (silu.square().sum(dim=-1, keepdim=True) + UNIT_EPS).rsqrt()
        phi = silu * inverse
        grad = inverse * (grad - phi * (grad * phi).sum(dim=-1, keepdim=True)) * _silu_slope(y)
    reach = _taps_inputs(torch.ones_like(keys[..., :1]), taps, resets, None if before is None else torch.ones_like(before[..., :1]))
    grad_all = F.pad(torch.zeros_like(grad), (0, 0, 0, 0, taps - 1, 0))
    for lag in range(taps):
        grad_all[:, taps - 1 - lag : taps - 1 - lag + time] += grad * reach[lag] * kernel[..., lag]
    grad_kernel = torch.stack([(grad * x).sum(dim=(0, 1)) for x in inputs], dim=-1)
    grad_before = keys.new_empty(0) if before is None else _own(grad_all[:, : taps - 1], before.dtype)
    return _own(grad_all[:, taps - 1 :], keys.dtype), grad_kernel.to(kernel.dtype), grad_before


def gated_norm(o: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float) -> Tensor:
    """o / sqrt(mean(o^2) + eps) * weight * silu(gate), the mean over a head's channels."""
    y = o.to(wide_dtype(o.dtype))
    y = y * (y.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * weight
    return (y if gate is None else y * F.silu(gate.to(y.dtype))).to(o.dtype)


def gated_norm_backward(grad: Tensor, o: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of o, weight and gate (empty where None). With n = o r: dL/do = r (g - n mean(g n)), g = dL/dn."""
    wide = wide_dtype(o.dtype)
    x, grad = o.to(wide), grad.to(wide)
    inverse = (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    normal = x * inverse
    opened = grad if gate is None else grad * F.silu(gate.to(wide))
    scaled = normal if weight is None else normal * weight
    grad_gate = o.new_empty(0) if gate is None else (grad * scaled * _silu_slope(gate.to(wide))).to(gate.dtype)
    grad_weight = o.new_empty(0) if weight is None else (opened * normal).sum(dim=(0, 1)).to(weight.dtype)
    grad_normal = opened if weight is None else opened * weight
    grad_o = inverse * (grad_normal - normal * (grad_normal * normal).mean(dim=-1, keepdim=True))
    return grad_o.to(o.dtype), grad_weight, grad_gate


def _chunks(
    read: Tensor, key: Tensor, value: Tensor, decay: Tensor, resets: Tensor | None, state: Tensor, chunk: int, *, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the head of this file, without scale: all of it, its part through the states, and the state behind the last chunk read."""
    read, key, value = (x.to(decay.dtype) for x in (read, key, value))
    total, through_states = torch.empty_like(value), torch.empty_like(value)
    starts = range(0, value.shape[1], chunk)
    for start in reversed(starts) if reverse else starts:
        part = slice(start, start + chunk)
        within, into, out, through = _factors(decay[:, part], None if resets is None else resets[:, part])
        if reverse:
            within, into, out = within.mT, out, into
        through_states[:, part] = torch.einsum("bthd,bhde->bthe", read[:, part], state) * into
        products = torch.einsum("bthd,bshd->bhts", read[:, part], key[:, part]) * within
        total[:, part] = through_states[:, part] + torch.einsum("bhts,bshe->bthe", products, value[:, part])
        state = through * state + torch.einsum("bthd,bthe->bhde", key[:, part], value[:, part] * out)
    return total, through_states, state


def _factors(decay: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is left of token j at token i [B, H, C, C]; of the entering state at i and of j at the end [B, C, H, 1]; of the state at the end [B, H, 1, 1]."""
    cum = decay.cumsum(dim=1)
    delta = (cum[:, :, None] - cum[:, None, :]).permute(0, 3, 1, 2)
    future = torch.ones(delta.shape[-2:], dtype=torch.bool, device=delta.device).triu(1)
    within, into, out, through = delta.masked_fill(future, -torch.inf).exp(), cum.exp(), (cum[:, -1:] - cum).exp(), cum[:, -1].exp()
    if resets is not None:
        document = resets.cumsum(dim=1, dtype=torch.int32)
        within = within * (document[:, None, :, None] == document[:, None, None, :])
        into, out = into * (document == 0)[..., None], out * (document == document[:, -1:])[..., None]
        through = through * (document[:, -1:] == 0)
    return within, into[..., None], out[..., None], through[..., None, None]


def _left_at_the_end(decay: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """What is left at the last token of each token [B, T, H], and of the state before the first [B, H]."""
    after = F.pad(decay[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(dim=1).flip(1)
    left, kept = after.exp(), (after[:, 0] + decay[:, 0]).exp()
    if resets is not None:
        document = resets.cumsum(dim=1, dtype=torch.int32)
        left, kept = left * (document == document[:, -1:])[..., None], kept * (document[:, -1:] == 0)
    return left, kept


def _taps_inputs(keys: Tensor, taps: int, resets: Tensor | None, before: Tensor | None) -> list[Tensor]:
    """Per lag what the tap reads, [B, T, H, d], wide; zero where that lies before the start of the token's document."""
    time, wide = keys.shape[1], keys.to(wide_dtype(keys.dtype))
    padded = F.pad(wide, (0, 0, 0, 0, taps - 1, 0)) if before is None else torch.cat((before.to(wide.dtype), wide), dim=1)
    document = None if resets is None else F.pad(resets, (taps - 1, 0)).cumsum(dim=1, dtype=torch.int32)
    inputs = []
    for lag in range(taps):
        part = slice(taps - 1 - lag, taps - 1 - lag + time)
        x = padded[:, part]
        inputs.append(x if document is None else x * (document[:, part] == document[:, taps - 1 :])[..., None, None])
    return inputs


def _convolved(inputs: list[Tensor], kernel: Tensor) -> Tensor:
    return torch.stack([x * kernel[..., lag] for lag, x in enumerate(inputs)]).sum(dim=0)


def _own(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy: an operator's results share no memory with its arguments or with each other."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _features(q: Tensor, silu_q: bool) -> Tensor:
    return F.silu(q) if silu_q else q


def _silu_slope(x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


def _per_token(log_decay: Tensor | None, like: Tensor) -> Tensor:
    """[B, T, H], wide."""
    shape, wide = like.shape[:3], wide_dtype(like.dtype)
    return torch.zeros(shape, dtype=wide, device=like.device) if log_decay is None else log_decay.to(wide).expand(shape)


def _or_zero(state: Tensor | None, like: Tensor) -> Tensor:
    batch, _, heads, width = like.shape
    wide = wide_dtype(like.dtype)
    return torch.zeros(batch, heads, width, width, dtype=wide, device=like.device) if state is None else state.to(wide)
