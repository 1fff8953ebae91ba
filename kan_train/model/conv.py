"""Diffusion of keys along the sequence: a short causal depthwise convolution, and an optional mixture of one-sided exponentials.

docs/model.md, section 3.  B batch, T time, H heads, d head width, w taps, P exponentials.  Neither crosses the start of a document.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(x_BTHd: Tensor, kernel_Hdw: Tensor, resets_BT: Tensor | None = None, before_BwHd: Tensor | None = None) -> Tensor:
    """y_t = sum_{j<w} kernel[..., j] * x_{t-j}, channel by channel; [B, T, H, d] -> [B, T, H, d] in the dtype of x.

    A tap that would reach over a token with resets_BT True (bool, the first of a document) reads zero. before_BwHd [B, w-1, H, d] are
    the inputs before the first (zero if None).
    """
    taps = kernel_Hdw.to(x_BTHd.dtype).unbind(-1)
    y_BTHd = x_BTHd * taps[0]
    if len(taps) == 1:
        return y_BTHd
    time = x_BTHd.shape[1]
    if before_BwHd is None:
        before_BwHd = x_BTHd.new_zeros(x_BTHd.shape[0], len(taps) - 1, *x_BTHd.shape[2:])
    padded = torch.cat((before_BwHd, x_BTHd), dim=1)
    reachable = None if resets_BT is None else torch.ones_like(resets_BT)
    for lag in range(1, len(taps)):
        past = padded[:, len(taps) - 1 - lag :][:, :time]
        if reachable is not None:
            reachable = reachable & ~_shift(resets_BT, lag - 1)
            past = past * reachable[..., None, None]
        y_BTHd = torch.addcmul(y_BTHd, past, taps[lag])
    return y_BTHd


def last_keys(x_BTHd: Tensor, before_BwHd: Tensor) -> Tensor:
    """The w-1 newest inputs after reading x: what `causal_conv` needs as `before` to continue."""
    count = before_BwHd.shape[1]
    return torch.cat((before_BwHd, x_BTHd), dim=1)[:, x_BTHd.shape[1] :] if count else before_BwHd


def exponential_mixture(
    x_BTHd: Tensor, log_rate_PHd: Tensor, weight_PHd: Tensor, resets_BT: Tensor | None = None, state_BPHd: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x_t + sum_p weight_p * m_t^p with m_t = a m_{t-1} + (1 - a) x_t, a = exp(-exp(log_rate)); returns it and the last m [B, P, H, d].

    The recurrence is solved by doubling its reach: m over the last 2s inputs is m over the last s, plus a^s times that of s tokens ago.
    """
    wide = torch.promote_types(x_BTHd.dtype, torch.float32)
    rate_PHd = log_rate_PHd.to(wide).exp()
    x_B1THd = x_BTHd.to(wide)[:, None]
    m = x_B1THd * -torch.expm1(-rate_PHd)[:, None]
    time, reach = x_BTHd.shape[1], 1
    document_BT = None if resets_BT is None else resets_BT.cumsum(dim=1)
    while reach < time:
        past = m[:, :, :-reach] * torch.exp(-reach * rate_PHd)[:, None]
        if document_BT is not None:
            past = past * (document_BT[:, reach:] == document_BT[:, :-reach])[:, None, :, None, None]
        m = torch.cat((m[:, :, :reach], m[:, :, reach:] + past), dim=2)
        reach *= 2
    if state_BPHd is not None:
        age_T = torch.arange(1, time + 1, device=x_BTHd.device, dtype=wide)
        carried = state_BPHd[:, :, None] * torch.exp(-age_T[:, None, None] * rate_PHd[:, None])
        if document_BT is not None:
            carried = carried * (document_BT == 0)[:, None, :, None, None]
        m = m + carried
    mixed = x_B1THd[:, 0] + (m * weight_PHd.to(wide)[:, None]).sum(dim=1)
    return mixed.to(x_BTHd.dtype), m[:, :, -1]


def _shift(resets_BT: Tensor, lag: int) -> Tensor:
    """resets at t - lag, False before the first token."""
    return F.pad(resets_BT, (lag, 0))[:, : resets_BT.shape[1]] if lag else resets_BT
