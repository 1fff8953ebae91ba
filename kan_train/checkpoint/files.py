"""Files that are whole or absent: written under a temporary name, hashed on the way, forced to disk, and renamed.

Tensors go into safetensors files (a JSON header, then raw little-endian bytes), everything else into JSON: reading either runs no code.
"""

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kan_train.checkpoint.errors import CheckpointError, otherwise, read_failure, write_failure

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PORTION = 8 << 20  # bytes handed to the disk and to the hash at a time


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
    """Write `pieces` (`size` bytes together) to `path`, on disk when this returns. On CheckpointError `path` is as before."""
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


def _write_hashed(file: IO[bytes], pieces: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    pending: deque[Future[None]] = deque()
    # Both the hash and the write leave the interpreter lock: together they take the time of the slower one.
    with ThreadPoolExecutor(1) as hasher:
        for portion in _portions(pieces):
            pending.append(hasher.submit(digest.update, portion))
            file.write(portion)
            if len(pending) > 2:
                pending.popleft().result()
        for future in pending:
            future.result()
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


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Callable[[str, torch.dtype, tuple[int, ...]], Tensor]]:
    """A function (key, dtype, shape) -> tensor that reads the safetensors file `path`, memory-mapped: only the pages used are read.

    CheckpointError names the file where it is not what was written, or the tensor has another dtype or shape.
    """
    try:
        # Opened here first: the format's own parser does not say which file it may not read.
        with path.open("rb"), safe_open(path, framework="pt") as file:
            yield lambda key, dtype, shape: _read_tensor(path, file.get_tensor(key), key, dtype, shape)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not the safetensors file that was written ({error}); {otherwise(path)}") from error
    except OSError as error:
        raise read_failure(path, error) from error


def _read_tensor(path: Path, tensor: Tensor, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
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
    try:
        return path.read_bytes()
    except OSError as error:
        raise read_failure(path, error) from error


def check_size(path: Path, record: FileRecord) -> None:
    """Raise CheckpointError unless `path` is there with its recorded size."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise read_failure(path, error) from error
    if size != record.size:
        raise CheckpointError(f"{path} has {size} bytes, and {record.size} in its manifest: it was truncated or altered; {otherwise(path)}")


def check_hashes(folder: Path, records: dict[str, FileRecord]) -> None:
    """Raise CheckpointError on the first file of `folder` whose size or SHA-256 is not the recorded one; a few files are read at a time."""
    for name, record in records.items():
        check_size(folder / name, record)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for path, found in pool.map(_hashed, (folder / name for name in records)):
            if found != records[path.name].sha256:
                raise CheckpointError(f"{path} does not have the SHA-256 of its manifest: its contents were damaged; {otherwise(path)}")


def _hashed(path: Path) -> tuple[Path, str]:
    try:
        with path.open("rb") as file:
            return path, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise read_failure(path, error) from error
