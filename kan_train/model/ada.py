"""ADA, Arnold diffusion attention: linear attention over convolved keys (docs/model.md, section 3).

B batch, T time, D width, H heads, d head width, w taps, p mixture exponentials.

    k'_t = sum_{j<w} kern_j * K_{t-j}      S_t = a_t S_{t-1} + phi(k'_t) v_t^T      o_t = phi(q_t)^T S_t / sqrt(d)
    y = W_o [ RMSNorm_head(o) * silu(W_gate x) ]
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_train.config import ModelConfig
from kan_train.model.conv import causal_conv, document_age
from kan_train.model.norm import at_least_fp32
from kan_train.model.scan import ada_scan, ada_step
from kan_train.parallel.layers import ColumnLinear, RowLinear
from kan_train.parallel.params import Constant, PerIndex, declare

# A rate of 20 a token forgets everything; beyond it the exponential of a learnt log rate could overflow.
_MAX_LOG_RATE = 3.0


@dataclass
class AdaState:
    """All that a head remembers; its size does not depend on the context."""

    memory: Tensor
    """S [B, H, d, d], fp32 or wider."""
    keys: Tensor
    """The last w-1 keys before the convolution [B, w-1, H, d]."""
    diffusion: Tensor
    """The running exponentials of the mixture [B, p, H, d], fp32 or wider."""


class Ada(nn.Module):
    """Token mixer of constant memory a sequence; heads are independent of each other."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        ada = config.ada
        self.config, self.norm_eps = ada, config.norm_eps
        self.num_heads, self.head_width = ada.num_heads, config.head_width
        inner = self.num_heads * self.head_width
        self.query = ColumnLinear(config.width, inner, axis="heads")
        self.key = ColumnLinear(config.width, inner, axis="heads")
        self.value = ColumnLinear(config.width, inner, axis="heads")
        self.out = RowLinear(inner, config.width, axis="heads", std=1 / math.sqrt(inner * 2 * config.num_layers))
        identity = (1.0,) + (0.0,) * (ada.conv_width - 1)
        declare(self, "conv_kernel", (self.num_heads, self.head_width, ada.conv_width), axes=("heads", None, None), init=PerIndex(2, identity))
        if ada.output_gate:
            self.gate = ColumnLinear(config.width, inner, axis="heads")
        if ada.output_norm:
            declare(self, "head_norm", (self.num_heads, self.head_width), axes=("heads", None), init=Constant(1.0))
        if ada.decay != "none":
            rates = tuple(math.log(math.log(2) / half_life) for half_life in initial_half_lives(config))
            declare(self, "log_rate", (self.num_heads,), axes=("heads",), init=PerIndex(0, rates))
        if ada.decay == "data":
            self.rate = ColumnLinear(config.width, self.num_heads, axis="heads", std=0.0)
        if ada.mixture:
            rates = tuple(math.log(math.log(2) / 2 ** (i + 1)) for i in range(ada.mixture))
            declare(self, "mixture_log_rate", (ada.mixture, self.num_heads), axes=(None, "heads"), init=PerIndex(0, rates))
            declare(self, "mixture_weight", (ada.mixture, self.num_heads, self.head_width), axes=(None, "heads", None), init=Constant(0.0))

    def forward(self, x_BTD: Tensor, resets_BT: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; resets_BT (bool) is True at the first token of a document: nothing reaches over it."""
        q, k, v = self._project(x_BTD)
        k = causal_conv(k, self.conv_kernel, None if resets_BT is None else document_age(resets_BT))
        if self.config.mixture:
            k, _ = self._diffuse(k, resets_BT, None)
        q, k = self._features(q, k)
        o, _ = ada_scan(q, k, v, self._log_decay(x_BTD), resets_BT, chunk=self.config.chunk)
        return self._read_out(o, x_BTD)

    def init_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> AdaState:
        """The state before the first token of `batch` sequences."""
        wide = dtype if dtype == torch.float64 else torch.float32
        heads, width = self.num_heads, self.head_width
        return AdaState(
            memory=torch.zeros(batch, heads, width, width, device=device, dtype=wide),
            keys=torch.zeros(batch, self.config.conv_width - 1, heads, width, device=device, dtype=dtype),
            diffusion=torch.zeros(batch, self.config.mixture, heads, width, device=device, dtype=wide),
        )

    def prefill(self, x_BTD: Tensor, state: AdaState) -> tuple[Tensor, AdaState]:
        """Read T tokens after `state` by the chunkwise form."""
        q, key_BTHd, v = self._project(x_BTD)
        keys, k = self._convolve_after(key_BTHd, state)
        diffusion = state.diffusion
        if self.config.mixture:
            k, diffusion = self._diffuse(k, None, diffusion)
        q, k = self._features(q, k)
        o, memory = ada_scan(q, k, v, self._log_decay(x_BTD), None, state.memory, chunk=self.config.chunk)
        return self._read_out(o, x_BTD), AdaState(memory, keys, diffusion)

    def step(self, x_BD: Tensor, state: AdaState) -> tuple[Tensor, AdaState]:
        """Read one token after `state` by the recurrence."""
        x_B1D = x_BD[:, None]
        q, key_B1Hd, v = self._project(x_B1D)
        keys, k = self._convolve_after(key_B1Hd, state)
        diffusion = state.diffusion
        if self.config.mixture:
            k, diffusion = self._diffuse(k, None, diffusion)
        q, k = self._features(q, k)
        log_decay = self._log_decay(x_B1D)
        if log_decay is not None and log_decay.ndim == 3:
            log_decay = log_decay[:, 0]
        o_BHd, memory = ada_step(q[:, 0], k[:, 0], v[:, 0], log_decay, state.memory)
        return self._read_out(o_BHd[:, None], x_B1D)[:, 0], AdaState(memory, keys, diffusion)

    def _project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (linear(x_BTD).unflatten(-1, (self.num_heads, self.head_width)) for linear in (self.query, self.key, self.value))
        return q, k, v

    def _features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """phi(q) / sqrt(d) and phi(k)."""
        scale = 1 / math.sqrt(self.head_width)
        if self.config.feature_map == "identity":
            return q * scale, k
        return F.silu(q) * scale, F.normalize(F.silu(at_least_fp32(k)), dim=-1, eps=1e-6).to(k.dtype)

    def _log_decay(self, x_BTD: Tensor) -> Tensor | None:
        """log a = -exp(log rate): None, [H], or [B, T, H] where the token adds W_rate x to its head's log rate."""
        if self.config.decay == "none":
            return None
        log_rate = at_least_fp32(self.log_rate)
        if self.config.decay == "data":
            log_rate = log_rate + at_least_fp32(self.rate(x_BTD))
        return -log_rate.clamp(max=_MAX_LOG_RATE).exp()

    def _convolve_after(self, key_BTHd: Tensor, state: AdaState) -> tuple[Tensor, Tensor]:
        """The keys to remember, and the convolved keys."""
        keys = torch.cat((state.keys, key_BTHd), dim=1)[:, key_BTHd.shape[1] :]
        return keys, causal_conv(key_BTHd, self.conv_kernel, history=state.keys)

    def _diffuse(self, k_BTHd: Tensor, resets_BT: Tensor | None, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """k + sum_p weight_p * m_p with m_t = b m_{t-1} + (1 - b) k_t, a head's b = exp(-exp(log rate)); also the last m [B, p, H, d]."""
        wide, after = at_least_fp32(k_BTHd), []
        mixed = wide
        for index, log_rate_H in enumerate(at_least_fp32(self.mixture_log_rate)):
            log_decay_H = -log_rate_H.clamp(max=_MAX_LOG_RATE).exp()
            # The scan with a constant query and a one-dimensional key is a first-order recurrence over its values.
            one = wide.new_ones(*wide.shape[:3], 1)
            gain = one * (1 - log_decay_H.exp())[:, None]
            state = None if before is None else before[:, index, :, None, :]
            m_BTHd, last = ada_scan(one, gain, wide, log_decay_H, resets_BT, state, chunk=self.config.chunk)
            mixed = mixed + m_BTHd * self.mixture_weight[index]
            after.append(last[:, :, 0])
        return mixed.to(k_BTHd.dtype), torch.stack(after, dim=1)

    def _read_out(self, o_BTHd: Tensor, x_BTD: Tensor) -> Tensor:
        if self.config.output_norm:
            wide = at_least_fp32(o_BTHd)
            o_BTHd = (F.rms_norm(wide, (self.head_width,), eps=self.norm_eps) * self.head_norm).to(o_BTHd.dtype)
        o = o_BTHd.flatten(-2)
        return self.out(o * F.silu(self.gate(x_BTD)) if self.config.output_gate else o)


def initial_half_lives(config: ModelConfig) -> list[float]:
    """Half-lives in tokens, one a head, log-spaced: the first half of the heads from half_life_min to half_life_middle, the rest to half_life_max."""
    ada, heads = config.ada, config.ada.num_heads
    short = max(1, math.ceil(heads / 2))
    low, middle, high = ada.half_life_min, ada.half_life_middle, config.half_life_max
    first = [low * (middle / low) ** (i / max(1, short - 1)) for i in range(short)]
    return first + [middle * (high / middle) ** ((i + 1) / (heads - short)) for i in range(heads - short)]
