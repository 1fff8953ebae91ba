"""What became of the jobs of a run: RUN/launch/attempts.jsonl, one event a line, and the questions that decide what comes next.

Every event has `event`, `time` (seconds since 1970), `job` (its number in the run), `scheduler`, `job_id` (text), `restart` (0, 1, ...), and by kind

    submitted    nodes, processes_per_node
    started      hosts, step: of the newest complete checkpoint, or 0; allocated: when the scheduler gave it its nodes, where that is known
    unhealthy    host, problem
    ended        exit_code, hosts, step, failed_host (or null), cause (of CAUSES), reason: text, seen: false where the next start tells of it, at
                 its time; until: then when the scheduler took the nodes back, where that is known
    requeued, resubmitted   reason, exclude: hosts; resubmitted also new_job_id
    gave_up      reason
    cancelled    reason: by its user; the job does not start again. Its attempt may still be on its way out
    finished
"""

import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from kan_train.accounting.lines import Row, encode, read_whole_lines
from kan_train.config.errors import ConfigError
from kan_train.launch.spec import JobSpec, launch_dir

ATTEMPTS = "attempts.jsonl"
"""Name of the file in RUN/launch."""

CAUSES = (
    "finished", "time_limit", "preempted", "stopped", "hung", "failed", "unhealthy", "lost", "settings", "bad_steps", "budget", "taken_away",
    "cancelled",
)  # fmt: skip
"""Why an attempt ended. stopped: by a signal of unknown origin; lost: with a node of which no word came; budget: what it may cost is used up; taken_away: ended
or requeued by others; cancelled: by `kan launch cancel`, or a signal to `kan launch local`."""

BLAMELESS = ("finished", "preempted", "taken_away", "cancelled")
"""Causes that say nothing against the run: such an attempt does not count as one without progress."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a job and what is known of its end."""

    job: int
    scheduler: str
    job_id: str
    restart: int
    hosts: list[str]
    """Hosts, in the order of their ranks."""
    started: float
    """Time of the start."""
    first_step: int
    """Step of the newest complete checkpoint at the start."""
    ended: float | None = None
    """Time of the end; None where none was recorded."""
    step: int | None = None
    """The same step at the end."""
    exit_code: int | None = None
    cause: str | None = None
    reason: str = ""
    failed_host: str | None = None
    unhealthy: dict[str, str] = field(default_factory=dict)
    """Host -> what its health check found."""

    @property
    def blamed(self) -> set[str]:
        """Hosts that this attempt failed on."""
        return set(self.unhealthy) | ({self.failed_host} if self.failed_host else set())


def attempts_file(run_dir: str | Path) -> Path:
    """Where the events of a run's jobs are."""
    return launch_dir(run_dir) / ATTEMPTS


def record(run_dir: str | Path, event: str, *, job: int, scheduler: str, job_id: str, restart: int = 0, **fields: object) -> Row:
    """Append one event; it is on the disk when this returns. ConfigError where the file cannot be written."""
    row: Row = {"event": event, "time": time.time(), "job": job, "scheduler": scheduler, "job_id": job_id, "restart": restart, **fields}
    path = attempts_file(run_dir)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(file).st_size
            # A writer that died in the middle of its line left no newline: this line must not be glued to it.
            torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
            os.write(file, (b"\n" if torn else b"") + encode(row))
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); make room, or use run.root=PATH with a folder that you may write") from error
    return row


def record_for(spec: JobSpec, event: str, job_id: str, restart: int = 0, **fields: object) -> Row:
    """`record` for a job of `spec`."""
    return record(spec.run_dir, event, job=spec.job, scheduler=spec.scheduler, job_id=job_id, restart=restart, **fields)


def read_events(run_dir: str | Path) -> list[Row]:
    """All events of a run's jobs, oldest first; none where there is no file. Torn lines do not count."""
    return read_whole_lines(attempts_file(run_dir))


def attempts_of(events: Iterable[Row]) -> list[Attempt]:
    """The attempts that `events` tell of, oldest first."""
    found: dict[tuple[str, int], dict] = {}
    for row in events:
        key = (row["job_id"], row["restart"])
        if row["event"] == "started":
            names = ("job", "scheduler", "job_id", "restart", "hosts")
            found[key] = {name: row[name] for name in names} | {"started": row["time"], "first_step": row["step"], "unhealthy": {}}
        elif key in found and row["event"] == "unhealthy":
            found[key]["unhealthy"][row["host"]] = row["problem"]
        elif key in found and row["event"] == "ended":
            names = ("step", "exit_code", "cause", "reason", "failed_host")
            found[key] |= {name: row.get(name) for name in names} | {"ended": row["time"]}
    return [Attempt(**fields) for fields in found.values()]


def without_progress(attempts: list[Attempt]) -> int:
    """How many of the last attempts in a row ended with no newer checkpoint than they started with, through some fault of theirs."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.step is None or attempt.cause in BLAMELESS:
            continue
        if attempt.step > attempt.first_step:
            break
        count += 1
    return count


def bad_hosts(attempts: list[Attempt], times: int) -> list[str]:
    """Hosts that `times` or more attempts failed on, sorted; none with times=0."""
    counts = Counter(host for attempt in attempts for host in attempt.blamed)
    return sorted(host for host, count in counts.items() if times and count >= times)
