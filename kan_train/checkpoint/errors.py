"""The error of the checkpoint room, and how the system's errors become it."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from kan_train.checkpoint.places import is_local
from kan_train.config import ConfigError

_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_STORE = "check the network, the credentials and that the bucket exists, or set checkpoint.location to another place"


class CheckpointError(ConfigError):
    """A checkpoint cannot be written, or cannot be trusted; the message names the file or tensor and what to do."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around a read of `path`: what the system or the store raises becomes a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if is_local(path) and not isinstance(error, OSError):
            raise
        raise read_failure(path, error) from error


@contextlib.contextmanager
def writing(path: Path, wanted: int | None = None) -> Iterator[None]:
    """Around a write of `path` (of `wanted` bytes, where known), or its deletion: what the system or the store raises becomes a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if is_local(path) and not isinstance(error, OSError):
            raise
        raise write_failure(path, error, wanted) from error


def write_failure(path: Path, error: Exception, wanted: int | None = None) -> CheckpointError:
    """What a failed write of `path` (of `wanted` bytes, where known) means to the user."""
    if not is_local(path):
        return CheckpointError(f"cannot write {path}: {_reason(error)}; {_STORE}")
    if _number(error) in _FULL:
        size = f"{wanted / 1e6:.1f} MB were to be written, " if wanted is not None else ""
        return CheckpointError(
            f"no space left to write {path}: {size}{_free(path)}; free some, keep fewer checkpoints (checkpoint.keep=1), or put them on a "
            f"larger disk (checkpoint.location=PATH, or run.root=PATH). The checkpoints before this one are untouched"
        )
    if _number(error) in _DENIED:
        return CheckpointError(f"no permission to write {path} ({_reason(error)}); change its owner or mode, or set run.root to one you may write")
    return CheckpointError(f"cannot write {path}: {_reason(error)}; check the disk, or set run.root to another one")


def read_failure(path: Path, error: Exception) -> CheckpointError:
    """What a failed read of `path` means to the user."""
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path} is missing: the checkpoint is damaged; {otherwise(path)}")
    if not is_local(path):
        return CheckpointError(f"cannot read {path}: {_reason(error)}; {_STORE}")
    if _number(error) in _DENIED:
        return CheckpointError(f"no permission to read {path} ({_reason(error)}); change its owner or mode, or run as its owner")
    return CheckpointError(f"cannot read {path}: {_reason(error)}; check the disk, or {otherwise(path)}")


def otherwise(file: Path) -> str:
    """What to do when a checkpoint's `file` is not as it was written."""
    return f"delete the folder {file.parent} to resume from the checkpoint before it, or restore the file"


def _number(error: Exception) -> int | None:
    return error.errno if isinstance(error, OSError) else None


def _reason(error: Exception) -> str:
    """The system's words where there are any, else the message with its type, which alone says little."""
    words = error.strerror if isinstance(error, OSError) else None
    return words or f"{type(error).__name__}: {error}"


def _free(path: Path) -> str:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return f"{shutil.disk_usage(existing).free / 1e6:.1f} MB are free there"
