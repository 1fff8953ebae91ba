"""The whole job of `kan train` in each process: start or resume, step, validate, save, leave in good order. Hooks watch it."""

import gc
import math
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kan_train.checkpoint import CHECKPOINTS, find_checkpoint, prune, save, weights_checksum
from kan_train.config import Config, ConfigError
from kan_train.data import TrainingData, open_training_data
from kan_train.engine import build_engine
from kan_train.engine.engine import StepResult
from kan_train.engine.hooks import Hook, Hooks
from kan_train.engine.progress import (
    Progress,
    progress_of,
    random_states,
    restore,
    restore_random_states,
    restore_weights,
    run_directory,
    starting_point,
    state_for_checkpoint,
)
from kan_train.engine.rows import StepTimes, step_row
from kan_train.engine.schedule import balance_rate, learning_rate_factor
from kan_train.engine.signals import StopSignals, exit_code
from kan_train.engine.validation import ValidationResult, Validator
from kan_train.model.lm import parameter_table
from kan_train.parallel.runtime import Runtime, launch_size, runtime

EXIT_BAD_STEPS = 3
"""Exit status of a run that stopped because too many steps in a row were not finite."""

COLLECT_EVERY = 50
"""Steps between garbage collections."""

MakeHooks = Callable[[Config, Path, Runtime], Sequence[Hook]]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What came of a run, the same in every process."""

    finished: bool
    """Whether all steps of the run are done."""
    exit_code: int
    """0, 128 + n after signal n, or EXIT_BAD_STEPS."""
    run_dir: Path
    """The run directory."""
    steps: int
    """Steps done, in all segments of the run."""
    tokens: int
    """Tokens trained on, in all segments."""
    validation_loss: float | None
    """Last validation loss in nats a token; None if there was none."""
    bits_per_byte: float | None
    """The same in bits a byte of text."""
    tokens_per_second: float | None
    """Training throughput of the last segment: tokens a step over the median step time, all processes together."""


class TooManyBadSteps(RuntimeError):
    """recovery.max_bad_steps steps in a row had a loss or gradient that is not finite."""


def train(config: Config, make_hooks: MakeHooks | None = None) -> RunResult:
    """Train as `config` says. Called in every process of the run; returns the same in all.

    make_hooks: what watches the run; unset: metrics.jsonl, ledger, console and W&B as `config.logging` says.
    Raises ConfigError before any work where a setting, the data or the checkpoint does not allow the run.
    """
    config.validate(launch_size())
    with StopSignals() as signals, runtime(config) as started:
        run_dir, own = run_directory(config), starting_point(config)
        if own is not None and (done := progress_of(own)).step >= config.train.steps:
            if started.is_first:
                print(
                    f"kan: run {config.run.name} has finished its {done.step} steps already; for more, use train.steps={2 * done.step}",
                    file=sys.stderr,
                )
            return _result(run_dir, done, finished=True, code=0)
        run = _Run(config, run_dir, started, signals, own)
        try:
            return run.train(Hooks((make_hooks or _default_hooks)(config, run_dir, started)))
        finally:
            run.close()


def _default_hooks(config: Config, run_dir: Path, runtime: Runtime) -> Sequence[Hook]:
    from kan_train.accounting.watch import default_hooks

    return default_hooks(config, run_dir, runtime)


class _Run:
    """One segment of a run: from a start or restart of the processes to their end."""

    def __init__(self, config: Config, run_dir: Path, runtime: Runtime, signals: StopSignals, own: Path | None) -> None:
        self.config, self.run_dir, self.runtime, self.signals = config, run_dir, runtime, signals
        train, model = config.train, config.model
        self.data = open_training_data(
            config.data, sequence_length=model.sequence_length, seed=config.run.seed, vocab_size=model.vocab_size
        )
        self.engine = build_engine(config, runtime)
        readers = self.engine.place.data
        self.loader = self.data.loader(train.global_batch_size, train.micro_batch_size, readers.rank, readers.size)
        self.validator = Validator(train, self.data, readers)
        self.tokens_a_step = train.global_batch_size * model.sequence_length
        self.step_seconds: list[float] = []
        self.progress, self.origin = self._start(own)
        _prepare_run_directory(config, run_dir, self.data, runtime)

    def _start(self, own: Path | None) -> tuple[Progress, str]:
        config = self.config
        if own is not None:
            progress = restore(own, config, self.engine, self.loader)
            restore_random_states(own, self.runtime.rank)
            progress.segment += 1
            return progress, f"resumed from {own}"
        if config.branch_from:
            origin = find_checkpoint("branch_from", config.branch_from, config.run.root)
            progress = restore(origin, config, self.engine, self.loader)
            restore_random_states(origin, self.runtime.rank)
            if progress.step >= config.train.steps:
                raise ConfigError(
                    f"train.steps={config.train.steps} is not beyond the {progress.step} steps of branch_from={origin}; "
                    f"use train.steps={progress.step + max(1, progress.step // 4)} or more"
                )
            progress.segment, progress.figures = 1, {}
            return progress, f"branched from {origin}"
        if config.init_from:
            origin = find_checkpoint("init_from", config.init_from, config.run.root)
            restore_weights(origin, config, self.engine)
            return Progress(), f"weights of {origin}"
        return Progress(), "new"

    def train(self, hooks: Hooks) -> RunResult:
        """Run the loop to its end, a signal, or too many bad steps."""
        progress = self.progress
        hooks.on_start(
            {
                "step": progress.step,
                "steps": self.config.train.steps,
                "tokens": progress.tokens,
                "segment": progress.segment,
                "origin": self.origin,
            }
        )
        status = "failed"
        try:
            if progress.step == 0:
                self._report_weights(hooks)
            number = self._loop(hooks)
            status = "interrupted" if number else "finished"
        except TooManyBadSteps as error:
            if self.runtime.is_first:
                print(f"kan: {error}", file=sys.stderr)
            return _result(self.run_dir, progress, finished=False, code=EXIT_BAD_STEPS)
        finally:
            hooks.on_end({"status": status, "step": progress.step, "tokens": progress.tokens, "segment": progress.segment})
        return _result(self.run_dir, progress, finished=not number, code=exit_code(number) if number else 0)

    def _report_weights(self, hooks: Hooks) -> None:
        """Say which weights the run starts from: a number that does not depend on the layout."""
        shapes = {name: spec.shape for name, spec in parameter_table(self.config.model).items()}
        checksum = weights_checksum(self.engine.named_fragments(), shapes, self.runtime.sum, device=self.runtime.device)
        hooks.on_event("weights", {"step": 0, "checksum": checksum})

    def _loop(self, hooks: Hooks) -> int:
        """Step until the run is done (returns 0) or a signal arrives (returns its number, the run being saved)."""
        # A garbage collection on one rank alone stalls all others in the next all-reduce: it runs on every rank at the same steps instead.
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            while True:
                self._step(hooks)
                progress = self.progress
                number = self.runtime.largest(self.signals.received)
                last = progress.step == self.config.train.steps
                if last or number or (self.config.checkpoint.every and progress.step % self.config.checkpoint.every == 0):
                    self._save(hooks)
                if number and not last:
                    self._announce(hooks, number)
                    return number
                if last:
                    return 0
                if progress.step % COLLECT_EVERY == 0:
                    gc.collect()
        finally:
            gc.enable()
            gc.unfreeze()

    def _step(self, hooks: Hooks) -> None:
        config, progress, started = self.config, self.progress, time.perf_counter()
        batches = self.loader.next_step()
        loaded = time.perf_counter()
        learning_rate = config.optimizer.learning_rate * learning_rate_factor(config.optimizer.schedule, progress.step, config.train.steps)
        rate = balance_rate(config.model.grove, progress.step, config.train.steps)
        result = self.engine.train_step(batches, learning_rate, rate)
        seconds = StepTimes(data=loaded - started, step=time.perf_counter() - started, **result.seconds)
        progress.step += 1
        progress.tokens += self.tokens_a_step
        self._count_bad(result, hooks)
        self.step_seconds.append(seconds.step)
        progress.figures["tokens_per_second"] = self.tokens_a_step / statistics.median(self.step_seconds[1:][-200:] or self.step_seconds)
        validation = self._validate(hooks) if self.validator.due(progress.step) else None
        hooks.on_step(step_row(config, self.runtime, progress, result, seconds, learning_rate, validation))
        if progress.bad_steps >= config.recovery.max_bad_steps:
            raise TooManyBadSteps(
                f"the loss or gradient was not finite in {progress.bad_steps} steps in a row "
                f"(recovery.max_bad_steps={config.recovery.max_bad_steps}), the last one step {progress.step}; the weights are those of before. "
                f"Start again from the last checkpoint with a smaller optimizer.learning_rate={config.optimizer.learning_rate / 2:g}, "
                f"or set a larger recovery.max_bad_steps"
            )

    def _count_bad(self, result: StepResult, hooks: Hooks) -> None:
        progress = self.progress
        progress.bad_steps = progress.bad_steps + 1 if result.skipped else 0
        progress.skipped_steps += int(result.skipped)
        if result.skipped:
            hooks.on_event(
                "skipped_step", {"step": progress.step, "in_a_row": progress.bad_steps, "loss": result.loss, "grad_norm": result.grad_norm}
            )

    def _validate(self, hooks: Hooks) -> ValidationResult:
        result = self.validator.run(self.engine)
        # A checkpoint's JSON has no NaN: a validation that diverged must not keep the run from being saved.
        figures = {"validation_loss": result.loss, "bits_per_byte": result.bits_per_byte}
        self.progress.figures |= {name: value if math.isfinite(value) else None for name, value in figures.items()}
        hooks.on_event(
            "validation",
            {
                "step": self.progress.step,
                "loss": result.loss,
                "bits_per_byte": result.bits_per_byte,
                "heldout_tokens": result.tokens,
                "seconds": result.seconds,
            },
        )
        return result

    def _save(self, hooks: Hooks) -> None:
        started = time.perf_counter()
        directory = self.run_dir / CHECKPOINTS
        path = save(
            directory,
            step=self.progress.step,
            fragments=list(self.engine.named_fragments()),
            state=state_for_checkpoint(self.progress, self.config, self.engine, self.loader),
            rank_tensors=random_states(self.runtime.device),
            config=_yaml(self.config),
        )
        if self.runtime.is_first:
            prune(directory, self.config.checkpoint.keep)
        hooks.on_event("save", {"step": self.progress.step, "path": str(path), "seconds": time.perf_counter() - started})

    def _announce(self, hooks: Hooks, number: int) -> None:
        name = signal.Signals(number).name
        hooks.on_event("signal", {"step": self.progress.step, "signal": name})
        if self.runtime.is_first:
            print(
                f"kan: {name} received: run {self.config.run.name} is saved at step {self.progress.step} of {self.config.train.steps}; "
                "the same command continues it",
                file=sys.stderr,
            )

    def close(self) -> None:
        self.loader.close()
        self.engine.close()


def _prepare_run_directory(config: Config, run_dir: Path, data: TrainingData, runtime: Runtime) -> None:
    if runtime.is_first:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "config.yaml").write_text(_yaml(config))
            shutil.copyfile(data.tokenizer_path, run_dir / "tokenizer.model")
        except OSError as error:
            raise ConfigError(
                f"the run directory {run_dir} cannot be written ({error.strerror}); use run.root=PATH with a folder you may write"
            ) from error
    runtime.barrier()


def _yaml(config: Config) -> str:
    from kan_train.config.compose import to_yaml

    return to_yaml(config)


def _result(run_dir: Path, progress: Progress, *, finished: bool, code: int) -> RunResult:
    figures: dict[str, Any] = progress.figures
    return RunResult(
        finished=finished,
        exit_code=code,
        run_dir=run_dir,
        steps=progress.step,
        tokens=progress.tokens,
        validation_loss=figures.get("validation_loss"),
        bits_per_byte=figures.get("bits_per_byte"),
        tokens_per_second=figures.get("tokens_per_second"),
    )
