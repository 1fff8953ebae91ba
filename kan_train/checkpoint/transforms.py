"""New weights from a run's checkpoints: splines on a grid twice as fine, and averages. The result is a run of its own, with weights alone.

Tensors are read, changed and put into a scratch file one at a time; the scratch file, mapped into memory, is what `save` writes. It has no
name, so that nothing is left of it whatever ends the process; and a run appears under its name whole or not at all.
"""

import contextlib
import copy
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from kan_train.checkpoint.boxes import Fragment
from kan_train.checkpoint.errors import CheckpointError, write_failure
from kan_train.checkpoint.files import sync_directory, write_file
from kan_train.checkpoint.runs import CHECKPOINTS
from kan_train.checkpoint.save import save
from kan_train.checkpoint.stream import CONFIG, TOKENIZER, WEIGHTS, Advance, TensorStream, ignore, model_config
from kan_train.model.edge import EdgeLayer, GroupedFunctions
from kan_train.model.lm import LanguageModel
from kan_train.model.splines import refine as refine_bspline

_ALIGNMENT = 64  # bytes; tensors in the scratch file begin at multiples of it

COUNTERS = ("pending",)
"""Buffers that count since the last step: an average of them means nothing."""

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def refine(checkpoint: Path, new_dir: Path, *, run_dir: Path | None = None, advance: Advance = ignore) -> Path:
    """A new run at `new_dir` with the weights of `checkpoint`, every spline on a grid of twice as many cells; returns its checkpoint.

    B-splines are refined by dyadic knot insertion, piecewise polynomials by splitting every cell: the same functions, but for the rounding of the new
    coefficients (computed in float64). Only they change. run_dir: where the old run's tokenizer is; unset: the folder that the checkpoint lies in.
    CheckpointError where the model has no grid, or `new_dir` exists.
    """
    stream = TensorStream(checkpoint, WEIGHTS, run_dir=run_dir, advance=advance)
    config = stream.run_config()
    splines = _spline_tensors(config, checkpoint)
    edge = config["model"]["grove"]["edge"]
    kind, order, grid = edge["kind"], edge["order"], edge["grid"]
    edge["grid"] = 2 * grid
    state = _kept_state(stream) | {"transform": {"kind": "refine", "of": [str(checkpoint)], "grid": [grid, 2 * grid]}}
    state["model"]["grove"]["edge"]["grid"] = 2 * grid

    def make(name: str) -> Tensor:
        tensor = stream.read(name)
        inputs = splines.get(name)
        return tensor if inputs is None else refined(tensor, kind, order, inputs)

    shapes: Shapes = {name: (stored.dtype, stored.shape) for name, stored in stream.table.items()}
    for name, inputs in splines.items():
        dtype, shape = shapes[name]
        shapes[name] = dtype, tuple(refined(torch.empty(shape, dtype=dtype, device="meta"), kind, order, inputs).shape)
    return write_run(new_dir, config, stream.tokenizer(), state, shapes, make, **_about(stream))


def refined(coefficients: Tensor, kind: str, order: int, inputs: int = 0) -> Tensor:
    """Coefficients on a grid of twice as many cells, in their own dtype: [..., n] -> [..., n'], or of an edge layer [N, inputs * n, O]."""
    if inputs:
        per_input = coefficients.unflatten(1, (inputs, -1)).transpose(-1, -2)
        return refined(per_input, kind, order).transpose(-1, -2).flatten(1, 2)
    wide = coefficients.double()
    fine = refine_bspline(wide, order) if kind == "bspline" else split_cells(wide, order)
    return fine.to(coefficients.dtype)


def split_cells(coefficients: Tensor, order: int) -> Tensor:
    """Polynomials [..., G * (p + 1)], powers of u in [0, 1) of each cell -> [..., 2G * (p + 1)]: the same functions on cells of half the width.

    In the left half u = v / 2, in the right half u = (1 + v) / 2.
    """
    cells = coefficients.unflatten(-1, (-1, order + 1))
    left = torch.zeros(order + 1, order + 1, dtype=torch.float64, device=coefficients.device)
    right = left.clone()
    for power in range(order + 1):
        left[power, power] = 0.5**power
        binomial = 1.0
        for lower in range(power + 1):
            right[power, lower] = binomial * 0.5**power
            binomial = binomial * (power - lower) / (lower + 1)
    halves = torch.stack((cells @ left.to(cells.dtype), cells @ right.to(cells.dtype)), dim=-2)
    return halves.flatten(-3)


def average(
    checkpoints: Sequence[Path],
    new_dir: Path,
    *,
    run_dir: Path | None = None,
    weights: Sequence[float] | None = None,
    free: tuple[str, ...] = (),
    advance: Advance = ignore,
) -> Path:
    """A new run at `new_dir` whose weights are the weighted mean of those of `checkpoints`; returns its checkpoint, of the newest one's step.

    weights: one for each, not negative; they are divided by their sum; unset: all alike. Sums are in float64. Buffers that count, and tensors that are
    no floating-point numbers, are the newest one's. free: settings of the model that may differ ("grove.balance_rate").
    run_dir as for
    `refine`. CheckpointError where the checkpoints are not of one model, or `new_dir` exists.
    """
    shares = _shares(checkpoints, weights)
    streams = [TensorStream(path, WEIGHTS, run_dir=run_dir, advance=advance) for path in checkpoints]
    newest = max(streams, key=lambda stream: stream.manifest.step)
    for stream in streams:
        _require_same(newest, stream, free)

    def make(name: str) -> Tensor:
        if name.rpartition(".")[2] in COUNTERS or not newest.table[name].dtype.is_floating_point:
            return newest.read(name)
        total = torch.zeros(newest.table[name].shape, dtype=torch.float64)
        for stream, share in zip(streams, shares, strict=True):
            total.add_(stream.read(name), alpha=share)
        return total.to(newest.table[name].dtype)

    state = _kept_state(newest) | {"transform": {"kind": "average", "of": [str(path) for path in checkpoints], "weights": shares}}
    # The last validation was of the newest checkpoint, not of the mean.
    state["progress"] = {**state.get("progress", {}), "figures": {}}
    shapes: Shapes = {name: (stored.dtype, stored.shape) for name, stored in newest.table.items()}
    return write_run(new_dir, newest.run_config(), newest.tokenizer(), state, shapes, make, **_about(newest))


def ema_weights(decay: float, count: int) -> list[float]:
    """Weights of `count` checkpoints, oldest first, of which each counts `decay` times the one after it."""
    return [decay ** (count - 1 - position) for position in range(count)]


def _shares(checkpoints: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    if len(checkpoints) < 2:
        raise CheckpointError(f"{len(checkpoints)} checkpoint is no average; name two or more, or a run with --last 2")
    given = [1.0] * len(checkpoints) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(checkpoints):
        raise CheckpointError(f"--weights has {len(given)} numbers for {len(checkpoints)} checkpoints; use {','.join(['1'] * len(checkpoints))}")
    if not all(0 <= weight < float("inf") for weight in given) or not sum(given) > 0:
        raise CheckpointError(f"--weights={','.join(f'{weight:g}' for weight in given)} must be finite, not negative and not all 0; use 1 for each")
    twice = next((path for path in checkpoints if sum(path.resolve() == other.resolve() for other in checkpoints) > 1), None)
    if twice is not None:
        raise CheckpointError(f"{twice} is named twice; name it once and give it a larger weight with --weights")
    return [weight / sum(given) for weight in given]


def _require_same(one: TensorStream, other: TensorStream, free: tuple[str, ...]) -> None:
    settings, found = (dict(_flat(stream.run_config()["model"])) for stream in (one, other))
    for name in sorted(settings.keys() | found.keys()):
        if name not in free and settings.get(name) != found.get(name):
            raise CheckpointError(
                f"{other.path} has model.{name}={found.get(name)} and {one.path} model.{name}={settings.get(name)}: only weights of one model can be "
                f"averaged; name checkpoints of one run"
            )
    tensors, others = ({name: (tensor.dtype, tensor.shape) for name, tensor in stream.table.items()} for stream in (one, other))
    for name in sorted(tensors.keys() | others.keys()):
        if tensors.get(name) != others.get(name):
            raise CheckpointError(f"{name} is not the same kind of tensor in {other.path} and {one.path}; name checkpoints of one run")


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _spline_tensors(config: dict[str, Any], checkpoint: Path) -> dict[str, int]:
    """Names of the tensors of spline coefficients, each with the inputs of its edge layer (0: its last axis is a function's coefficients)."""
    model = config["model"]
    if model.get("ffn") != "kalmagrove":
        raise CheckpointError(f"{checkpoint} is of a model without splines (model.ffn={model.get('ffn')}); there is no grid to refine")
    kind = model["grove"]["edge"]["kind"]
    if kind not in ("bspline", "piecewise_poly"):
        raise CheckpointError(
            f"{checkpoint} has model.grove.edge.kind={kind}, functions without a grid: there is nothing to refine. Grids have bspline and piecewise_poly"
        )
    built = LanguageModel(model_config(config))
    found = {}
    for path, module in built.named_modules():
        if isinstance(module, GroupedFunctions):
            found[f"param/{path}.coefficients"] = 0
        elif isinstance(module, EdgeLayer):
            found[f"param/{path}.coefficients"] = module.base.shape[1]
    return found


def _kept_state(stream: TensorStream) -> dict[str, Any]:
    """What of a checkpoint's state still holds for its weights alone: optimizer, loader and schedule start anew from them."""
    state = stream.manifest.state
    kept = {name: copy.deepcopy(state[name]) for name in ("progress", "model") if name in state}
    return {"model": stream.run_config()["model"]} | kept


def _about(stream: TensorStream) -> dict[str, Any]:
    return {"step": stream.manifest.step, "tokens": stream.manifest.tokens, "data_index": stream.manifest.data_index}


def write_run(
    new_dir: Path,
    config: dict[str, Any],
    tokenizer: bytes,
    state: dict[str, Any],
    shapes: Shapes,
    make: Callable[[str], Tensor],
    *,
    files: Mapping[str, bytes] | None = None,
    **about: Any,
) -> Path:
    """The run at `new_dir`, whole or not at all: configuration, tokenizer and one checkpoint of the tensors in `shapes`, each made when its turn comes.

    files: others, by their path in the run directory. about: what of its manifest is known, with its step. Returns the checkpoint's folder.
    CheckpointError where `new_dir` exists, or cannot be written.
    """
    if new_dir.exists():
        raise CheckpointError(f"the run {new_dir} exists already; choose another name (--run {new_dir.name}-2), or remove it first")
    name = new_dir.name
    config["run"] = {**config.get("run", {}), "name": name, "root": str(new_dir.parent)}
    # The new run's checkpoint lies in its own directory, wherever the old run kept its own.
    config["checkpoint"] = {**config.get("checkpoint", {}), "location": ""}
    text = yaml.safe_dump(config, sort_keys=False, width=140)
    with _appearing(new_dir) as partial:
        for name, content in {CONFIG: text.encode(), TOKENIZER: tokenizer, **(files or {})}.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(partial / name, [content], len(content))
        with _scratch(partial, shapes) as tensors:
            for key, tensor in tensors.items():
                tensor.copy_(make(key))
            fragments = [Fragment.whole(key, tensor) for key, tensor in tensors.items()]
            folder = save(partial / CHECKPOINTS, fragments=fragments, state=state, config=text, **about)
    return new_dir / folder.relative_to(partial)


@contextlib.contextmanager
def _appearing(new_dir: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `new_dir` when all went well and is removed otherwise."""
    partial = new_dir.with_name(f".{new_dir.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(new_dir)
        sync_directory(new_dir.parent)
    except OSError as error:
        raise write_failure(new_dir, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _scratch(folder: Path, shapes: Shapes) -> Iterator[dict[str, Tensor]]:
    """Empty tensors of these types and shapes in a nameless file in `folder`: what is in them needs no memory that swapping could not free."""
    starts, position = {}, 0
    for name, (dtype, shape) in shapes.items():
        starts[name] = position
        position += -(-torch.Size(shape).numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    with tempfile.TemporaryFile(dir=folder) as file:
        # Room for all of it now: a write to a mapped page of a full disk would end the process.
        os.posix_fallocate(file.fileno(), 0, max(position, 1))
        pages = mmap.mmap(file.fileno(), max(position, 1))
        tensors = {}
        for name, (dtype, shape) in shapes.items():
            count = torch.Size(shape).numel()
            flat = torch.frombuffer(pages, dtype=dtype, count=count, offset=starts[name]) if count else torch.empty(0, dtype=dtype)
            tensors[name] = flat.view(shape)
        yield tensors
