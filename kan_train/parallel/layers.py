"""One layer class each for column-parallel, row-parallel and vocabulary-parallel weights. Without a tensor-parallel group each is the
plain layer."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_train.parallel.params import Normal, declare

_HEAD_ROWS = 512  # rows of logits held at a time


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


class VocabHead(nn.Module):
    """Logits x W^T over the vocabulary, W [vocab, width] with rows split over the axis "vocab"; or, given targets, their cross-entropy."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = declare(self, "weight", (vocab_size, width), axes=("vocab", None), init=Normal(1 / math.sqrt(width)), decay=True)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """x [..., width] -> logits [..., vocab] in its dtype; with targets (int64 [...], below 0: not counted) the mean cross-entropy, fp32 nats."""
        if targets is None:
            return F.linear(x, self.weight)
        return _CrossEntropy.apply(x.flatten(0, -2), self.weight, targets.flatten())


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x W^T without ever holding all logits: each slice of rows gives its loss and its gradients at once."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        counted = (targets >= 0).sum().clamp(min=1)
        total = torch.zeros((), dtype=wide, device=x.device)
        grad_x = torch.empty_like(x) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_grad else None
        for start in range(0, len(x), _HEAD_ROWS):
            rows, labels = x[start : start + _HEAD_ROWS], targets[start : start + _HEAD_ROWS]
            logits, label, counts = F.linear(rows, weight).to(wide), labels.clamp(min=0)[:, None], (labels >= 0)[:, None]
            target = logits.gather(1, label)
            # In place from here on: on a CPU fresh memory for the vocabulary costs more than the arithmetic on it.
            largest = logits.amax(1, keepdim=True)
            partition = logits.sub_(largest).exp_().sum(1, keepdim=True)
            total += (partition.log() + largest - target).mul_(counts).sum()
            if grad_x is not None and grad_weight is not None:
                share = counts.to(wide).div_(counted)
                grad_logits = logits.mul_(share / partition).scatter_add_(1, label, -share).to(x.dtype)
                torch.mm(grad_logits, weight, out=grad_x[start : start + _HEAD_ROWS])
                if grad_weight.dtype == x.dtype:
                    grad_weight.addmm_(grad_logits.T, rows)
                else:
                    grad_weight += grad_logits.T @ rows
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total / counted

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        grad_x, grad_weight = ctx.saved_tensors
        return (grad_x * grad).to(grad_x.dtype), (grad_weight * grad).to(ctx.weight_dtype), None
