"""Causal depthwise convolution along the sequence.  B batch, T time, H heads, d head width, w taps."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(x_BTHd: Tensor, kernel_Hdw: Tensor, age_BT: Tensor | None = None, history: Tensor | None = None) -> Tensor:
    """y_t = sum_{j<w} kernel_j * x_{t-j}, in the dtype of x.

    age_BT (int, tokens since the start of the document) keeps taps from reaching over a document's start; history [B, w-1, H, d] holds the inputs
    before the first one, zeros where it is not given.
    """
    taps = kernel_Hdw.shape[-1]
    time = x_BTHd.shape[1]
    padded = F.pad(x_BTHd, (0, 0, 0, 0, taps - 1, 0)) if history is None else torch.cat((history.to(x_BTHd.dtype), x_BTHd), dim=1)
    y_BTHd = x_BTHd * kernel_Hdw[..., 0]
    for tap in range(1, taps):
        earlier = padded[:, taps - 1 - tap : taps - 1 - tap + time]
        weight = kernel_Hdw[..., tap]
        if age_BT is not None:
            weight = weight * (age_BT >= tap)[:, :, None, None].to(x_BTHd.dtype)
        y_BTHd = y_BTHd + earlier * weight
    return y_BTHd


def document_age(resets_BT: Tensor) -> Tensor:
    """int64 [B, T]: tokens since the last True of resets_BT (before the first one: large, since the sequence's history may reach in)."""
    time = resets_BT.shape[1]
    position_T = torch.arange(time, device=resets_BT.device)
    start_BT = torch.where(resets_BT, position_T, -time).cummax(dim=1).values
    return position_T - start_BT
