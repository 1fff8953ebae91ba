"""Append-only files of JSON lines that survive a crash: one write a line, and a torn last line is passed over."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends rows to a file. What was written before, by this process or an earlier one, is never changed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            # A process died within a line: the next row must not be glued to it.
            os.write(self._file, b"\n")

    def append(self, row: dict[str, Any]) -> None:
        """Write `row` as one line. A number that is not finite becomes null: JSON has no other way to say it."""
        line = json.dumps({key: _plain(value) for key, value in row.items()}, allow_nan=False).encode() + b"\n"
        # One write call a line: with O_APPEND no other writer can come between, and a crash tears at most the last line.
        os.write(self._file, line)

    def close(self) -> None:
        """Hand what was written to the disk and close the file."""
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; torn lines are passed over."""
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that stand: one a step, in order. A segment that resumed at an earlier step replaces what was after it."""
    standing: list[dict[str, Any]] = []
    for row in read_lines(path):
        while standing and standing[-1]["step"] >= row["step"]:
            standing.pop()
        standing.append(row)
    return standing


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value
