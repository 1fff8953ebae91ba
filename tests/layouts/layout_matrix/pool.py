"""The caller's end of server.py."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

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


class Pool:
    """A server of rows; a context manager that ends it."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, str(Path(__file__).with_name("server.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.import_seconds: float | None = None

    def run(
        self, row: Row, folder: Path, *, steps: int = STEPS, choices: Path | None = None, fault: str | None = None, seconds: float = 300.0
    ) -> Run:
        """Train the first steps of a row in fresh processes; the rest as `member.train_row`. seconds: after which they are ended by force."""
        if self.import_seconds is None:
            self.import_seconds = self._answer()["import_seconds"]
        folder.mkdir(parents=True, exist_ok=True)
        request = {"row": row.name, "world": row.world, "folder": str(folder), "steps": steps, "fault": fault, "seconds": seconds}
        request["choices"] = str(choices) if choices else None
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        if any(answer["codes"]):
            return Run(folder, seconds=answer["seconds"], error=_ends(folder, answer["codes"]))
        return Run(folder, read_ranks(row, folder), answer["seconds"])

    def close(self) -> None:
        """End the server; it has no children between rows."""
        self.process.terminate()
        self.process.communicate()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server of rows ended with code {self.process.wait()}; its error is above")
        return json.loads(line)


def read_ranks(row: Row, folder: Path) -> list[dict]:
    """What each rank of a row wrote."""
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(row.world)]


def _ends(folder: Path, codes: list[int]) -> str:
    """The last lines of the ranks that failed by themselves, and of the others only their codes."""
    failed = [rank for rank, code in enumerate(codes) if code > 0] or [rank for rank, code in enumerate(codes) if code]
    outputs = [f"rank {rank}:\n{(folder / f'output-{rank}').read_text(errors='replace')[-3000:]}" for rank in failed]
    return f"exit codes {codes}\n" + "\n".join(outputs)
