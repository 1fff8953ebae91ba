"""Which checkpoints there are: the newest complete one, those to keep, and what interrupted saves left behind."""

import contextlib
import logging
import re
from pathlib import Path

from kan_train.checkpoint.errors import CheckpointError, read_failure, write_failure
from kan_train.checkpoint.files import sync_directory
from kan_train.checkpoint.manifest import MANIFEST, check_complete, read_manifest

logger = logging.getLogger(__name__)

_STEP_FOLDER = re.compile(r"step-(\d{8,})")
# The names that a save writes. Cleaning touches nothing else: a user's own file in the folder stays.
_OWN_FILE = re.compile(r"rank-\d{5,}-\d{3,}-[0-9a-f]{8}\.safetensors|tensors-[0-9a-f]{8}\.json|manifest\.json")


def step_folder(directory: Path, step: int) -> Path:
    """The folder of the checkpoint of `step`."""
    return directory / f"step-{step:08d}"


def folders(directory: Path) -> list[Path]:
    """Folders of checkpoints below `directory`, complete or not, newest step first."""
    if not directory.exists():
        return []
    try:
        steps = [(int(match[1]), path) for path in directory.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name)) and path.is_dir()]
    except OSError as error:
        raise read_failure(directory, error) from error
    return [path for _, path in sorted(steps, reverse=True)]


def newest(directory: Path) -> Path | None:
    """The newest complete checkpoint below `directory`: manifest intact, every file there with its size. None where there is none.

    Says (as a warning) why a newer folder was skipped. Contents are hashed by the load, not here. Raises CheckpointError where saves were
    finished but none of them is usable: to start over silently would lose a run.
    """
    refused: list[CheckpointError] = []
    for path in folders(directory):
        try:
            check_complete(path)
        except CheckpointError as error:
            logger.warning("checkpoint %s is skipped: %s", path.name, error)
            if _has_manifest(path):
                refused.append(error)
            continue
        return path
    if refused:
        raise CheckpointError(f"no checkpoint in {directory} can be used. {refused[0]}. To start over, choose another run.name")
    return None


def prune(directory: Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` complete checkpoints (0: delete none) and return the deleted ones. For one rank to call.

    A damaged checkpoint counts for nothing and is left for a person to look at. CheckpointError where a file cannot be deleted.
    """
    if keep <= 0:
        return []
    deleted = []
    for path in _complete(directory)[keep:]:
        delete_checkpoint(path)
        deleted.append(path)
    return deleted


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, its manifest first: whatever interrupts this, no folder is left that looks complete and is not."""
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
        sync_directory(folder)
        _delete_own_files(folder, listed=set())
    except OSError as error:
        raise write_failure(folder, error) from error


def clean_leftovers(directory: Path) -> None:
    """Delete the files of interrupted saves and deletions below `directory`. For one rank to call, while no save is under way."""
    for path in folders(directory):
        clean_folder(path)


def clean_folder(folder: Path) -> None:
    """Delete every file of a save that the manifest of `folder` does not list, and the folder if that empties it; failures are logged."""
    try:
        if _has_manifest(folder):
            _delete_own_files(folder, listed={MANIFEST, *read_manifest(folder).files})
        else:
            _delete_own_files(folder, listed=set())
    except CheckpointError as error:
        logger.warning("checkpoint %s is left as it is: %s", folder.name, error)
    except OSError as error:
        logger.warning("leftovers of an interrupted save in %s cannot be deleted: %s", folder, error)


def _complete(directory: Path) -> list[Path]:
    complete = []
    for path in folders(directory):
        with contextlib.suppress(CheckpointError):
            check_complete(path)
            complete.append(path)
    return complete


def _has_manifest(folder: Path) -> bool:
    try:
        return (folder / MANIFEST).exists()
    except OSError:  # A folder that may not be looked into may well hold one.
        return True


def _delete_own_files(folder: Path, listed: set[str]) -> None:
    for path in folder.iterdir():
        final = path.name.removeprefix(".").removesuffix(".tmp") if path.name.startswith(".") else path.name
        if _OWN_FILE.fullmatch(final) and path.name not in listed:
            path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
