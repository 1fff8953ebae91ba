"""The caller's end of server.py."""

import json
import os
import select
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from layout_matrix.rows import STEPS, Row


@dataclass
class Run:
    """What the processes of a row left."""

    folder: Path
    ranks: list[dict] = field(default_factory=list)
    """What each rank saw; empty where one of them failed."""
    seconds: float = 0.0
    """From the fork to the last exit."""
    error: str = ""
    """The end of the failed ranks' output."""


TESTS = str(Path(__file__).parents[2])
"""free_ports.py is there: a campaign started outside of pytest has not got it on its path."""

GRACE_SECONDS = 3.0
"""After one process of a row failed, the others wait in a collective: they get this long to fail too."""


class Job:
    """Processes that a pool has started; one job at a time."""

    def __init__(self, pool: "Pool", pids: list[int]) -> None:
        self.pool = pool
        self.pids = pids
        """Process numbers, one a rank."""
        self.codes: list[int] | None = None
        """Exit codes, one a rank, below 0 where a rank was ended by force; None while the job runs."""
        self.seconds = 0.0
        """From the fork to the last exit."""

    def kill(self, rank: int) -> None:
        """End one rank by force (SIGKILL); the others follow as the job's grace says. Nothing where it has ended already."""
        if not self.ended():
            self.pool.send({"kill": rank})

    def ended(self, timeout: float = 0.0) -> bool:
        """Whether all ranks have ended; waits up to `timeout` seconds for it."""
        if self.codes is None and self.pool.answered(timeout):
            answer = self.pool.answer()
            self.codes, self.seconds = answer["codes"], answer["seconds"]
        return self.codes is not None

    def wait(self) -> list[int]:
        """The exit codes, one a rank."""
        while not self.ended(60.0):
            pass
        assert self.codes is not None
        return self.codes


class Pool:
    """A server of jobs; a context manager that ends it."""

    def __init__(self, *modules: str) -> None:
        """modules: what its processes need beside what every row needs; imported once."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*(path for path in sys.path if path), TESTS])}
        command = [sys.executable, str(Path(__file__).with_name("server.py")), *modules]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.import_seconds: float | None = None

    def run(
        self, row: Row, folder: Path, *, steps: int = STEPS, choices: Path | None = None, fault: str | None = None, seconds: float = 300.0
    ) -> Run:
        """Train the first steps of a row in fresh processes; the rest as `member.train_row`. seconds: after which they are ended by force."""
        arguments = {"name": row.name, "steps": steps, "choices": str(choices) if choices else None, "fault": fault}
        return self.call("layout_matrix.member:run_row", row, folder, arguments, seconds=seconds)

    def call(self, task: str, row: Row, folder: Path, arguments: dict[str, Any], *, seconds: float = 300.0) -> Run:
        """Let a function (`task`: "module:function") of JSON `arguments` run in the processes of a row, each of which leaves a rank-N.json."""
        job = self.start(task, row.world, folder, arguments, seconds=seconds)
        if any(job.wait()):
            return Run(folder, seconds=job.seconds, error=_ends(folder, job.wait()))
        return Run(folder, read_ranks(row, folder), job.seconds)

    def start(
        self, task: str, world: int, folder: Path, arguments: dict[str, Any], *, seconds: float, grace: float = GRACE_SECONDS, terminate: bool = False
    ) -> Job:
        """Start function(folder, **arguments) in `world` processes; server.py has the details. Their output goes to output-N in `folder`."""
        self.ready()
        folder.mkdir(parents=True, exist_ok=True)
        request = {"task": task, "world": world, "folder": str(folder), "arguments": arguments}
        self.send(request | {"seconds": seconds, "grace": grace, "terminate": terminate})
        return Job(self, self.answer()["pids"])

    def ready(self) -> None:
        """Wait until the imports are done; the first start does too."""
        if self.import_seconds is None:
            self.import_seconds = self.answer()["import_seconds"]

    def close(self) -> None:
        """End the server; it has no children between jobs, and ends those of a job that is still going on."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def send(self, request: dict[str, Any]) -> None:
        """One line to the server."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The server's next line; RuntimeError where it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server of jobs ended with code {self.process.wait()}; its error is above")
        return json.loads(line)

    def answered(self, timeout: float) -> bool:
        """Whether there is an answer to read (or none will ever come); waits up to `timeout` seconds. An answer is read whole: none lies in a buffer."""
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], timeout)[0])


def read_ranks(row: Row, folder: Path) -> list[dict]:
    """What each rank of a row wrote."""
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(row.world)]


def _ends(folder: Path, codes: list[int]) -> str:
    """The last lines of the ranks that failed by themselves, and of the others only their codes."""
    failed = [rank for rank, code in enumerate(codes) if code > 0] or [rank for rank, code in enumerate(codes) if code]
    outputs = [f"rank {rank}:\n{(folder / f'output-{rank}').read_text(errors='replace')[-3000:]}" for rank in failed]
    return f"exit codes {codes}\n" + "\n".join(outputs)
