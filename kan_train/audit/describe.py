"""The functions of one layer as audit.json has them: how important, how bent, and the most important ones with their curves and shapes."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from kan_train.audit.functions import Functions
from kan_train.audit.importance import Importance, share_that_holds
from kan_train.audit.shapes import summary_of
from kan_train.audit.watch import middles_of, range_of

POINTS = 61
"""Points of a curve."""

SUMMARISED = 64
"""Functions of a layer that are compared with the dictionary: its most important ones."""

QUANTILES = 20


def layers_of(functions: Sequence[Functions], importances: Sequence[Importance], inputs: Sequence[np.ndarray], *, top: int) -> list[dict[str, Any]]:
    """One entry a layer, in order; `top`: how many of its functions come with curves."""
    found = []
    for layer in dict.fromkeys(each.layer for each in functions):
        parts = [part for part in zip(functions, importances, inputs, strict=True) if part[0].layer == layer]
        found.append(_layer(layer, parts, top))
    return found


def _layer(layer: int, parts: list[tuple[Functions, Importance, np.ndarray]], top: int) -> dict[str, Any]:
    bent = np.concatenate([importance.bent.ravel() for _, importance, _ in parts])
    silent = [int(grove) for each, importance, _ in parts if not each.shared for grove in np.flatnonzero(~importance.bent.any((1, 2)))]
    most = [_one(parts, int(number), curve=rank < top) for rank, number in enumerate(np.argsort(-bent, kind="stable")[:SUMMARISED]) if bent[number] > 0]
    return {
        "layer": layer, "functions": len(bent), "importance": float(np.sqrt((bent**2).sum())), "holds_90_percent": share_that_holds(bent),
        "outside_grid": float(np.average([importance.outside for _, importance, _ in parts], weights=[counts.sum() for *_, counts in parts])),
        "quantiles": np.quantile(bent, np.linspace(0, 1, QUANTILES + 1)).tolist(),
        "without_importance": int((bent == 0).sum()), "groves_without_importance": silent,
        "shapes": dict(Counter(one["summary"]["shape"] for one in most).most_common()), "most": most,
    }  # fmt: skip


def _one(parts: list[tuple[Functions, Importance, np.ndarray]], number: int, *, curve: bool) -> dict[str, Any]:
    """Function `number` of a layer, its groves' and its shared grove's end to end."""
    starts = np.cumsum([0, *(functions.count for functions, *_ in parts)])
    part = int(np.searchsorted(starts, number, side="right")) - 1
    functions, importance, inputs = parts[part]
    number -= int(starts[part])
    grove, i, o = (int(index) for index in np.unravel_index(number, functions.shape))
    counts, middles = inputs[grove, i], middles_of(functions.config)

    def values(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        silu = functions.silu_weights(grove)[i, o] * x / (1 + np.exp(-x))
        return silu + functions.learned(grove, x)[i, o], silu

    one = {
        "grove": "shared" if functions.shared else grove, "input": i, "output": o if functions.shape[2] > 1 else None,
        "importance": float(importance.bent[grove, i, o]), "runs": float(importance.runs[grove]),
        "summary": summary_of(middles, values(middles)[0], counts).as_json(),
    }  # fmt: skip
    if curve:
        x = np.linspace(*_seen(functions, counts), POINTS)
        whole, silu = values(x)
        density = np.interp(x, middles, counts / max(1, counts.max()))
        one |= {"x": x.tolist(), "y": whole.tolist(), "silu": silu.tolist(), "density": density.tolist()}
    return one


def _seen(functions: Functions, counts: np.ndarray) -> tuple[float, float]:
    """The grid, or where 99.8% of the inputs lay if that is more."""
    low, high = range_of(functions.config)
    edges, cumulated = np.linspace(low, high, len(counts) + 1), np.cumsum(counts) / max(1, counts.sum())
    first, last = int(np.searchsorted(cumulated, 0.001)), int(np.searchsorted(cumulated, 0.999))
    return min(functions.config.low, edges[first]), max(functions.config.high, edges[min(last + 1, len(counts))])
