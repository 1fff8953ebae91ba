"""The linear recurrence of ADA:  S_t = a_t S_{t-1} + k_t v_t^T,  o_t = scale * q_t^T S_t   (docs/model.md, section 3).

B batch, T time, H heads, d head width, C tokens of a chunk, N chunks.  A token that starts a document has a_t = 0.
"""

import torch
from torch import Tensor


def chunkwise_scan(
    q_BTHd: Tensor,
    k_BTHd: Tensor,
    v_BTHd: Tensor,
    log_decay: Tensor | None,
    resets_BT: Tensor | None = None,
    state_BHdd: Tensor | None = None,
    *,
    chunk: int,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """All outputs o [B, T, H, d] (dtype of q) and the last state [B, H, d, d] (fp32, or fp64 for fp64 inputs).

    log_decay is log a: None (no decay), [H], or [B, T, H]; resets_BT is bool; state_BHdd is the state before the first token (zero if None).
    Within a chunk the recurrence is a masked product, between chunks the state is carried.
    """
    batch, time, heads, width = q_BTHd.shape
    wide = torch.promote_types(q_BTHd.dtype, torch.float32)
    if state_BHdd is None:
        state_BHdd = torch.zeros(batch, heads, width, width, device=q_BTHd.device, dtype=wide)
    if log_decay is None:
        log_decay = torch.zeros(heads, device=q_BTHd.device, dtype=wide)
    outputs = []
    whole = time - time % chunk
    for start, stop, size in ((0, whole, chunk), (whole, time, time - whole)):
        if start < stop:
            part = slice(start, stop)
            inputs = (x[:, part].unflatten(1, (-1, size)).transpose(2, 3).to(wide) for x in (q_BTHd, k_BTHd, v_BTHd))
            decay = log_decay if log_decay.dim() == 1 else log_decay[:, part]
            resets = None if resets_BT is None else resets_BT[:, part]
            o_BNHCd, state_BHdd = _whole_chunks(*inputs, decay.to(wide), resets, state_BHdd, size, scale)
            outputs.append(o_BNHCd.transpose(2, 3).flatten(1, 2))
    o_BTHd = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return o_BTHd.to(q_BTHd.dtype), state_BHdd


def recurrent_step(
    q_BHd: Tensor, k_BHd: Tensor, v_BHd: Tensor, log_decay: Tensor | None, state_BHdd: Tensor, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One token: o [B, H, d] in the dtype of q, and the new state; log_decay is None, [H] or [B, H]."""
    wide = state_BHdd.dtype
    decayed = state_BHdd if log_decay is None else state_BHdd * log_decay.to(wide).exp()[..., None, None]
    state = torch.addcmul(decayed, k_BHd.to(wide)[..., :, None], v_BHd.to(wide)[..., None, :])
    o_BHd = (q_BHd.to(wide)[..., None, :] @ state)[..., 0, :] * scale
    return o_BHd.to(q_BHd.dtype), state


def _whole_chunks(q, k, v, log_decay, resets_BT, state_BHdd, size, scale):
    batch, chunks = q.shape[:2]
    if log_decay.dim() == 1:
        cum = log_decay[:, None] * torch.arange(1, size + 1, device=q.device, dtype=q.dtype)  # [H, C]
        cum = cum[None, None]
    else:
        cum = log_decay.unflatten(1, (chunks, size)).cumsum(dim=2).transpose(2, 3)  # [B, N, H, C]
    hidden = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    into, out, through = cum.exp(), (cum[..., -1:] - cum).exp(), cum[..., -1].exp()
    if resets_BT is not None:
        document = resets_BT.unflatten(1, (chunks, size)).cumsum(dim=2)[:, :, None]  # [B, N, 1, C]
        hidden = hidden | (document[..., :, None] != document[..., None, :])
        into = into * (document == 0)
        out = out * (document == document[..., -1:])
        through = through * (document[..., -1] == 0)
    within = (cum[..., :, None] - cum[..., None, :]).masked_fill(hidden, -torch.inf).exp() * scale
    o = (q @ k.transpose(-1, -2) * within) @ v
    update = (k * out[..., None]).transpose(-1, -2) @ v
    through = through.expand(batch, chunks, -1)[..., None, None]
    states = []
    for n in range(chunks):
        states.append(state_BHdd)
        state_BHdd = through[:, n] * state_BHdd + update[:, n]
    o = o + (q * (into * scale)[..., None]) @ torch.stack(states, dim=1)
    return o, state_BHdd
