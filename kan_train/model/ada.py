"""ADA, Arnold diffusion attention: linear attention over diffused keys, with decay   (docs/model.md, section 3).

    k'_t = sum_{j<w} kern_j * K_{t-j}      S_t = a_t S_{t-1} + phi(k'_t) v_t^T      o_t = phi(q_t)^T S_t / sqrt(d)
    y = W_o [ RMSNorm_head(o) * silu(W_gate x) ]

B batch, T time, D width, H heads, d head width, w taps, P exponentials of the mixture.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_train.config import ModelConfig
from kan_train.kernels import ada_scan
from kan_train.kernels.backend import use_triton
from kan_train.model.conv import causal_conv, exponential_mixture, inputs_before, last_inputs
from kan_train.model.norm import at_least_fp32, rms_norm, unit
from kan_train.model.scan import chunkwise_scan, last_state, recurrent_step
from kan_train.parallel.context import carry_in
from kan_train.parallel.layers import ColumnLinear, RowLinear, TensorRegion
from kan_train.parallel.params import Constant, PerIndex, declare
from kan_train.parallel.place import ALONE, Axis, current_place


@dataclass
class AdaState:
    """What ADA remembers of a context of any length."""

    memory_BHdd: Tensor
    """S, fp32 (fp64 in an fp64 model)."""
    keys_BwHd: Tensor
    """The w-1 newest keys, as they were before the convolution."""
    means_BPHd: Tensor
    """The P exponential means of the convolved keys, as wide as S."""


class Ada(nn.Module):
    """The token mixer. Half-lives of the heads' decay start log-spaced; the convolution starts as the identity.

    Context-parallel ranks each read one chunk of every sequence, after what the chunks before it leave: the last keys, the means and the state.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        ada, width = config.ada, config.width
        heads, self.head_width = ada.num_heads, config.head_width
        self.config, self.norm_eps, self.scale = ada, config.norm_eps, self.head_width**-0.5
        self.silu = ada.feature_map == "silu"  # phi(q) = silu(q), phi(k) = silu(k) / ||silu(k)||; or the identity
        self.kernels = config.kernels if self.head_width <= ada_scan.WIDEST_HEAD else "torch"
        self.context = current_place().context
        self.region = TensorRegion()
        self.query = ColumnLinear(width, width, axis="heads")
        self.key = ColumnLinear(width, width, axis="heads")
        self.value = ColumnLinear(width, width, axis="heads")
        self.out = RowLinear(width, width, axis="heads", std=1 / math.sqrt(width * 2 * config.num_layers))
        per_channel, channel_axes = (heads, self.head_width), ("heads", None)
        if ada.output_gate:
            self.gate = ColumnLinear(width, width, axis="heads")
        if ada.output_norm:
            declare(self, "norm_weight", per_channel, init=Constant(1.0), axes=channel_axes)
        if ada.conv_width > 1:
            identity = PerIndex(2, (1.0, *[0.0] * (ada.conv_width - 1)))
            declare(self, "kernel", (*per_channel, ada.conv_width), init=identity, axes=(*channel_axes, None))
        if ada.decay != "none":
            declare(self, "log_rate", (heads,), init=PerIndex(0, log_rates(half_lives(heads, config))), axes=("heads",))
        if ada.decay == "data":
            declare(self, "rate_weight", (heads, width), init=Constant(0.0), axes=("heads", None))
        if ada.mixture:
            mixture, axes = (ada.mixture, *per_channel), (None, *channel_axes)
            lives = log_spaced(float(ada.conv_width), max(config.half_life_max, 2.0 * ada.conv_width), ada.mixture)
            declare(self, "mixture_log_rate", mixture, init=PerIndex(0, log_rates(lives)), axes=axes)
            declare(self, "mixture_weight", mixture, init=Constant(0.0), axes=axes)

    def forward(self, x_BTD: Tensor, resets_BT: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D] in the dtype of x; resets_BT (bool) is True at the first token of a document, which sees none before."""
        x_BTD = self.region(x_BTD)
        q, k, v, _ = self._read(x_BTD, None, resets_BT, self.context)
        log_decay = self._log_decay(x_BTD)
        before_BHdd = carry_in(*self._last_state(k, v, log_decay, resets_BT), self.context) if self.context.size > 1 else None
        o_BTHd, _ = self._scan(q, k, v, log_decay, resets_BT, before_BHdd)
        return self._output(o_BTHd, x_BTD)

    def init_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> AdaState:
        """The state before the first token of `batch` sequences, for activations of `dtype`."""
        heads, width = self.key.weight.shape[0] // self.head_width, self.head_width
        wide = torch.promote_types(dtype, torch.float32)
        return AdaState(
            memory_BHdd=torch.zeros(batch, heads, width, width, device=device, dtype=wide),
            keys_BwHd=torch.zeros(batch, self.config.conv_width - 1, heads, width, device=device, dtype=dtype),
            means_BPHd=torch.zeros(batch, self.config.mixture, heads, width, device=device, dtype=wide),
        )

    def prefill(self, x_BTD: Tensor, state: AdaState) -> tuple[Tensor, AdaState]:
        """Read T tokens after `state`: their outputs [B, T, D], and the state after them."""
        x_BTD = self.region(x_BTD)
        q, k, v, after = self._read(x_BTD, state)
        log_decay = self._log_decay(x_BTD)
        o_BTHd, memory = self._scan(q, k, v, log_decay, None, state.memory_BHdd)
        return self._output(o_BTHd, x_BTD), AdaState(memory, *after)

    def step(self, x_BD: Tensor, state: AdaState) -> tuple[Tensor, AdaState]:
        """Read one token after `state`: [B, D] -> [B, D]; its cost does not depend on how many came before."""
        x_B1D = self.region(x_BD[:, None])
        q, k, v, after = self._read(x_B1D, state)
        log_decay = self._log_decay(x_B1D)
        if log_decay is not None and log_decay.dim() == 3:
            log_decay = log_decay[:, 0]
        step = partial(ada_scan.step, silu_q=self.silu) if self._fused(x_BD) else recurrent_step
        o_BHd, memory = step(q[:, 0], k[:, 0], v[:, 0], log_decay, state.memory_BHdd, scale=self.scale)
        return self._output(o_BHd[:, None], x_B1D)[:, 0], AdaState(memory, *after)

    def _read(
        self, x_BTD: Tensor, state: AdaState | None, resets_BT: Tensor | None = None, context: Axis = ALONE.context
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """phi(q) (q itself where kernels run, which take phi as they read it), phi(k'), v, each [B, T, H, d]; after a state, the keys and means of the next."""
        q, keys, v = (linear(x_BTD).unflatten(-1, (-1, self.head_width)) for linear in (self.query, self.key, self.value))
        if state is not None:
            before, means = state.keys_BwHd, state.means_BPHd
        else:
            before, means = inputs_before(keys, self.config.conv_width - 1, resets_BT, context), None
        fused = self._fused(x_BTD)
        if fused and self.config.conv_width > 1 and not self.config.mixture:
            k = ada_scan.diffused_keys(keys, self.kernel, resets_BT, before, feature=self.silu)
        else:
            k = causal_conv(keys, self.kernel, resets_BT, before) if self.config.conv_width > 1 else keys
            if self.config.mixture:
                k, means = exponential_mixture(k, self.mixture_log_rate, self.mixture_weight, resets_BT, means, context)
            k = unit(F.silu(k)) if self.silu else k
        after = () if state is None else (last_inputs(keys, before), means)
        return F.silu(q) if self.silu and not fused else q, k, v, after

    def _fused(self, x: Tensor) -> bool:
        return use_triton(self.kernels, x.device)

    def _scan(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, resets_BT: Tensor | None, before_BHdd: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scan = partial(ada_scan.scan, silu_q=self.silu) if self._fused(q) else chunkwise_scan
        return scan(q, k, v, log_decay, resets_BT, before_BHdd, chunk=self.config.chunk, scale=self.scale)

    def _last_state(self, k: Tensor, v: Tensor, log_decay: Tensor | None, resets_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        return (ada_scan.last_state if self._fused(k) else last_state)(k, v, log_decay, resets_BT)

    def _log_decay(self, x_BTD: Tensor) -> Tensor | None:
        """log a_t, fp32 or wider: [H], [B, T, H] when it depends on the token, None without decay.

        learned: a = exp(-rate_h).  data: a_t = sigmoid(-(w_h . x_t) - log(exp(rate_h) - 1)), which is exp(-rate_h) where w_h . x_t = 0.
        """
        if self.config.decay == "none":
            return None
        rate_H = at_least_fp32(self.log_rate).exp()
        if self.config.decay == "learned":
            return -rate_H
        wide = at_least_fp32(x_BTD)
        return F.logsigmoid(-F.linear(wide, self.rate_weight.to(wide.dtype)) - rate_H - torch.log(-torch.expm1(-rate_H)))

    def _output(self, o_BTHd: Tensor, x_BTD: Tensor) -> Tensor:
        if self.config.output_norm and self._fused(o_BTHd):
            gate = self.gate(x_BTD).view_as(o_BTHd) if self.config.output_gate else None
            return self.out(ada_scan.gated_norm(o_BTHd, self.norm_weight, gate, self.norm_eps).flatten(-2))
        if self.config.output_norm:
            o_BTHd = rms_norm(o_BTHd, self.norm_weight, self.norm_eps)
        y_BTD = o_BTHd.flatten(-2)
        if self.config.output_gate:
            y_BTD = y_BTD * F.silu(self.gate(x_BTD))
        return self.out(y_BTD)


def half_lives(heads: int, config: ModelConfig) -> tuple[float, ...]:
    """Half-lives of the heads at step 0, in tokens: log-spaced from half_life_min to half_life_max, bent where that puts more than
    half of the heads above half_life_middle."""
    shortest, middle, longest = config.ada.half_life_min, config.ada.half_life_middle, config.half_life_max
    if heads == 1:
        return (middle,)
    lower = (heads + 1) // 2
    bend = min(middle, log_spaced(shortest, longest, heads)[lower - 1])
    return log_spaced(shortest, bend, lower) + log_spaced(bend, longest, heads - lower + 1)[1:]


def log_spaced(low: float, high: float, count: int) -> tuple[float, ...]:
    """`count` numbers from low to high in equal ratios; `low` alone if count is 1."""
    if count == 1:
        return (low,)
    return tuple(low * (high / low) ** (i / (count - 1)) for i in range(count))


def log_rates(lives: tuple[float, ...]) -> tuple[float, ...]:
    """log(log(2) / half-life): the learned quantity behind a half-life."""
    return tuple(math.log(math.log(2) / life) for life in lives)
