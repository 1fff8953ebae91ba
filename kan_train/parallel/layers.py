"""One layer class each for column-parallel, row-parallel and vocabulary-parallel weights. On a tensor axis of one rank each is the plain layer.

Activations are [B, T, D]. Between the layers, in the residual stream, sequence parallelism holds T/n tokens on each of n tensor ranks. A `TensorRegion`
takes them into the region where heads, hidden units or vocabulary are split; a row-parallel layer leads out of it.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kan_train.parallel.mappings import copy_in, gather_last, gather_tokens, split_tokens, sum_and_split_tokens, sum_out
from kan_train.parallel.params import Normal, declare
from kan_train.parallel.place import Axis, current_place

_HEAD_ROWS = 512  # rows of logits held at a time on a CPU, whose caches they should not leave
_HEAD_LOGITS = 1 << 28  # logits held at a time elsewhere: every slice passes over the whole gradient of the weights, so that few large ones are best


class TensorRegion(nn.Module):
    """The way in, once for all column-parallel layers that read the same input, and the way out."""

    def __init__(self) -> None:
        super().__init__()
        place = current_place()
        self.axis, self.sequence_parallel = place.tensor, place.sequence_parallel

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T/n, D] under sequence parallelism, else [B, T, D] alike on all ranks -> [B, T, D]; parts of its gradient are summed."""
        return gather_tokens(x_BTD, self.axis, partial_gradients=True) if self.sequence_parallel else copy_in(x_BTD, self.axis)

    def leave(self, part_BTD: Tensor) -> Tensor:
        """The sum of the ranks' parts, split over them again under sequence parallelism."""
        return sum_and_split_tokens(part_BTD, self.axis) if self.sequence_parallel else sum_out(part_BTD, self.axis)


class GroveRegion(nn.Module):
    """The way of a layer's tokens to its groves and back, in one of four ways.

    - The same tokens on all ranks, as in decoding: each runs its part of the groves for all of them, and the parts are summed.
    - One tensor rank: as they are.
    - Tensor parallelism outside the groves alone (expert_tensor_parallel=1): each tensor rank routes and sends its own tokens, which sequence parallelism
      has split already, and which are split here without it.
    - Also inside (expert_tensor_parallel=tensor_parallel): every tensor rank routes all tokens alike, runs its part of every grove's hidden units, and
      the parts are summed.
    """

    def __init__(self) -> None:
        super().__init__()
        place = current_place()
        self.axis, self.inside, self.sequence_parallel = place.tensor, place.expert_tensor, place.sequence_parallel
        self.same_tokens, self.expert = place.same_tokens, place.expert

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] as the residual stream holds it -> the tokens that this rank routes."""
        if self.same_tokens:
            return x_BTD
        if self.inside.size == 1:
            return x_BTD if self.sequence_parallel else split_tokens(x_BTD, self.axis)
        return gather_tokens(x_BTD, self.axis, partial_gradients=False) if self.sequence_parallel else x_BTD

    def inputs(self, tensor: Tensor) -> Tensor:
        """What the groves read, held alike by the ranks that split their hidden units: the parts of its gradient are summed."""
        return copy_in(tensor, self.inside)

    def leave(self, y_BTD: Tensor) -> Tensor:
        """The routed sum of the tokens that this rank routed (or its part of it) -> [B, T, D] as the residual stream holds it."""
        if self.same_tokens:
            return sum_out(sum_out(y_BTD, self.inside), self.expert)
        if self.inside.size == 1:
            return y_BTD if self.sequence_parallel else gather_tokens(y_BTD, self.axis, partial_gradients=False)
        return sum_and_split_tokens(y_BTD, self.axis) if self.sequence_parallel else sum_out(y_BTD, self.axis)


class ColumnLinear(nn.Module):
    """y = x W^T inside a tensor region, the outputs of W [outputs, inputs] split over the axis named `axis`."""

    def __init__(self, inputs: int, outputs: int, *, axis: str, std: float | None = None) -> None:
        super().__init__()
        std = 1 / math.sqrt(inputs) if std is None else std
        self.weight = declare(self, "weight", (outputs, inputs), axes=(axis, None), init=Normal(std), decay=True, matrix=True)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs / n]: this rank's outputs."""
        return F.linear(x, self.weight)


class RowLinear(nn.Module):
    """y = x W^T out of a tensor region, the inputs of W [outputs, inputs] split over the axis named `axis`."""

    def __init__(self, inputs: int, outputs: int, *, axis: str, std: float | None = None) -> None:
        super().__init__()
        std = 1 / math.sqrt(inputs) if std is None else std
        self.weight = declare(self, "weight", (outputs, inputs), axes=(None, axis), init=Normal(std), decay=True, matrix=True)
        self.region = TensorRegion()

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, inputs / n] -> [B, T, outputs] ([B, T/n, outputs] under sequence parallelism)."""
        return self.region.leave(F.linear(x, self.weight))


class VocabEmbedding(nn.Module):
    """Token embedding [vocab, width], rows split over the axis "vocab"."""

    def __init__(self, vocab_size: int, width: int, *, std: float) -> None:
        super().__init__()
        self.weight = declare(self, "weight", (vocab_size, width), axes=("vocab", None), init=Normal(std), decay=True)
        self.region = TensorRegion()

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, T] (or [B]) -> [B, T, width] ([B, T/n, width] under sequence parallelism)."""
        if self.region.axis.size == 1:
            return F.embedding(tokens, self.weight)
        own = tokens - self.region.axis.rank * len(self.weight)
        elsewhere = (own < 0) | (own >= len(self.weight))
        rows = F.embedding(own.masked_fill(elsewhere, 0), self.weight)
        return self.region.leave(rows.masked_fill(elsewhere[..., None], 0.0))


class VocabHead(nn.Module):
    """Logits x W^T over the vocabulary, W [vocab, width] with rows split over the axis "vocab"; or, given targets, their cross-entropy."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = declare(self, "weight", (vocab_size, width), axes=("vocab", None), init=Normal(1 / math.sqrt(width)), decay=True)
        self.region = TensorRegion()

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """x [B, T, width] (T/n tokens under sequence parallelism) -> logits [B, T, vocab] in its dtype, on all ranks.

        With targets (int64 [B, T], below 0: not counted) the mean cross-entropy, fp32 nats.
        """
        x = self.region(x)
        if targets is None:
            return gather_last(F.linear(x, self.weight), self.region.axis)
        return _CrossEntropy.apply(x.flatten(0, -2), self.weight, targets.flatten(), self.region.axis)


def head_rows(vocab: int, device_type: str) -> int:
    """Tokens whose logits over `vocab` rows of the head are held at a time in training."""
    return _HEAD_ROWS if device_type == "cpu" else max(_HEAD_ROWS, _HEAD_LOGITS // vocab // 128 * 128)


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x W^T without ever holding all logits: each slice of rows gives its loss and its gradients at once.

    Ranks that split the vocabulary tell each other three numbers a row. The gradient of x is each rank's part of it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, axis: Axis) -> Tensor:  # type: ignore[no-untyped-def]
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        counted = (targets >= 0).sum().clamp(min=1)
        total = torch.zeros((), dtype=wide, device=x.device)
        grad_x = torch.empty_like(x) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_grad else None
        first, slice_rows = axis.rank * len(weight), head_rows(len(weight), x.device.type)
        for start in range(0, len(x), slice_rows):
            rows, labels = x[start : start + slice_rows], targets[start : start + slice_rows, None]
            logits, counts = F.linear(rows, weight).to(wide), labels >= 0
            held = (labels >= first) & (labels < first + len(weight))
            own = torch.where(held, labels - first, 0)
            target = logits.gather(1, own).mul_(held)
            # In place from here on: on a CPU fresh memory for the vocabulary costs more than the arithmetic on it.
            largest = logits.amax(1, keepdim=True)
            partition = logits.sub_(largest).exp_().sum(1, keepdim=True)
            scale, loss = _combine(largest, partition, target, axis)
            total += loss.mul_(counts).sum()
            if grad_x is not None and grad_weight is not None:
                share = counts.to(wide).div_(counted)
                grad_logits = logits.mul_(share * scale).scatter_add_(1, own, -share * held).to(x.dtype)
                torch.mm(grad_logits, weight, out=grad_x[start : start + slice_rows])
                if grad_weight.dtype == x.dtype:
                    grad_weight.addmm_(grad_logits.T, rows)
                else:
                    grad_weight += grad_logits.T @ rows
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total / counted

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[no-untyped-def]
        grad_x, grad_weight = ctx.saved_tensors
        return (grad_x * grad).to(grad_x.dtype), (grad_weight * grad).to(ctx.weight_dtype), None, None


def _combine(largest: Tensor, partition: Tensor, target: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """What turns exp(logit - largest of this rank) into a probability, and the rows' losses, each [n, 1], from each rank's part of the vocabulary."""
    if axis.size == 1:
        return 1 / partition, partition.log() + largest - target
    mine = torch.cat((largest, partition, target), dim=1)
    gathered = mine.new_empty(axis.size * len(mine), 3)
    dist.all_gather_into_tensor(gathered, mine, group=axis.group)
    parts = gathered.unflatten(0, (axis.size, -1))
    largest_of_all = parts[..., :1].amax(0)
    of_all = (parts[..., 1:2] * (parts[..., :1] - largest_of_all).exp()).sum(0)
    return (largest - largest_of_all).exp() / of_all, of_all.log() + largest_of_all - parts[..., 2:].sum(0)
