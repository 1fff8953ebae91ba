"""How much each function's learned part does, weighed by what the function reads and by how often its grove runs.

    importance = sqrt( P(grove runs) * E[(s(x) - a - b x)^2] ),   a + b x the best straight line through s for its inputs

the root mean square, over all tokens, of what s adds beyond a straight line. x is distributed as the inputs seen on held-out text, to the width of a bin.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kan_train.audit.functions import Functions
from kan_train.audit.watch import BINS, Watched, middles_of


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Of the functions [N, I, O]."""

    bent: np.ndarray
    """Importance: fp64 [N, I, O], in the units of the function's output; 0 where the grove was never used."""
    size: np.ndarray
    """The same without the straight line taken out: sqrt(P(grove runs) E[s^2]). What zeroing s takes away."""
    runs: np.ndarray
    """P(grove runs) a token: fp64 [N]."""
    outside: float
    """Share of all inputs that lay outside the grid, where functions are straight."""


def importance_of(functions: Functions, inputs: np.ndarray, runs: np.ndarray) -> Importance:
    """From the histograms [N, I, BINS] of the inputs, and the probability [N] that a token runs the grove."""
    x, shape = middles_of(functions.config), functions.shape
    bent, size = np.zeros(shape), np.zeros(shape)
    for grove in np.flatnonzero(inputs.sum((1, 2))):
        weights_IP = inputs[grove] / np.maximum(1, inputs[grove].sum(-1, keepdims=True))
        learned_IOP = functions.learned(int(grove), x)
        bent[grove] = np.sqrt(runs[grove] * residual(weights_IP[:, None], x, learned_IOP))
        size[grove] = np.sqrt(runs[grove] * (weights_IP[:, None] * learned_IOP**2).sum(-1))
    inside = inputs[:, :, BINS // 4 : -BINS // 4].sum()
    return Importance(bent=bent, size=size, runs=runs, outside=float(1 - inside / max(1, inputs.sum())))


def residual(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """E[(y - a - b x)^2] for the best a and b: weights [..., P] that sum to 1, x [P], y [..., P] -> [...]."""
    mean_x, mean_y = (weights * x).sum(-1, keepdims=True), (weights * y).sum(-1, keepdims=True)
    dx, dy = x - mean_x, y - mean_y
    variance = (weights * dx**2).sum(-1)
    slope = (weights * dx * dy).sum(-1) / np.where(variance > 0, variance, 1.0)
    return (weights * (dy - slope[..., None] * dx) ** 2).sum(-1)


def importances_of(functions: Sequence[Functions], watched: Watched) -> list[Importance]:
    """One for every entry of `functions`, which are those that were watched."""
    number = {layer: place for place, layer in enumerate(watched.layers)}
    found = []
    for each, inputs in zip(functions, watched.inputs, strict=True):
        runs = np.ones(1) if each.shared else runs_of(watched.choices[number[each.layer]], each.shape[0])
        found.append(importance_of(each, inputs, runs))
    return found


def runs_of(choices_TK: np.ndarray, groves: int) -> np.ndarray:
    """Probability that a token runs each grove: fp64 [N]."""
    return np.bincount(choices_TK[choices_TK >= 0], minlength=groves) / len(choices_TK)


def share_that_holds(bent: np.ndarray, part: float = 0.9) -> float:
    """The least share of the functions that together have `part` of the squared importance; 0 where there is none."""
    squares = np.sort(bent.ravel() ** 2)[::-1]
    total = squares.sum()
    return float((np.searchsorted(np.cumsum(squares), part * total) + 1) / len(squares)) if total else 0.0
