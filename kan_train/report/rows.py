"""metrics.jsonl as columns, for runs of any length: memory by the number of rows and not by what is in them, and only what is new is read again."""

import math
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kan_train.accounting.lines import decode
from kan_train.config.errors import ConfigError

Column = NDArray[np.float64]
"""fp64 [rows]; NaN where a row does not have the figure, or has one that is not finite."""

LINEAGE = ("step", "segment", "rewinds", "resumed_from")
"""What decides whether a row counts: see `kan_train.accounting.sinks.jsonl.read_metrics`, which this agrees with."""

FIGURES = (
    "tokens", "loss", "cross_entropy", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "mfu_causal", "hfu", "time/step", "validation/loss",
    "validation/bits_per_byte", "sparsity/nominal", "sparsity/executed_flops_share", "cost/forecast_hours", "cost/forecast_hours_low",
    "cost/forecast_hours_high", "cost/forecast_usd", "cost/forecast_usd_low", "cost/forecast_usd_high", "cost/budget_left_usd", "cost/budget_left_hours",
    "energy/joules", "energy/joules_per_token",
)  # fmt: skip
"""What is kept of every row, besides its lineage."""

LAYER_FIGURES = ("load/cv", "sparsity/touched")
"""What a row has of every layer of groves, each under NAME/LAYER: kept of a sample of the rows."""

SAMPLES = 240
"""Rows whose layers are kept: at least half as many, at most so many, evenly apart."""


@dataclass(frozen=True)
class Metrics:
    """The rows of a run that count, in the order of their steps."""

    columns: dict[str, Column]
    """Every name of LINEAGE and FIGURES."""
    layers: dict[str, NDArray[np.float64]]
    """Every name of LAYER_FIGURES that there is: fp64 [sampled rows, layers]."""
    sampled: NDArray[np.int64]
    """int64 [sampled rows]: which rows of the columns these are."""

    def __len__(self) -> int:
        return len(self.columns["step"])

    def has(self, name: str) -> bool:
        """Whether any row has the figure."""
        return bool(np.isfinite(self.columns[name]).any())

    def last(self, name: str) -> float | None:
        """The last finite figure of that name; None where there is none."""
        finite = self.columns[name][np.isfinite(self.columns[name])]
        return float(finite[-1]) if len(finite) else None


class MetricsReader:
    """Reads a metrics.jsonl that may still grow."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def read(self) -> Metrics:
        """What counts by now; nothing where there is no file. ConfigError naming the line where one in the middle is damaged."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self._offset:
            self._forget()  # another run of the same name
        if size > self._offset:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._add(line)
                    self._offset += len(line)
        return self._counting()

    def _forget(self) -> None:
        self._offset, self._lines, self._apart = 0, 0, 1
        self._columns = {name: array("d") for name in (*LINEAGE, *FIGURES)}
        self._samples: list[tuple[int, dict[str, list[float]]]] = []

    def _add(self, line: bytes) -> None:
        try:
            row = decode(line)
        except ValueError as error:
            raise ConfigError(f"{self.path}, line {self._lines + 1} is damaged ({error}); remove that line, or restore the file") from error
        for name, column in self._columns.items():
            value = row.get(name, 0.0 if name == "rewinds" else math.nan)
            column.append(value if isinstance(value, int | float) else math.nan)
        if self._lines % self._apart == 0:
            self._samples.append((self._lines, {name: _layers(row, name) for name in LAYER_FIGURES}))
            if len(self._samples) > SAMPLES:
                self._samples, self._apart = self._samples[::2], 2 * self._apart
        self._lines += 1

    def _counting(self) -> Metrics:
        # Views, which must be gone before the next row is added; what is kept is copied by the choice of the rows that count.
        columns = {name: np.frombuffer(column) if column else np.empty(0) for name, column in self._columns.items()}
        counts = counting(columns)
        place = np.cumsum(counts) - 1
        samples = [(number, layers) for number, layers in self._samples if counts[number]]
        kept = {}
        for name in LAYER_FIGURES:
            wide = max((len(layers[name]) for _, layers in samples), default=0)
            if wide:
                kept[name] = np.array([layers[name] + [math.nan] * (wide - len(layers[name])) for _, layers in samples])
        sampled = np.array([place[number] for number, _ in samples], dtype=np.int64)
        return Metrics({name: column[counts] for name, column in columns.items()}, kept, sampled)


def _layers(row: dict[str, float], name: str) -> list[float]:
    found: list[float] = []
    while (value := row.get(f"{name}/{len(found)}")) is not None:
        found.append(value)
    return found


def counting(columns: dict[str, Column]) -> NDArray[np.bool_]:
    """Which rows of a whole file count, bool [rows], by the columns of LINEAGE.

    From the last stretch back: steps beyond the one that a later stretch went on from were done again.
    """
    step, segment, rewinds, resumed_from = (columns[name] for name in LINEAGE)
    counts = np.zeros(len(step), dtype=bool)
    if not len(step):
        return counts
    changes = np.flatnonzero((np.diff(segment) != 0) | (np.diff(rewinds) != 0)) + 1
    starts, ends = [0, *changes.tolist()], [*changes.tolist(), len(step)]
    horizon = math.inf
    for start, end in zip(reversed(starts), reversed(ends), strict=True):
        counts[start:end] = step[start:end] <= horizon
        horizon = min(horizon, resumed_from[start])
    return counts
