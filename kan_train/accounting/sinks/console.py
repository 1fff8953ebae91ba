"""What a person sees while a run trains: live progress on a terminal, plain lines elsewhere, and where the time went at the end."""

import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from kan_train.accounting.lines import Row
from kan_train.config import Config

MEDIAN_OF = 50
"""Steps whose throughput is averaged for what is shown."""


class _Output(Console):
    """A console that falls silent when nobody reads it any more: rich would end the process, and with it the run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # Live progress puts a proxy in the place of sys.stdout.
        if self.file in (sys.stdout, sys.__stdout__):
            # What others print later goes nowhere, instead of failing at their place.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.file.fileno())
            os.close(nowhere)

    @contextmanager
    def lasting(self) -> Iterator[None]:
        """A terminal that has gone is no reason to end the run either: writing to it is then an input/output error."""
        try:
            yield
        except OSError:
            self.on_broken_pipe()


class ConsoleSink:
    """Shows a run on standard output. A reader that goes away does not end the run."""

    def __init__(self, config: Config, file: TextIO | None = None, *, terminal: bool | None = None) -> None:
        """file: unset, standard output. terminal: whether it is one; unset: asked."""
        self.config = config
        self.console = _Output(file=file, force_terminal=terminal, soft_wrap=True, highlight=False)
        self.live = config.logging.progress and self.console.is_terminal
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._recent: deque[float] = deque(maxlen=MEDIAN_OF)
        self._seconds: dict[str, float] = {}
        self._started = time.monotonic()
        self._first_step = self._first_tokens = 0

    def start(self, start: Row) -> None:
        """One line on what is trained from where; on a terminal the progress bar."""
        config, self._started = self.config, time.monotonic()
        self._first_step = start["step"]
        self._first_tokens = start["tokens"]
        self._print(f"run {config.run.name}: model {config.model.name}, {start['steps']:,} steps, {start['origin']}")
        if self.live:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[figures]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                refresh_per_second=4,
            )
            self._task = self._progress.add_task("train", total=start["steps"], completed=start["step"], figures="")
            with self.console.lasting():
                self._progress.start()

    def write(self, row: Row) -> None:
        """Move the bar, or print a line every logging.console_every steps and at the last one."""
        self._recent.append(row["time/step"])
        for bucket in ("data", "forward_backward", "optimizer"):
            self._count(bucket.replace("_", "-"), row.get(f"time/{bucket}", 0.0))
        if self._progress is not None:
            with self.console.lasting():
                self._progress.update(self._task, completed=row["step"], figures=self._figures(row))
        elif row["step"] % self.config.logging.console_every == 0 or row["step"] == self.config.train.steps:
            steps, left = self.config.train.steps, self._median() * (self.config.train.steps - row["step"])
            self._print(f"step {row['step']:,}/{steps:,}  {self._figures(row)}  left {_clock(left)}")

    def event(self, kind: str, fields: dict[str, Any]) -> None:
        """A line for the weights that a run starts from, for a validation, an evaluation, a bad step and what is slow."""
        self._count(kind, fields.get("seconds", 0.0))
        if kind == "weights":
            self._print(f"weights at step 0: checksum {fields['checksum']}, the same on every layout")
        elif kind == "validation":
            self._print(f"step {fields['step']:,}: validation loss {fields['loss']:.4f}, {fields['bits_per_byte']:.4f} bits a byte")
        elif kind == "evaluation":
            figures = ", ".join(f"{task} {score['accuracy']:.1%} ({score['random']:.1%} by chance)" for task, score in fields["tasks"].items())
            self._print(f"step {fields['step']:,}: {figures}")
        elif kind in ("straggler", "slow_link"):
            self._print(f"step {fields['step']:,}: {fields['summary']}")
        elif kind in ("skipped_step", "spike_step"):
            figures = f"{fields['in_a_row']} bad in a row: loss {fields['loss']:g}, gradient norm {fields['grad_norm']:g}"
            self._print(f"step {fields['step']:,} {f'skipped, {figures}; weights unchanged' if kind == 'skipped_step' else f'is a spike, {figures}'}")

    def close(self, end: Row) -> None:
        """Stop the bar, and say how far the run is and where its time went."""
        if self._progress is not None:
            with self.console.lasting():
                self._progress.stop()
        elapsed = max(time.monotonic() - self._started, 1e-9)
        steps, tokens = end["step"] - self._first_step, end["tokens"] - self._first_tokens
        self._print(f"{end['status']} at step {end['step']:,}: {steps:,} steps and {tokens:,} tokens in {_clock(elapsed)}")
        self._seconds["other"] = max(0.0, elapsed - sum(self._seconds.values()))
        shares = [f"{name} {seconds / elapsed:.0%}" for name, seconds in self._seconds.items() if seconds >= 0.005 * elapsed]
        self._print(f"time: {', '.join(shares)}")

    def _figures(self, row: Row) -> str:
        tokens_per_second = row["tokens_per_second"] * row["time/step"] / self._median()
        mfu = f"  mfu {row['mfu']:.1%}" if row.get("mfu") is not None else ""
        return f"loss {row['loss']:.4f}  {_short(row['tokens'])} tokens  {tokens_per_second:,.0f} tokens/s{mfu}"

    def _median(self) -> float:
        ordered = sorted(self._recent)
        return max(ordered[len(ordered) // 2], 1e-9)

    def _count(self, bucket: str, seconds: float) -> None:
        self._seconds[bucket] = self._seconds.get(bucket, 0.0) + seconds

    def _print(self, line: str) -> None:
        with self.console.lasting():
            self.console.print(line, markup=False)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _short(count: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return f"{count:,.0f}"
