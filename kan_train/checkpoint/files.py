"""Files that are whole or absent: written under a temporary name, hashed on the way, forced to disk, and renamed; uploaded, in an object store.

Tensors go into safetensors files (a JSON header, then raw little-endian bytes), everything else into JSON: reading either runs no code.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kan_train.checkpoint.errors import CheckpointError, otherwise, read_failure, reading, write_failure, writing
from kan_train.checkpoint.places import is_local, store_of
from kan_train.checkpoint.ranges import DTYPES, RangeReader

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FILES_AT_A_TIME = 4
"""Files that a rank writes, reads or hashes at a time: some wait for the disk or the store while others are hashed."""

_PORTION = 1 << 20  # bytes that are hashed and written in turn
_REQUEST = 8 << 20  # bytes asked of an object store at a time
_UPLOAD_PART = 64 << 20  # bytes of a part of an upload: stores allow 10,000 parts a file


@dataclass(frozen=True)
class FileRecord:
    """What the manifest knows of a file."""

    size: int
    """Bytes."""
    sha256: str
    """SHA-256 of its bytes, hexadecimal."""


def temporary(path: Path) -> Path:
    """Where `path` is written before it is renamed into place."""
    return path.with_name(f".{path.name}.tmp")


def write_file(path: Path, pieces: Iterable[bytes | memoryview], size: int) -> FileRecord:
    """Write `pieces` (`size` bytes together) to `path`, durable when this returns. On CheckpointError `path` is as before."""
    return _write_renamed(path, pieces, size) if is_local(path) else _upload(path, pieces, size)


def _write_renamed(path: Path, pieces: Iterable[bytes | memoryview], size: int) -> FileRecord:
    partial = temporary(path)
    try:
        with partial.open("wb") as file:
            digest = _write_hashed(file, pieces)
            written = file.tell()
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise write_failure(path, error, size) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return FileRecord(written, digest)


def _upload(path: Path, pieces: Iterable[bytes | memoryview], size: int) -> FileRecord:
    """An object appears when its upload ends. What a failed one replaces stays, so `path` itself is never deleted here."""
    store, name = store_of(path)
    with writing(path, size):
        if size <= _REQUEST or isinstance(pieces, list):  # in memory anyway
            whole = b"".join(pieces)
            store.pipe_file(name, whole)
            return FileRecord(len(whole), hashlib.sha256(whole).hexdigest())
        file = store.open(name, "wb", block_size=_UPLOAD_PART)
        try:
            digest = _write_hashed(file, pieces)
            written = file.tell()
            file.close()
        except BaseException:
            _abandon(file)
            raise
    return FileRecord(written, digest)


def _abandon(file: IO[bytes]) -> None:
    """Give up an upload; its parts are deleted. Left to itself, the file would finish the upload when it is closed or collected."""
    with contextlib.suppress(Exception):
        file.discard()  # type: ignore[attr-defined]
    with contextlib.suppress(Exception):
        file.closed = True  # type: ignore[misc]


def _write_hashed(file: IO[bytes], pieces: Iterable[bytes | memoryview]) -> str:
    # In turns, and not in two threads: the write then finds what was hashed in the processor's cache. Files overlap with each other.
    digest = hashlib.sha256()
    for portion in _portions(pieces):
        digest.update(portion)
        file.write(portion)
    return digest.hexdigest()


def _portions(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Pieces of about equal size: small ones joined, large ones cut (without a copy)."""
    small = bytearray()
    for piece in pieces:
        view = memoryview(piece)
        if len(view) <= _PORTION // 8:
            small += view
        else:
            if small:
                yield bytes(small)
                small.clear()
            yield from (view[start : start + _PORTION] for start in range(0, len(view), _PORTION))
        if len(small) >= _PORTION:
            yield bytes(small)
            small.clear()
    if small:
        yield bytes(small)


def write_tensors(path: Path, tensors: list[tuple[str, Tensor]]) -> FileRecord:
    """Write (key, tensor of any device) pairs as one safetensors file at `path`; tensors are moved to host memory one at a time."""
    # Widest types first keeps every tensor aligned to its own element size, as the format asks.
    ordered = sorted(tensors, key=lambda pair: -pair[1].element_size())
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key, tensor in ordered:
        end = position + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text

    def pieces() -> Iterator[bytes | memoryview]:
        yield start
        for _, tensor in ordered:
            yield memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())

    return write_file(path, pieces(), len(start) + position)


class TensorReader(Protocol):
    """Reads a tensor of a safetensors file."""

    def __call__(self, key: str, dtype: torch.dtype, shape: tuple[int, ...], part: tuple[slice, ...] = ()) -> Tensor:
        """The tensor `key`, which must be of `dtype` and `shape`, or the `part` of it that these slices of its first dimensions take."""


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[TensorReader]:
    """A reader of the safetensors file `path` that reads no more than it is asked for: memory-mapped, or by ranges from an object store.

    CheckpointError names the file where it is not what was written, or the tensor has another dtype or shape.
    """
    if not is_local(path):
        yield RangeReader(path)
        return
    try:
        # Opened here first: the format's own parser does not say which file it may not read.
        with path.open("rb"), safe_open(path, framework="pt") as file:

            def read(key: str, dtype: torch.dtype, shape: tuple[int, ...], part: tuple[slice, ...] = ()) -> Tensor:
                return _checked_tensor(path, file.get_tensor(key), key, dtype, shape)[part]

            yield read
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not the safetensors file that was written ({error}); {otherwise(path)}") from error
    except OSError as error:
        raise read_failure(path, error) from error


def _checked_tensor(path: Path, tensor: Tensor, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{path} holds {key} as {tensor.dtype} {list(tensor.shape)}, the tensor table says {dtype} {list(shape)}; {otherwise(path)}"
        )
    return tensor


def render_json(value: object) -> bytes:
    """The one way that `value` is written: a file whose bytes differ from the rendering of what it holds was altered."""
    return json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"


def sync_directory(folder: Path) -> None:
    """Force the names in `folder` to disk: a renamed file may otherwise be lost in a power failure. Raises CheckpointError."""
    if not is_local(folder):
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise write_failure(folder, error) from error


def read_bytes(path: Path) -> bytes:
    """All bytes of `path`; CheckpointError where they cannot be read."""
    with reading(path):
        return path.read_bytes()


def check_size(path: Path, record: FileRecord) -> None:
    """Raise CheckpointError unless `path` is there with its recorded size."""
    with reading(path):
        size = path.stat().st_size
    if size != record.size:
        raise CheckpointError(f"{path} has {size} bytes, and {record.size} in its manifest: it was truncated or altered; {otherwise(path)}")


def check_hashes(folder: Path, records: dict[str, FileRecord]) -> None:
    """Raise CheckpointError on the first file of `folder` whose size or SHA-256 is not the recorded one; a few files are read at a time."""
    for name, record in records.items():
        check_size(folder / name, record)
    with ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
        for path, found in pool.map(_hashed, (folder / name for name in records)):
            if found != records[path.name].sha256:
                raise CheckpointError(f"{path} does not have the SHA-256 of its manifest: its contents were damaged; {otherwise(path)}")


def _hashed(path: Path) -> tuple[Path, str]:
    digest = hashlib.sha256()
    with reading(path):
        if is_local(path):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")  # type: ignore[assignment]
        else:
            store, name = store_of(path)
            for start in range(0, path.stat().st_size, _REQUEST):
                digest.update(store.cat_file(name, start=start, end=start + _REQUEST))
    return path, digest.hexdigest()
