"""Which shape of a small dictionary a function looks like, where its inputs lie:  y = a g(b x + c) + d.

A description, no discovery: four free numbers fit most smooth curves over a short range, so that the simplest shape among the nearly best ones is named,
the straight line's R^2 stands beside it, and below `GOOD` no shape is named.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

GOOD = 0.95
"""R^2 below which no shape is named."""

NEAR = 0.005
"""R^2 that a simpler shape may be below the best one."""

_ROUNDS, _POINTS = 8, 5


@dataclass(frozen=True)
class Shape:
    """One entry of the dictionary."""

    name: str
    text: str
    """Its formula, {u} in the place of b x + c."""
    function: Callable[[np.ndarray], np.ndarray]
    numbers: int
    """Free numbers, a and d among them: what simpler means."""
    scales: tuple[float, ...]
    """Values of b to begin from, in deviations of the inputs; one alone is kept."""
    shifts: tuple[float, ...]
    """The same for c."""


_SCALES = (-1.0, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.5)
_SHIFTS = (-3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0)


def _silu(u: np.ndarray) -> np.ndarray:
    return u / (1 + np.exp(-np.clip(u, -60, 60)))


DICTIONARY = (
    Shape("line", "{u}", lambda u: u, 2, (1.0,), (0.0,)),
    Shape("square", "({u})^2", np.square, 3, (1.0,), _SHIFTS),
    Shape("bend", "|{u}|", np.abs, 3, (1.0,), _SHIFTS),
    Shape("ramp", "max(0, {u})", lambda u: np.maximum(u, 0), 3, (1.0, -1.0), _SHIFTS),
    Shape("exp", "exp({u})", lambda u: np.exp(np.clip(u, -30, 30)), 3, tuple(sign * b for b in (0.3, 0.75, 1.5, 3.0) for sign in (1, -1)), (0.0,)),
    Shape("cube", "({u})^3", lambda u: u**3, 3, (1.0,), _SHIFTS),
    Shape("silu", "silu({u})", _silu, 4, tuple(sign * b for b in (0.5, 1.0, 2.0, 4.0) for sign in (1, -1)), _SHIFTS),
    Shape("tanh", "tanh({u})", np.tanh, 4, _SCALES[1:], _SHIFTS),
    Shape("bell", "exp(-({u})^2)", lambda u: np.exp(-np.minimum(u**2, 60)), 4, _SCALES[1:], _SHIFTS),
    Shape("sin", "sin({u})", np.sin, 4, _SCALES[1:], _SHIFTS),
)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a function looks like."""

    shape: str
    """Name in the dictionary; "none" where no R^2 reaches GOOD, "flat" where the function is constant on its inputs."""
    formula: str
    """With its numbers; empty for none and flat."""
    r2: float
    """Share of the function's variance over its inputs that the shape has; of the best shape where none is named."""
    line_r2: float
    """The same of the best straight line."""
    next_shape: str
    """The best of the other shapes that are not simpler (of all others where none is named); empty for flat."""
    next_r2: float

    def as_json(self) -> dict[str, Any]:
        """For audit.json."""
        return asdict(self)


@dataclass(frozen=True)
class _Fit:
    shape: Shape
    r2: float
    scale: float
    shift: float


def summary_of(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Summary:
    """The shape of a function with values y at x, all [P]; weights [P]: how many of its inputs lie there."""
    seen = weights > 0
    x, y, p = x[seen], y[seen], weights[seen] / weights[seen].sum()
    mean, deviation = float(p @ x), float(np.sqrt(p @ (x - p @ x) ** 2))
    if p @ (y - p @ y) ** 2 <= 1e-12 * max(1.0, float(p @ y**2)) or deviation == 0:
        return Summary(shape="flat", formula="", r2=0.0, line_r2=0.0, next_shape="", next_r2=0.0)
    t = (x - mean) / deviation
    # What a function begins as counts as simple as a line: whether it still is that comes before any other shape.
    start = Shape("silu", "silu({u})", _silu, 2, (deviation,), (mean,))
    fits = [_fit(shape, t, y, p) for shape in (*DICTIONARY, start)]
    chosen = max(fits, key=lambda fit: fit.r2)
    named = chosen.r2 >= GOOD
    if named:
        least = max(chosen.r2 - NEAR, GOOD)
        chosen = min((fit for fit in fits if fit.r2 >= least), key=lambda fit: (fit.shape.numbers, -fit.r2))
    others = [fit for fit in fits if fit.shape.name != chosen.shape.name and (not named or fit.shape.numbers >= chosen.shape.numbers)]
    following = max(others, key=lambda fit: fit.r2)
    return Summary(
        shape=chosen.shape.name if named else "none", formula=_formula(chosen, mean, deviation, x, y, p) if named else "",
        r2=chosen.r2, line_r2=fits[0].r2, next_shape=following.shape.name, next_r2=following.r2,
    )  # fmt: skip


def _fit(shape: Shape, t: np.ndarray, y: np.ndarray, p: np.ndarray) -> _Fit:
    """The best b and c, first of the shape's own, then of ever finer grids around the best so far; a and d follow by least squares."""
    best = _best(shape, np.array(shape.scales), np.array(shape.shifts), t, y, p)
    width = 0.5
    for _ in range(_ROUNDS):
        steps = np.linspace(-width, width, _POINTS)
        scales = best.scale * np.exp(steps) if len({abs(scale) for scale in shape.scales}) > 1 else np.array([best.scale])
        shifts = best.shift + steps if len(shape.shifts) > 1 else np.array([best.shift])
        best, width = max(best, _best(shape, scales, shifts, t, y, p), key=lambda fit: fit.r2), width * 0.6
    return best


def _best(shape: Shape, scales: np.ndarray, shifts: np.ndarray, t: np.ndarray, y: np.ndarray, p: np.ndarray) -> _Fit:
    b, c = (each.ravel() for each in np.meshgrid(scales, shifts, indexing="ij"))
    values = shape.function(b[:, None] * t + c[:, None])
    dg, dy = values - (values @ p)[:, None], y - p @ y
    variance = dg**2 @ p
    r2 = np.where(variance > 1e-12, (dg @ (p * dy)) ** 2 / (np.maximum(variance, 1e-300) * (p @ dy**2)), 0.0)
    number = int(r2.argmax())
    return _Fit(shape, float(min(1.0, r2[number])), float(b[number]), float(c[number]))


def _formula(fit: _Fit, mean: float, deviation: float, x: np.ndarray, y: np.ndarray, p: np.ndarray) -> str:
    scale = fit.scale / deviation
    shift = fit.shift - scale * mean
    if fit.shape.name == "line":
        scale, shift = 1.0, 0.0
    g = fit.shape.function(scale * x + shift)
    dg = g - p @ g
    factor = float(dg @ (p * (y - p @ y)) / (dg**2 @ p))
    inner = ("x" if abs(scale - 1) < 5e-3 else f"{scale:.3g} x") + (f" {'+' if shift > 0 else '-'} {abs(shift):.2g}" if abs(shift) >= 5e-3 else "")
    constant = float(p @ y - factor * (p @ g))
    outer = f" {'+' if constant > 0 else '-'} {abs(constant):.2g}" if abs(constant) >= 5e-3 * abs(factor) else ""
    return f"{factor:.3g} {fit.shape.text.format(u=inner)}{outer}"
