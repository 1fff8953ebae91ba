"""Softmax attention: hybrid layers and the dense baseline.

B batch, T time, S keys, D width, H query heads, G key-value heads, d head width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_train.config import ModelConfig
from kan_train.parallel.layers import ColumnLinear, RowLinear


@dataclass
class KeyValueCache:
    """Keys (rotated) and values of the tokens read so far, each [B, G, S, d]."""

    keys: Tensor
    values: Tensor


class SoftmaxAttention(nn.Module):
    """Causal softmax attention with rotary positions (Su et al., arXiv:2104.09864), grouped queries (Ainslie et al., arXiv:2305.13245).

    Positions count from the start of the packed sequence, not of the document: scores depend on their differences alone.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.num_heads = config.attention.num_heads
        self.num_kv_heads = config.attention.num_kv_heads
        self.head_width = config.width // self.num_heads
        self.rope_theta = config.attention.rope_theta
        inner, kv_inner = self.num_heads * self.head_width, self.num_kv_heads * self.head_width
        self.query = ColumnLinear(config.width, inner, axis="heads")
        self.key = ColumnLinear(config.width, kv_inner, axis="heads")
        self.value = ColumnLinear(config.width, kv_inner, axis="heads")
        self.out = RowLinear(inner, config.width, axis="heads", std=1 / math.sqrt(inner * 2 * config.num_layers))

    def forward(self, x_BTD: Tensor, resets_BT: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; a token sees the tokens before it in its own document (resets_BT True where one starts)."""
        q_BHTd, k_BGTd, v_BGTd = self._project(x_BTD, start=0)
        if resets_BT is None:
            return self._attend(q_BHTd, k_BGTd, v_BGTd, causal=True)
        return self._attend(q_BHTd, k_BGTd, v_BGTd, mask=document_mask(resets_BT))

    def init_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> KeyValueCache:
        """An empty cache for `batch` sequences."""
        empty = torch.empty(batch, self.num_kv_heads, 0, self.head_width, device=device, dtype=dtype)
        return KeyValueCache(empty, empty)

    def prefill(self, x_BTD: Tensor, state: KeyValueCache) -> tuple[Tensor, KeyValueCache]:
        """Read T tokens after those of `state`: their outputs [B, T, D], and the longer state."""
        before, time = state.keys.shape[2], x_BTD.shape[1]
        q_BHTd, k_BGTd, v_BGTd = self._project(x_BTD, start=before)
        after = KeyValueCache(torch.cat((state.keys, k_BGTd), dim=2), torch.cat((state.values, v_BGTd), dim=2))
        if before == 0 or time == 1:  # one token sees all keys
            return self._attend(q_BHTd, after.keys, after.values, causal=time > 1), after
        past_TS = torch.ones(time, before + time, dtype=torch.bool, device=x_BTD.device).tril(before)
        return self._attend(q_BHTd, after.keys, after.values, mask=past_TS), after

    def step(self, x_BD: Tensor, state: KeyValueCache) -> tuple[Tensor, KeyValueCache]:
        """Read one token after those of `state`: [B, D] -> [B, D], at a cost that grows with them."""
        y_B1D, state = self.prefill(x_BD[:, None], state)
        return y_B1D[:, 0], state

    def _project(self, x_BTD: Tensor, *, start: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (linear(x_BTD).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for linear in (self.query, self.key, self.value))
        cosine, sine = rotary_tables(start, x_BTD.shape[1], self.head_width, self.rope_theta, x_BTD.device)
        return rotate(q, cosine, sine), rotate(k, cosine, sine), v

    def _attend(self, q_BHTd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        grouped = q_BHTd.shape[1] != k_BGSd.shape[1]
        o_BHTd = F.scaled_dot_product_attention(q_BHTd, k_BGSd, v_BGSd, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        return self.out(o_BHTd.transpose(1, 2).flatten(2))


def document_mask(resets_BT: Tensor) -> Tensor:
    """bool [B, 1, T, T]: True where row t may see column j, that is j <= t in the same document."""
    time = resets_BT.shape[1]
    document_BT = resets_BT.cumsum(dim=1, dtype=torch.int32)
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return same_BTT.logical_and_(torch.ones(time, time, dtype=torch.bool, device=resets_BT.device).tril())[:, None]


def rotary_tables(start: int, count: int, head_width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines in fp64, [count, head_width / 2] for positions start .. start+count."""
    frequencies = theta ** (-torch.arange(0, head_width, 2, device=device, dtype=torch.float64) / head_width)
    angles = torch.arange(start, start + count, device=device, dtype=torch.float64)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x_BHTd: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate each pair (i, i + d/2) of the head's channels by its angle, in at least fp32, returned in the dtype of x."""
    wide = x_BHTd.dtype if x_BHTd.dtype == torch.float64 else torch.float32
    first, second = x_BHTd.to(wide).chunk(2, dim=-1)
    cosine, sine = cosine.to(wide), sine.to(wide)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x_BHTd.dtype)
