"""What is measured between steps: the loss on held-out text, and the tasks of train.evaluate_tasks. Nothing that training goes on from is touched."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kan_train.config import Config, ConfigError
from kan_train.engine.engine import Engine
from kan_train.engine.hooks import Hooks, Row
from kan_train.engine.progress import Progress
from kan_train.engine.validation import Validator
from kan_train.engine.watchdog import Watchdog

if TYPE_CHECKING:
    from kan_train.data import TrainingData


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """What came of a task's questions."""

    metric: str
    """How a choice is made: one of `kan evaluate`'s metrics."""
    right: int
    """Questions that were answered right."""
    questions: int
    """Questions."""
    random: float
    """Accuracy of choosing evenly."""
    majority: float
    """Accuracy of the answer's place that is most often right."""

    @property
    def accuracy(self) -> float:
        """Share that was answered right."""
        return self.right / self.questions


class Evaluator(Protocol):
    """Measures tasks with a model in training; kan_train.evaluation, which lies above this room, has it (`during.TaskEvaluator`)."""

    def run(self, engine: Engine, stopped: Callable[[], bool], alive: Callable[[], None]) -> Mapping[str, TaskScore] | None:
        """Task -> its score, the same on every rank; None where `stopped`, asked now and then on every rank alike, said so. Collective.

        alive: called often, on each rank by itself.
        """


MakeEvaluator = Callable[[Config, Path], Evaluator]
"""From the configuration and the tokenizer's file, with all questions read: ConfigError where some are missing."""


def evaluator_of(config: Config, tokenizer: Path, make: MakeEvaluator | None) -> Evaluator | None:
    """What evaluates the run; None where train.evaluate_every=0. ConfigError where questions are missing."""
    if not config.train.evaluate_every:
        return None
    if make is None:
        raise ConfigError(
            f"train.evaluate_every={config.train.evaluate_every}, but nothing that evaluates was given to train(); use "
            "make_evaluator=kan_train.evaluation.during.task_evaluator, or train.evaluate_every=0"
        )
    return make(config, tokenizer)


class Examination:
    """Validation and evaluation of one run."""

    def __init__(self, config: Config, data: "TrainingData", engine: Engine, watchdog: Watchdog, evaluator: Evaluator | None) -> None:
        """A corpus that holds nothing out is refused here. evaluator: None where train.evaluate_every=0."""
        self.train, self.engine, self.watchdog, self.evaluator = config.train, engine, watchdog, evaluator
        self.validator = Validator(config.train, data, engine.place.data)

    def after_step(self, progress: Progress, hooks: Hooks, stopped: Callable[[], int]) -> Row:
        """Measure what is due; returns what it adds to the step's row. Collective."""
        every, step = self.train.evaluate_every, progress.step
        progress.validation_due = self.validator.due(step)
        progress.evaluation_due = self.evaluator is not None and (step % every == 0 or step == self.train.steps)
        return self.what_is_due(progress, hooks, stopped)

    def what_is_due(self, progress: Progress, hooks: Hooks, stopped: Callable[[], int]) -> Row:
        """Measure what `progress` says is due. What `stopped` breaks off stays due, until the run goes on. Collective."""
        row: Row = {}
        if progress.validation_due:
            row |= self._validate(progress, hooks, stopped)
        if progress.evaluation_due and not progress.validation_due:
            row |= self._evaluate(progress, hooks, stopped)
        return row

    def _validate(self, progress: Progress, hooks: Hooks, stopped: Callable[[], int]) -> Row:
        started, asks = time.perf_counter(), self._asks("validation", progress.step, stopped)
        result = self.validator.run(self.engine, asks)
        progress.validation_due = result is None
        if result is None:
            return _broken_off("validation", progress, hooks, started)
        # A checkpoint's JSON has no NaN: a validation that diverged must not keep the run from being saved.
        figures = {"validation_loss": result.loss, "bits_per_byte": result.bits_per_byte}
        progress.figures |= {name: value if math.isfinite(value) else None for name, value in figures.items()}
        told = {"loss": result.loss, "bits_per_byte": result.bits_per_byte, "heldout_tokens": result.tokens, "seconds": result.seconds}
        hooks.on_event("validation", {"step": progress.step} | told)
        return {"validation/loss": result.loss, "validation/bits_per_byte": result.bits_per_byte, "time/validation": result.seconds}

    def _evaluate(self, progress: Progress, hooks: Hooks, stopped: Callable[[], int]) -> Row:
        if self.evaluator is None:  # the run that was broken off measured tasks, this one does not
            progress.evaluation_due = False
            return {}
        started, asks = time.perf_counter(), self._asks("evaluation", progress.step, stopped)
        scores = self.evaluator.run(self.engine, asks, lambda: self.watchdog.beat("evaluation", progress.step))
        progress.evaluation_due = scores is None
        if scores is None:
            return _broken_off("evaluation", progress, hooks, started)
        seconds = time.perf_counter() - started
        hooks.on_event("evaluation", {"step": progress.step, "seconds": seconds, "tasks": {task: _as_json(score) for task, score in scores.items()}})
        return {f"evaluation/{task}/accuracy": score.accuracy for task, score in scores.items()} | {"time/evaluation": seconds}

    def _asks(self, phase: str, step: int, stopped: Callable[[], int]) -> Callable[[], bool]:
        self.watchdog.beat(phase, step)

        def asks() -> bool:
            self.watchdog.beat(phase, step)
            return stopped() != 0

        return asks


def _broken_off(kind: str, progress: Progress, hooks: Hooks, started: float) -> Row:
    hooks.on_event(f"{kind}_stopped", {"step": progress.step, "seconds": time.perf_counter() - started})
    return {}


def _as_json(score: TaskScore) -> dict[str, Any]:
    return {
        "metric": score.metric, "accuracy": score.accuracy, "right": score.right, "questions": score.questions,
        "random": score.random, "majority": score.majority,
    }  # fmt: skip
