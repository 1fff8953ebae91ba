"""Which checkpoints there are: the newest, those to keep, and what interrupted saves left behind. Newer is the larger step: no clock is asked."""

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kan_train.checkpoint.errors import CheckpointError, reading, writing
from kan_train.checkpoint.files import sync_directory
from kan_train.checkpoint.manifest import MANIFEST, Manifest, check_complete, read_manifest
from kan_train.checkpoint.places import children, is_local, place, present

logger = logging.getLogger(__name__)

_STEP_FOLDER = re.compile(r"step-(\d{8,})")
# The names that a save writes. Cleaning touches nothing else: a user's own file in the folder stays.
_OWN_FILE = re.compile(r"rank-\d{5,}-\d{3,}-[0-9a-f]{8}\.safetensors|tensors-[0-9a-f]{8}\.json|manifest\.json")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Which checkpoints are kept: the newest, and besides them some for good."""

    keep: int = 0
    """The newest so many; 0: all."""
    every: int = 0
    """Those of steps that this divides; 0: none."""
    best: int = 0
    """So many of the lowest metric; of equal ones the newest."""


def step_folder(directory: Path, step: int) -> Path:
    """The folder of the checkpoint of `step`."""
    return directory / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step of the checkpoint whose folder is named so; CheckpointError where `folder` has no such name."""
    match = _STEP_FOLDER.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder} is not named as a checkpoint is; use a folder named like {step_folder(folder.parent, 100)}")
    return int(match[1])


def folders(directory: Path) -> list[Path]:
    """Folders of checkpoints below `directory`, complete or not, newest step first."""
    directory = place(directory)
    with reading(directory):
        # A store is not asked whether it is a folder: to that question fsspec answers no where the store cannot be reached.
        found = [path for path in children(directory) if _STEP_FOLDER.fullmatch(path.name) and (not is_local(path) or path.is_dir())]
    return sorted(found, key=step_of, reverse=True)


def newest(directory: Path) -> Path | None:
    """The newest complete checkpoint below `directory`: manifest intact, every file there with its size. None where there is none.

    Says (as a warning) why a newer folder was skipped. Contents are hashed by the load, or by `newest_valid`, not here. Raises CheckpointError
    where saves were finished but none of them is usable: to start over silently would lose a run.
    """
    refused: list[str] = []
    for path in folders(directory):
        try:
            check_complete(path)
        except CheckpointError as error:
            logger.warning("checkpoint %s is skipped: %s", path.name, error)
            if has_manifest(path):
                refused.append(str(error))
            continue
        return path
    if refused:
        raise none_usable(directory, refused[0])
    return None


def none_usable(directory: Path, reason: str) -> CheckpointError:
    """Saves below `directory` were finished, and none can be used; `reason` is what is wrong with the newest."""
    return CheckpointError(f"no checkpoint in {directory} can be used. {reason}. To start over, choose another run.name")


def prune(directory: Path, policy: Policy, metric: Callable[[Manifest], float | None] | None = None) -> list[Path]:
    """Delete what `expendable` gives, and return it. For one rank to call. CheckpointError where a file cannot be deleted."""
    deleted = expendable(directory, policy, metric)
    for path in deleted:
        delete_checkpoint(path)
    return deleted


def expendable(directory: Path, policy: Policy, metric: Callable[[Manifest], float | None] | None = None) -> list[Path]:
    """The complete checkpoints that `policy` does not keep, newest first.

    metric: what the best are the best by, lowest first; a checkpoint for which it is None or not finite is not among them. A damaged checkpoint
    counts for nothing and is left for a person to look at.
    """
    if policy.keep <= 0:
        return []
    complete = _complete(directory)
    kept = {manifest.step for _, manifest in complete[: policy.keep]}
    kept |= {manifest.step for _, manifest in complete if policy.every and manifest.step % policy.every == 0}
    if policy.best and metric is not None:
        rated = [(value, -manifest.step) for _, manifest in complete if (value := metric(manifest)) is not None and math.isfinite(value)]
        kept |= {-step for _, step in sorted(rated)[: policy.best]}
    return [path for path, manifest in complete if manifest.step not in kept]


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, its manifest first: whatever interrupts this, no folder is left that looks complete and is not."""
    with writing(folder):
        (folder / MANIFEST).unlink(missing_ok=True)
        sync_directory(folder)
        _delete_own_files(folder, listed=set())


def clean_leftovers(directory: Path) -> None:
    """Delete the files of interrupted saves and deletions below `directory`. For one rank to call, while no save is under way."""
    for path in folders(directory):
        clean_folder(path)


def clean_folder(folder: Path) -> None:
    """Delete every file of a save that the manifest of `folder` does not list, and the folder if that empties it; failures are logged."""
    try:
        listed = {MANIFEST, *read_manifest(folder).files} if has_manifest(folder) else set()
    except CheckpointError as error:
        logger.warning("checkpoint %s is left as it is: %s", folder.name, error)
        return
    try:
        _delete_own_files(folder, listed)
    except Exception as error:
        # Litter is no reason to fail a save, whatever the system or the store says.
        logger.warning("leftovers of an interrupted save in %s cannot be deleted: %s", folder, error)


def has_manifest(folder: Path) -> bool:
    """Whether a save into `folder` was finished; also where that cannot be found out: a folder that may not be looked into may well hold one."""
    try:
        return present(folder / MANIFEST)
    except Exception:
        return True


def _complete(directory: Path) -> list[tuple[Path, Manifest]]:
    """Complete checkpoints with their manifests, newest first."""
    complete = []
    for path in folders(directory):
        try:
            complete.append((path, check_complete(path)))
        except CheckpointError as error:
            logger.debug("checkpoint %s does not count: %s", path.name, error)
    return complete


def _delete_own_files(folder: Path, listed: set[str]) -> None:
    for path in children(folder):
        final = path.name.removeprefix(".").removesuffix(".tmp") if path.name.startswith(".") else path.name
        if _OWN_FILE.fullmatch(final) and path.name not in listed:
            path.unlink(missing_ok=True)
    if is_local(folder) and folder.exists() and not children(folder):
        folder.rmdir()
