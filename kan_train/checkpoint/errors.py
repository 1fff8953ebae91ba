"""The error of the checkpoint room, and how the system's errors become it."""

import errno
import os
import shutil
from pathlib import Path

from kan_train.config import ConfigError

_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


class CheckpointError(ConfigError):
    """A checkpoint cannot be written, or cannot be trusted; the message names the file or tensor and what to do."""


def write_failure(path: Path, error: OSError, wanted: int | None = None) -> CheckpointError:
    """What a failed write of `path` (of `wanted` bytes, where known) means to the user."""
    if error.errno in _FULL:
        size = f"{wanted / 1e6:.1f} MB were to be written, " if wanted is not None else ""
        return CheckpointError(
            f"no space left to write {path}: {size}{_free(path)}; free some, keep fewer checkpoints (checkpoint.keep=1), or put runs on a "
            f"larger disk (run.root=PATH). The checkpoints before this one are untouched"
        )
    if error.errno in _DENIED:
        return CheckpointError(
            f"no permission to write {path} ({os.strerror(error.errno)}); change its owner or mode, or set run.root to one you may write"
        )
    return CheckpointError(f"cannot write {path}: {error.strerror or error}; check the disk, or set run.root to another one")


def read_failure(path: Path, error: OSError) -> CheckpointError:
    """What a failed read of `path` means to the user."""
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path} is missing: the checkpoint is damaged; {otherwise(path)}")
    if error.errno in _DENIED:
        return CheckpointError(f"no permission to read {path} ({os.strerror(error.errno)}); change its owner or mode, or run as its owner")
    return CheckpointError(f"cannot read {path}: {error.strerror or error}; check the disk, or {otherwise(path)}")


def otherwise(file: Path) -> str:
    """What to do when a checkpoint's `file` is not as it was written."""
    return f"delete the folder {file.parent} to resume from the checkpoint before it, or restore the file"


def _free(path: Path) -> str:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return f"{shutil.disk_usage(existing).free / 1e6:.1f} MB are free there"
