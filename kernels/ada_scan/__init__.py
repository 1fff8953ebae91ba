"""ADA's kernels: the chunkwise scan, what feeds it and what it feeds, and the recurrent step (docs/model.md, section 3; docs/kernels/ada_scan.md).

    k' = diffused_keys(K, kern)      o, S = scan(silu(q), k', v, log a)      y = gated_norm(o, weight, gate)      o_t, S = step(...) a token

B batch, T time, H heads, d head width, w taps. The operators are torch.ops.kan_train.ada_*. They run Triton kernels for fp32, fp16 and bf16 and d up
to 128 where a device has any, `reference.py` elsewhere; each is differentiable once. Results have the same bits in every run on the same device.
"""

import torch
from torch import Tensor

from kan_train.kernels.ada_scan import operators  # noqa: F401  (registers torch.ops.kan_train.ada_*)
from kan_train.kernels.ada_scan.reference import wide_dtype
from kan_train.kernels.ada_scan.tables import WIDEST as WIDEST_HEAD

__all__ = ["WIDEST_HEAD", "diffused_keys", "gated_norm", "last_state", "scan", "step"]


def scan(
    q_BTHd: Tensor,
    k_BTHd: Tensor,
    v_BTHd: Tensor,
    log_decay: Tensor | None = None,
    resets_BT: Tensor | None = None,
    state_BHdd: Tensor | None = None,
    *,
    chunk: int = 64,
    scale: float = 1.0,
    silu_q: bool = False,
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} + k_t v_t^T,  o_t = scale S_t^T q_t: o [B, T, H, d] in the dtype of q, and the last S [B, H, d, d] in fp32 (fp64 for fp64).

    q, k, v have one dtype. log_decay is log a <= 0: None (a = 1), [H], or [B, T, H]. resets_BT is bool: a_t = 0 at a document's first token.
    state_BHdd is S before the first token (zero if None). chunk bounds the tokens of a chunk and changes no more than the rounding; T is any. silu_q: q is
    given before its feature map, o_t = scale S_t^T silu(q_t). Differentiable in q, k, v, log_decay and state; only the arguments and the last state are
    kept. Products of 16-bit inputs read S and the products of a chunk rounded to that type, and add up in fp32. Raises ValueError for shapes or types
    that do not fit, and for scale 0, which the gradient divides by.
    """
    batch, time, heads, width = _four(q_BTHd, "q")
    _same(q_BTHd, k=k_BTHd, v=v_BTHd)
    _check_decay(log_decay, batch, time, heads)
    _check_resets(resets_BT, batch, time)
    _require(chunk >= 1, f"chunk={chunk} must be at least 1; use 64")
    _require(scale != 0, "scale=0 makes every output zero, and its gradient is divided by scale")
    if state_BHdd is not None:
        _require(state_BHdd.shape == (batch, heads, width, width), f"state {list(state_BHdd.shape)} must be {[batch, heads, width, width]}")
        state_BHdd = state_BHdd.to(wide_dtype(q_BTHd.dtype)).contiguous()
    q, k, v = (x.contiguous() for x in (q_BTHd, k_BTHd, v_BTHd))
    return torch.ops.kan_train.ada_scan(q, k, v, _packed(log_decay), _packed(resets_BT), state_BHdd, chunk, scale, silu_q)


def last_state(k_BTHd: Tensor, v_BTHd: Tensor, log_decay: Tensor | None = None, resets_BT: Tensor | None = None, *, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """What T tokens make of a state S, kept * S + added: added [B, H, d, d] and kept [B, H, 1, 1], fp32 (fp64 for fp64). Arguments as in `scan`.

    For context parallelism: what a rank tells the others of its chunk. Differentiable in k, v and log_decay; the backward pass is two matrix products.
    """
    batch, time, heads, _ = _four(k_BTHd, "k")
    _same(k_BTHd, v=v_BTHd)
    _check_decay(log_decay, batch, time, heads)
    _check_resets(resets_BT, batch, time)
    return torch.ops.kan_train.ada_last_state(k_BTHd.contiguous(), v_BTHd.contiguous(), _packed(log_decay), _packed(resets_BT), chunk)


def step(
    q_BHd: Tensor,
    k_BHd: Tensor,
    v_BHd: Tensor,
    log_decay: Tensor | None,
    state_BHdd: Tensor,
    *,
    scale: float = 1.0,
    silu_q: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of `scan`: o [B, H, d] in the dtype of q, and the new state. log_decay is None, [H] or [B, H].

    in_place writes the new state over state_BHdd, which must be contiguous, and returns it: nothing is allocated but o. For decoding: not differentiable.
    Raises ValueError for shapes or types that do not fit.
    """
    _require(q_BHd.dim() == 3, f"q {list(q_BHd.shape)} must be [B, H, d]")
    batch, heads, width = q_BHd.shape
    _same(q_BHd, k=k_BHd, v=v_BHd)
    wanted = {(heads,), (batch, heads)}
    _require(log_decay is None or tuple(log_decay.shape) in wanted, f"log_decay must be None, [{heads}] or [{batch}, {heads}]")
    _require(state_BHdd.shape == (batch, heads, width, width), f"state {list(state_BHdd.shape)} must be {[batch, heads, width, width]}")
    arguments = (q_BHd.contiguous(), k_BHd.contiguous(), v_BHd.contiguous(), _packed(log_decay))
    if in_place:
        _require(state_BHdd.is_contiguous(), "a state that is updated in place must be contiguous")
        return torch.ops.kan_train.ada_step_(*arguments, state_BHdd, scale, silu_q), state_BHdd
    return torch.ops.kan_train.ada_step(*arguments, state_BHdd.contiguous(), scale, silu_q)


def diffused_keys(keys_BTHd: Tensor, kernel_Hdw: Tensor, resets_BT: Tensor | None = None, before_BwHd: Tensor | None = None, *, feature: bool = True) -> Tensor:
    """phi(k'), k'_t = sum_{j<w} kernel[..., j] K_{t-j} channel by channel, phi(x) = silu(x) / sqrt(|silu(x)|^2 + 1e-6): [B, T, H, d], dtype of the keys.

    A tap that would reach over a document's first token (resets_BT True) reads zero. before_BwHd [B, w-1, H, d] are the keys before the first one
    (zero if None). Without `feature` it is k' itself. fp32 inside, rounded once. Differentiable in keys, kernel and before. Raises ValueError for shapes
    that do not fit.
    """
    batch, time, heads, width = _four(keys_BTHd, "keys")
    _require(kernel_Hdw.shape[:2] == (heads, width) and kernel_Hdw.dim() == 3, f"kernel {list(kernel_Hdw.shape)} must be [{heads}, {width}, w]")
    _check_resets(resets_BT, batch, time)
    taps = kernel_Hdw.shape[-1]
    if before_BwHd is not None:
        wanted = (batch, taps - 1, heads, width)
        _require(before_BwHd.shape == wanted, f"before {list(before_BwHd.shape)} must be {list(wanted)}")
        before_BwHd = before_BwHd.contiguous() if taps > 1 else None
    return torch.ops.kan_train.ada_diffused_keys(keys_BTHd.contiguous(), kernel_Hdw.contiguous(), _packed(resets_BT), before_BwHd, feature)


def gated_norm(o_BTHd: Tensor, weight_Hd: Tensor | None, gate_BTHd: Tensor | None, eps: float) -> Tensor:
    """o / sqrt(mean(o^2) + eps) * weight * silu(gate), the mean over a head's channels: [B, T, H, d] in the dtype of o.

    weight and gate are left out where None. fp32 inside, rounded once. Differentiable in all three. Raises ValueError for shapes that do not fit.
    """
    _, _, heads, width = _four(o_BTHd, "o")
    if weight_Hd is not None:
        _require(weight_Hd.shape == (heads, width), f"weight {list(weight_Hd.shape)} must be [{heads}, {width}]")
    if gate_BTHd is not None:
        _require(gate_BTHd.shape == o_BTHd.shape, f"gate {list(gate_BTHd.shape)} must be {list(o_BTHd.shape)}")
    return torch.ops.kan_train.ada_gated_norm(o_BTHd.contiguous(), _packed(weight_Hd), _packed(gate_BTHd), eps)


def _packed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _four(x: Tensor, name: str) -> torch.Size:
    _require(x.dim() == 4, f"{name} {list(x.shape)} must be [B, T, H, d]")
    return x.shape


def _same(x: Tensor, **others: Tensor) -> None:
    for name, other in others.items():
        _require(other.shape == x.shape and other.dtype == x.dtype, f"{name} {list(other.shape)} {other.dtype} must be {list(x.shape)} {x.dtype}")


def _check_decay(log_decay: Tensor | None, batch: int, time: int, heads: int) -> None:
    wanted = {(heads,), (batch, time, heads)}
    _require(log_decay is None or tuple(log_decay.shape) in wanted, f"log_decay must be None, [{heads}] or [{batch}, {time}, {heads}]")


def _check_resets(resets: Tensor | None, batch: int, time: int) -> None:
    _require(resets is None or (resets.shape == (batch, time) and resets.dtype == torch.bool), f"resets must be bool [{batch}, {time}]")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
