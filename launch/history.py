"""The jobs of a run as its recorded events tell of them: what `kan launch status`, `logs`, `cancel` and `resume` begin with."""

from dataclasses import dataclass
from pathlib import Path

from kan_train.accounting.lines import Row
from kan_train.checkpoint.stream import CONFIG
from kan_train.config import ConfigError
from kan_train.launch.attempts import Attempt, attempts_of, read_events
from kan_train.launch.spec import LAUNCH

FINAL = ("finished", "gave_up", "cancelled", "resubmitted")
"""Events after which a job does not start again."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job of a run, as the scheduler knows it: a job that was submitted again under another id is two."""

    job: int
    """Its number in the run, the one of its description."""
    scheduler: str
    """slurm or local."""
    job_id: str
    """Its name there."""
    events: list[Row]
    """What was recorded of it, oldest first."""

    @property
    def attempts(self) -> list[Attempt]:
        """Its starts."""
        return attempts_of(self.events)

    @property
    def attempt(self) -> Attempt | None:
        """Its last start."""
        return self.attempts[-1] if self.attempts else None

    @property
    def is_final(self) -> bool:
        """Whether it is known not to start again. It may still be on its way out."""
        return any(event["event"] in FINAL for event in self.events)

    @property
    def state(self) -> str:
        """What the events say: submitted, running, ended, requeued, or a final one. A scheduler knows more of a job that is not final."""
        final = [event["event"] for event in self.events if event["event"] in FINAL]
        if final:
            return "gave up" if final[-1] == "gave_up" else str(final[-1])
        kinds = {"started": "running", "unhealthy": "running"}
        last = str(self.events[-1]["event"])
        return kinds.get(last, last)

    @property
    def reason(self) -> str:
        """Why it ended or waits, in the words of the last event that says so."""
        return next((str(event["reason"]) for event in reversed(self.events) if event.get("reason")), "")


def over(job: Job) -> bool:
    """Whether nothing of the job is left: it does not start again, and its last attempt has told its end."""
    return job.is_final and (job.attempt is None or job.attempt.ended is not None)


def jobs_of_run(run_dir: Path) -> list[Job]:
    """All jobs of the run in `run_dir`, in the order of their first event; none where it was never launched."""
    events: dict[str, list[Row]] = {}
    for row in read_events(run_dir):
        events.setdefault(row["job_id"], []).append(row)
    return [Job(job=rows[0]["job"], scheduler=rows[0]["scheduler"], job_id=job_id, events=rows) for job_id, rows in events.items()]


def find_run(value: str, root: Path) -> Path:
    """The directory of the run that a user named: its path, or its name below `root`. ConfigError, with the runs there are, where there is none."""
    for path in (Path(value), root / value):
        if _is_run(path):
            return path
    there = ", ".join(path.name for path in runs_below(root)) or f"none: `kan launch local run.root={root}` makes one"
    raise ConfigError(f"{value!r} is not a run; use the path of a run directory, --root DIR, or one of the runs in {root} ({there})")


def runs_below(root: Path) -> list[Path]:
    """The run directories in `root`, by name."""
    return sorted(path for path in root.iterdir() if _is_run(path)) if root.is_dir() else []


def find_job(run_dir: Path, wanted: str | None) -> Job:
    """The job of a run that `wanted` names, by the scheduler's id or by its number in the run; None: the newest that was started, else the newest."""
    jobs = jobs_of_run(run_dir)
    if not jobs:
        raise ConfigError(f"{run_dir} has had no job; start one with `kan launch local run.name={run_dir.name}` or `kan launch slurm run.name={run_dir.name}`")
    if wanted is None:
        return next((job for job in reversed(jobs) if job.attempts), jobs[-1])
    # Of the jobs of one number the newest: the others were submitted again under a new id.
    found = [job for job in jobs if job.job_id == wanted] or [job for job in jobs if str(job.job) == wanted]
    if not found:
        raise ConfigError(f"--job {wanted} is no job of {run_dir}; use one of: {', '.join(job.job_id for job in jobs)}")
    return found[-1]


def _is_run(path: Path) -> bool:
    return (path / LAUNCH).is_dir() or (path / CONFIG).is_file()
