"""The trainers of one node as child processes: started with their ranks, their output kept and passed on, signalled, and waited for."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kan_train.engine.exits import EXIT_STOPPED

_PR_SET_PDEATHSIG = 1
_OUTPUT_LOCK = threading.Lock()


@dataclass(kw_only=True)
class Failure:
    """A trainer that ended neither finished nor saved."""

    rank: int
    exit_code: int
    """As a shell says it: 128 + number for a signal."""
    signal: str | None
    """The signal that ended it."""
    time: float
    """When that was seen."""
    last_line: str
    """The last line that it wrote."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Trainer:
    """One trainer: its process, and the thread that copies its output to the rank's file and, marked with the rank, to our own."""

    def __init__(self, rank: int, command: Sequence[str], directory: str, environment: Mapping[str, str], log: Path) -> None:
        self.rank, self.last_line, self.killed = rank, "", False
        self.process = subprocess.Popen(
            command, cwd=directory, env=dict(environment), preexec_fn=die_with_parent,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._copier = threading.Thread(target=self._copy, args=(log,), name=f"output-{rank}", daemon=True)
        self._copier.start()

    def failure(self, stopping: bool) -> Failure | None:
        """How it failed, if it has ended and did. stopping: a stop signal was sent, so that its death by one is no failure."""
        code = self.process.poll()
        if code is None or self.killed or status_of(code, stopping) in (0, EXIT_STOPPED):
            return None
        self._copier.join(2)
        name = signal.Signals(-code).name if code < 0 else None
        return Failure(rank=self.rank, exit_code=status_of(code, stopping), signal=name, time=time.time(), last_line=self.last_line)

    def close(self) -> None:
        """Wait for the rest of the output."""
        self._copier.join(10)

    def _copy(self, log: Path) -> None:
        assert self.process.stdout is not None
        mark = f"[rank {self.rank}] ".encode()
        with log.open("ab", buffering=0) as file:
            for line in self.process.stdout:
                if line.strip():
                    self.last_line = line.decode("utf-8", "replace").strip()[-300:]
                for write in (lambda line: file.write(line), lambda line: _pass_on(mark + line)):
                    try:
                        write(line)
                    except OSError:
                        continue  # a full disk must not stop a trainer that can still save elsewhere


class Trainers:
    """All trainers of a node."""

    def __init__(self) -> None:
        self._all: list[Trainer] = []

    def start(self, ranks: Sequence[int], command: Sequence[str], directory: str, environments: Sequence[Mapping[str, str]], logs: Path) -> None:
        """Start one trainer for each of `ranks`, with the environment of the same place in `environments`."""
        for rank, environment in zip(ranks, environments, strict=True):
            self._all.append(Trainer(rank, command, directory, environment, logs / f"rank-{rank:05d}.log"))

    def send(self, number: int) -> None:
        """Send a signal to every trainer that lives."""
        for trainer in self._all:
            if trainer.process.poll() is None:
                trainer.process.send_signal(number)

    def kill(self) -> None:
        """End those that live at once; that is no failure of theirs."""
        for trainer in self._all:
            if trainer.process.poll() is None:
                trainer.killed = True
                trainer.process.kill()

    @property
    def running(self) -> bool:
        """Whether any lives."""
        return any(trainer.process.poll() is None for trainer in self._all)

    def failures(self, stopping: bool) -> list[Failure]:
        """Those that have failed so far."""
        return [failure for trainer in self._all if (failure := trainer.failure(stopping))]

    def stopped_early(self) -> bool:
        """Whether one was ended by a stop signal before it could hear it: then it cannot take part in a save, and nobody will save."""
        return any((trainer.process.poll() or 0) < 0 for trainer in self._all)

    def status(self, stopping: bool) -> int:
        """What they came to together, once none runs: 0, EXIT_STOPPED, or the status of the first failure."""
        failures = sorted(self.failures(stopping), key=lambda failure: failure.time)
        if failures:
            return failures[0].exit_code
        codes = {status_of(trainer.process.returncode, stopping) for trainer in self._all if not trainer.killed}
        return EXIT_STOPPED if EXIT_STOPPED in codes else 0 if codes else 1

    def close(self) -> None:
        """Wait for the rest of all output."""
        for trainer in self._all:
            trainer.close()


def status_of(code: int, stopping: bool) -> int:
    """The exit status that stands for a return code of subprocess. A stop signal that came before Python could catch it left nothing to save."""
    if code >= 0:
        return code
    if stopping and -code in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        return EXIT_STOPPED
    return 128 - code


def _pass_on(line: bytes) -> None:
    # One write a line, so that lines of several ranks never mix.
    with _OUTPUT_LOCK:
        data = line if line.endswith(b"\n") else line + b"\n"
        while data:
            data = data[os.write(sys.__stdout__.fileno() if sys.__stdout__ is not None else 1, data) :]


def die_with_parent() -> None:
    """For a child, before it begins: have it sent SIGTERM when its parent ends, however that ends."""
    # A trainer whose node process was killed would train on, and hold the run's lock, with nobody to end it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
