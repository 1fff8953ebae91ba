"""The ledger: what a run did with its time, event by event. Cost accounting reads it; nothing in it is ever changed.

ledger.jsonl lies in the run directory. Every event has

    event        what happened (below)
    time         wall clock, seconds since 1970
    elapsed      seconds since segment_start, by a clock that never jumps
    segment      how often the run had been started, this time included; 1 is the first
    step, tokens how far the run was
    world_size   processes, each with one device
    device, host, pid

and, by kind:

    segment_start  origin; process_seconds: the age of the process, or since its run before ended: what starting took, paid for like everything else;
                   price: what accounting.price says that a device costs, with its source, where it is set (accounting/prices.py);
                   devices: those of all its nodes, one a process or more
    restart        right after it from segment 2 on: previous_status ("killed" where there is no segment_end, "hung" after a hang), previous_time, and
                   lost_steps: steps to be done again, of those that the ledger knew
    steps          first_step, steps; seconds_step and of it seconds_data, seconds_forward_backward, seconds_optimizer, in the first process;
                   joules that all devices took since the event before that has them, where they tell (accounting/energy.py)
    energy         joules, of steps that had been written already as they were told
    validation     seconds, loss, bits_per_byte, heldout_tokens; validation_stopped: seconds of one that a signal broke off
    evaluation     seconds; tasks: {task: {metric, accuracy, right, questions, random, majority}}; evaluation_stopped: seconds
    save           a checkpoint was taken: seconds that training waited, and of them seconds_waiting for the one before
    save_wait      seconds that the run waited for a save in the background before it went back or left
    saved          it is on disk: saved_step, path, seconds_writing (in the background)
    save_failed    saved_step, attempt, error; prune_failed: error
    skipped_step   in_a_row, loss, grad_norm; spike_step: the same
    rewind         bad steps sent the run back: from_step, bad_steps, rewinds (of the whole run), samples_left_out, seconds
    signal         signal
    budget         kind: "warned" as the forecast crosses the cap, "stopped" at it; setting, cap, spent and forecast, in its unit (accounting/budget.py)
    hang           report, summary
    ranks          ranks: columns host, stage (of the pipeline), computing, waiting (in collectives) and data, by rank: mean seconds a step over `over` steps
    straggler      ranks that were slow in several reports in a row: host, ranks, whole_host, slower (times the median), what ("computing" or "data"),
                   reports, computing, waiting, data and median (seconds a step of the slowest of them), summary
    links          megabytes (sent to measure), links: [{hosts, ranks, gigabytes_per_second}] between neighbouring nodes, each direction
    slow_link      one of them, with `best`, the fastest, and summary
    segment_end    status: finished, interrupted or failed

The seconds of a segment are process_seconds + elapsed of its last event; accounting/account.py says where each went.
"""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from kan_train.accounting.lines import JsonLines, Row, read_lines

LEDGER = "ledger.jsonl"
"""The ledger's name in a run directory."""

STEPS_EVERY_SECONDS = 10.0
"""A `steps` event is written at least this often: what a killed run can lose of its account."""

STEP_BUCKETS = ("data", "forward_backward", "optimizer", "step")

_paid_until = 0.0
"""When the last run of this process ended, seconds since 1970: its time until then is paid for."""


@dataclass(frozen=True, kw_only=True)
class Where:
    """What every event says about the machine."""

    world_size: int = 1
    """Processes of the run."""
    device: str = "cpu"
    """Device as its driver names it."""
    host: str = ""
    """Host of the first process."""
    pid: int = 0
    """The first process there."""
    devices: int = 0
    """Devices of all nodes, those that no process uses included; 0: one a process."""

    @classmethod
    def here(cls, world_size: int = 1, device: str = "cpu", devices: int = 0) -> "Where":
        """This process."""
        return cls(world_size=world_size, device=device, host=socket.gethostname(), pid=os.getpid(), devices=devices)


class Ledger:
    """Writes a run's ledger from the first process; each opening is a new segment."""

    def __init__(self, path: Path, where: Where | None = None) -> None:
        """ConfigError where `path` cannot be written, or where another process is training this run."""
        self.where = where or Where.here()
        self._lines = JsonLines(path)
        self.totals: dict[str, float] = {}
        """Sums over all segments: segments, and "<event>.<name>" of every number of steps or seconds."""
        self._before = self._read(path)
        self.segment: int = self._before.get("segment", 0) + 1
        """How often the run was started, this time included."""
        self._started = time.monotonic()
        self._progress: Row = {"step": 0, "tokens": 0}
        self._pending: Row = {}
        self._joules = 0.0
        self._flushed = self._started

    def event(self, kind: str, /, **fields: Any) -> float:
        """Append one event; it is on the disk when this returns, with its `elapsed`. `step` and `tokens` stay those of the last event that named them."""
        self._progress |= {name: fields[name] for name in ("step", "tokens") if name in fields}
        row = {
            "event": kind,
            "time": time.time(),
            "elapsed": self.elapsed(),
            "segment": self.segment,
            **self._progress,
            "world_size": self.where.world_size,
            "device": self.where.device,
            "host": self.where.host,
            "pid": self.where.pid,
        }
        self._lines.append(row | fields, durable=True)
        self._add(kind, fields)
        return row["elapsed"]

    def elapsed(self) -> float:
        """Seconds since segment_start."""
        return time.monotonic() - self._started

    def begin(self, step: int, tokens: int, origin: str, price: Row | None = None) -> None:
        """The loop begins after `step` steps and `tokens` tokens: segment_start, with the `price` of a device, and, after an earlier segment, restart."""
        self._started = self._flushed = time.monotonic()
        recorded: Row = {"devices": max(self.where.devices, self.where.world_size)} | ({} if price is None else {"price": price})
        self.event("segment_start", step=step, tokens=tokens, origin=origin, process_seconds=_process_seconds(), **recorded)
        before = self._before
        if before:
            previous = {f"previous_{name}": before[name] for name in ("segment", "status", "time")}
            self.event("restart", **previous, lost_steps=max(0, before["step"] - step))

    def count_step(self, row: Row) -> None:
        """Add a step's times (`time/...` of the row) to the account; written with others, at least every STEPS_EVERY_SECONDS."""
        pending = self._pending
        if not pending:
            pending |= {"first_step": row["step"], "steps": 0} | {f"seconds_{bucket}": 0.0 for bucket in STEP_BUCKETS}
        pending["steps"] += 1
        for bucket in STEP_BUCKETS:
            pending[f"seconds_{bucket}"] += row.get(f"time/{bucket}", 0.0)
        pending |= {"step": row["step"], "tokens": row["tokens"]}
        if time.monotonic() - self._flushed >= STEPS_EVERY_SECONDS:
            self.write_steps()

    def add_joules(self, joules: float) -> None:
        """Energy for the account; written with the next steps, or before the next event where there are none."""
        self._joules += joules

    def write_steps(self) -> None:
        """Write the steps, and the energy, counted since the last time."""
        pending, self._pending, self._flushed = self._pending, {}, time.monotonic()
        if pending:
            joules, self._joules = self._joules, 0.0
            self.event("steps", **pending, **({"joules": joules} if joules else {}))
        elif self._joules:
            joules, self._joules = self._joules, 0.0
            self.event("energy", joules=joules)

    def _read(self, path: Path) -> Row:
        """segment, status, time and last step of the newest segment that was started, empty if there is none; all events go into the totals."""
        found: Row = {}
        for event in read_lines(path):  # one by one: the ledger of a long run is long
            self._add(event["event"], event)
            status = event["status"] if event["event"] == "segment_end" else "hung" if event["event"] == "hang" else "killed"
            found = {"segment": event["segment"], "status": status, "time": event["time"], "step": event["step"]}
        return found

    def _add(self, kind: str, fields: Row) -> None:
        if kind == "segment_start":
            self.totals["segments"] = self.totals.get("segments", 0) + 1
        for name, value in fields.items():
            if name in ("steps", "joules") or "seconds" in name:
                self.totals[f"{kind}.{name}"] = self.totals.get(f"{kind}.{name}", 0) + value

    def close(self) -> None:
        """Close the file; another process may then go on with the run, and a further run of this process pays for what comes now."""
        global _paid_until
        _paid_until = time.time()
        self._lines.close()


def read_ledger(path: Path) -> list[Row]:
    """All events of a ledger, oldest first; none where there is no file. A line torn by a crash does not count."""
    return list(read_lines(path))


def _process_seconds() -> float:
    return max(0.0, time.time() - max(psutil.Process().create_time(), _paid_until))
