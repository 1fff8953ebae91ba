"""A run that `kan launch slurm` submits, looked at from outside: its rows, starts and jobs, and the processes of its ranks."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from recovery_proofs.corpus import NAME, VOCABULARY
from recovery_proofs.evidence import FIGURES, Evidence

from kan_train.accounting.ledger import LEDGER, read_ledger
from kan_train.launch.attempts import read_events
from kan_train.launch.spec import log_dir, output_file
from slurm_proofs.cluster import Cluster

STEPS, EVERY, VALIDATE_EVERY = 48, 4, 16
"""Steps of a run, and between its saves and its validations."""

# Many groves of which few compute: steps are fast, but a save takes some tenths of a second and a validation a whole one, so that both can be hit.
SETTINGS = (
    "model=kan_tiny", "model.width=64", "model.sequence_length=32", f"model.vocab_size={VOCABULARY}", "model.grove.num_groves=128", "model.grove.width=64",
    "~data.blend.stdlib", f"+data.blend.{NAME}=1.0", "train.global_batch_size=4", f"train.validate_every={VALIDATE_EVERY}",
    "train.validation_sequences=192", f"checkpoint.every={EVERY}", "checkpoint.keep=2", "optimizer.schedule.warmup_steps=5", "run.seed=5", "run.device=cpu",
    "run.threads=1", "logging.progress=false", "parallel.zero_stage=2",
    "cluster=slurm", "cluster.nodes=2", "cluster.devices_per_node=1", "cluster.time=30", "cluster.signal_seconds=60", "+cluster.sbatch.exclusive=",
)  # fmt: skip
"""Two nodes with one process each."""

SECONDS = 240.0
"""Whatever is waited for takes no longer, on a machine that is busy with other tests too."""

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")
"""States of a job that will not start again."""


class Missed(AssertionError):
    """What a proof waited for did not come; says what there was instead."""


async def until(what: str, found: Callable[[], Any], seconds: float = SECONDS, every: float = 0.05) -> Any:
    """Wait until `found` gives something that is true, and return that."""
    deadline = time.monotonic() + seconds
    while not (result := found()):
        if time.monotonic() > deadline:
            raise Missed(f"waited {seconds:.0f} s in vain for {what}")
        await asyncio.sleep(every)
    return result


@dataclass
class Run:
    """One run, in a folder of its own."""

    cluster: Cluster
    corpora: Path
    folder: Path
    """run.root."""
    name: str = "run"
    """run.name."""
    overrides: list[str] = field(default_factory=list)
    """Settings beside SETTINGS."""
    steps: int = STEPS
    """train.steps."""
    said: str = ""
    """What the last submission wrote."""

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.folder / self.name

    @property
    def evidence(self) -> Evidence:
        """The same, as the proofs of recovery look at it. What the ranks read is not noted here: losses and norms to the last bit tell of it."""
        return Evidence(self.run_dir, self.folder / "samples")

    def words(self) -> list[str]:
        """What `kan launch slurm` is given."""
        return [*SETTINGS, f"data.root={self.corpora}", f"run.root={self.folder}", f"run.name={self.name}", f"train.steps={self.steps}", *self.overrides]

    async def kan(self, *words: str) -> tuple[int, str]:
        """A command that a user calls: its exit status, and what it wrote."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = self.cluster.environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-m", "kan_train", *words]
        # Not where the tests stand: a setting that names a relative path must mean the same on every node.
        started = await asyncio.create_subprocess_exec(
            *command, env=environment, cwd=self.folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        said = (await started.communicate())[0].decode()
        assert started.returncode is not None
        return started.returncode, said

    async def submit(self, *more: str) -> int:
        """Submit; the command's exit status."""
        status, self.said = await self.kan("launch", "slurm", *self.words(), *more)
        return status

    async def submitted(self) -> "Run":
        """Submit, which must succeed; returns the run itself."""
        assert await self.submit() == 0, self.said
        return self

    # --- what it left -----------------------------------------------------------------------------------------------------------------------------------

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Events of the jobs, oldest first, all or those of `kinds`."""
        return [event for event in read_events(self.run_dir) if not kinds or event["event"] in kinds]

    def ledger(self, *kinds: str) -> list[dict[str, Any]]:
        """Events of the ledger, oldest first, all or those of `kinds`."""
        return [event for event in read_ledger(self.run_dir / LEDGER) if not kinds or event["event"] in kinds]

    def rows(self, segment: int | None = None) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl, all or those of one start of the trainers."""
        rows = [row for row in self.evidence.rows() if "loss" in row] if self.run_dir.exists() else []
        return [row for row in rows if segment in (None, row["segment"])]

    def step(self) -> int:
        """Of the last row, 0 before the first."""
        rows = self.rows()
        return int(rows[-1]["step"]) if rows else 0

    def segment(self) -> int:
        """The newest start of the trainers that reached the loop, 0 before the first."""
        return max((event["segment"] for event in self.ledger("segment_start")), default=0)

    def differences(self, whole: "Run") -> list[str]:
        """Where this run is not `whole`, to the last bit: rows, validations, checkpoints, files. Empty: nowhere."""
        # W&B's files are only where it was asked for.
        found = [line for line in self.evidence.differences(whole.evidence) if "wandb" not in line and not line.startswith("rows:")]
        expected = {row["step"]: _figures(row) for row in whole.rows()}
        wrong = sorted({row["step"] for row in self.rows() if _figures(row) != expected.get(row["step"])})
        found += [f"rows: other figures in steps {wrong}"] if wrong else []
        own, others = (sorted({(event["step"], event["loss"]) for event in run.ledger("validation")}) for run in (self, whole))
        return found + ([] if own == others else [f"validations: {own}, not {others}"])

    # --- its job --------------------------------------------------------------------------------------------------------------------------------------

    @property
    def job_id(self) -> str:
        """The newest job's id."""
        newest = self.events("submitted", "resubmitted")[-1]
        return str(newest.get("new_job_id") or newest["job_id"])

    def job(self) -> dict[str, str]:
        """Slurm's words about it."""
        return self.cluster.job(self.job_id)

    def hosts(self) -> list[str]:
        """Of the newest start, in the order of ranks."""
        return [str(host) for host in self.events("started")[-1]["hosts"]]

    def restarts(self) -> int:
        """How often the jobs of this run were started again."""
        return len(self.events("started")) - 1

    def ranks(self) -> dict[int, psutil.Process]:
        """Rank -> its process, of those that are there now."""
        return {int(environment["RANK"]): process for process, environment in self._processes() if "RANK" in environment and _trains(process)}

    def _processes(self) -> list[tuple[psutil.Process, dict[str, str]]]:
        found, job_id = [], self.job_id
        for process in psutil.process_iter():
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            # The number of a job tells clusters apart too: they start counting at different ones.
            if environment.get("SLURM_JOB_ID") == job_id and environment.get("SLURM_CONF") == self.cluster.environment["SLURM_CONF"]:
                found.append((process, environment))
        return found

    async def until_step(self, step: int) -> None:
        """Wait for the row of `step`."""
        await self.until(f"step {step}", lambda: self.step() >= step)

    async def until(self, what: str, found: Callable[[], Any], every: float = 0.05) -> Any:
        """Wait for `found`, but no longer than the run goes on."""

        def found_or_over() -> Any:
            over = self.events("gave_up", "finished")
            return found() or (Missed(f"the run has ended without {what}") if over else None)

        try:
            result = await until(what, found_or_over, every=every)
        except Missed as missed:
            result = missed
        if isinstance(result, Missed):
            raise Missed(f"{result}\n{self.story()}")
        return result

    async def until_state(self, *states: str) -> dict[str, str]:
        """Wait for the job to be in one of `states`."""
        try:
            await until(f"job {self.job_id} to be {' or '.join(states)}", lambda: self.job()["JobState"] in states, every=0.2)
        except Missed as missed:
            raise Missed(f"{missed}\n{self.story()}") from None
        return self.job()

    async def until_finished(self) -> None:
        """Wait for the end of the job, which must be a good one."""
        state = await self.until_state(*ENDED)
        assert state["JobState"] == "COMPLETED", self.story()
        assert self.events()[-1]["event"] == "finished", self.story()

    def story(self) -> str:
        """What is known of the run: events of its jobs and the end of their output."""
        events = "\n".join(json.dumps({key: value for key, value in event.items() if key != "scheduler"}) for event in self.events())
        output = output_file(self.run_dir, self.job_id) if self.events() else None
        text = output.read_text(errors="replace")[-3000:] if output is not None and output.exists() else "no output"
        return f"{self.said}\n{events}\n{text}"

    def log_of_rank(self, rank: int, restart: int) -> Path:
        """The rank's own output in one start of the newest job."""
        return log_dir(self.run_dir, self.job_id, restart) / f"rank-{rank:05d}.log"


def send_term(run: Run) -> float:
    """SIGTERM to every process of the job's steps, as Slurm does it before a preemption, but at this moment; returns it (unix)."""
    steps = [process for process, environment in run._processes() if "SLURM_PROCID" in environment and environment.get("SLURM_STEP_ID", "") != ""]
    now = time.time()
    for process in steps:
        try:
            process.send_signal(signal.SIGTERM)
        except psutil.NoSuchProcess:
            continue
    return now


def _figures(row: dict[str, Any]) -> list[Any]:
    # A validation that was broken off is done when the run goes on: its figures are in the ledger, not in the row of its step.
    return [row.get(name) for name in FIGURES if not name.startswith("validation/")]


def _trains(process: psutil.Process) -> bool:
    try:
        return "train" in process.cmdline()
    except psutil.Error:
        return False
