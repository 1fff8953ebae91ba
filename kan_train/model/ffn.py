"""The dense baseline's feed-forward layer.  B batch, T time, D width."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from kan_train.config import ModelConfig
from kan_train.parallel.layers import ColumnLinear, RowLinear, TensorRegion


class SwiGLU(nn.Module):
    """W_out (silu(W_up x) * (W_v x))  (Shazeer, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.region = TensorRegion()
        self.up = ColumnLinear(config.width, config.ffn_width, axis="hidden")
        self.value = ColumnLinear(config.width, config.ffn_width, axis="hidden")
        residual_std = 1 / math.sqrt(config.ffn_width * 2 * config.num_layers)
        self.out = RowLinear(config.ffn_width, config.width, axis="hidden", std=residual_std)

    def forward(self, x_BTD: Tensor, resets_BT: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; resets do not matter to a layer without memory."""
        x_BTD = self.region(x_BTD)
        return self.out(F.silu(self.up(x_BTD)) * self.value(x_BTD))
