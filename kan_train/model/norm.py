"""Root-mean-square normalisation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_train.parallel.params import Constant, declare


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in at least fp32 and returned in the dtype of x."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = declare(self, "weight", (width,), init=Constant(1.0))

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_fp32(x)
        return F.rms_norm(wide, (x.shape[-1],), self.weight.to(wide.dtype), self.eps).to(x.dtype)


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is when it is fp32 or wider."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
