"""`kan launch status`: where the jobs of a run are, how far the run is, and why a job ended or waits."""

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kan_train.launch import slurm
from kan_train.launch.history import Job, jobs_of_run, over
from kan_train.launch.local import is_alive
from kan_train.launch.progress import RunProgress, progress_of_run

HEADINGS = ("run", "job", "state", "restarts", "hosts", "step", "tokens", "loss", "tokens/s", "checkpoint", "last step", "why")
RIGHT = range(5, 10)
"""Columns of numbers."""


@dataclass(frozen=True, kw_only=True)
class QueueEntry:
    """What Slurm says of a job."""

    state: str
    """As Slurm writes it: PENDING, RUNNING, COMPLETED, ..."""
    reason: str
    """Why it waits; empty where Slurm gives none."""
    is_over: bool
    """Whether it has left the queue."""


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """A row of the table; as JSON the same names."""

    run: str
    """Name of the run."""
    run_dir: str
    """Its directory."""
    job: int | None
    """Number of the job in its run; None: the run was started without the launcher."""
    scheduler: str | None
    """slurm or local."""
    job_id: str | None
    """The scheduler's name of the job."""
    state: str
    """pending, running, requeued, finished, gave up, cancelled, stopping, ended or lost; of a run without a job: training, or how it ended."""
    stands_still: bool
    """Whether it runs and has not been heard of for long."""
    why: str
    """Why it waits or ended."""
    restarts: int
    """Starts after the first one."""
    hosts: list[str]
    """Of the last start."""
    step: int | None
    """Last step of the run; of a job that has ended, the one that it was saved at."""
    steps: int | None
    """Steps that the run is to take."""
    tokens: int | None
    """Tokens trained on."""
    loss: float | None
    """Of the last step."""
    tokens_per_second: float | None
    """Median of the last steps."""
    checkpoint: int | None
    """Step of the newest finished checkpoint."""
    seconds_since_step: float | None
    """Since the last sign of the run."""


def status_of(run_dirs: Sequence[Path], *, every_job: bool) -> list[JobStatus]:
    """Rows for the runs in `run_dirs`: their jobs, oldest first. every_job: also those that have ended, but for the newest, which is always told."""
    jobs = {run_dir: jobs_of_run(run_dir) for run_dir in run_dirs}
    asked = [job.job_id for listed in jobs.values() for job in listed if job.scheduler == "slurm" and not over(job)]
    try:
        queue: dict[str, QueueEntry] | None = queue_of(asked)
    except slurm.SlurmError as error:
        print(f"kan: {error}; what follows is what was recorded", file=sys.stderr)
        queue = None
    rows = []
    for run_dir, listed in jobs.items():
        progress = progress_of_run(run_dir)
        if not listed:
            rows.append(_without_job(run_dir, progress))
        for number, job in enumerate(listed):
            newest = number == len(listed) - 1
            if newest or every_job or not job.is_final:
                rows.append(_row(run_dir, job, queue, progress, newest))
    return rows


def queue_of(ids: Sequence[str]) -> dict[str, QueueEntry]:
    """What Slurm says of the jobs `ids`: its queue, and its accounts of those that have left it. Nothing of jobs that it does not know (any more).

    SlurmError where it cannot be asked.
    """
    if not ids:
        return {}
    try:
        listed = slurm.queue(ids=ids)
    except slurm.SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        listed = []  # of one job that it has forgotten
    found = {}
    for job in listed:
        reason = "" if job["Reason"] in ("None", "(null)") else job["Reason"]
        found[job["JobArrayID"]] = QueueEntry(state=job["State"], reason=reason, is_over=not slurm.alive([job]))
    missing = [job_id for job_id in ids if job_id not in found]
    if missing:
        with suppress(slurm.SlurmError):  # many clusters keep no accounts
            for job in slurm.accounting(missing):
                if job["JobID"] in missing:  # its steps are listed too
                    # "CANCELLED by 1000"
                    found[job["JobID"]] = QueueEntry(state=job["State"].partition(" ")[0], reason="", is_over=True)
    return found


def state_of(run_dir: Path, job: Job, queue: Mapping[str, QueueEntry] | None) -> tuple[str, str]:
    """State of a job, and why: what the scheduler says of a job that may go on, else what was recorded. queue: None where Slurm cannot be asked."""
    if job.scheduler == "local":
        if is_alive(run_dir, job.job_id):
            return ("stopping" if job.is_final else "running"), job.reason
        return (job.state, job.reason) if job.is_final or job.state == "ended" else ("lost", "its launcher has gone without a word; start it again")
    if queue is None or over(job):
        return job.state, job.reason
    entry = queue.get(job.job_id)
    if entry is None:
        lost = job.state in ("submitted", "running", "requeued")
        return ("lost", "it is no longer in the queue, and nothing was recorded of its end") if lost else (job.state, job.reason)
    if entry.is_over:
        return (job.state, job.reason) if job.is_final else (entry.state.lower(), entry.reason or job.reason)
    if job.is_final and job.state == "cancelled":
        return "stopping", job.reason
    if entry.state == "PENDING":
        return ("requeued" if job.attempts else "pending"), "; ".join(filter(None, (entry.reason, job.reason)))
    return entry.state.lower(), ""


def table(rows: Sequence[JobStatus]) -> list[list[str]]:
    """Cells of the table, its headings first."""
    return [list(HEADINGS), *(_cells(row) for row in rows)]


def _row(run_dir: Path, job: Job, queue: Mapping[str, QueueEntry] | None, progress: RunProgress, newest: bool) -> JobStatus:
    state, why = state_of(run_dir, job, queue)
    attempt = job.attempt
    runs = state in ("running", "stopping")
    # The figures are the run's; to a job that is over belongs what it left, not what others did after it.
    current = newest or runs
    return JobStatus(
        run=run_dir.name,
        run_dir=str(run_dir),
        job=job.job,
        scheduler=job.scheduler,
        job_id=job.job_id,
        state=state,
        stands_still=runs and progress.stands_still(attempt.started if attempt else None),
        why=why,
        restarts=attempt.restart if attempt else 0,
        hosts=attempt.hosts if attempt else [],
        step=progress.step if current else attempt.step if attempt else None,
        steps=progress.steps,
        tokens=progress.tokens if current else None,
        loss=progress.loss if current else None,
        tokens_per_second=progress.tokens_per_second if current else None,
        checkpoint=progress.checkpoint if current else None,
        seconds_since_step=time.time() - progress.last_sign if current and progress.last_sign else None,
    )


def _without_job(run_dir: Path, progress: RunProgress) -> JobStatus:
    """A run that `kan train` trains or has trained by itself."""
    state = progress.ended or ("training" if progress.last_sign and not progress.stands_still() else "no sign of life")
    return JobStatus(
        run=run_dir.name,
        run_dir=str(run_dir),
        job=None,
        scheduler=None,
        job_id=None,
        state=state,
        stands_still=False,
        why="",
        restarts=0,
        hosts=[],
        step=progress.step,
        steps=progress.steps,
        tokens=progress.tokens,
        loss=progress.loss,
        tokens_per_second=progress.tokens_per_second,
        checkpoint=progress.checkpoint,
        seconds_since_step=time.time() - progress.last_sign if progress.last_sign else None,
    )


def _cells(row: JobStatus) -> list[str]:
    def text(value: float | None, form: str = ",") -> str:
        return "-" if value is None else format(value, form)

    steps = f"{text(row.step)}/{row.steps:,}" if row.steps else text(row.step)
    still = " (stands still)" if row.stands_still else ""
    hosts = ",".join(row.hosts[:2]) + (f",+{len(row.hosts) - 2}" if len(row.hosts) > 2 else "")
    since = "-" if row.seconds_since_step is None else f"{duration_text(row.seconds_since_step)} ago"
    return [
        row.run, row.job_id or "-", row.state + still, str(row.restarts), hosts or "-", steps, text(row.tokens), text(row.loss, ".4f"),
        text(row.tokens_per_second, ",.0f"), text(row.checkpoint), since, row.why or "-",
    ]  # fmt: skip


def duration_text(seconds: float) -> str:
    """Seconds in the two units that read best: 42 s, 3 min 10 s, 5 h 2 min, 3 d 4 h."""
    for size, unit, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} {seconds % size // smaller:.0f} {small}"
    return f"{max(0.0, seconds):.0f} s"
