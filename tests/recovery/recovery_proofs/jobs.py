"""All processes of a run, started together and ended together: forked by a pool, or by the torchrun command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

import psutil
from layout_matrix.pool import Job, Pool

ATTEMPT_SECONDS = 300.0
"""A start of a run that takes longer is ended by force, and has failed."""

TERMINATION_SECONDS = 15.0
"""After SIGTERM the ranks that are left get this long, as torchrun gives them 30, before they are ended by force."""


class Started(Protocol):
    """Processes of a run."""

    def exists(self, rank: int) -> bool:
        """Whether the process of `rank` is there to be killed."""
        ...

    def kill(self, rank: int) -> None:
        """kill -9 of one rank; the others are then ended as the launcher ends them."""
        ...

    def ended(self, timeout: float) -> bool:
        """Whether all processes have ended; waits up to `timeout` seconds."""
        ...

    @property
    def status(self) -> int:
        """0 where all processes ended well; after the end."""
        ...


class Launcher(Protocol):
    """Starts runs."""

    name: str

    def start(self, overrides: list[str], world: int, folder: Path, samples: Path, *, terminate: bool) -> Started:
        """`kan train` with `overrides` in `world` processes. folder: for its output. samples: where what is read is noted, if this launcher does.

        terminate: after one rank was killed the others get SIGTERM and some seconds, as from torchrun; else they are killed at once, as a cluster
        manager ends the job of a node that died.
        """
        ...


class Forked:
    """Processes that a pool forks: the same command, without its imports. The other launcher differs from it in nothing but time."""

    name = "forked"

    def __init__(self, pool: Pool) -> None:
        pool.ready()  # the imports are no part of any start
        self.pool = pool

    def start(self, overrides: list[str], world: int, folder: Path, samples: Path, *, terminate: bool) -> Started:
        arguments = {"overrides": overrides, "samples": str(samples)}
        grace = TERMINATION_SECONDS if terminate else 0.0
        return _ForkedJob(
            self.pool.start("recovery_proofs.entry:command", world, folder, arguments, seconds=ATTEMPT_SECONDS, grace=grace, terminate=terminate)
        )


class _ForkedJob:
    def __init__(self, job: Job) -> None:
        self.job = job

    def exists(self, rank: int) -> bool:
        return True

    def kill(self, rank: int) -> None:
        self.job.kill(rank)

    def ended(self, timeout: float) -> bool:
        return self.job.ended(timeout)

    @property
    def status(self) -> int:
        return next((code for code in self.job.wait() if code), 0)


class Torchrun:
    """`torchrun -m kan_train train`: it ends the others with SIGTERM when one rank is gone. What is read is not noted."""

    name = "torchrun"

    def start(self, overrides: list[str], world: int, folder: Path, samples: Path, *, terminate: bool) -> Started:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "-m", "kan_train", "train"]
        with (folder / "output").open("w") as output:
            agent = subprocess.Popen([*command, *overrides], stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return _TorchrunJob(agent)


class _TorchrunJob:
    def __init__(self, agent: subprocess.Popen) -> None:
        self.agent = agent
        self.processes: dict[int, psutil.Process] = {}
        self.deadline = time.monotonic() + ATTEMPT_SECONDS

    def exists(self, rank: int) -> bool:
        if rank not in self.processes:
            self._look()
        return rank in self.processes

    def _look(self) -> None:
        try:
            for process in psutil.Process(self.agent.pid).children(recursive=True):
                environment = process.environ()
                if "RANK" in environment and process.exe() != "" and "kan_train" in process.cmdline():
                    self.processes[int(environment["RANK"])] = process
        except psutil.Error:  # a process that is starting or ending: the next look will see
            return

    def kill(self, rank: int) -> None:
        # psutil compares the process's birth with the one that was seen: a number given anew is not killed.
        try:
            self.processes[rank].send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            return

    def ended(self, timeout: float) -> bool:
        try:
            self.agent.wait(timeout)
        except subprocess.TimeoutExpired:
            if time.monotonic() > self.deadline:
                self._give_up()
            return False
        return True

    def _give_up(self) -> None:
        for process in [*psutil.Process(self.agent.pid).children(recursive=True), psutil.Process(self.agent.pid)]:
            process.kill()
        self.agent.wait()

    @property
    def status(self) -> int:
        return self.agent.wait()
