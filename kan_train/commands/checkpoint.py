"""`kan checkpoint list`, `verify` and `prune`: which checkpoints there are, whether they are as they were written, and which may go."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from kan_train.accounting.ledger import LEDGER, read_ledger
from kan_train.checkpoint import (
    CHECKPOINTS,
    CheckpointError,
    Manifest,
    Policy,
    directory_of_run,
    expendable,
    find_checkpoint,
    folders,
    prune,
    read_manifest,
    step_of,
)
from kan_train.checkpoint.export import check_export, read_export
from kan_train.checkpoint.manifest import MANIFEST, check_complete
from kan_train.checkpoint.places import place
from kan_train.checkpoint.retention import has_manifest
from kan_train.checkpoint.stream import CONFIG, bytes_to_verify, problems, tokens_of, validation_loss_of
from kan_train.commands.output import columns, progress_bar, size_text
from kan_train.config import ConfigError
from kan_train.config.errors import require_at_least

HEADINGS = ("step", "tokens", "validation loss", "size", "date", "layout", "complete")


@dataclass(frozen=True)
class Place:
    """Where a run is."""

    run_dir: Path
    """Its directory."""
    checkpoints: Path
    """The folder of its checkpoints, there or elsewhere (checkpoint.location)."""


def locate(value: str, root: Path) -> Place:
    """The run that a user named by `value`: its name below `root`, its path, or the folder of its checkpoints. ConfigError where there is none."""
    for path in (Path(value), root / value):
        if (path / CONFIG).is_file() or (path / CHECKPOINTS).is_dir():
            return Place(path, directory_of_run(path))
    if folders(directory := place(value, "RUN")):
        return Place(directory.parent, directory)
    found = find_checkpoint("run", value, str(root))  # says which runs there are, where it is none of them
    raise ConfigError(f"{value} is one checkpoint, {found}; use its run: {found.parent.parent}")


def run_list(run: str | None, root: Path) -> int:
    """Print a table of the checkpoints of `run`, newest first, or of the newest one of every run below `root`. Returns the exit status."""
    if run is None:
        return _list_runs(root)
    where = locate(run, root)
    found = folders(where.checkpoints)
    if not found:
        print(f"{where.checkpoints} holds no checkpoint yet")
        return 0
    dates = _dates(where.run_dir)
    rows, reasons = [list(HEADINGS)], []
    for folder in found:
        cells, reason = _row(folder, dates)
        rows.append(cells)
        reasons += [f"{folder.name}: {reason}"] if reason else []
    print(columns(rows, right=range(4)))
    print("\n".join(reasons), end="\n" if reasons else "")
    return 0


def run_verify(source: str, root: Path, *, every: bool = False) -> int:
    """Verify the checkpoint or exported file `source`, or of the run `source` the newest finished checkpoint, or every one. Returns 0 or 1."""
    if Path(source).is_file():
        return _verify_export(Path(source))
    chosen, wrong = _chosen(source, root, every=every), 0
    with progress_bar("verifying", sum(map(bytes_to_verify, chosen))) as advance:
        for folder in chosen:
            found = problems(folder, advance)
            wrong += bool(found)
            if not found:
                print(f"{folder}: as it was written ({len(read_manifest(folder).files)} files, {size_text(bytes_to_verify(folder))})")
            for problem in found:
                print(f"{folder}: {problem}")
    if wrong:
        print(f"{wrong} of {len(chosen)} checkpoints cannot be used")
    return int(wrong > 0)


def run_prune(run: str, root: Path, *, keep: int, every: int = 0, best: int = 0, dry_run: bool = False, force: bool = False) -> int:
    """Delete the checkpoints of `run` that the policy does not keep, and say which. Returns the exit status.

    ConfigError while a process trains the run, unless `force`.
    """
    require_at_least("--keep", keep, 1)
    require_at_least("--every", every, 0)
    require_at_least("--best", best, 0)
    where, policy = locate(run, root), Policy(keep=keep, every=every, best=best)
    sizes = {folder: bytes_to_verify(folder) for folder in folders(where.checkpoints)}
    with contextlib.nullcontext() if force or dry_run else _held(where.run_dir):
        deleted = (expendable if dry_run else prune)(where.checkpoints, policy, validation_loss_of)
    for folder in deleted:
        print(f"{'would delete' if dry_run else 'deleted'} {folder} ({size_text(sizes.get(folder, 0))})")
    print(f"{size_text(sum(sizes.get(folder, 0) for folder in deleted))} in {len(deleted)} of {len(sizes)} checkpoints")
    return 0


def layout_text(manifest: Manifest) -> str:
    """The layout that wrote a checkpoint: its processes, and every dimension that is split."""
    processes = f"{manifest.world_size} process{'es' if manifest.world_size > 1 else ''}"
    short = {"tensor_parallel": "tp", "pipeline_parallel": "pp", "virtual_pipeline": "vp", "context_parallel": "cp", "expert_parallel": "ep"}
    split = [f"{letters}{size}" for name, letters in short.items() if (size := manifest.layout.get(name, 1)) > 1]
    stage = manifest.layout.get("zero_stage")
    return " ".join([processes, *split, *([f"zero{stage}"] if stage is not None else [])])


def _list_runs(root: Path) -> int:
    names = sorted({path.parent for name in (CHECKPOINTS, CONFIG) for path in root.glob(f"[!.]*/{name}")})
    if not names:
        print(f"{root} holds no run (`kan train` makes one)")
        return 0
    rows = [["run", "checkpoints", *HEADINGS]]
    for run_dir in names:
        found = folders(locate(str(run_dir), root).checkpoints)
        cells = _row(found[0], _dates(run_dir))[0] if found else [""] * len(HEADINGS)
        rows.append([run_dir.name, str(len(found)), *cells])
    print(columns(rows, right=range(1, 6)))
    return 0


def _row(folder: Path, dates: dict[int, float]) -> tuple[list[str], str]:
    """The cells of a checkpoint, and why it is not complete (empty where it is)."""
    reason = ""
    try:
        check_complete(folder)
    except CheckpointError as error:
        reason = str(error)
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return [f"{step_of(folder):,}", "", "", "", "", "", "no"], reason
    tokens, loss = tokens_of(manifest), validation_loss_of(manifest)
    when = datetime.fromtimestamp(dates.get(manifest.step) or (folder / MANIFEST).stat().st_mtime)
    cells = [
        f"{manifest.step:,}",
        "" if tokens is None else f"{tokens:,}",
        "" if loss is None else f"{loss:.4f}",
        size_text(sum(record.size for record in manifest.files.values())),
        f"{when:%Y-%m-%d %H:%M}",
        layout_text(manifest),
        "no" if reason else "yes",
    ]
    return cells, reason


def _dates(run_dir: Path) -> dict[int, float]:
    """Step -> when the ledger says that its checkpoint was on disk, seconds since 1970. A file's own time would be that of its last copy."""
    try:
        events: list[dict[str, Any]] = read_ledger(run_dir / LEDGER)
    except ConfigError:
        return {}
    return {event["saved_step"]: event["time"] for event in events if event["event"] == "saved"}


def _chosen(source: str, root: Path, *, every: bool) -> list[Path]:
    """The folders to verify."""
    given = place(source, "RUN")
    if (given / MANIFEST).is_file() or (given.parent.name == CHECKPOINTS and given.is_dir()):
        return [given]
    where = locate(source, root)
    found = folders(where.checkpoints)
    if not found:
        raise ConfigError(f"{where.checkpoints} holds no checkpoint yet; wait for the first save (checkpoint.every)")
    if every:
        return found
    # A folder without a manifest is a save that did not finish: nothing goes on from it.
    return [next((folder for folder in found if has_manifest(folder)), found[0])]


def _verify_export(file: Path) -> int:
    try:
        with progress_bar("verifying", file.stat().st_size) as advance:
            check_export(file, advance)
    except CheckpointError as error:
        print(error)
        return 1
    print(f"{file}: as it was written (step {read_export(file).step:,}, {size_text(file.stat().st_size)})")
    return 0


@contextlib.contextmanager
def _held(run_dir: Path) -> Iterator[None]:
    """Keep training processes of the run out meanwhile; ConfigError where one is at work: it holds the lock of the run's ledger."""
    ledger = run_dir / LEDGER
    if not ledger.is_file():
        yield
        return
    descriptor = os.open(ledger, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{run_dir} is being trained, and prunes itself (checkpoint.keep, keep_every, keep_best); wait for its end, or use --force"
            ) from None
        except OSError:
            pass  # some network file systems have no locks
        yield
    finally:
        os.close(descriptor)
