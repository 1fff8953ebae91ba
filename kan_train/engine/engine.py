"""What every engine does in a step, and what it must offer: gradients over micro-batches, one decision for all ranks, one update.

Every micro-batch of a training step has the same number of counted tokens, so means of means are exact.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kan_train.checkpoint.boxes import Fragment
from kan_train.config import Config
from kan_train.engine.optimizer import optimizer_steps, set_learning_rate, set_optimizer_steps
from kan_train.model.lm import LanguageModel
from kan_train.parallel.place import ALONE, Place
from kan_train.parallel.runtime import Runtime

if TYPE_CHECKING:
    from kan_train.data import Batch


@dataclass(kw_only=True)
class StepResult:
    """One optimizer step, the same in every process but for `seconds`."""

    loss: float
    """Mean training loss of the global batch in nats a token, auxiliary losses included."""
    cross_entropy: float
    """Mean cross-entropy of the global batch in nats a token."""
    grad_norm: float
    """Euclidean norm of the gradient of the mean loss, before clipping."""
    skipped: bool
    """Whether the step changed nothing, because a loss or gradient was not finite somewhere."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock of "forward_backward" and "optimizer" in this process."""
    statistics: Tensor | None = field(default=None, repr=False)
    """Routing statistics of the global batch, fp32 [layers, 3N+1], as `LanguageModel.pending_statistics`; None for a dense model or a
    skipped step."""


class Engine(ABC):
    """A model in training. `parts` are the modules of it that this process holds, whatever wraps them: one, or several stages of a pipeline."""

    def __init__(self, config: Config, parts: Sequence[LanguageModel], runtime: Runtime, place: Place = ALONE) -> None:
        self.config, self.parts, self.runtime, self.place = config, list(parts), runtime, place
        for part in parts:
            part.activation_checkpointing = config.train.activation_checkpointing
        self.optimizer: Any = None

    @property
    def model(self) -> LanguageModel:
        """The model, where this process holds its whole depth; else the first of its parts."""
        return self.parts[0]

    def train_step(self, batches: "Sequence[Batch]", learning_rate: float, balance_rate: float | None = None) -> StepResult:
        """One optimizer step on the micro-batches of a global batch that this rank's place on the data axis reads. Collective: every rank calls it
        with as many micro-batches; ranks that differ on other axes alone bring the same ones, of whole sequences.

        learning_rate: of a group of multiple 1. balance_rate: step of the groves' selection bias; unset: model.grove.balance_rate.
        A step with a loss or gradient that is not finite on any rank changes nothing on any.
        """
        self._training(True)
        set_learning_rate(self.optimizer, learning_rate)
        clock = _Clock(self.runtime)
        losses = self._forward_backward([self._own(batch) for batch in batches])
        forward_backward = clock.lap()
        grad_norm, skipped = self._update()
        statistics = self._move_balance(balance_rate, skipped)
        return StepResult(
            loss=losses.sum().item(),
            cross_entropy=losses[0].item(),
            grad_norm=grad_norm,
            skipped=skipped,
            seconds={"forward_backward": forward_backward, "optimizer": clock.lap()},
            statistics=statistics,
        )

    @torch.no_grad()
    def evaluate(self, batches: "Iterable[Batch]") -> tuple[float, int]:
        """(nats, tokens): summed cross-entropy of the counted tokens, and their number, over all ranks' batches.

        Collective: every rank brings as many batches.
        """
        self._training(False)
        totals = torch.zeros(2, dtype=torch.float64, device=self.runtime.device)
        own = [self._own(batch) for batch in batches]
        for batch, cross_entropy in zip(own, self._cross_entropies(own), strict=True):
            counted = (batch.targets >= 0).sum()
            # The mean over no token at all is not a number.
            nats = torch.where(counted > 0, cross_entropy.double() * counted, 0.0)
            totals += torch.stack((nats, counted.double()))
        self._training(True)
        nats_sum, tokens = self.place.replicas.sum(totals).tolist()
        return nats_sum, int(tokens)

    @abstractmethod
    def named_fragments(self) -> Iterator[Fragment]:
        """What this rank holds of the run's tensors: "param/NAME" (fp32 masters), "exp_avg/NAME", "exp_avg_sq/NAME", "momentum/NAME"
        and "buffer/NAME".

        Exactly one rank has write=True for each element. Views, not copies: loading fills them; call `after_load` then.
        """

    @abstractmethod
    def after_load(self) -> None:
        """Make the weights that compute equal to the fp32 masters that a load has filled. Collective."""

    def state_dict(self) -> dict[str, int]:
        """Scalars of the optimizer, for JSON; the same on every rank."""
        return {"optimizer_steps": self.runtime.largest(optimizer_steps(self._inner_optimizer()))}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take the scalars that `state_dict` gave."""
        set_optimizer_steps(self._inner_optimizer(), state["optimizer_steps"])

    def close(self) -> None:  # noqa: B027 (most engines hold nothing)
        """Free what the engine holds beyond its model."""

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer

    @abstractmethod
    def _forward_backward(self, batches: "list[Batch]") -> Tensor:
        """Gradients of the mean loss of the global batch; cross-entropy and auxiliary losses [2] of it, fp64, the same on every rank.

        Where one of them is not finite on any rank, the gradients are not finite on any: one check of their norm then decides for all alike.
        """

    @abstractmethod
    def _cross_entropies(self, batches: "list[Batch]") -> Iterable[Tensor]:
        """Mean cross-entropy of each micro-batch, the same on all tensor and pipeline ranks. Collective."""

    @abstractmethod
    def _update(self) -> tuple[float, bool]:
        """Clip and step, or skip the step, and clear the gradients: (global norm before clipping, skipped), the same on every rank."""

    def _training(self, training: bool) -> None:
        for part in self.parts:
            part.train(training)

    def _move_balance(self, balance_rate: float | None, skipped: bool) -> Tensor | None:
        """Move selection biases and score statistics; returns the global batch's statistics of all layers, the same on every rank."""
        if not self.config.model.has_groves:
            return None
        if skipped:
            for part in self.parts:
                part.discard_statistics()
            return None
        rate = self.config.model.grove.balance_rate if balance_rate is None else balance_rate
        readers = self.place.stage if self.place.groves_split_tokens else self.place.replicas
        of_all = torch.zeros(self.config.model.num_layers, 3 * self.config.model.grove.num_groves + 1, device=self.runtime.device)
        for part in self.parts:
            statistics = readers.sum(part.pending_statistics())
            part.apply_statistics(statistics, rate)
            of_all[part.part.layers.start : part.part.layers.stop] = statistics
        return self.place.pipeline.sum(of_all)

    def _own(self, batch: "Batch") -> "Batch":
        """This rank's chunk of the sequences of `batch`, on its device."""
        batch = batch.chunk(self.place.context.rank, self.place.context.size)
        return batch if self.runtime.device.type == "cpu" else batch.to(self.runtime.device)

    def _mean_losses(self, losses: Tensor, micro_batches: int) -> Tensor:
        """[cross-entropy, auxiliary losses] of the global batch from this rank's sums over its micro-batches; over the ranks of one pipeline stage."""
        # Tensor ranks have the same cross-entropy, and parts of the auxiliary losses where each routes its own tokens.
        tensor = self.place.tensor.size
        shares = losses.new_tensor([1 / tensor, 1.0 if self.place.groves_split_tokens else 1 / tensor])
        return self.place.stage.sum(losses * shares) / (micro_batches * self.place.replicas.size)


class MicroBatchEngine(Engine):
    """An engine that takes one micro-batch after the other through the whole model, forward and backward."""

    def _forward_backward(self, batches: "list[Batch]") -> Tensor:
        sums = torch.zeros(2, dtype=torch.float64, device=self.runtime.device)
        for index, batch in enumerate(batches):
            loss, cross_entropy = self._forward(batch)
            sums += torch.stack((cross_entropy, loss.detach() - cross_entropy)).double()
            last = index == len(batches) - 1
            if last:
                sums = self._mean_losses(sums, len(batches))
                loss = loss * torch.where(sums.isfinite().all(), 1.0, torch.nan).to(loss.dtype)
            self._backward(loss, len(batches), last=last)
        return sums

    def _cross_entropies(self, batches: "list[Batch]") -> Iterable[Tensor]:
        return (self._forward(batch)[1] for batch in batches)

    @abstractmethod
    def _forward(self, batch: "Batch") -> tuple[Tensor, Tensor]:
        """(loss, cross-entropy) of a micro-batch on the device."""

    @abstractmethod
    def _backward(self, loss: Tensor, micro_batches: int, *, last: bool) -> None:
        """Add the gradients of loss / micro_batches; at the last micro-batch of a step they become those of the global batch."""


def replicated_fragments(parts: Sequence[nn.Module], place: Place) -> Iterator[Fragment]:
    """The persistent buffers of `parts`: every rank of a pipeline stage has them all, the first one writes them."""
    for path, module in (pair for part in parts for pair in part.named_modules()):
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield Fragment.whole(f"buffer/{path}.{name}" if path else f"buffer/{name}", buffer, write=place.stage.is_first)


class _Clock:
    """Seconds between laps, with the device's work done."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.started = time.perf_counter()

    def lap(self) -> float:
        self.runtime.synchronise()
        before, self.started = self.started, time.perf_counter()
        return self.started - before
