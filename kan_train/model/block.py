"""A pre-norm block: x + Mixer(RMSNorm(x)), then x + FeedForward(RMSNorm(x))  (docs/model.md).  B batch, T time, D width."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kan_train.config import ModelConfig
from kan_train.model.ada import Ada
from kan_train.model.attention import SoftmaxAttention
from kan_train.model.ffn import SwiGLU
from kan_train.model.grove import KalmaGrove
from kan_train.model.norm import RMSNorm
from kan_train.model.route import checkpoint_contexts


class Block(nn.Module):
    """Token mixer (ADA or softmax attention) and feed-forward layer (KalmaGrove or SwiGLU), each on the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.mixer = SoftmaxAttention(config, layer) if config.is_softmax_layer(layer) else Ada(config, layer)
        self.ffn_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.ffn = KalmaGrove(config, layer) if config.ffn == "kalmagrove" else SwiGLU(config, layer)

    def forward(self, x_BTD: Tensor, resets_BT: Tensor | None = None) -> Tensor:
        x_BTD = x_BTD + self.mixer(self.mixer_norm(x_BTD), resets_BT)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD), resets_BT)

    def recomputed(self, x_BTD: Tensor, resets_BT: Tensor | None = None) -> Tensor:
        """`forward`, keeping only its input for the backward pass, which runs it again."""
        return checkpoint(self, x_BTD, resets_BT, use_reentrant=False, context_fn=checkpoint_contexts)

    def init_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Any:
        """The mixer's state before the first token; the feed-forward layer has none."""
        return self.mixer.init_state(batch, device, dtype)

    def prefill(self, x_BTD: Tensor, state: Any) -> tuple[Tensor, Any]:
        mixed_BTD, state = self.mixer.prefill(self.mixer_norm(x_BTD), state)
        x_BTD = x_BTD + mixed_BTD
        return x_BTD + self.ffn(self.ffn_norm(x_BTD)), state

    def step(self, x_BD: Tensor, state: Any) -> tuple[Tensor, Any]:
        mixed_BD, state = self.mixer.step(self.mixer_norm(x_BD), state)
        x_BD = x_BD + mixed_BD
        return x_BD + self.ffn(self.ffn_norm(x_BD)[:, None])[:, 0], state
