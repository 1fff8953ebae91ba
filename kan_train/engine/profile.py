"""`kan train profile=on`: a trace of chosen steps in the run directory, one file a rank, and a table of the operators that took longest.

A step of a trace reaches from the end of one step to the end of the next: what lies between them (a validation, a save, logging) is in it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kan_train.config import ProfileConfig
from kan_train.engine.hooks import Hook, Row
from kan_train.parallel.runtime import Runtime

PROFILE = "profile"
"""Folder of the traces in a run directory."""


def profile_hooks(config: ProfileConfig, run_dir: Path, runtime: Runtime) -> Sequence[Hook]:
    """What traces the run in this process: nothing where config.enabled is off, or this rank is none of config.ranks."""
    if not config.enabled or (config.ranks and runtime.rank not in config.ranks):
        return []
    return [StepProfile(config, run_dir / PROFILE, runtime.rank, runtime.device, talks=runtime.rank == min(config.ranks, default=0))]


class StepProfile:
    """A hook that traces config.active steps, config.wait + config.warmup steps after the start; a step later it costs nothing any more."""

    def __init__(self, config: ProfileConfig, folder: Path, rank: int, device: torch.device, *, talks: bool) -> None:
        """folder: where the files go. talks: whether this rank prints its table, and what else there is to say."""
        self.config, self.folder, self.rank, self.device, self.talks = config, folder, rank, device, talks
        self._profiler: Any = None
        self._first = self._last = 0

    def on_start(self, start: Row) -> None:
        """The loop begins: the steps to trace are counted from here."""
        self._first = start["step"] + self.config.wait + self.config.warmup + 1
        self._last = self._first + self.config.active - 1
        if self._last > start["steps"]:
            self._say(f"profile: step {self._last} is to be traced, but the run ends with step {start['steps']}; use profile.wait=0, or more train.steps")
        if start["step"] == self._first - self.config.warmup - 1:
            self._begin()

    def on_step(self, row: Row) -> None:
        """A step was done: begin, go on or end."""
        if self._profiler is not None:
            self._step_done(row["step"])
        elif row["step"] == self._first - self.config.warmup - 1:
            self._begin()

    def on_event(self, kind: str, fields: Row) -> None:
        """Nothing: what happens is in the trace."""

    def totals(self) -> dict[str, float]:
        """None."""
        return {}

    def on_end(self, end: Row) -> None:
        """A run that ends amid the steps to trace leaves what there is of them."""
        if self._profiler is not None:
            self._end(end["step"])

    def _begin(self) -> None:
        from torch.profiler import ProfilerAction, ProfilerActivity, profile

        config = self.config
        begin, first, last = self._first - config.warmup, self._first, self._last

        def action(step: int) -> ProfilerAction:
            if max(step, begin) < first:  # the profiler asks about step 0 before it can be told where it begins
                return ProfilerAction.WARMUP
            return ProfilerAction.RECORD if max(step, begin) < last else ProfilerAction.RECORD_AND_SAVE

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        self._profiler = profile(
            activities=activities,
            schedule=action,
            record_shapes=config.shapes,
            profile_memory=config.memory,
            with_stack=config.stacks,
        )
        self._profiler.step_num = begin  # the steps of the trace are called by their numbers in the run
        self._profiler.start()

    def _step_done(self, step: int) -> None:
        if step >= self._last:
            self._end(step)
        else:
            self._profiler.step()

    def _end(self, step: int) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        if step < self._first:
            return
        path = self.folder / f"rank-{self.rank:05d}-step-{self._first:08d}.json.gz"
        try:
            table = self._table(profiler)
            self.folder.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}")
            profiler.export_chrome_trace(str(part))
            part.replace(path)
            path.with_name(path.name.replace(".json.gz", ".txt")).write_text(table)
        except (OSError, RuntimeError) as error:
            self._say(f"profile: {path} could not be written ({error}); the run goes on")
            return
        steps = f"step {step}" if step == self._first else f"steps {self._first} to {step}"
        self._say(f"{table}profile: {steps} of rank {self.rank} in {path}; open it in https://ui.perfetto.dev or chrome://tracing")

    def _table(self, profiler: Any) -> str:
        by = "self_cpu_time_total" if self.device.type == "cpu" else "self_device_time_total"
        averages = profiler.key_averages(group_by_input_shape=self.config.shapes)
        return averages.table(sort_by=by, row_limit=self.config.operators, max_name_column_width=60)

    def _say(self, text: str) -> None:
        if self.talks:
            print(f"kan: {text}" if "\n" not in text else text, file=sys.stderr)
