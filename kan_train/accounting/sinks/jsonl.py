"""metrics.jsonl: one row a step, appended and never changed. The truth that the console, W&B and every report show."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from kan_train.accounting.lines import JsonLines, Row, read_lines

METRICS = "metrics.jsonl"
"""The file's name in a run directory."""

LINEAGE = ("step", "segment", "resumed_from", "rewinds")
"""What decides whether a row counts."""


class JsonlSink:
    """Appends rows to metrics.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: JsonLines | None = None

    def start(self, start: Row) -> None:
        """Open the file; a line torn by a crash is cut off. ConfigError where it cannot be written."""
        self._lines = JsonLines(self.path)

    def write(self, row: Row) -> None:
        """Append `row`; it survives this process when this returns."""
        assert self._lines is not None, "write before start"
        self._lines.append(row)

    def event(self, kind: str, fields: dict[str, Any]) -> None:
        """Events are the ledger's."""

    def close(self, end: Row) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()


def read_metrics(path: Path, names: Collection[str] | None = None) -> list[Row]:
    """The rows that count, in the order of their steps; none where there is no file.

    A run that is killed at step 150 and resumed from its checkpoint of step 100 has done the steps from 101 twice: the first rows of
    them stay in the file, and do not count. Every row has its `segment`, how often that went back to a checkpoint because of bad steps
    (`rewinds`), and the step that it then went on from (`resumed_from`): a row counts if none later that wrote any row went on from before its step.
    Numbers that are not finite come back as such; a last line torn by a crash does not count. ConfigError where a line in the middle is damaged.

    names: what to keep of every row besides step, segment and resumed_from; unset: everything, which takes much memory for a long run.
    """
    rows = [row if names is None else {name: row[name] for name in row if name in LINEAGE or name in names} for row in read_lines(path)]
    counting: list[Row] = []
    going, horizon = None, float("inf")  # what is being read, from the last row back; steps beyond the horizon were done again
    resumed_from = float("inf")
    for row in reversed(rows):
        if (row["segment"], row.get("rewinds", 0)) != going:
            going, horizon = (row["segment"], row.get("rewinds", 0)), min(horizon, resumed_from)
        resumed_from = row["resumed_from"]
        if row["step"] <= horizon:
            counting.append(row)
    counting.reverse()
    return counting
