"""The language model: embedding, blocks, final norm, untied head (docs/model.md).  B batch, T time, D width, V vocabulary."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kan_train.config import ModelConfig
from kan_train.model.block import Block
from kan_train.model.grove import KalmaGrove
from kan_train.model.norm import RMSNorm
from kan_train.parallel.layers import VocabEmbedding, VocabHead
from kan_train.parallel.params import ParamSpec, named_specs
from kan_train.parallel.place import ALONE, at


@dataclass(frozen=True)
class Part:
    """What of a model one pipeline stage holds."""

    layers: range
    """Its blocks, by their numbers in the whole model."""
    is_first: bool
    """Whether it embeds the tokens."""
    is_last: bool
    """Whether it has the final norm and the head."""

    @classmethod
    def whole(cls, config: ModelConfig) -> "Part":
        """All of the model."""
        return cls(range(config.num_layers), is_first=True, is_last=True)


class LanguageModel(nn.Module):
    """Decoder-only language model, built on the meta device; `kan_train.model.init.materialise` gives it memory and weights.

    Built for the current place, it holds that place's shard of every parameter; with `part` the blocks of one pipeline stage, under the names that they
    have in the whole model.
    """

    def __init__(self, config: ModelConfig, part: Part | None = None) -> None:
        super().__init__()
        config.validate()
        self.config, self.part = config, part or Part.whole(config)
        self.activation_checkpointing = False
        if self.part.is_first:
            self.embedding = VocabEmbedding(config.vocab_size, config.width, std=config.embedding_std)
        self.layers = nn.ModuleList()
        for layer in self.part.layers:
            self.layers.add_module(str(layer), Block(config, layer))
        if self.part.is_last:
            self.final_norm = RMSNorm(config.width, eps=config.norm_eps)
            self.head = VocabHead(config.width, config.vocab_size)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, resets_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Training loss (cross-entropy plus auxiliary losses) and detached cross-entropy, two fp32 scalars in nats a token.

        tokens_BT and targets_BT are int64, targets below 0 do not count; resets_BT is bool, True at the first token of a document.
        """
        cross_entropy = self.cross_entropy(self.stream(tokens_BT, resets_BT), targets_BT)
        auxiliary = self.auxiliary_loss()
        return (cross_entropy if auxiliary is None else cross_entropy + auxiliary), cross_entropy.detach()

    def stream(self, x: Tensor, resets_BT: Tensor | None = None) -> Tensor:
        """The residual stream [B, T, D] behind the blocks of this part: of tokens (int64 [B, T]) in the first part, of the stream before it elsewhere."""
        if self.part.is_first:
            x = self.embedding(x)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            x = layer.recomputed(x, resets_BT) if recompute else layer(x, resets_BT)
        return x

    def cross_entropy(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy of the stream behind the last block: fp32 nats a token."""
        return self.head(self.final_norm(x_BTD), targets_BT)

    def auxiliary_loss(self) -> Tensor | None:
        """Sum of the auxiliary losses of the last forward pass over the blocks of this part; None where there are none."""
        losses = [loss for groves in self.grove_layers() if (loss := groves.auxiliary_loss()) is not None]
        return torch.stack(losses).sum() if losses else None

    def logits(self, tokens_BT: Tensor, resets_BT: Tensor | None = None) -> Tensor:
        """Next-token logits [B, T, V] in the dtype of the weights."""
        return self.head(self.final_norm(self.stream(tokens_BT, resets_BT)))

    def init_state(self, batch: int) -> list[Any]:
        """One mixer state a layer, before the first token of `batch` sequences."""
        weight = self.embedding.weight
        return [layer.init_state(batch, weight.device, weight.dtype) for layer in self.layers]

    def prefill(self, tokens_BT: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """Read T tokens after `state`: logits [B, V] of the next token, and the state after them."""
        x_BTD = self.embedding(tokens_BT)
        after = []
        for layer, before in zip(self.layers, state, strict=True):
            x_BTD, layer_state = layer.prefill(x_BTD, before)
            after.append(layer_state)
        return self.head(self.final_norm(x_BTD[:, -1])), after

    def step(self, tokens_B: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """Read one token after `state`: logits [B, V] of the next token, and the state after it."""
        x_BD = self.embedding(tokens_B)
        after = []
        for layer, before in zip(self.layers, state, strict=True):
            x_BD, layer_state = layer.step(x_BD, before)
            after.append(layer_state)
        return self.head(self.final_norm(x_BD)), after

    def grove_layers(self) -> list[KalmaGrove]:
        """The KalmaGrove layers, in order; none in a model without groves to choose."""
        return [layer.ffn for layer in self.layers if isinstance(layer.ffn, KalmaGrove)] if self.config.has_groves else []

    def pending_statistics(self) -> Tensor:
        """Routing statistics since the last `apply_statistics`: fp32 [layers, 3N+1], to be summed over every rank with different tokens."""
        groves = self.grove_layers()
        return torch.stack([layer.pending for layer in groves]) if groves else torch.empty(0)

    def apply_statistics(self, summed: Tensor, balance_rate: float) -> None:
        """Move running score statistics and selection biases by statistics summed over all ranks; forgets the pending ones."""
        for layer, row in zip(self.grove_layers(), summed, strict=True):
            layer.apply_statistics(row, balance_rate)

    def discard_statistics(self) -> None:
        """Forget the pending statistics: those of a step that is skipped."""
        for layer in self.grove_layers():
            layer.pending.zero_()


def parameter_table(config: ModelConfig) -> dict[str, ParamSpec]:
    """Canonical name -> facts of every parameter of a model, without giving it memory."""
    with at(ALONE):
        return dict(named_specs(LanguageModel(config)))


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(total, active) parameters: active counts K of the N groves."""
    table = parameter_table(config).values()
    groves = sum(spec.numel for spec in table if spec.grove)
    rest = sum(spec.numel for spec in table if not spec.grove)
    return rest + groves, rest + (groves * config.grove.active_groves // config.grove.num_groves if config.has_groves else 0)
