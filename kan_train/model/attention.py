"""Softmax attention: hybrid layers and the dense baseline.

B batch, T time, S keys, D width, H query heads, G key-value heads, d head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_train.config import ModelConfig
from kan_train.model.cache import KeyValueCache, past_mask
from kan_train.parallel.context import gather_chunks
from kan_train.parallel.layers import ColumnLinear, RowLinear, TensorRegion
from kan_train.parallel.place import current_place


class SoftmaxAttention(nn.Module):
    """Causal softmax attention with rotary positions (Su et al., arXiv:2104.09864), grouped queries (Ainslie et al., arXiv:2305.13245).

    Positions count from the start of the packed sequence, not of the document: scores depend on their differences alone. Context-parallel ranks each
    ask for one chunk of every sequence, and gather the keys and values of all.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        attention = config.attention
        self.head_width, self.rope_theta = config.attention_head_width, attention.rope_theta
        inner, kv_inner = attention.num_heads * self.head_width, attention.num_kv_heads * self.head_width
        self.context = current_place().context
        self.region = TensorRegion()
        self.query = ColumnLinear(config.width, inner, axis="heads")
        self.key = ColumnLinear(config.width, kv_inner, axis="heads")
        self.value = ColumnLinear(config.width, kv_inner, axis="heads")
        self.out = RowLinear(inner, config.width, axis="heads", std=1 / math.sqrt(inner * 2 * config.num_layers))

    def forward(self, x_BTD: Tensor, resets_BT: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; a token sees the tokens before it in its own document (resets_BT True where one starts)."""
        x_BTD = self.region(x_BTD)
        time = x_BTD.shape[1]
        q_BHTd, k_BGTd, v_BGTd = self._project(x_BTD, torch.arange(time, device=x_BTD.device) + self.context.rank * time)
        if self.context.size == 1 and resets_BT is None:
            return self._attend(q_BHTd, k_BGTd, v_BGTd, causal=True)
        k_BGSd, v_BGSd, resets_BS = self._with_chunks_before(k_BGTd, v_BGTd, resets_BT)
        mask = past_mask(time, k_BGSd.shape[2], x_BTD.device) if resets_BS is None else document_mask(resets_BS, time)
        return self._attend(q_BHTd, k_BGSd, v_BGSd, mask=mask)

    def init_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> KeyValueCache:
        """An empty cache for `batch` sequences."""
        kv_heads = self.key.weight.shape[0] // self.head_width
        empty = torch.empty(batch, kv_heads, 0, self.head_width, device=device, dtype=dtype)
        return KeyValueCache(empty, empty)

    def prefill(self, x_BTD: Tensor, state: KeyValueCache) -> tuple[Tensor, KeyValueCache]:
        """Read T tokens after those of `state`: their outputs [B, T, D], and the longer state."""
        x_BTD = self.region(x_BTD)
        before, time = state.keys.shape[2], x_BTD.shape[1]
        q_BHTd, k_BGTd, v_BGTd = self._project(x_BTD, state.positions(time))
        after = state.append(k_BGTd, v_BGTd)
        if state.lengths_B is None and (before == 0 or time == 1):  # one token sees all keys
            return self._attend(q_BHTd, after.keys, after.values, causal=time > 1), after
        return self._attend(q_BHTd, after.keys, after.values, mask=after.mask(time)), after

    def step(self, x_BD: Tensor, state: KeyValueCache) -> tuple[Tensor, KeyValueCache]:
        """Read one token after those of `state`: [B, D] -> [B, D], at a cost that grows with them."""
        y_B1D, state = self.prefill(x_BD[:, None], state)
        return y_B1D[:, 0], state

    def _project(self, x_BTD: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (linear(x_BTD).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for linear in (self.query, self.key, self.value))
        cosine, sine = rotary_tables(positions, self.head_width, self.rope_theta)
        return rotate(q, cosine, sine), rotate(k, cosine, sine), v

    def _with_chunks_before(self, k_BGTd: Tensor, v_BGTd: Tensor, resets_BT: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and resets of all tokens up to the last of this rank's chunk."""
        if self.context.size == 1:
            return k_BGTd, v_BGTd, resets_BT
        seen = (self.context.rank + 1) * k_BGTd.shape[2]
        k_BGSd, v_BGSd = gather_chunks(torch.stack((k_BGTd, v_BGTd)), self.context, dim=3)[..., :seen, :].unbind()
        return k_BGSd, v_BGSd, None if resets_BT is None else gather_chunks(resets_BT, self.context, dim=1)[:, :seen]

    def _attend(self, q_BHTd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        grouped = q_BHTd.shape[1] != k_BGSd.shape[1]
        o_BHTd = F.scaled_dot_product_attention(q_BHTd, k_BGSd, v_BGSd, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        return self.out(o_BHTd.transpose(1, 2).flatten(2))


def document_mask(resets_BS: Tensor, time: int) -> Tensor:
    """bool [B, 1, T, S] for the last T of S tokens: True where one may see column j, that is j is no later and in the same document."""
    document_BS = resets_BS.cumsum(dim=1, dtype=torch.int32)
    same_BTS = document_BS[:, -time:, None] == document_BS[:, None, :]
    return same_BTS.logical_and_(past_mask(time, resets_BS.shape[1], resets_BS.device))[:, None]


def rotary_tables(positions: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines in fp64 of positions [T] or [B, T]: [T, head_width / 2] or [B, 1, T, head_width / 2]."""
    frequencies = theta ** (-torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float64) / head_width)
    angles = positions.double()[..., None] * frequencies
    if angles.dim() == 3:
        angles = angles[:, None]  # for all heads
    return angles.cos(), angles.sin()


def rotate(x_BHTd: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate each pair (i, i + d/2) of the head's channels by its angle, in at least fp32, returned in the dtype of x."""
    wide = x_BHTd.dtype if x_BHTd.dtype == torch.float64 else torch.float32
    first, second = x_BHTd.to(wide).chunk(2, dim=-1)
    cosine, sine = cosine.to(wide), sine.to(wide)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x_BHTd.dtype)
