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
    """A model in training. `model` is the module itself, whatever wraps it."""

    def __init__(self, config: Config, model: LanguageModel, runtime: Runtime) -> None:
        self.config, self.model, self.runtime = config, model, runtime
        model.activation_checkpointing = config.train.activation_checkpointing
        self.optimizer: Any = None

    def train_step(self, batches: "Sequence[Batch]", learning_rate: float, balance_rate: float | None = None) -> StepResult:
        """One optimizer step on this rank's micro-batches of a global batch. Collective: every rank calls it with as many micro-batches.

        learning_rate: of a group of multiple 1. balance_rate: step of the groves' selection bias; unset: model.grove.balance_rate.
        A step with a loss or gradient that is not finite on any rank changes nothing on any.
        """
        self.model.train()
        set_learning_rate(self.optimizer, learning_rate)
        clock = _Clock(self.runtime)
        sums = torch.zeros(2, dtype=torch.float64, device=self.runtime.device)
        for index, batch in enumerate(batches):
            loss, cross_entropy = self._forward(self._to_device(batch))
            sums += torch.stack((loss.detach(), cross_entropy)).double()
            if index == len(batches) - 1:
                self.runtime.sum(sums)
                # A bad loss anywhere becomes a bad gradient everywhere: one check of the gradient norm then decides for all ranks alike.
                loss = loss * torch.where(sums.isfinite().all(), 1.0, torch.nan).to(loss.dtype)
            self._backward(loss, len(batches), last=index == len(batches) - 1)
        mean_loss, mean_cross_entropy = (sums / (len(batches) * self.runtime.world_size)).tolist()
        forward_backward = clock.lap()
        grad_norm, skipped = self._update()
        statistics = self._move_balance(balance_rate, skipped)
        return StepResult(
            loss=mean_loss,
            cross_entropy=mean_cross_entropy,
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
        self.model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.runtime.device)
        for batch in batches:
            batch = self._to_device(batch)
            _, cross_entropy = self._forward(batch)
            counted = (batch.targets >= 0).sum()
            # The mean over no token at all is not a number.
            nats = torch.where(counted > 0, cross_entropy.double() * counted, 0.0)
            totals += torch.stack((nats, counted.double()))
        self.model.train()
        nats_sum, tokens = self.runtime.sum(totals).tolist()
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
    def _forward(self, batch: "Batch") -> tuple[Tensor, Tensor]:
        """(loss, cross-entropy) of a micro-batch on the device."""

    @abstractmethod
    def _backward(self, loss: Tensor, micro_batches: int, *, last: bool) -> None:
        """Add the gradients of loss / micro_batches; at the last micro-batch of a step they become those of the global batch."""

    @abstractmethod
    def _update(self) -> tuple[float, bool]:
        """Clip and step, or skip the step, and clear the gradients: (global norm before clipping, skipped), the same on every rank."""

    def _move_balance(self, balance_rate: float | None, skipped: bool) -> Tensor | None:
        statistics = self.model.pending_statistics()
        if not statistics.numel():
            return None
        if skipped:
            self.model.discard_statistics()
            return None
        self.runtime.sum(statistics)
        self.model.apply_statistics(statistics, self.config.model.grove.balance_rate if balance_rate is None else balance_rate)
        return statistics

    def _to_device(self, batch: "Batch") -> "Batch":
        return batch if self.runtime.device.type == "cpu" else batch.to(self.runtime.device)


def replicated_fragments(model: nn.Module, runtime: Runtime) -> Iterator[Fragment]:
    """The model's persistent buffers: every rank has them all, the first one writes them."""
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield Fragment.whole(f"buffer/{path}.{name}" if path else f"buffer/{name}", buffer, write=runtime.is_first)


class _Clock:
    """Seconds between laps, with the device's work done."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.started = time.perf_counter()

    def lap(self) -> float:
        self.runtime.synchronise()
        before, self.started = self.started, time.perf_counter()
        return self.started - before
