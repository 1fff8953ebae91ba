"""The linear recurrence of ADA:  S_t = a_t S_{t-1} + k_t v_t^T,  o_t = scale * S_t^T q_t   (docs/model.md, section 3).

B batch, T time, H heads, d head width, C tokens of a chunk, N chunks.  A token that starts a document forgets: a_t = 0 there.
With c_i the sum of log a over the tokens of a chunk up to and with i, and S the state that enters the chunk:

    o_i = scale * ( sum_{j<=i} exp(c_i - c_j) (q_i . k_j) v_j  +  exp(c_i) S^T q_i )
    S'  = exp(c_C) S + sum_j exp(c_C - c_j) k_j v_j^T

The backward pass runs the recurrence in reverse on dL/dS', and recomputes S and the products of a chunk instead of keeping them.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    """All outputs o [B, T, H, d] (dtype of q) and the last state [B, H, d, d] (fp32, or fp64 for fp64 inputs), both differentiable.

    log_decay is log a <= 0: None (no decay), [H], or [B, T, H]; resets_BT is bool; state_BHdd is the state before the first token (zero if
    None). T need not be a multiple of `chunk`: the rest is one shorter chunk.
    """
    batch, time, heads, width = q_BTHd.shape
    wide = torch.promote_types(q_BTHd.dtype, torch.float32)
    if state_BHdd is None:
        state_BHdd = torch.zeros(batch, heads, width, width, device=q_BTHd.device, dtype=wide)
    if log_decay is None:
        log_decay = torch.zeros(heads, device=q_BTHd.device, dtype=wide)
    outputs = []
    whole = time - time % chunk
    for start, stop in ((0, whole), (whole, time)):
        if start < stop:
            part = slice(start, stop)
            decay = log_decay if log_decay.dim() == 1 else log_decay[:, part]
            resets = None if resets_BT is None else resets_BT[:, part]
            size = min(chunk, stop - start)
            o_BTHd, state_BHdd = _Scan.apply(q_BTHd[:, part], k_BTHd[:, part], v_BTHd[:, part], decay, resets, state_BHdd, size, scale)
            outputs.append(o_BTHd)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), state_BHdd


def last_state(k_BTHd: Tensor, v_BTHd: Tensor, log_decay: Tensor | None, resets_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What T tokens make of a state S: kept * S + added. Returns added [B, H, d, d] and kept (broadcasts to it), fp32 or wider, differentiable.

    One product instead of the whole scan: added = sum_t exp(log a summed over the tokens after t) k_t v_t^T. Arguments as in `chunkwise_scan`.
    """
    if log_decay is None:
        log_decay = torch.zeros(k_BTHd.shape[2], device=k_BTHd.device, dtype=torch.promote_types(k_BTHd.dtype, torch.float32))
    return _LastState.apply(k_BTHd, v_BTHd, log_decay, resets_BT)


def recurrent_step(
    q_BHd: Tensor, k_BHd: Tensor, v_BHd: Tensor, log_decay: Tensor | None, state_BHdd: Tensor, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One token: o [B, H, d] in the dtype of q, and the new state; log_decay is None, [H] or [B, H]."""
    wide = state_BHdd.dtype
    decayed = state_BHdd if log_decay is None else state_BHdd * log_decay.to(wide).exp()[..., None, None]
    state = torch.addcmul(decayed, k_BHd.to(wide)[..., :, None], v_BHd.to(wide)[..., None, :])
    o_BHd = (q_BHd.to(wide)[..., None, :] @ state)[..., 0, :] * scale
    return o_BHd.to(q_BHd.dtype), state


class _Decays:
    """The factors of a chunk; dimensions of size 1 where they do not depend on batch and chunk."""

    def __init__(self, log_decay: Tensor, resets_BT: Tensor | None, chunks: int, size: int, dtype: torch.dtype) -> None:
        floor = math.log(torch.finfo(dtype).tiny) / 2
        if log_decay.dim() == 1:
            steps = torch.arange(1, size + 1, device=log_decay.device, dtype=dtype)
            cum = (log_decay.to(dtype)[:, None] * steps)[None, None]  # [1, 1, H, C]
        else:
            cum = log_decay.to(dtype).unflatten(1, (chunks, size)).cumsum(dim=2).transpose(2, 3)  # [B, N, H, C]
        future = torch.ones(size, size, dtype=torch.bool, device=cum.device).triu(1)
        self.within = _exp((cum[..., :, None] - cum[..., None, :]).masked_fill_(future, -torch.inf), floor)  # [.., C, C]
        self.into = _exp(cum, floor)[..., None]
        self.out = _exp(cum[..., -1:] - cum, floor)[..., None]
        self.through = _exp(cum[..., -1], floor)[..., None, None]
        self.same_document: Tensor | None = None
        if resets_BT is not None:
            document = resets_BT.unflatten(1, (chunks, size)).cumsum(dim=2, dtype=torch.int32)[:, :, None]  # [B, N, 1, C]
            self.same_document = (document[..., :, None] == document[..., None, :]).to(dtype)
            self.into = self.into * (document == 0)[..., None]
            self.out = self.out * (document == document[..., -1:])[..., None]
            self.through = self.through * (document[..., -1] == 0)[..., None, None]

    def mask_(self, products: Tensor) -> Tensor:
        """products [B, N, H, C, C] times what is left of token j at token i, in place."""
        products.mul_(self.within)
        return products if self.same_document is None else products.mul_(self.same_document)


def _exp(log_factor: Tensor, floor: float) -> Tensor:
    # Below the root of the smallest normal number a factor has no effect, but subnormal products cost a CPU a hundred times the time.
    return torch.where(log_factor < floor, 0.0, log_factor.exp())


class _LastState(torch.autograd.Function):
    """Keeps its inputs alone; u_t = sum of log a over the tokens after t, w_t = exp(u_t), so that dL/du_t = k_t . dL/dk_t."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, log_decay: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(k, v, log_decay, resets)
        wide = torch.promote_types(k.dtype, torch.float32)
        left, kept = _left_at_the_end(log_decay, resets, k.shape[1], wide)
        return torch.einsum("bthd,bthe->bhde", k.to(wide), v * left), kept[..., None, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_added: Tensor, grad_kept: Tensor) -> tuple[Tensor | None, ...]:
        k, v, log_decay, resets = ctx.saved_tensors
        time = k.shape[1]
        left, kept = _left_at_the_end(log_decay, resets, time, grad_added.dtype)
        grad_k = torch.einsum("bthe,bhde->bthd", v * left, grad_added)
        grad_v = torch.einsum("bthd,bhde->bthe", k.to(grad_added.dtype), grad_added).mul_(left)
        grad_decay = None
        if ctx.needs_input_grad[2]:
            grad_u = torch.einsum("bthd,bthd->bth", k.to(grad_k.dtype), grad_k)
            through = kept * grad_kept[..., 0, 0]
            if log_decay.dim() == 3:
                grad_decay = F.pad(grad_u, (0, 0, 1, 0))[:, :-1].cumsum(dim=1) + through[:, None]
            else:
                after = torch.arange(time - 1, -1, -1, device=k.device, dtype=grad_u.dtype)
                grad_decay = torch.einsum("bth,t->h", grad_u, after) + time * through.sum(dim=0)
            grad_decay = grad_decay.to(log_decay.dtype)
        return grad_k.to(k.dtype), grad_v.to(v.dtype), grad_decay, None


def _left_at_the_end(log_decay: Tensor, resets: Tensor | None, time: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What is left at the last token of each token [B, T, H, 1] (B may be 1), and of the state before the first [B, H]."""
    floor = math.log(torch.finfo(dtype).tiny) / 2
    if log_decay.dim() == 1:
        after = torch.arange(time - 1, -1, -1, device=log_decay.device, dtype=dtype)
        total = (log_decay.to(dtype) * after[:, None])[None]
    else:
        # Summed from the end: as a difference of sums from the start, a small one would keep the rounding of two large ones.
        total = F.pad(log_decay.to(dtype), (0, 0, 0, 1))[:, 1:].flip(1).cumsum(dim=1).flip(1)
    first = log_decay.to(dtype) if log_decay.dim() == 1 else log_decay[:, 0].to(dtype)
    left, kept = _exp(total, floor), _exp(total[:, 0] + first, floor)
    if resets is not None:
        document = resets.cumsum(dim=1, dtype=torch.int32)[..., None]
        left, kept = left * (document == document[:, -1:]), kept * (document[:, -1] == 0)
    return left[..., None], kept


class _Scan(torch.autograd.Function):
    """T = N C tokens."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, resets: Tensor | None, state: Tensor, size: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, log_decay, resets, state)
        ctx.size, ctx.scale = size, scale
        q_c, k_c, v_c = (_to_chunks(x, size, state.dtype) for x in (q, k, v))
        decays = _Decays(log_decay, resets, q_c.shape[1], size, state.dtype)
        o = decays.mask_(q_c @ k_c.mT) @ v_c
        # From here on the chunks' own copies are scaled in place: on a CPU fresh memory costs more than the arithmetic on it.
        entering, last = _states(k_c, v_c.mul_(decays.out), decays.through, state)
        _add_product(o, q_c.mul_(decays.into), entering)
        return _from_chunks(o.mul_(scale), q.dtype), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, resets, state = ctx.saved_tensors
        q_c, k_c, v_c, grad_c = (_to_chunks(x, ctx.size, state.dtype) for x in (q, k, v, grad_o))
        grad_c.mul_(ctx.scale)
        decays = _Decays(log_decay, resets, q_c.shape[1], ctx.size, state.dtype)

        # Within the chunks.
        products = decays.mask_(q_c @ k_c.mT)
        grad_v = products.mT @ grad_c
        grad_products = decays.mask_(torch.matmul(grad_c, v_c.mT, out=products))
        grad_q, grad_k = grad_products @ k_c, grad_products.mT @ q_c

        # Through the states, in reverse.
        v_out, grad_into = v_c.mul_(decays.out), grad_c.mul_(decays.into)
        entering, last = _states(k_c, v_out, decays.through, state)
        grad_leaving, grad_state = _state_grads(q_c.mT @ grad_into, decays.through, grad_last)
        _add_product(grad_q, grad_into, entering.mT)
        _add_product(grad_k, v_out, grad_leaving.mT)
        grad_v.addcmul_(k_c @ grad_leaving, decays.out)

        grad_decay = None
        if ctx.needs_input_grad[3]:
            leaving = torch.cat((entering[:, 1:], last[:, None]), dim=1)
            carried = leaving.mul_(grad_leaving).sum(dim=(-2, -1))
            grad_decay = _decay_grad(q_c, grad_q, k_c, grad_k, carried, per_token=log_decay.dim() == 3).to(log_decay.dtype)
        grads = (_from_chunks(grad, x.dtype) for grad, x in ((grad_q, q), (grad_k, k), (grad_v, v)))
        return *grads, grad_decay, None, grad_state, None, None


def _to_chunks(x_BTHd: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """[B, N C, H, d] -> contiguous [B, N, H, C, d]: one batched matrix product a step instead of one a head."""
    batch, time, heads, width = x_BTHd.shape
    chunks = torch.empty(batch, time // size, heads, size, width, dtype=dtype, device=x_BTHd.device)
    return chunks.copy_(x_BTHd.unflatten(1, (-1, size)).transpose(2, 3))


def _from_chunks(x_BNHCd: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_to_chunks`, in `dtype`."""
    batch, chunks, heads, size, width = x_BNHCd.shape
    out = torch.empty(batch, chunks, size, heads, width, dtype=dtype, device=x_BNHCd.device)
    return out.copy_(x_BNHCd.transpose(2, 3)).flatten(1, 2)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    total.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))


def _states(k: Tensor, v_out: Tensor, through: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """States entering each chunk [B, N, H, d, d], and the one that leaves the last."""
    added = k.mT @ v_out
    entering = torch.empty_like(added)
    through = through.expand(-1, added.shape[1], -1, -1, -1)
    for n in range(added.shape[1]):
        entering[:, n] = state
        state = torch.addcmul(added[:, n], through[:, n], state)
    return entering, state


def _state_grads(read: Tensor, through: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dS leaving each chunk [B, N, H, d, d], and dL/dS before the first; `read` is the part of it that the chunk's own outputs give."""
    leaving = torch.empty_like(read)
    through = through.expand(-1, read.shape[1], -1, -1, -1)
    for n in reversed(range(read.shape[1])):
        leaving[:, n] = grad
        grad = torch.addcmul(read[:, n], through[:, n], grad)
    return leaving, grad


def _decay_grad(q: Tensor, grad_q: Tensor, k: Tensor, grad_k: Tensor, carried: Tensor, *, per_token: bool) -> Tensor:
    """dL/d log a, [B, T, H] or summed over it [H]; overwrites q.

    c_i enters as q_i exp(c_i) and k_i exp(-c_i) alone, so dL/dc_i = q_i . dL/dq_i - k_i . dL/dk_i, and log a_t is part of every c_i with
    i >= t: of those in its chunk, and, through the state that leaves it, of all later ones together (`carried` [B, N, H]). The two products
    cancel where a is small: in fp32 the error is about 1e-7 of either, which is far below the noise of a batch.
    """
    grad_c = q.mul_(grad_q).addcmul_(k, grad_k, value=-1.0).sum(dim=-1)  # [B, N, H, C]
    if per_token:
        grad = grad_c.flip(-1).cumsum(dim=-1).flip(-1) + carried[..., None]
        return grad.transpose(2, 3).flatten(1, 2)
    size = grad_c.shape[-1]
    steps = torch.arange(1, size + 1, device=grad_c.device, dtype=grad_c.dtype)
    return (grad_c * steps).sum(dim=(0, 1, 3)) + size * carried.sum(dim=(0, 1))
