"""ADA's linear recurrence, chunk by chunk.  B batch, T time, H heads, d key width, e value width, n chunks of C tokens.

    S_t = a_t S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

Within a chunk a masked product, between chunks the state (docs/model.md, section 3). The decay between two tokens is exp(cum_i - cum_j) with cum
the running sum of log a, masked before the exponential: the other triangle would overflow. State and decay are fp32, or fp64 for fp64 inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_train.model.norm import at_least_fp32


def ada_scan(
    q_BTHd: Tensor,
    k_BTHd: Tensor,
    v_BTHe: Tensor,
    log_decay: Tensor | None = None,
    resets_BT: Tensor | None = None,
    state_BHde: Tensor | None = None,
    *,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, e] in the dtype of v, and the state after the last token [B, H, d, e].

    log_decay is log a: None (no decay), [H], or [B, T, H]. resets_BT (bool) clears the state before its token. state_BHde is the state before the
    first token, zero where it is not given.
    """
    time = q_BTHd.shape[1]
    chunk = min(chunk, time)
    q, k, v = (_chunks(at_least_fp32(x), chunk) for x in (q_BTHd, k_BTHd, v_BTHe))
    cum = _cumulative_decay(log_decay, q, time, chunk)
    documents = None if resets_BT is None else _document_numbers(resets_BT, chunk)
    if state_BHde is None:
        state_BHde = q.new_zeros(q.shape[0], q.shape[1], k.shape[-1], v.shape[-1])
    pairs = _pair_weights(cum, documents, chunk, q)
    inside = ((q @ k.transpose(-1, -2)) * pairs) @ v
    before, after = _carry(k, v, cum, documents, at_least_fp32(state_BHde))
    reach = _reach_into_chunk(cum, documents, q)
    o = inside + (q * reach) @ before
    return o.flatten(2, 3)[:, :, :time].transpose(1, 2).to(v_BTHe.dtype), after


def ada_step(q_BHd: Tensor, k_BHd: Tensor, v_BHe: Tensor, log_decay: Tensor | None, state_BHde: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: output [B, H, e] in the dtype of v, and the new state. log_decay is None, [H] or [B, H]."""
    q, k, v = (at_least_fp32(x) for x in (q_BHd, k_BHd, v_BHe))
    if log_decay is not None:
        state_BHde = state_BHde * log_decay.exp()[..., None, None]
    state_BHde = state_BHde + k[..., :, None] * v[..., None, :]
    return (q[..., None, :] @ state_BHde)[..., 0, :].to(v_BHe.dtype), state_BHde


def _chunks(x_BTHd: Tensor, chunk: int) -> Tensor:
    """[B, T, H, d] -> [B, H, n, C, d], padded with zeros: a zero key leaves the state as it is."""
    padding = -x_BTHd.shape[1] % chunk
    if padding:
        x_BTHd = F.pad(x_BTHd, (0, 0, 0, 0, 0, padding))
    return x_BTHd.transpose(1, 2).unflatten(2, (-1, chunk)).contiguous()


def _cumulative_decay(log_decay: Tensor | None, like: Tensor, time: int, chunk: int) -> Tensor | None:
    """Running sum of log a in each chunk: [H, n, C] (n = 1 when every chunk is alike), or [B, H, n, C]; padding does not decay."""
    if log_decay is None:
        return None
    log_decay = log_decay.to(like.dtype)
    if log_decay.ndim == 3:
        padded = F.pad(log_decay.transpose(1, 2), (0, -time % chunk))
        return padded.unflatten(2, (-1, chunk)).cumsum(dim=-1)
    chunks = like.shape[2]
    if time % chunk == 0:
        return log_decay[:, None, None] * torch.arange(1, chunk + 1, dtype=like.dtype, device=like.device)
    real = (torch.arange(chunks * chunk, device=like.device) < time).to(like.dtype).view(chunks, chunk)
    return log_decay[:, None, None] * real.cumsum(dim=-1)


def _document_numbers(resets_BT: Tensor, chunk: int) -> Tensor:
    """int64 [B, 1, n, C]: resets in the chunk up to and with each token; 0 for tokens that the chunk's incoming state reaches."""
    padded = F.pad(resets_BT, (0, -resets_BT.shape[1] % chunk))
    return padded.unflatten(1, (-1, chunk)).cumsum(dim=-1)[:, None]


def _pair_weights(cum: Tensor | None, documents: Tensor | None, chunk: int, like: Tensor) -> Tensor:
    """What token j still weighs at token i >= j of its chunk: 1 decayed, 0 across documents. Broadcasts over [B, H, n, C, C]."""
    visible = torch.ones(chunk, chunk, dtype=torch.bool, device=like.device).tril()
    if documents is not None:
        visible = visible & (documents[..., :, None] == documents[..., None, :])
    if cum is None:
        return visible.to(like.dtype)
    exponent = cum[..., :, None] - cum[..., None, :]
    return exponent.masked_fill(~visible, float("-inf")).exp()


def _reach_into_chunk(cum: Tensor | None, documents: Tensor | None, like: Tensor) -> Tensor:
    """What the incoming state still weighs at each token of the chunk. Broadcasts over [B, H, n, C, 1]."""
    reach = like.new_ones(1) if cum is None else cum.exp()[..., None]
    return reach if documents is None else reach * (documents == 0)[..., None]


def _carry(k: Tensor, v: Tensor, cum: Tensor | None, documents: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """State before each chunk [B, H, n, d, e], and after the last one."""
    if cum is not None:
        k = k * (cum[..., -1:] - cum).exp()[..., None]
    if documents is not None:
        k = k * (documents == documents[..., -1:])[..., None]
    gained = k.transpose(-1, -2) @ v
    kept = _kept_over_chunks(cum, documents, gained)
    before = []
    for index in range(gained.shape[2]):
        before.append(state)
        state = state * kept[:, :, index] + gained[:, :, index]
    return torch.stack(before, dim=2), state


def _kept_over_chunks(cum: Tensor | None, documents: Tensor | None, like: Tensor) -> Tensor:
    """Share of the incoming state that leaves each chunk. [B or 1, H or 1, n, 1, 1]."""
    kept = like.new_ones(1, 1, like.shape[2]) if cum is None else cum[..., -1]
    if cum is not None:
        kept = (kept if kept.ndim == 3 else kept[None]).exp().expand(-1, -1, like.shape[2])
    if documents is not None:
        kept = kept * (documents[..., -1] == 0)
    return kept[..., None, None]
