"""The verdict on a row: how far it was from the reference, and which bounds it broke."""

import math
import statistics
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kan_train.checkpoint import load_tensors
from kan_train.checkpoint.retention import step_folder
from kan_train.config import OptimizerConfig
from layout_matrix.pool import Run
from layout_matrix.reference import Reference
from layout_matrix.rows import LENGTH, SEQUENCES, STEPS, Row

NEAR_TIE = 1e-4
"""A choice of groves may fall the other way where the reference's margin is below this, in units of the score's deviation."""

SHOWN = 4
"""Parameters named where a bound of gradients or weights is broken: the worst ones."""


@dataclass(frozen=True)
class Bounds:
    """Relative, of what a row may differ from float64 on one process."""

    loss: float
    norm: float
    gradient: float
    """Of a parameter's gradient, beside its own norm."""
    weight: float
    """Of a parameter's distance, beside the way that training moved it."""
    margin: float
    """Of a choice that differs."""


FP32 = Bounds(loss=1e-5, norm=1e-5, gradient=2e-5, weight=1e-3, margin=NEAR_TIE)
BF16 = Bounds(loss=1e-3, norm=1e-2, gradient=0.2, weight=1.0, margin=1.0)
"""Weights and activations of 8 bits move a score by up to 2% of its size, and the smallest gradients by a tenth of theirs."""


@dataclass
class Comparison:
    """Worst differences over all steps or parameters, relative, and what is out of bounds. A run cut short is not held to the last weights."""

    loss: float = math.nan
    norm: float = math.nan
    gradient: float = math.nan
    weight: float = math.nan
    flips: int = 0
    """Choices of groves that differ from the reference's (in each, the reference's was used)."""
    margin: float = 0.0
    """The widest margin of a flip."""
    tokens_per_second: float = math.nan
    """Of the global batch, median step."""
    failures: list[str] = field(default_factory=list)
    """One line a broken bound; empty: the row trains the same model."""


def compare(row: Row, run: Run, reference: Reference) -> Comparison:
    """Hold a row's run against its reference."""
    found, bounds = Comparison(), BF16 if row.precision == "bf16" else FP32
    if run.error:
        found.failures.append(f"error: {run.error}")
        return found
    first = run.ranks[0]
    for key in ("losses", "norms", "skipped"):
        if any(rank[key] != first[key] for rank in run.ranks):
            found.failures.append(f"ranks: {key} are not the same on all ranks: {[rank[key][0] for rank in run.ranks]}")
    if any(first["skipped"]):
        found.failures.append("skipped: a step was skipped")
    steps = len(first["losses"])
    found.loss = worst(first["losses"], reference.losses[:steps])
    found.norm = worst(first["norms"], reference.norms[:steps])
    found.failures += [f"checkpoint: {text}" for text in first["not_saved"]]
    gradient_name = weight_name = ""
    if not first["not_saved"]:
        found.gradient, gradient_name = _worst_gradient(row, run, reference)
        found.weight, weight_name = _worst_weight(run, reference) if steps == STEPS else (0.0, "")
    differ = sorted({tuple(token) for rank in run.ranks for token in rank.get("differ", ())})
    found.flips = len(differ)
    found.margin = max((reference.margins[token].item() for token in differ), default=0.0)
    found.tokens_per_second = SEQUENCES * LENGTH / statistics.median(first["seconds"][1:])
    where = {"gradient": gradient_name, "weight": weight_name}
    for key, bound in vars(bounds).items():
        value = getattr(found, key)
        if not value <= bound:  # also where it is not a number
            found.failures.append(f"{key}: {value:.2e} > {bound:.0e} {where.get(key, '')}".rstrip())
    return found


def worst(seen: list[float], expected: list[float]) -> float:
    """The largest difference between two lists of numbers, relative to the second."""
    pairs = zip(seen, expected, strict=True)
    return torch.tensor([abs(value / right - 1) for value, right in pairs]).max().item()


def _worst_gradient(row: Row, run: Run, reference: Reference) -> tuple[float, str]:
    """The gradient of the first step is in the first moments, times 1 - beta1 and clipped; the reference's is clipped by its own norm."""
    norm = reference.norms[0]
    factor = min(1.0, row.clip / (norm + 1e-6)) if row.clip else 1.0
    scale = (1 - OptimizerConfig().beta1) * factor
    moments = load_tensors(step_folder(run.folder, 1), "exp_avg/")
    return worst_tensor({name: moment.double() / scale for name, moment in moments.items()}, reference.gradients, reference.gradients)


def _worst_weight(run: Run, reference: Reference) -> tuple[float, str]:
    folder = step_folder(run.folder, STEPS)
    moved = {name: weight - reference.initial[name] for name, weight in reference.weights.items()}
    worst = worst_tensor(load_tensors(folder), reference.weights, moved)
    buffers = load_tensors(folder, "buffer/")
    return max(worst, worst_tensor(buffers, reference.buffers, reference.buffers))


def worst_tensor(seen: dict[str, Tensor], expected: dict[str, Tensor], scales: dict[str, Tensor]) -> tuple[float, str]:
    """The largest distance beside the norm of its scale, and whose it is and the next ones; infinite where a tensor is missing or too many."""
    if seen.keys() != expected.keys():
        return math.inf, f"(tensors {sorted(seen.keys() ^ expected.keys())} are on one side alone)"
    distances = []
    for name, right in expected.items():
        distance, scale = (seen[name].double() - right.double()).norm().item(), scales[name].double().norm().item()
        relative = distance / scale if scale else math.inf if distance else 0.0
        distances.append((math.inf if math.isnan(relative) else relative, name))
    worst = sorted(distances, reverse=True)[:SHOWN] or [(0.0, "")]  # a dense model has no buffers
    return worst[0][0], ", ".join(name if not number else f"{name} {value:.1e}" for number, (value, name) in enumerate(worst))
