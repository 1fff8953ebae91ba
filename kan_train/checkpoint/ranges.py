"""Tensors of a safetensors file in an object store, read by ranges: the header, then the rows that are asked for, and nothing else.

The format: 8 bytes with the header's length, little-endian; the header, JSON of {key: {"dtype", "shape", "data_offsets": [begin, end]}}, where the
offsets count from the header's end; the tensors' raw little-endian bytes, row-major.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kan_train.checkpoint.errors import CheckpointError, otherwise, reading
from kan_train.checkpoint.places import store_of

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Type in a safetensors header -> type of PyTorch."""

_FIRST = 64 << 10  # bytes of the first read: the header of most files, in one request
_LARGEST_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: what it is, and where its first byte lies."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


class RangeReader:
    """Reads tensors of the file `path`. CheckpointError where it is not a safetensors file whose header agrees with its size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path):
            self.size = path.stat().st_size
        first = self._fetch(0, min(self.size, _FIRST))
        length = int.from_bytes(first[:8], "little")
        if not 0 < length <= min(self.size - 8, _LARGEST_HEADER):
            raise self._damaged(f"its header would have {length} bytes")
        text = first[8 : 8 + length] if 8 + length <= len(first) else self._fetch(8, 8 + length)
        try:
            header = json.loads(text)
            self.entries = {key: self._entry(value, 8 + length) for key, value in header.items() if key != "__metadata__"}
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from None

    def __call__(self, key: str, dtype: torch.dtype, shape: tuple[int, ...], part: tuple[slice, ...] = ()) -> Tensor:
        """The `part` of the tensor `key`; of its bytes only the rows (of the first dimension) that the part takes are fetched."""
        entry = self.entries.get(key)
        if entry is None:
            raise self._damaged(f"it has no tensor {key}")
        if entry.dtype != dtype or entry.shape != shape:
            raise CheckpointError(
                f"{self.path} holds {key} as {entry.dtype} {list(entry.shape)}, the tensor table says {dtype} {list(shape)}; {otherwise(self.path)}"
            )
        if not shape:
            return self._tensor(entry, 0, 1).view(())
        first, last, step = part[0].indices(shape[0]) if part else (0, shape[0], 1)
        row = math.prod(shape[1:])
        rows = self._tensor(entry, first * row, max(first, last) * row).view(-1, *shape[1:]) if row else torch.empty(last - first, *shape[1:], dtype=dtype)
        return rows[(slice(None, None, step), *part[1:])]

    def _tensor(self, entry: _Entry, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a tensor, 1-D."""
        size = entry.dtype.itemsize
        if start == stop:
            return torch.empty(0, dtype=entry.dtype)
        return torch.frombuffer(bytearray(self._fetch(entry.begin + start * size, entry.begin + stop * size)), dtype=entry.dtype)

    def _fetch(self, start: int, stop: int) -> bytes:
        store, name = store_of(self.path)
        with reading(self.path):
            raw = store.cat_file(name, start=start, end=stop) if stop > start else b""
        if len(raw) != stop - start:
            raise self._damaged(f"it ended at {start + len(raw)} of {stop} bytes")
        return raw

    def _entry(self, value: dict[str, Any], data: int) -> _Entry:
        dtype, shape, (begin, end) = DTYPES[value["dtype"]], tuple(value["shape"]), value["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError(f"{value} are no sizes")
        if end - begin != math.prod(shape) * dtype.itemsize or data + end > self.size:
            raise ValueError(f"bytes {begin} to {end} do not hold {value['dtype']} {list(shape)} in a file of {self.size} bytes")
        return _Entry(dtype, shape, data + begin)

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not the safetensors file that was written ({why}); {otherwise(self.path)}")
