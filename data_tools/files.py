"""Files that are there whole or not at all, and the errors of the disks they are on."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from kan_train.config import ConfigError


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` for writing; on success fsync it and rename it into place, on any failure remove it.

    ConfigError says what to do when the disk is full or the folder may not be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        # A permission that denied the temporary file denies its removal too; the error that matters is on its way already.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold the right to write `folder`, and remove what a killed writer left half done. ConfigError while another process holds it.

    The lock is the kernel's, on a file beside the folder: it ends with its process, however that ends.
    """
    with named_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f".{folder.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(f"another process is preparing {folder} now; wait for it, or use another corpus.name") from error
            for leftover in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")):
                leftover.unlink()
            yield


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk and of missing permissions into ConfigErrors that name the path and a way out."""
    try:
        yield
    except PermissionError as error:
        raise ConfigError(f"{error.filename or path}: permission denied for user {os.getuid()}; change its owner or mode, or use another folder") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(f"{path}: no space left on the disk; free some, or set root=FOLDER on a larger one, and start again: it continues") from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1, sort_keys=True).encode() + b"\n")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
