"""Curves of any length as a few thousand points that look the same."""

import itertools

import numpy as np
from numpy.typing import NDArray

from kan_train.report.rows import Column

DIGITS = 6
"""Significant digits of what is drawn: more cannot be seen."""


def parts(length: int, points: int) -> list[slice]:
    """At most `points` slices that cover `length` values, in order, as equal as possible."""
    edges = np.linspace(0, length, min(length, points) + 1).round().astype(int).tolist()
    return [slice(start, end) for start, end in itertools.pairwise(edges) if end > start]


def medians(values: Column, points: int) -> Column:
    """The median of each of `parts`, NaN left out: what a single bad step does not move."""
    return np.array([_median(values[part]) for part in parts(len(values), points)])


def extremes(values: Column, points: int) -> NDArray[np.int64]:
    """Indices, ascending, of the least and the greatest finite value of each of `points` // 2 parts: spikes stay."""
    kept: set[int] = set()
    for part in parts(len(values), max(1, points // 2)):
        finite = np.flatnonzero(np.isfinite(values[part])) + part.start
        if len(finite):
            kept |= {int(finite[np.argmin(values[finite])]), int(finite[np.argmax(values[finite])])}
    return np.array(sorted(kept), dtype=np.int64)


def running_median(values: Column, reach: int) -> Column:
    """The median over `reach` values on each side, fewer at the ends; NaN left out."""
    return np.array([_median(values[max(0, i - min(reach, i)) : i + min(reach, i) + 1]) for i in range(len(values))])


def short(values: Column | list[float]) -> list[float | None]:
    """As JSON can hold them: DIGITS significant digits, null for what is not finite."""
    return [float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None for value in np.asarray(values, dtype=float).tolist()]


def _median(values: Column) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else float("nan")
