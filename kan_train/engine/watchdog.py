"""Ends a run that makes no progress, and says where every rank was.

Each rank has a thread that watches the training thread's beats, and one that looks for a sign of the others in a folder that all ranks see. The rank whose
beats stop first makes the sign, a new folder; each rank puts there what it waits in (`waiting`), and the maker writes what that means together (`hangs`):
the collective, its group, and the rank that did not arrive. Then all leave. No collective and no store is used, as these are what hangs.

Not seen: a thread that keeps Python's lock in C++ for good keeps this rank's watchdog from running. To the other ranks it is one that does not answer.
"""

import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from kan_train.engine.exits import EXIT_HANG
from kan_train.engine.hangs import hang_report, report_text
from kan_train.engine.waiting import OWN_THREADS, look, stacks_text

OVERSLEPT = 4
"""Periods without a wake-up after which the process itself must have been stopped: a laptop that slept, SIGSTOP. That time does not count."""

Beat = tuple[str, int, float]


class Watchdog:
    """Ends this process, with a report, when the thread that started it has not called `beat` for a set time; a context manager.

    The other ranks' watchdogs end theirs as soon as they see the report begin, whether or not their own time has run out.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        seconds: float,
        *,
        on_hang: Callable[[dict[str, Any]], None] | None = None,
        exit_code: int = EXIT_HANG,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        """folder: where reports go, the same for all ranks and of this run alone. seconds: without a beat; 0: nothing is watched.

        on_hang: given the report, on rank 0 alone and only if it lives; what it raises changes nothing. environment: tells this start of the job from others.
        """
        self.folder, self.rank, self.world_size, self.seconds = folder, rank, world_size, seconds
        self.on_hang, self.exit_code = on_hang, exit_code
        self.period = min(max(seconds / 8, 0.02), 15.0)
        """Seconds between looks at the beats and at the folder."""
        self.answer_seconds = min(max(seconds / 4, 3.0), 120.0)
        """Seconds that ranks have to answer. A shared file system may show a new folder a minute late."""
        self.start_of = _start(environment)
        self._beat: Beat = ("start-up", 0, time.monotonic())
        self._patience = 1.0
        self._stopped, self._ending = threading.Event(), threading.Event()
        self._known: frozenset[str] = frozenset()
        self._found: Path | None = None
        self._watched: int | None = None

    def beat(self, phase: str, step: int) -> None:
        """The training thread lives, and begins `phase` of `step`. Costs less than a microsecond."""
        self._beat = (phase, step, time.monotonic())

    @contextmanager
    def patience(self, factor: float) -> Iterator[None]:
        """Within it the run may take `factor` times as long between beats. Every rank must enter it: the others' patience is not known here."""
        before = self._patience
        self._patience = before * factor
        try:
            yield
        finally:
            # What took long is done: the usual time begins now.
            self.beat(*self._beat[:2])
            self._patience = before

    def start(self) -> None:
        """Watch the calling thread from now on. Reports that are there already are of earlier starts, and are left alone."""
        if self.seconds <= 0:
            return
        self._known = frozenset(self._names())
        self._watched = threading.get_ident()
        self.beat(*self._beat[:2])
        # Two threads: where the file system hangs, the one that reads it hangs too, and the other still ends the run.
        for name, work in (("beats", self._watch_beats), ("folder", self._watch_folder)):
            threading.Thread(target=work, name=f"{OWN_THREADS}-{name}", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer. Does not return where the end has begun: the first rank to leave breaks the others' collectives, which is not their end."""
        self._stopped.set()
        if self._ending.is_set():
            time.sleep(6 * self.answer_seconds + 60)

    def __enter__(self) -> "Watchdog":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.stop()

    # --- watching ---------------------------------------------------------------------------------------------------------------------------------

    def _watch_beats(self) -> None:
        beat, slept, woke = self._beat, 0.0, time.monotonic()
        while not self._stopped.wait(self.period):
            now = time.monotonic()
            if self._beat is not beat:
                beat, slept = self._beat, 0.0
            if now - woke > OVERSLEPT * self.period:
                slept += min(now - woke - self.period, max(now - beat[2], 0.0))
            woke = now
            late = now - beat[2] - slept > self.seconds * self._patience and self._beat is beat
            if (late or self._found is not None) and not self._stopped.is_set():
                self._end()

    def _watch_folder(self) -> None:
        while not self._stopped.wait(self.period):
            new = self._new()
            if new is not None:
                self._found = new
                return

    def _names(self) -> list[str]:
        try:
            return sorted(entry.name for entry in self.folder.iterdir() if entry.name.startswith("hang-"))
        except OSError:
            return []

    def _new(self) -> Path | None:
        names = [name for name in self._names() if name not in self._known and name.endswith(self.start_of)]
        return self.folder / names[0] if names else None

    # --- the end ----------------------------------------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Report and leave. Whatever the report hangs in, the process leaves."""
        beat = self._beat
        self._ending.set()
        try:
            if not _within(3 * self.answer_seconds + 20, "report", lambda: self._report(beat)):
                _within(2, "last words", lambda: _print(f"kan: rank {self.rank}: no progress, and no report could be written\n{stacks_text()}"))
        finally:
            os._exit(self.exit_code)

    def _report(self, beat: Beat) -> None:
        stacks, seconds = stacks_text(), time.monotonic() - beat[2]
        folder, reporter = self._claim()
        name = f"rank-{self.rank:05d}"
        if folder is not None and not _written(folder / f"{name}.txt", stacks):  # before torch is asked anything
            folder = None
        record = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(), "phase": beat[0], "step": beat[1], "seconds": seconds}
        record |= look(self._watched)
        if folder is not None and not _written(folder / f"{name}.json", json.dumps(record, indent=1)):
            folder = None
        if folder is None:
            report = self._put_together(None, {self.rank: record})
            _print_report(report, f"rank {self.rank}: {self.folder} cannot be written, so this is what one rank knows", stacks)
            self._call_on_hang(report)
            time.sleep(max(2 * self.period, 1.0))  # the others' time runs out too, and their collectives break where this one leaves
            return
        if reporter:
            self._wait_for(lambda: len(list(folder.glob("rank-*.json"))) == self.world_size, self.answer_seconds)
            self._publish(folder)
        elif not self._wait_for((folder / "report.json").exists, 2 * self.answer_seconds) and self._succeed(folder):
            self._publish(folder)
        self._leave_together(folder)

    def _claim(self) -> tuple[Path | None, bool]:
        """The folder of this hang, and whether this rank made it; None where none can be made."""
        new = self._found or self._new()
        if new is not None:
            return new, False
        numbers = [int(name.split("-")[1]) for name in self._known if name.split("-")[1].isdigit()]
        # All ranks of one start know the same folders, so that they try the same name: one of them makes it.
        folder = self.folder / f"hang-{max(numbers, default=0) + 1:04d}-{self.start_of}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder, True
        except FileExistsError:
            return (folder, False) if folder.is_dir() else (None, False)
        except OSError:
            return None, False

    def _succeed(self, folder: Path) -> bool:
        """Whether this rank takes the place of a reporter that was lost."""
        try:
            os.close(os.open(folder / "successor", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            return True
        except OSError:
            self._wait_for((folder / "report.json").exists, 5)
            return False

    def _publish(self, folder: Path) -> None:
        records = {}
        for path in sorted(folder.glob("rank-*.json")):
            with suppress(OSError, ValueError):
                record = json.loads(path.read_text())
                records[record["rank"]] = record
        report = self._put_together(folder, records)
        # Printed first, as the disk may be full.
        _print_report(report, f"rank {self.rank} saw no progress for {self.seconds:g} s; the stacks of all threads are in {folder}")
        _written(folder / "report.txt", report_text(report))
        _written(folder / "report.json", json.dumps(report, indent=1))

    def _put_together(self, folder: Path | None, records: dict[int, Any]) -> dict[str, Any]:
        report = hang_report(records, self.world_size)
        steps = [record["step"] for record in records.values()]
        return report | {
            "hang": None if folder is None else folder.name,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "reporter": self.rank,
            "world_size": self.world_size,
            "seconds": self.seconds,
            "step": max(steps, default=0),
            "exit_code": self.exit_code,
        }

    def _leave_together(self, folder: Path) -> None:
        """Rank 0 tells of the report before the others leave: a launcher ends all processes when it sees one end."""
        told = folder / "told"
        if self.rank != 0:
            if (folder / "rank-00000.json").exists():
                self._wait_for(told.exists, min(2 * self.answer_seconds, 7))
            return
        with suppress(OSError, ValueError):
            self._call_on_hang(json.loads((folder / "report.json").read_text()))
        with suppress(OSError):
            told.touch()

    def _call_on_hang(self, report: dict[str, Any]) -> None:
        if self.rank == 0 and self.on_hang is not None:
            on_hang = self.on_hang
            _within(5, "on_hang", lambda: on_hang(report))

    def _wait_for(self, condition: Callable[[], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(min(self.period, 0.5))
        return True


def _start(environment: Mapping[str, str]) -> str:
    """Eight digits that tell one start of a job from another, alike on all its ranks: a rank that an earlier start left behind ends no later one."""
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "MASTER_PORT")
    return hashlib.sha256("|".join(environment.get(name, "") for name in names).encode()).hexdigest()[:8]


def _within(seconds: float, name: str, work: Callable[[], object]) -> bool:
    """Do `work` in a thread of its own; whether it was done in time, without an error. An error is printed."""
    done = threading.Event()

    def run() -> None:
        try:
            work()
            done.set()
        except BaseException as error:
            with suppress(OSError):
                _print(f"kan: the watchdog's {name}: {type(error).__name__}: {error}\n")

    (thread := threading.Thread(target=run, name=f"{OWN_THREADS}-{name}", daemon=True)).start()
    thread.join(seconds)
    return done.is_set()


def _print_report(report: Mapping[str, Any], heading: str, stacks: str = "") -> None:
    _within(2, "print", lambda: _print(f"kan: {heading}\n{report_text(report)}{stacks}"))


def _print(text: str) -> None:
    # Not through sys.stderr: the thread that hangs may hold its lock.
    data = text.encode()
    while data:
        data = data[os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, data) :]


def _written(path: Path, text: str) -> bool:
    """Write a file whole or not at all, as others look at it meanwhile; whether that went well."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text)
        part.replace(path)
    except OSError:
        return False
    return True
