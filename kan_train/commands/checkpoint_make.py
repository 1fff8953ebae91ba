"""`kan checkpoint export`, `refine` and `average`: what is made from checkpoints. Nothing that exists is overwritten unless that was asked for."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kan_train.checkpoint import CheckpointError, find_checkpoint, folders, read_manifest
from kan_train.checkpoint.manifest import check_complete
from kan_train.checkpoint.stream import bytes_to_verify, run_directory_of
from kan_train.commands.checkpoint import locate
from kan_train.commands.output import progress_bar, size_text
from kan_train.config import ConfigError
from kan_train.config.errors import require_at_least


def run_export(source: str, root: Path, file: Path, *, dtype: str = "fp32", overwrite: bool = False) -> int:
    """Write the export `file` and say what it holds. Returns the exit status."""
    from kan_train.checkpoint.export import export

    checkpoint = find_checkpoint("run", source, str(root))
    run_dir = run_directory_of(checkpoint, source, root)
    with progress_bar("exporting", 3 * bytes_to_verify(checkpoint)) as advance:
        facts = export(checkpoint, file, run_dir=run_dir, dtype=dtype, overwrite=overwrite, advance=advance)
    print(f"{file}: {size_text(file.stat().st_size)}, {dtype}, step {facts.step:,} of {checkpoint}")
    print(f"decode with it: kan generate run={file} prompt='def '")
    return 0


def run_refine(source: str, root: Path, new_run: str) -> int:
    """Make the run `new_run` below `root`, of finer splines, and say how to go on. Returns the exit status."""
    from kan_train.checkpoint.transforms import refine

    new_dir, checkpoint = new_directory(root, new_run), find_checkpoint("run", source, str(root))
    with progress_bar("refining", bytes_to_verify(checkpoint)) as advance:
        made = refine(checkpoint, new_dir, run_dir=run_directory_of(checkpoint, source, root), advance=advance)
    grid = _transform(made)["grid"]
    print(f"{made}: the weights of {checkpoint} on a grid of {grid[1]} cells (before: {grid[0]})")
    print(f"go on: kan train init_from={new_dir} run.name={new_run}-trained model.grove.edge.grid={grid[1]} and the settings of the run before")
    return 0


def run_average(
    sources: Sequence[str], root: Path, new_run: str, *, last: int | None = None, weights: str | None = None, ema: float | None = None
) -> int:
    """Make the run `new_run` below `root`, of averaged weights, and say how to go on. Returns the exit status."""
    from kan_train.checkpoint.transforms import average, ema_weights
    from kan_train.engine.progress import FREE_SETTINGS, INITIAL_SETTINGS

    new_dir = new_directory(root, new_run)
    checkpoints = _newest(sources, root, last) if last is not None else [find_checkpoint("run", source, str(root)) for source in sources]
    given = _numbers(weights) if weights is not None else None
    if ema is not None:
        if given is not None:
            raise ConfigError(f"--weights={weights} and --ema={ema:g} both say how much each counts; use one of them")
        if not 0 < ema <= 1:
            raise ConfigError(f"--ema={ema:g} must lie above 0 and not above 1; use --ema 0.9")
        checkpoints = sorted(checkpoints, key=_step)
        given = ema_weights(ema, len(checkpoints))
    with progress_bar("averaging", sum(map(bytes_to_verify, checkpoints))) as advance:
        run_dir = run_directory_of(checkpoints[-1], sources[-1], root)
        made = average(checkpoints, new_dir, run_dir=run_dir, weights=given, free=FREE_SETTINGS + INITIAL_SETTINGS, advance=advance)
    transform = _transform(made)
    print(f"{made}: the mean of")
    for path, share in zip(transform["of"], transform["weights"], strict=True):
        print(f"  {share:.4f} {path}")
    print(f"go on: kan train init_from={new_dir} run.name={new_run}-trained and the settings of the run before")
    return 0


def _newest(sources: Sequence[str], root: Path, last: int) -> list[Path]:
    """The `last` newest complete checkpoints of the one run in `sources`, oldest first."""
    require_at_least("--last", last, 2)
    if len(sources) != 1:
        raise ConfigError(f"--last={last} is of one run, and {len(sources)} were named; name one, or checkpoints without --last")
    directory = locate(sources[0], root).checkpoints
    complete = []
    for folder in folders(directory):
        with contextlib.suppress(CheckpointError):
            check_complete(folder)
            complete.append(folder)
    if len(complete) < last:
        raise ConfigError(
            f"--last={last}, but {directory} holds {len(complete)} complete checkpoints; use --last {max(2, len(complete))} or less, "
            f"or keep more while it trains (checkpoint.keep={last})"
        )
    return complete[:last][::-1]


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights={text} must be numbers with commas between them; use --weights 1,1,2") from None


def _step(checkpoint: Path) -> int:
    return read_manifest(checkpoint).step


def _transform(checkpoint: Path) -> dict[str, Any]:
    return read_manifest(checkpoint).state["transform"]


def new_directory(root: Path, name: str) -> Path:
    """The directory of a run that is to be made. ConfigError where its name is no plain one."""
    if not name or "/" in name or name.startswith("."):
        raise ConfigError(f"--run {name!r} must be a plain folder name; use --run first")
    return root / name
