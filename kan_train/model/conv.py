"""Diffusion of keys along the sequence: a short causal depthwise convolution, and an optional mixture of one-sided exponentials.

docs/model.md, section 3.  B batch, T time, H heads, d head width, w taps, P exponentials.  Neither crosses the start of a document.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kan_train.config import ConfigError
from kan_train.config.model import largest_divisor
from kan_train.parallel.context import carry_in
from kan_train.parallel.place import ALONE, Axis


def causal_conv(x_BTHd: Tensor, kernel_Hdw: Tensor, resets_BT: Tensor | None = None, before_BwHd: Tensor | None = None) -> Tensor:
    """y_t = sum_{j<w} kernel[..., j] * x_{t-j}, channel by channel; [B, T, H, d] -> [B, T, H, d] in the dtype of x.

    A tap that would reach over a token with resets_BT True (bool, the first of a document) reads zero. before_BwHd [B, w-1, H, d] are
    the inputs before the first one (zero if None).
    """
    if before_BwHd is None:
        return _CausalConv.apply(x_BTHd, kernel_Hdw, resets_BT)
    count = before_BwHd.shape[1]
    if resets_BT is not None:
        resets_BT = F.pad(resets_BT, (count, 0))
    return _CausalConv.apply(torch.cat((before_BwHd, x_BTHd), dim=1), kernel_Hdw, resets_BT)[:, count:]


def last_inputs(x_BTHd: Tensor, before_BwHd: Tensor) -> Tensor:
    """The w-1 newest inputs after reading x: what `causal_conv` needs as `before` to continue."""
    # A copy: a part would keep the memory of all.
    return torch.cat((before_BwHd, x_BTHd), dim=1)[:, x_BTHd.shape[1] :].clone()


def inputs_before(x_BTHd: Tensor, count: int, resets_BT: Tensor | None, axis: Axis) -> Tensor | None:
    """The `count` inputs before this rank's chunk x, [B, count, H, d], in documents that go on at its end; None where no rank holds any.

    Zero where there are none: before the first rank's chunk, and where a document has ended. ConfigError where a chunk is shorter than count.
    """
    if axis.size == 1 or count == 0:
        return None
    if x_BTHd.shape[1] < count:
        whole = x_BTHd.shape[1] * axis.size
        works = largest_divisor(whole, max(1, whole // count))
        raise ConfigError(
            f"parallel.context_parallel={axis.size} leaves each rank {x_BTHd.shape[1]} tokens of a sequence, fewer than the {count} that the convolution "
            f"reaches back; use parallel.context_parallel={works} or model.ada.conv_width={x_BTHd.shape[1] + 1}"
        )
    tail = x_BTHd[:, -count:]
    if resets_BT is not None:
        document_BT = resets_BT[:, -count:].cumsum(dim=1, dtype=torch.int32)
        tail = tail * (document_BT == document_BT[:, -1:])[..., None, None]
    return carry_in(tail, None, axis)


class _CausalConv(torch.autograd.Function):
    """One multiply-add over the whole tensor a tap. Automatic differentiation would pad and add a full tensor for every shift."""

    @staticmethod
    def forward(ctx: Any, x_BTHd: Tensor, kernel_Hdw: Tensor, resets_BT: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_BTHd, kernel_Hdw, resets_BT)
        taps_wHd = kernel_Hdw.to(x_BTHd.dtype).movedim(-1, 0).contiguous()
        y_BTHd = x_BTHd * taps_wHd[0]
        for lag, reachable in _lags(taps_wHd, x_BTHd, resets_BT):
            past = x_BTHd[:, :-lag]
            y_BTHd[:, lag:].addcmul_(past if reachable is None else past * reachable, taps_wHd[lag])
        return y_BTHd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHd: Tensor) -> tuple[Tensor | None, ...]:
        x_BTHd, kernel_Hdw, resets_BT = ctx.saved_tensors
        taps_wHd = kernel_Hdw.to(x_BTHd.dtype).movedim(-1, 0).contiguous()
        wide = torch.promote_types(kernel_Hdw.dtype, torch.float32)
        grad_kernel_wHd = torch.zeros_like(taps_wHd, dtype=wide)
        grad_x_BTHd = grad_BTHd * taps_wHd[0]
        grad_kernel_wHd[0] = (grad_BTHd * x_BTHd).sum(dim=(0, 1), dtype=wide)
        for lag, reachable in _lags(taps_wHd, x_BTHd, resets_BT):
            ahead = grad_BTHd[:, lag:] if reachable is None else grad_BTHd[:, lag:] * reachable
            grad_x_BTHd[:, :-lag].addcmul_(ahead, taps_wHd[lag])
            grad_kernel_wHd[lag] = (ahead * x_BTHd[:, :-lag]).sum(dim=(0, 1), dtype=wide)
        return grad_x_BTHd, grad_kernel_wHd.movedim(0, -1).to(kernel_Hdw.dtype), None


def _lags(taps_wHd: Tensor, x_BTHd: Tensor, resets_BT: Tensor | None) -> Any:
    """Yield (lag, mask [B, T-lag, 1, 1] or None): token lag+i reaches token i where no document starts after i, up to lag+i."""
    document_BT = None if resets_BT is None else resets_BT.cumsum(dim=1, dtype=torch.int32)
    for lag in range(1, min(taps_wHd.shape[0], x_BTHd.shape[1])):
        yield lag, None if document_BT is None else (document_BT[:, lag:] == document_BT[:, :-lag])[..., None, None]


def exponential_mixture(
    x_BTHd: Tensor,
    log_rate_PHd: Tensor,
    weight_PHd: Tensor,
    resets_BT: Tensor | None = None,
    state_BPHd: Tensor | None = None,
    axis: Axis = ALONE.context,
) -> tuple[Tensor, Tensor]:
    """y_t = x_t + sum_p weight_p * m_t^p,  m_t^p = a_p m_{t-1}^p + (1 - a_p) x_t,  a_p = exp(-exp(log_rate_p)), channel by channel.

    Returns y [B, T, H, d] in the dtype of x, and the last m [B, P, H, d] (fp32, or fp64 for fp64 inputs), which is the state to continue
    from; state_BPHd is m before the first token (zero if None); on an `axis` of several ranks, each with a chunk, it is what the chunks before leave. The
    recurrence is solved by doubling its reach: m over the last 2s inputs
    is m over the last s, plus a^s times the same of s tokens ago.
    """
    wide = torch.promote_types(x_BTHd.dtype, torch.float32)
    time, reach = x_BTHd.shape[1], 1
    rate_P1Hd = log_rate_PHd.to(wide).exp()[:, None]
    document_BT = None if resets_BT is None else resets_BT.cumsum(dim=1, dtype=torch.int32)
    m_BPTHd = x_BTHd.to(wide)[:, None] * -torch.expm1(-rate_P1Hd)
    while reach < time:
        past = m_BPTHd[:, :, :-reach] * torch.exp(-reach * rate_P1Hd)
        if document_BT is not None:
            past = past * (document_BT[:, reach:] == document_BT[:, :-reach])[:, None, :, None, None]
        m_BPTHd = m_BPTHd + F.pad(past, (0, 0, 0, 0, reach, 0))
        reach *= 2
    if axis.size > 1:
        kept_BPHd = torch.exp(-time * rate_P1Hd)[None, :, 0]
        if document_BT is not None:
            kept_BPHd = kept_BPHd * (document_BT[:, -1] == 0)[:, None, None, None]
        state_BPHd = carry_in(m_BPTHd[:, :, -1], kept_BPHd, axis)
    if state_BPHd is not None:
        age_T11 = torch.arange(1, time + 1, device=x_BTHd.device, dtype=wide)[:, None, None]
        carried = state_BPHd[:, :, None] * torch.exp(-age_T11 * rate_P1Hd)
        if document_BT is not None:
            carried = carried * (document_BT == 0)[:, None, :, None, None]
        m_BPTHd = m_BPTHd + carried
    y_BTHd = x_BTHd + (m_BPTHd * weight_PHd.to(wide)[:, None]).sum(dim=1)
    return y_BTHd.to(x_BTHd.dtype), m_BPTHd[:, :, -1]
