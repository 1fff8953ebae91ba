"""One layer class each for column-parallel, row-parallel and vocabulary-parallel weights. Without a tensor-parallel group each is the
plain layer."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from kan_train.parallel.params import Normal, declare


class ColumnLinear(nn.Module):
    """y = x W^T, the outputs of W [outputs, inputs] split over the axis named `axis`."""

    def __init__(self, inputs: int, outputs: int, *, axis: str, std: float | None = None) -> None:
        super().__init__()
        std = 1 / math.sqrt(inputs) if std is None else std
        self.weight = declare(self, "weight", (outputs, inputs), axes=(axis, None), init=Normal(std), decay=True, matrix=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class RowLinear(nn.Module):
    """y = x W^T, the inputs of W [outputs, inputs] split over the axis named `axis`."""

    def __init__(self, inputs: int, outputs: int, *, axis: str, std: float | None = None) -> None:
        super().__init__()
        std = 1 / math.sqrt(inputs) if std is None else std
        self.weight = declare(self, "weight", (outputs, inputs), axes=(None, axis), init=Normal(std), decay=True, matrix=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class VocabEmbedding(nn.Module):
    """Token embedding [vocab, width], rows split over the axis "vocab"."""

    def __init__(self, vocab_size: int, width: int, *, std: float) -> None:
        super().__init__()
        self.weight = declare(self, "weight", (vocab_size, width), axes=("vocab", None), init=Normal(std), decay=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


def vocab_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats over all positions, in fp32.  logits [..., V], targets int64 [...]; targets below 0 do not count."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=-1)
