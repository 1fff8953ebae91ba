"""One run that is killed again and again, each time started by the same command, until it finishes; every start and the end are checked."""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kan_train.checkpoint import read_manifest
from recovery_proofs.corpus import NAME, VOCABULARY
from recovery_proofs.evidence import Evidence
from recovery_proofs.jobs import ATTEMPT_SECONDS, Launcher, Started

EVERY, GLOBAL_BATCH = 3, 12
"""Steps between saves, and sequences of a step."""

SETTINGS = (
    "model=kan_tiny", "model.width=64", "model.sequence_length=32", f"model.vocab_size={VOCABULARY}", "model.grove.num_groves=8", "model.grove.width=32",
    "~data.blend.stdlib", f"+data.blend.{NAME}=1.0", f"train.global_batch_size={GLOBAL_BATCH}", "train.validate_every=9", "train.validation_sequences=4",
    f"checkpoint.every={EVERY}", "checkpoint.keep=2", "optimizer.schedule.warmup_steps=5", "run.seed=5", "run.device=cpu", "run.threads=1",
    "logging.progress=false", "logging.console_every=1",
)  # fmt: skip

AIMS = {"start-up": 0.25, "step": 0.4, "save": 0.35}
"""When a kill is to come, and how often: before the first step of a start, in the steps (whatever is being written then), while files are written."""

SAVE_SECONDS = 0.05
"""After its first file was seen, a kill that aims at a save comes within this time: somewhat less than one takes."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout whose runs are killed."""

    world: int
    """Processes."""
    overrides: tuple[str, ...] = ()
    """Settings of the command."""
    asynchronous: bool = True
    """Whether saves are written in the background."""
    steps: int = 36
    """Steps of a run."""

    def settings(self, corpora: Path, folder: Path) -> list[str]:
        """The command of a run in `folder`."""
        saves = f"checkpoint.asynchronous={str(self.asynchronous).lower()}"
        return [*SETTINGS, *self.overrides, saves, f"train.steps={self.steps}", f"data.root={corpora}", f"run.root={folder}", "run.name=run"]

    @property
    def most_repeated(self) -> int:
        """Steps that a start may have to do again: one interval, and another one where the newest save may still be in flight at the next."""
        return EVERY * (2 if self.asynchronous else 1)


CASES = {
    "plain": Case(world=1),
    "plain-sync": Case(world=1, asynchronous=False),
    "dp2-zero2": Case(world=2, overrides=("parallel.zero_stage=2",)),
    "tp2-etp2-zero1": Case(world=2, overrides=("parallel.tensor_parallel=2", "parallel.expert_tensor_parallel=2", "parallel.zero_stage=1")),
    "dp3-zero3": Case(world=3, overrides=("parallel.zero_stage=3",)),
    "dp3-zero1-sync": Case(world=3, overrides=("parallel.zero_stage=1",), asynchronous=False),
    "pp2-vpp2-dp2-zero2": Case(
        world=4, overrides=("parallel.pipeline_parallel=2", "parallel.virtual_pipeline=2", "parallel.zero_stage=2", "train.micro_batch_size=3")
    ),
    "cp2-ep2-dp2-zero1": Case(world=4, overrides=("parallel.context_parallel=2", "parallel.expert_parallel=2", "parallel.zero_stage=1")),
}


@dataclass(kw_only=True)
class Whole:
    """The run of a case that is never killed."""

    evidence: Evidence
    first_step_seconds: float
    """From the command to its first finished step."""
    step_seconds: float
    """The median step."""


@dataclass(kw_only=True)
class Kill:
    """A start of a run, and how it was killed."""

    aim: str
    """Key of AIMS."""
    rank: int
    """Whose process was killed."""
    terminated: bool
    """Whether the others got SIGTERM, or were killed too."""
    hit: str = ""
    """start-up: no step was finished in this start. save: files of a save or a deletion were left half-way. step: neither."""
    step: int = 0
    """The last finished step."""
    checkpoint: int = 0
    """Step of the newest valid checkpoint afterwards; 0: none yet."""
    repeated: int = 0
    """Finished steps that are to be done again."""
    origin: str | None = None
    """Where this start said that it went on from; None where it was killed before."""
    seconds: float = 0.0
    """From the command to the kill."""
    ending_seconds: float = 0.0
    """From the kill to the end of the last process."""
    first_step_seconds: float | None = None
    """From the command to the first finished step of this start, if it got there."""
    restart_seconds: float | None = None
    """From the kill before to the first finished step of this start: its ending and this start, without this tool's own checks between them."""


@dataclass(kw_only=True)
class Episode:
    """A run from its first start to its end."""

    kills: list[Kill] = field(default_factory=list)
    restart_seconds: float | None = None
    """Of the last start, which finished the run."""
    failures: list[str] = field(default_factory=list)
    """One line each; empty: nothing was lost."""


def run_whole(case: Case, launcher: Launcher, corpora: Path, folder: Path) -> Whole:
    """Run a case to its end without a kill."""
    evidence, samples = _evidence(folder)
    started = time.monotonic()
    job = launcher.start(case.settings(corpora, folder), case.world, folder / "attempt", samples, terminate=False)
    first = _wait_for_row(job, evidence, 0, started)
    while not job.ended(0.05):
        pass
    if job.status or first is None:
        raise RuntimeError(f"the run that nobody kills ended with status {job.status}: see {folder / 'attempt'}")
    return Whole(evidence=evidence, first_step_seconds=first, step_seconds=statistics.median(row["time/step"] for row in evidence.rows()))


def run_killed(case: Case, launcher: Launcher, corpora: Path, folder: Path, whole: Whole, *, aims: Sequence[str], seed: str) -> Episode:
    """Start a run of `case` again and again, and kill it once for each of `aims` (keys of AIMS) unless it has finished before. seed: decides whom and when."""
    episode, draw = Episode(), random.Random(seed)
    evidence, samples = _evidence(folder)
    before: Kill | None = None
    while True:
        aimed = len(episode.kills) < len(aims)
        aim = aims[len(episode.kills)] if aimed else ""
        kill = Kill(aim=aim, rank=draw.randrange(case.world), terminated=draw.random() < 0.5 and case.world > 1)
        expected, _ = evidence.newest_valid()
        cursor = 0 if expected is None else read_manifest(expected).state["loader"]["cursor"]
        segments, reads = len(evidence.starts()), evidence.reads()
        rows, unfinished = evidence.row_count(), evidence.unfinished()
        started = time.monotonic()
        attempt = folder / f"attempt-{len(episode.kills)}"
        job = launcher.start(case.settings(corpora, folder), case.world, attempt, samples, terminate=kill.terminated)
        killed = aimed and _kill_at_its_moment(kill, job, evidence, whole, draw, rows, unfinished, started)
        if not killed:
            kill.first_step_seconds = kill.first_step_seconds or _wait_for_row(job, evidence, rows, started)
        killed_at = time.monotonic()
        while not job.ended(0.02):
            pass
        kill.seconds, kill.ending_seconds = killed_at - started, time.monotonic() - killed_at
        if before is not None and kill.first_step_seconds is not None:
            kill.restart_seconds = before.ending_seconds + kill.first_step_seconds
        judge_start(kill, evidence, segments, expected, episode)
        judge_reads(evidence, reads, cursor, episode)
        if job.status == 0:
            episode.restart_seconds = kill.restart_seconds
            episode.failures += evidence.differences(whole.evidence)
            return episode
        if not killed or time.monotonic() - started > ATTEMPT_SECONDS:
            episode.failures.append(f"status: a start that was not killed ended with {job.status}: see {attempt}")
            return episode
        judge_kill(kill, case, evidence, rows, unfinished, episode)
        episode.kills.append(kill)
        before = kill


def _evidence(folder: Path) -> tuple[Evidence, Path]:
    samples = folder / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    return Evidence(folder / "run", samples), samples


def _wait_for_row(job: Started, evidence: Evidence, rows: int, started: float) -> float | None:
    """Seconds since `started` when this start's first row is there; None where it ended before."""
    while evidence.row_count() <= rows:
        if job.ended(0.005) and evidence.row_count() <= rows:
            return None
    return time.monotonic() - started


def _kill_at_its_moment(
    kill: Kill, job: Started, evidence: Evidence, whole: Whole, draw: random.Random, rows: int, unfinished: set[str], started: float
) -> bool:
    """Wait for the moment that `kill` aims at, and kill; False where the job ended before it."""
    while not job.exists(kill.rank):
        if job.ended(0.01):
            return False
    if kill.aim == "start-up":
        deadline = time.monotonic() + draw.uniform(0, whole.first_step_seconds)
        while time.monotonic() < deadline and evidence.row_count() <= rows:
            if job.ended(0.002):
                return False
        job.kill(kill.rank)
        return True
    kill.first_step_seconds = _wait_for_row(job, evidence, rows, started)
    if kill.first_step_seconds is None:
        return False
    if kill.aim == "step":
        later = rows + 1 + draw.randrange(2 * EVERY)
        delay = draw.uniform(0, whole.step_seconds)
        while evidence.row_count() < later:
            if job.ended(0.002):
                return False
    else:
        delay = draw.uniform(0, SAVE_SECONDS)
        while not evidence.unfinished() - unfinished:
            if job.ended(0.002):
                return False
    if job.ended(delay):
        return False
    job.kill(kill.rank)
    return True


def judge_start(kill: Kill, evidence: Evidence, segments: int, expected: Path | None, episode: Episode) -> None:
    """A start that came so far as to say what it goes on from must have taken the newest checkpoint of which every byte is right."""
    said = evidence.starts()[segments:]
    if not said:
        return
    kill.origin = said[0]["origin"]
    wanted = "new" if expected is None else f"resumed from {expected}"
    if kill.origin != wanted:
        episode.failures.append(f"origin: start {len(episode.kills)} said {kill.origin!r}, not {wanted!r}")


def judge_reads(evidence: Evidence, reads: dict[str, list[int]], first: int, episode: Episode) -> None:
    """What a start reads follows the `first` samples, those of the checkpoint that it went on from, batch after batch. reads: of all starts before."""
    for name, cursors in evidence.reads().items():
        own = cursors[len(reads.get(name, [])) :]
        if own != [first + GLOBAL_BATCH * step for step in range(len(own))]:
            episode.failures.append(f"cursor: start {len(episode.kills)} read the batches at {own} after {first} samples ({name})")


def judge_kill(kill: Kill, case: Case, evidence: Evidence, rows: int, unfinished: set[str], episode: Episode) -> None:
    checkpoint, wrong = evidence.newest_valid()
    episode.failures += wrong
    kill.step, kill.checkpoint = evidence.last_step(), int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    kill.repeated = max(0, kill.step - kill.checkpoint)
    if kill.repeated > case.most_repeated:
        episode.failures.append(f"repeated: {kill.repeated} steps after step {kill.step}, and at most {case.most_repeated} may be")
    if evidence.row_count() <= rows:
        kill.hit = "start-up"
    else:
        kill.hit = "save" if evidence.unfinished() - unfinished else "step"
