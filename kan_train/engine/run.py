"""One segment of a run: from a start or restart of the processes to their end. The loop over steps, and what interrupts it."""

import gc
import shutil
import signal
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from kan_train.accounting.energy import EnergyReports, counters_of
from kan_train.checkpoint import Fragment, Manifest, checkpoint_directory, find_checkpoint, weights_checksum
from kan_train.config import Config, ConfigError
from kan_train.config.layout import layout_of
from kan_train.data import TrainingData, open_training_data
from kan_train.engine import build_engine
from kan_train.engine.engine import StepResult
from kan_train.engine.examination import Examination, MakeEvaluator, evaluator_of
from kan_train.engine.exits import EXIT_BAD_STEPS, EXIT_BUDGET, EXIT_STOPPED
from kan_train.engine.hooks import Hooks
from kan_train.engine.progress import Progress, random_states, restore, restore_random_states, restore_weights, state_for_checkpoint
from kan_train.engine.recovery import delete_after, judge, last_good
from kan_train.engine.result import RunResult, result_of
from kan_train.engine.rows import StepTimes, step_row
from kan_train.engine.saving import Saver, Snapshot
from kan_train.engine.schedule import balance_rate, learning_rate_factor
from kan_train.engine.signals import StopSignals
from kan_train.engine.stragglers import RankReports
from kan_train.engine.watchdog import Watchdog
from kan_train.model.lm import parameter_table
from kan_train.parallel.runtime import Runtime

PATIENCE = 4.0
"""Times recovery.hang_minutes that reading and writing whole checkpoints may take."""

OVER_BUDGET = 1000
"""Among the numbers of signals, above all of them: what a limit of accounting stops must not be started again."""

COLLECT_EVERY = 50
"""Steps between garbage collections."""


class TooManyBadSteps(RuntimeError):
    """recovery.max_bad_steps steps in a row were bad, and the run may not, or cannot, go back to a checkpoint."""


class Run:
    """One segment of a run: from a start or restart of the processes to their end."""

    def __init__(
        self, config: Config, run_dir: Path, runtime: Runtime, signals: StopSignals, own: Path | None, watchdog: Watchdog,
        make_evaluator: MakeEvaluator | None = None,
    ) -> None:  # fmt: skip
        self.config, self.run_dir, self.runtime, self.signals, self.watchdog = config, run_dir, runtime, signals, watchdog
        self.directory = checkpoint_directory(run_dir, config.checkpoint.location)
        train, model = config.train, config.model
        self.data = open_training_data(
            config.data, sequence_length=model.sequence_length, seed=config.run.seed, vocab_size=model.vocab_size
        )
        # Before the model is built: questions that are missing are told at once.
        evaluator = evaluator_of(config, self.data.tokenizer_path, make_evaluator)
        # Nothing draws from it yet. What will (dropout, say) must draw the same numbers in two runs of one seed, and others on every rank.
        torch.manual_seed(config.run.seed + runtime.rank)
        self.engine = build_engine(config, runtime)
        readers = self.engine.place.data
        self.loader = self.data.loader(train.global_batch_size, train.micro_batch_size, readers.rank, readers.size)
        self.examination = Examination(config, self.data, self.engine, watchdog, evaluator)
        self.ranks = RankReports(config.stragglers, runtime, self.engine.place.pipeline.rank, run_dir)
        self.energy = EnergyReports(runtime, counters_of(runtime))
        self.over_budget = ""
        self.tokens_a_step = train.global_batch_size * model.sequence_length
        self.step_seconds: list[float] = []
        self.progress, self.origin = self._start(own)
        self.saved_step = self.progress.step
        self.saver = Saver(config.checkpoint, self.directory, runtime, _validation_loss)
        _prepare_run_directory(config, run_dir, self.data, runtime)

    def _start(self, own: Path | None) -> tuple[Progress, str]:
        config = self.config
        if own is not None:
            progress = self._restore(own, verify=False)
            progress.segment += 1
            return progress, f"resumed from {own}"
        if config.branch_from:
            origin = find_checkpoint("branch_from", config.branch_from, config.run.root)
            progress = self._restore(origin, verify=True)
            if progress.step >= config.train.steps:
                raise ConfigError(
                    f"train.steps={config.train.steps} is not beyond the {progress.step} steps of branch_from={origin}; "
                    f"use train.steps={progress.step + max(1, progress.step // 4)} or more"
                )
            progress.segment, progress.rewinds, progress.figures = 1, 0, {}
            return progress, f"branched from {origin}"
        if config.init_from:
            origin = find_checkpoint("init_from", config.init_from, config.run.root)
            restore_weights(origin, config, self.engine)
            return Progress(), f"weights of {origin}"
        return Progress(), "new"

    def _restore(self, checkpoint: Path, *, verify: bool) -> Progress:
        progress = restore(checkpoint, self.config, self.engine, self.loader, verify=verify)
        restore_random_states(checkpoint, self.runtime.rank)
        return progress

    def train(self, hooks: Hooks, watching: Hooks) -> RunResult:
        """Run the loop to its end, a signal, or too many bad steps. `watching` has the hooks while it runs."""
        progress, self._limits = self.progress, hooks
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
        watching.hooks += hooks.hooks
        try:
            if progress.step == 0:
                self._report_weights(hooks)
            number = self._loop(hooks)
            status = "interrupted" if number else "finished"
        except TooManyBadSteps as error:
            if self.runtime.is_first:
                print(f"kan: {error}", file=sys.stderr)
            self._end_saving(hooks)
            return result_of(self.run_dir, self.progress, finished=False, code=EXIT_BAD_STEPS)
        finally:
            watching.hooks.clear()
            progress = self.progress
            hooks.on_end({"status": status, "step": progress.step, "tokens": progress.tokens, "segment": progress.segment})
        if number == OVER_BUDGET and self.runtime.is_first:  # the last line of all: a launcher shows it
            print(f"kan: {self.over_budget}; run {self.config.run.name} is saved at step {self.progress.step} of {self.config.train.steps}", file=sys.stderr)
        code = EXIT_BUDGET if number == OVER_BUDGET else EXIT_STOPPED if number else 0
        return result_of(self.run_dir, self.progress, finished=not number, code=code)

    def _report_weights(self, hooks: Hooks) -> None:
        """Say which weights the run starts from: a number that does not depend on the layout."""
        shapes = {name: spec.shape for name, spec in parameter_table(self.config.model).items()}
        checksum = weights_checksum(self.engine.named_fragments(), shapes, self.runtime.sum, device=self.runtime.device)
        hooks.on_event("weights", {"step": 0, "checksum": checksum})

    def _loop(self, hooks: Hooks) -> int:
        """Step until the run is done (returns 0), a signal arrives or a limit is reached (returns its number, or OVER_BUDGET, the run being saved)."""
        # A garbage collection on one rank alone stalls all others in the next all-reduce: it runs on every rank at the same steps instead.
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            if self.progress.examination_due and not self._stopped():
                self.examination.what_is_due(self.progress, hooks, self._stopped)
            self.energy.begin()
            while self.progress.step < self.config.train.steps:
                if number := self._stopped():
                    self._save_at_last(hooks)
                    self._announce(hooks, number)
                    return number
                self._step(hooks)
                self._recover(hooks)
                self._save_when_due(hooks)
                self._pass_on_events(hooks)
                if self.progress.step % COLLECT_EVERY == 0:
                    gc.collect()
            self._save_at_last(hooks)
            # Stopped in its last examination, it is not finished.
            number = self._stopped() if self.progress.examination_due else 0
            if number == OVER_BUDGET:
                self._announce(hooks, number)
            return number
        finally:
            gc.enable()
            gc.unfreeze()

    def _stopped(self) -> int:
        """The signal that some process was sent, OVER_BUDGET where the first one knows of a limit that is reached, or 0. Collective."""
        self.over_budget = self._limits.over_budget()
        return self.runtime.largest(OVER_BUDGET if self.over_budget else self.signals.received)

    def _step(self, hooks: Hooks) -> None:
        config, progress, started = self.config, self.progress, time.perf_counter()
        self.watchdog.beat("data", progress.step)
        batches = self.loader.next_step()
        loaded = time.perf_counter()
        self.watchdog.beat("step", progress.step)
        learning_rate = config.optimizer.learning_rate * learning_rate_factor(config.optimizer.schedule, progress.step, config.train.steps)
        rate = balance_rate(config.model.grove, progress.step, config.train.steps)
        with self.ranks.clock:
            result = self.engine.train_step(batches, learning_rate, rate)
        seconds = StepTimes(data=loaded - started, step=time.perf_counter() - started, **result.seconds)
        progress.step += 1
        progress.tokens += self.tokens_a_step
        self._judge(result, hooks)
        self.step_seconds.append(seconds.step)
        progress.figures["tokens_per_second"] = self.tokens_a_step / statistics.median(self.step_seconds[1:][-200:] or self.step_seconds)
        measured = self.examination.after_step(progress, hooks, self._stopped)
        self._tell_energy(hooks, self.energy.count(last=progress.step == config.train.steps))
        hooks.on_step(step_row(config, self.runtime, progress, result, seconds, learning_rate, measured))
        for kind, fields in self.ranks.count(progress.step, seconds=seconds.step, data=seconds.data):
            hooks.on_event(kind, fields)

    def _tell_energy(self, hooks: Hooks, taken: dict[str, float] | None) -> None:
        if taken:
            hooks.on_event("energy", {"step": self.progress.step, **taken})

    def _judge(self, result: StepResult, hooks: Hooks) -> None:
        progress = self.progress
        if kind := judge(self.config.recovery, progress, result):
            fields = {"step": progress.step, "in_a_row": progress.bad_steps, "loss": result.loss, "grad_norm": result.grad_norm}
            hooks.on_event(f"{kind}_step", fields)

    def _recover(self, hooks: Hooks) -> None:
        """After too many bad steps in a row go back to the last good checkpoint, and leave the samples of those steps out."""
        config, progress = self.config, self.progress
        bad, limit = progress.bad_steps, config.recovery.max_bad_steps
        if bad < limit:
            return
        self._end_saving(hooks)
        good = last_good(self.directory, progress) if progress.rewinds < config.recovery.max_rewinds else None
        if good is None:
            raise TooManyBadSteps(self._why_too_many(progress))
        started, samples = time.perf_counter(), bad * config.train.global_batch_size
        left_out = [*self.loader.left_out, *self.loader.stretches(self.loader.cursor - samples, samples)]
        restored = self._restore(good, verify=False)
        self.loader.leave_out(left_out)
        # What happened stays counted: a run that goes back for ever must come to its end.
        restored.segment, restored.rewinds, restored.skipped_steps = progress.segment, progress.rewinds + 1, progress.skipped_steps
        self.progress = restored
        if self.runtime.is_first:
            delete_after(self.directory, restored.step)
        # In the place of the one it was restored from: a run that is killed now must not read the samples again.
        self._save_now(hooks)
        fields = {"step": restored.step, "tokens": restored.tokens, "from_step": progress.step, "bad_steps": bad, "rewinds": restored.rewinds}
        hooks.on_event("rewind", fields | {"samples_left_out": left_out, "seconds": time.perf_counter() - started})
        if self.runtime.is_first:
            print(
                f"kan: {bad} bad steps in a row up to step {progress.step}: the run goes on from its checkpoint of step {restored.step} "
                f"without the {samples} samples of those steps ({restored.rewinds} of recovery.max_rewinds={config.recovery.max_rewinds})",
                file=sys.stderr,
            )

    def _why_too_many(self, progress: Progress) -> str:
        recovery = self.config.recovery
        if progress.rewinds >= recovery.max_rewinds:
            why = f"it has gone back to a checkpoint {progress.rewinds} times already (recovery.max_rewinds={recovery.max_rewinds})"
        else:
            why = f"there is no checkpoint of before them in {self.directory}"
        return (
            f"{progress.bad_steps} steps in a row were not finite, or had a spike of the loss (recovery.max_bad_steps={recovery.max_bad_steps}), the "
            f"last one step {progress.step}, and {why}. Start again from the last checkpoint with a smaller "
            f"optimizer.learning_rate={self.config.optimizer.learning_rate / 2:g}, or set a larger recovery.max_bad_steps"
        )

    def _save_when_due(self, hooks: Hooks) -> None:
        progress, every = self.progress, self.config.checkpoint.every
        # Not amid bad steps: what is saved then is nothing to go back to.
        if every and progress.step % every == 0 and progress.step < self.config.train.steps and not progress.bad_steps:
            snapshot, fragments = self._snapshot(hooks)
            with self.watchdog.patience(PATIENCE):
                self._saved(hooks, self.saver.save(snapshot, fragments))

    def _save_at_last(self, hooks: Hooks) -> None:
        """Before leaving: what the background is writing, and then what no checkpoint holds yet."""
        self._tell_energy(hooks, self.energy.rest())
        self._end_saving(hooks)
        if self.saved_step < self.progress.step:
            self._save_now(hooks)

    def _save_now(self, hooks: Hooks) -> None:
        snapshot, fragments = self._snapshot(hooks)
        with self.watchdog.patience(PATIENCE):
            seconds = self.saver.save_now(snapshot, fragments)
        self._saved(hooks, seconds)
        self._pass_on_events(hooks)

    def _saved(self, hooks: Hooks, seconds: dict[str, float]) -> None:
        hooks.on_event("save", {"step": self.progress.step, **seconds})

    def _snapshot(self, hooks: Hooks) -> tuple[Snapshot, list[Fragment]]:
        self.watchdog.beat("save", self.progress.step)
        about = {
            "config": _yaml(self.config),
            "tokens": self.progress.tokens,
            "layout": asdict(layout_of(self.config, self.runtime.world_size)),
            "data_index": self.data.index_hash,
            "ledger": hooks.totals(),
        }
        state = state_for_checkpoint(self.progress, self.config, self.engine, self.loader)
        snapshot = Snapshot(step=self.progress.step, state=state, rank_tensors=random_states(self.runtime.device), about=about)
        return snapshot, list(self.engine.named_fragments())

    def _end_saving(self, hooks: Hooks) -> None:
        self.watchdog.beat("save", self.progress.step)
        with self.watchdog.patience(PATIENCE):
            seconds = self.saver.wait()
        if seconds:
            hooks.on_event("save_wait", {"step": self.progress.step, "seconds": seconds})
        self._pass_on_events(hooks)

    def _pass_on_events(self, hooks: Hooks) -> None:
        for kind, fields in self.saver.events():
            if kind == "saved":
                self.saved_step = fields["saved_step"]
            hooks.on_event(kind, {"step": self.progress.step, **fields})

    def _announce(self, hooks: Hooks, number: int) -> None:
        if number == OVER_BUDGET:
            hooks.on_event("budget", {"step": self.progress.step, "kind": "stopped"})
            return
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


def _validation_loss(manifest: Manifest) -> float | None:
    return manifest.state["progress"]["figures"].get("validation_loss")


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
