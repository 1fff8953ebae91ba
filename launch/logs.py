"""`kan launch logs`: the output of a run's jobs, of all ranks together or of one, and of what is still to be written, over restarts and requeues."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from kan_train.config import ConfigError
from kan_train.launch.history import Job, find_job, jobs_of_run, over
from kan_train.launch.local import is_alive
from kan_train.launch.spec import log_dir, output_file

POLL_SECONDS = 0.3
"""Between two looks at files that are followed."""

Print = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which output of a run is asked for."""

    rank: int | None = None
    """A rank's own output; None: that of all."""
    by_rank: bool = False
    """The ranks' own files, each line with its rank; else the file into which all write."""
    job: str | None = None
    """Job, by the scheduler's id or its number in the run; None: the newest."""
    restart: int | None = None
    """Attempt of the job; None: the last of the ranks' own files, all in the merged one."""

    @property
    def merged(self) -> bool:
        """Whether the merged file is read. It holds all attempts, so that one of them is found in the ranks' own files alone."""
        return self.rank is None and not self.by_rank and self.restart is None


@dataclass
class Tail:
    """A file of which the lines are read as they come."""

    path: Path
    label: str = ""
    """Before each line."""
    position: int = 0
    pending: bytes = field(default=b"", repr=False)

    def lines(self, *, whole: bool = False) -> Iterator[str]:
        """Lines since the last call. whole: the last one too where its newline is still to come."""
        try:
            with self.path.open("rb") as file:
                if self.path.stat().st_size < self.position:  # begun anew
                    self.position, self.pending = 0, b""
                file.seek(self.position)
                while block := file.read(1 << 20):
                    self.position += len(block)
                    *lines, self.pending = (self.pending + block).split(b"\n")
                    yield from map(self._text, lines)
        except FileNotFoundError:
            return
        if whole and self.pending:
            yield self._text(self.pending)
            self.pending = b""

    def _text(self, line: bytes) -> str:
        return self.label + line.decode("utf-8", "replace").rstrip("\r")


def show(run_dir: Path, selection: Selection, *, lines: int, print_line: Print = print) -> None:
    """Print the last `lines` lines (0: all) of each file that `selection` means. ConfigError where there is none, with what there is."""
    job = find_job(run_dir, selection.job)
    for tail in _require(run_dir, job, selection):
        for line in _last(tail, lines):
            print_line(line)


def follow(run_dir: Path, selection: Selection, *, lines: int, print_line: Print = print, poll: float = POLL_SECONDS) -> None:
    """As `show`, and then every line that is written, until no job of the run is left that could write one.

    Goes on with the attempts and jobs that follow, saying where each begins; with `selection.job` or `.restart` only with what these mean.
    """
    job = find_job(run_dir, selection.job)
    tails = {tail.path: tail for tail in _tails(run_dir, job, selection)}
    for tail in tails.values():
        for line in _last(tail, lines):
            print_line(line)
    first = job.attempt.restart if job.attempt else 0
    told = {_place(tail, selection) for tail in tails.values()}
    while True:
        over = _over(run_dir, selection)  # before the files are read: what was written before the end is then read after it
        for tail in _following(run_dir, job, first, selection):
            if tails.setdefault(tail.path, tail) is tail and _place(tail, selection) not in told:
                told.add(_place(tail, selection))
                print_line(f"==> {_place(tail, selection).name} <==")
        for tail in tails.values():
            for line in tail.lines(whole=over):
                print_line(line)
        if over:
            return
        time.sleep(poll)


def _last(tail: Tail, count: int) -> Iterator[str]:
    return iter(deque(tail.lines(), maxlen=count or None))


def _place(tail: Tail, selection: Selection) -> Path:
    """The job's file, or the attempt's folder."""
    return tail.path if selection.merged else tail.path.parent


def _following(run_dir: Path, job: Job, first: int, selection: Selection) -> Iterator[Tail]:
    """What there is by now of `job`, from its attempt `first` on, and of the jobs after it."""
    jobs = jobs_of_run(run_dir)
    later = jobs[[one.job_id for one in jobs].index(job.job_id) :]
    for one in later[:1] if selection.job is not None or selection.restart is not None else later:
        if selection.merged or selection.restart is not None:
            yield from _tails(run_dir, one, selection)
            continue
        for attempt in one.attempts:
            if one.job_id != job.job_id or attempt.restart >= first:
                yield from _tails(run_dir, one, replace(selection, restart=attempt.restart))


def _over(run_dir: Path, selection: Selection) -> bool:
    jobs = jobs_of_run(run_dir) if selection.job is None else [find_job(run_dir, selection.job)]
    # A launcher of this machine, or one that shares its file system, is known to live or not; of Slurm's jobs the events must tell.
    return all(over(job) or (job.scheduler == "local" and not is_alive(run_dir, job.job_id)) for job in jobs)


def _tails(run_dir: Path, job: Job, selection: Selection) -> list[Tail]:
    """The files of one job that are meant and exist."""
    if selection.merged:
        path = output_file(run_dir, job.job_id)
        return [Tail(path)] if path.is_file() else []
    if job.attempt is None:
        return []
    folder = log_dir(run_dir, job.job_id, job.attempt.restart if selection.restart is None else selection.restart)
    found = sorted(folder.glob("rank-*.log"))
    if selection.rank is not None:
        return [Tail(path) for path in found if _rank(path) == selection.rank]
    return [Tail(path, label=f"[rank {_rank(path)}] ") for path in found]


def _require(run_dir: Path, job: Job, selection: Selection) -> list[Tail]:
    if tails := _tails(run_dir, job, selection):
        return tails
    if selection.restart is not None and all(attempt.restart != selection.restart for attempt in job.attempts):
        there = ", ".join(str(attempt.restart) for attempt in job.attempts) or "none: it has not started yet"
        raise ConfigError(f"--restart {selection.restart} is no attempt of job {job.job_id}; there are: {there}")
    ranks = [_rank(path) for path in _paths(run_dir, job, selection)]
    if selection.rank is not None and ranks:
        raise ConfigError(f"--rank {selection.rank} is no rank of job {job.job_id}; use one of 0 to {max(ranks)}")
    if job.is_final:
        raise ConfigError(f"job {job.job_id} of {run_dir} ({job.state}) has no such output; use --job ID for another one, or leave out --all and --rank")
    raise ConfigError(f"job {job.job_id} of {run_dir} has written nothing yet ({job.state}); use --follow to wait for it, or --job ID for an earlier one")


def _paths(run_dir: Path, job: Job, selection: Selection) -> list[Path]:
    everyone = Selection(by_rank=True, job=selection.job, restart=selection.restart)
    return [tail.path for tail in _tails(run_dir, job, everyone)]


def _rank(path: Path) -> int:
    return int(path.stem.removeprefix("rank-"))
