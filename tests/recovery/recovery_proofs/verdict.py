"""The verdict on a pair: what the layout that went on did differently from the one that saved, and from a run that was never stopped."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from layout_matrix.compare import FP32, worst, worst_tensor
from layout_matrix.pool import Run
from layout_matrix.reference import Reference
from layout_matrix.rows import LENGTH, SEQUENCES, Row, micro_batches
from safetensors.torch import load_file
from torch import Tensor

from kan_train.checkpoint import load_tensors, read_manifest
from kan_train.checkpoint.retention import step_folder
from recovery_proofs.layouts import LAYOUTS, SAVED, STEPS, Pair

TENSORS = ("param/", "exp_avg/", "exp_avg_sq/", "momentum/", "buffer/")
"""Kinds of global tensors of a checkpoint; what else it holds are the ranks' own tensors."""


@dataclass
class Whole:
    """The run of one process that was never stopped."""

    reference: Reference
    """Losses, norms, weights and choices of groves, float64."""
    samples: list[tuple[Tensor, Tensor]]
    """(tokens, resets) of each step, the whole global batch."""


@dataclass
class Verdict:
    """Worst differences of the steps after the checkpoint, relative to the whole run, and all that is wrong."""

    tensors: int = 0
    """Global tensors compared bit for bit."""
    elements: int = 0
    """Their elements."""
    loss: float = float("nan")
    norm: float = float("nan")
    weight: float = float("nan")
    """Of a parameter's distance after the last step, beside the way that training moved it."""
    flips: int = 0
    """Choices of groves that fell the other way, each a near-tie."""
    failures: list[str] = field(default_factory=list)
    """One line each, beginning with what is wrong; empty: the pair holds."""


def judge(pair: Pair, saved: Run, loaded: Run, whole: Whole) -> Verdict:
    """Hold what the layouts of `pair` left against each other and against the whole run."""
    found = Verdict()
    for run in (saved, loaded):
        if run.error:
            found.failures.append(f"error: {run.error}")
    if not found.failures:
        _judge_tensors(saved.folder, loaded.folder, found)
        _judge_steps(pair, loaded, whole, found)
        _judge_weights(loaded.folder, whole.reference, found)
        _judge_samples(LAYOUTS[pair.loading], loaded.folder, whole.samples, found)
        _judge_state(pair, saved, loaded, found)
        if pair.alike:
            _judge_alike(saved, loaded, found)
    return found


def _judge_tensors(saving: Path, loading: Path, found: Verdict) -> None:
    """What was saved again at once is what was loaded, bit for bit."""
    saved, again = (global_tensors(step_folder(folder, SAVED)) for folder in (saving, loading))
    found.tensors, found.elements = len(saved), sum(tensor.numel() for tensor in saved.values())
    found.failures += [f"tensors: {text}" for text in differing(saved, again)]


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Tensors that are not the same in both, bit for bit (or not in both)."""
    texts = [f"{name} is on one side alone" for name in sorted(first.keys() ^ second.keys())]
    return texts + [f"{name} differs" for name in sorted(first.keys() & second.keys()) if not _same_bits(first[name], second[name])]


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return torch.equal(first.contiguous().view(-1).view(torch.uint8), second.contiguous().view(-1).view(torch.uint8))


def global_tensors(folder: Path) -> dict[str, Tensor]:
    """Weights, optimizer and buffers of the checkpoint in `folder`, whole; every byte verified."""
    return {name: tensor for name, tensor in load_tensors(folder, "").items() if name.startswith(TENSORS)}


def _judge_steps(pair: Pair, loaded: Run, whole: Whole, found: Verdict) -> None:
    first, reference = loaded.ranks[0], whole.reference
    for key in ("losses", "norms", "skipped"):
        if any(rank[key] != first[key] for rank in loaded.ranks):
            found.failures.append(f"ranks: {key} are not the same on all ranks")
    if any(first["skipped"]):
        found.failures.append("skipped: a step was skipped")
    found.loss, found.norm = worst(first["losses"], reference.losses[SAVED:]), worst(first["norms"], reference.norms[SAVED:])
    flips = sorted({tuple(token) for rank in loaded.ranks for token in rank["differ"]})
    margin = max((reference.margins[token].item() for token in flips), default=0.0)
    found.flips = len(flips)
    for key, value in (("loss", found.loss), ("norm", found.norm), ("margin", margin)):
        bound = getattr(FP32, key)
        if not value <= bound:  # also where it is not a number
            found.failures.append(f"{key}: {value:.2e} > {bound:.0e}")


def _judge_weights(folder: Path, reference: Reference, found: Verdict) -> None:
    last = step_folder(folder, STEPS)
    moved = {name: weight - reference.initial[name] for name, weight in reference.weights.items()}
    found.weight, name = max(
        worst_tensor(load_tensors(last), reference.weights, moved), worst_tensor(load_tensors(last, "buffer/"), reference.buffers, reference.buffers)
    )
    if not found.weight <= FP32.weight:
        found.failures.append(f"weight: {found.weight:.2e} > {FP32.weight:.0e} {name}")


def _judge_samples(row: Row, folder: Path, expected: list[tuple[Tensor, Tensor]], found: Verdict) -> None:
    """Every rank reads its share of the sequences that the whole run reads in that step, token by token."""
    for rank in range(row.world):
        read = load_file(folder / f"samples-{rank}.safetensors")
        own = [index for part in micro_batches(row, rank) for index in range(SEQUENCES)[part]]
        for step in range(SAVED, STEPS):
            for kind, tensor in zip(("tokens", "resets"), expected[step], strict=True):
                if not torch.equal(read[f"{step}/{kind}"], tensor[own]):
                    found.failures.append(f"samples: rank {rank} read other {kind} in step {step + 1}")


def _judge_state(pair: Pair, saved: Run, loaded: Run, found: Verdict) -> None:
    """Counters, cursor and random states go on; a rank that the saving layout did not have keeps its own random state."""
    for rank, seen in enumerate(loaded.ranks):
        if seen["optimizer_steps"] != [SAVED, STEPS]:
            found.failures.append(f"optimizer steps: rank {rank} counts {seen['optimizer_steps']}")
        if seen["cursors"] != [SEQUENCES * step for step in range(SAVED + 1, STEPS + 1)]:
            found.failures.append(f"cursor: rank {rank} read up to {seen['cursors']}")
        known = rank < len(saved.ranks)
        if known and seen["draws"] != saved.ranks[rank]["draws"]:
            found.failures.append(f"random states: rank {rank} draws other numbers")
        if seen["kept_own_random_state"] == known:
            found.failures.append(f"random states: rank {rank} {'kept' if known else 'lost'} its own")
    first, again = (read_manifest(step_folder(run.folder, SAVED)).state for run in (saved, loaded))
    last = read_manifest(step_folder(loaded.folder, STEPS)).state
    found.failures += [f"state: {key} is not what was saved" for key in first if first[key] != again.get(key)]
    counters = (last["progress"]["step"], last["progress"]["tokens"], last["loader"]["cursor"])
    if counters != (STEPS, STEPS * SEQUENCES * LENGTH, STEPS * SEQUENCES):
        found.failures.append(f"state: step, tokens and cursor are {counters} at the end")


def _judge_alike(saved: Run, loaded: Run, found: Verdict) -> None:
    """The same layout: everything after the checkpoint is what the run did that went on, to the last bit."""
    for rank, (first, second) in enumerate(zip(saved.ranks, loaded.ranks, strict=True)):
        found.failures += [f"bits: {key} of rank {rank}" for key in ("losses", "norms", "draws") if first[key] != second[key]]
    last = [load_tensors(step_folder(run.folder, STEPS), "") for run in (saved, loaded)]
    found.failures += [f"bits: {text}" for text in differing(*last)]
