"""A model made ready for steps: one token of every row at a time, nothing computed twice that follows from the weights alone.

B rows, D width, H heads, d head width, w taps, G key-value heads, S keys. A step gives what `LanguageModel.step` gives, by the same mathematics in fewer
operations: with one token a row, the time goes to reading weights and to starting operations. What has no such form here (kernels of a GPU, tensor
parallelism, the ablations) takes the module's own step.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_train.kernels.backend import use_triton
from kan_train.model.ada import Ada, AdaState
from kan_train.model.attention import SoftmaxAttention, rotary_tables
from kan_train.model.block import Block
from kan_train.model.cache import KeyValueCache
from kan_train.model.decoder_groves import GroveStep
from kan_train.model.ffn import SwiGLU
from kan_train.model.grove import KalmaGrove
from kan_train.model.lm import LanguageModel
from kan_train.model.norm import RMSNorm, at_least_fp32


class Decoder:
    """Steps of a model whose weights, mode and active groves stay as they are for as long as it is used. Without gradients."""

    @torch.no_grad()
    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        layers: list[Block] = list(model.layers)  # type: ignore[arg-type]
        self._mixers = [_mixer(layer) for layer in layers]
        self._feed_forwards = [_feed_forward(layer) for layer in layers]
        self._norm = NormStep(model.final_norm)
        self._plain_ends = model.head.region.axis.size == 1

    def step(self, tokens_B: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """Read one token after `state`, which is overwritten: logits [B, V] of the next token, and the state after it."""
        model, turn = self.model, Turn()
        x_BD = F.embedding(tokens_B, model.embedding.weight) if self._plain_ends else model.embedding(tokens_B)
        after = []
        for mix, feed_forward, before in zip(self._mixers, self._feed_forwards, state, strict=True):
            x_BD, layer_state = mix(x_BD, before, turn)
            x_BD = feed_forward(x_BD)
            after.append(layer_state)
        x_BD = self._norm(x_BD)
        return F.linear(x_BD, model.head.weight) if self._plain_ends else model.head(x_BD), after


class Turn:
    """What the softmax layers of one step share: their positions are the same."""

    rotation: tuple[Tensor, Tensor] | None = None


Mixer = Callable[[Tensor, Any, Turn], tuple[Tensor, Any]]


def _mixer(layer: Block) -> Mixer:
    """From the residual stream [B, D] and the layer's state to both behind the mixer."""
    mixer, norm = layer.mixer, layer.mixer_norm
    if mixer.region.axis.size == 1:
        if isinstance(mixer, SoftmaxAttention):
            return AttentionStep(mixer, norm)
        if mixer.config.decay != "data" and not mixer.config.mixture and not use_triton(mixer.kernels, mixer.query.weight.device):
            return AdaStep(mixer, norm)

    def step(x_BD: Tensor, state: Any, _: Turn) -> tuple[Tensor, Any]:
        y_BD, state = mixer.step(norm(x_BD), state)
        return x_BD + y_BD, state

    return step


def _feed_forward(layer: Block) -> Callable[[Tensor], Tensor]:
    """From the residual stream [B, D] to the one behind the feed-forward layer."""
    ffn, norm = layer.ffn, NormStep(layer.ffn_norm)
    if isinstance(ffn, KalmaGrove) and GroveStep.fits(ffn):
        grove_step = GroveStep(ffn)
        return lambda x_BD: grove_step(norm(x_BD), x_BD)
    if isinstance(ffn, SwiGLU) and ffn.region.axis.size == 1:
        up, value, out = ffn.up.weight, ffn.value.weight, ffn.out.weight.T

        def step(x_BD: Tensor) -> Tensor:
            u_BD = norm(x_BD)
            return torch.addmm(x_BD, F.silu(F.linear(u_BD, up)).mul_(F.linear(u_BD, value)), out)

        return step
    return lambda x_BD: x_BD + ffn(norm(x_BD)[:, None])[:, 0]


class NormStep:
    """x / sqrt(mean(x^2) + eps) * weight = x / sqrt(sum(x^2) + D eps) * (sqrt(D) weight): four operations."""

    def __init__(self, norm: RMSNorm) -> None:
        width = norm.weight.shape[0]
        self.weight = at_least_fp32(norm.weight) * math.sqrt(width)
        self.root = self.weight.new_tensor(math.sqrt(width * norm.eps))

    def __call__(self, x_BD: Tensor) -> Tensor:
        return over_length(x_BD, self.root).mul_(self.weight).to(x_BD.dtype)


def over_length(x: Tensor, root: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + root^2) over the last dimension, in the dtype of root."""
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=root.dtype), root)


class AdaStep:
    """ADA on the residual stream; its state is overwritten."""

    def __init__(self, mixer: Ada, norm: RMSNorm) -> None:
        self.norm, config, width = NormStep(norm), mixer.config, mixer.head_width
        self.query, self.key, self.value, self.out = mixer.query.weight, mixer.key.weight, mixer.value.weight, mixer.out.weight.T
        self.gate = mixer.gate.weight if config.output_gate else None
        self.shape, self.silu, self.scale = (-1, len(self.query) // width, width), mixer.silu, mixer.scale
        # Oldest first, as the state keeps the keys.
        self.taps_wHd = mixer.kernel.movedim(-1, 0).flip(0).contiguous() if config.conv_width > 1 else None
        self.key_root = self.norm.root.new_tensor(1e-3)  # unit's eps is its square
        decay = mixer._log_decay(self.norm.weight[None, None])
        self.decay_H11 = None if decay is None else decay.exp()[:, None, None]
        self.norm_weight: Tensor | None = None
        if config.output_norm:
            # The output's scale 1/sqrt(d) matters through eps alone.
            self.norm_weight = (at_least_fp32(mixer.norm_weight) * math.sqrt(width)).flatten()
            self.out_root = self.norm.root.new_tensor(math.sqrt(width * mixer.norm_eps) / mixer.scale)

    def __call__(self, x_BD: Tensor, state: AdaState, _: Turn) -> tuple[Tensor, AdaState]:
        u_BD, memory = self.norm(x_BD), state.memory_BHdd
        keys_BHd = F.linear(u_BD, self.key).view(self.shape)
        window, k_BHd = state.keys_BwHd, keys_BHd
        if self.taps_wHd is not None:
            window_BwHd = torch.cat((window, keys_BHd[:, None]), dim=1)
            window, k_BHd = window_BwHd[:, 1:], (window_BwHd * self.taps_wHd).sum(dim=1)
        q_BHd, v_BHd = F.linear(u_BD, self.query).view(self.shape), F.linear(u_BD, self.value).view(self.shape)
        if self.silu:
            q_BHd, k_BHd = F.silu(q_BHd), over_length(F.silu(k_BHd), self.key_root)
        wide = memory.dtype
        if self.decay_H11 is not None:
            memory.mul_(self.decay_H11)
        memory.addcmul_(k_BHd.to(wide)[..., :, None], v_BHd.to(wide)[..., None, :])
        o_BHd = torch.bmm(q_BHd.to(wide).view(-1, 1, self.shape[-1]), memory.flatten(0, 1)).view(self.shape)
        # Only as wide as it must be: the product with W_out is in the dtype of the weights.
        y_BD = (o_BHd.mul_(self.scale) if self.norm_weight is None else over_length(o_BHd, self.out_root)).flatten(1)
        if self.norm_weight is not None:
            y_BD = y_BD.mul_(self.norm_weight)
        if self.gate is not None:
            y_BD = y_BD.mul_(F.silu(F.linear(u_BD, self.gate)))
        return torch.addmm(x_BD, y_BD.to(x_BD.dtype), self.out), AdaState(memory, window, state.means_BPHd)


class AttentionStep:
    """Softmax attention on the residual stream; its cache grows in place."""

    def __init__(self, mixer: SoftmaxAttention, norm: RMSNorm) -> None:
        self.norm, self.mixer = NormStep(norm), mixer
        self.query, self.key, self.value, self.out = mixer.query.weight, mixer.key.weight, mixer.value.weight, mixer.out.weight.T
        self.width = mixer.head_width
        self.heads = len(self.query) // self.width
        self.grouped = len(self.key) != len(self.query)

    def __call__(self, x_BD: Tensor, state: KeyValueCache, turn: Turn) -> tuple[Tensor, KeyValueCache]:
        u_BD = self.norm(x_BD)
        if turn.rotation is None:
            turn.rotation = self._rotation(state, x_BD.dtype)
        cosine, sine = turn.rotation
        qk_BHd = torch.cat((F.linear(u_BD, self.query), F.linear(u_BD, self.key)), dim=1).view(len(x_BD), -1, self.width)
        turned_BHd = torch.cat((qk_BHd[..., self.width // 2 :], qk_BHd[..., : self.width // 2]), dim=-1)
        qk_BHd = torch.addcmul(qk_BHd * cosine, turned_BHd, sine).to(x_BD.dtype)
        q_BH1d, k_BG1d = qk_BHd[:, : self.heads, None], qk_BHd[:, self.heads :, None]
        after = state.append(k_BG1d, F.linear(u_BD, self.value).view(len(x_BD), -1, 1, self.width))
        mask = None if after.lengths_B is None else after.mask(1)
        o_BH1d = F.scaled_dot_product_attention(q_BH1d, after.keys, after.values, attn_mask=mask, enable_gqa=self.grouped)
        return torch.addmm(x_BD, o_BH1d.flatten(1), self.out), after

    def _rotation(self, state: KeyValueCache, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines [1 or B, 1, d], and sines with the sign of the pair's other half."""
        positions = state.positions(1).view(-1, 1)
        tables, wide = rotary_tables(positions, self.width, self.mixer.rope_theta), torch.promote_types(dtype, torch.float32)
        cosine, sine = (table.flatten(0, 1).to(wide) for table in tables)
        return torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)
