"""Append-only files of JSON lines that survive a crash: what metrics.jsonl and ledger.jsonl are made of.

A line is written by one system call and counts once its newline is there. A process that dies while writing leaves a torn last line:
readers pass over it, and the next writer cuts it off. JSON has no NaN and no infinity: such a number is written as null, and
"nonfinite" beside it says which it was, so that every line is valid JSON, a column holds numbers only, and reading gives the number back.
"""

import errno
import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from kan_train.config.errors import ConfigError

Row = dict[str, Any]
"""Flat names to numbers, text or None."""

NONFINITE = "nonfinite"
"""Key of the names that are null because their number was not finite, each with "nan", "inf" or "-inf"."""


class JsonLines:
    """A file of JSON lines, open for appending by this process alone.

    Raises ConfigError where the file cannot be written, or where another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _cannot_write(path, error) from error
        try:
            self._lock()
            self._cut_torn_line()
        except BaseException:
            os.close(self._file)
            raise

    def append(self, row: Row, *, durable: bool = False) -> None:
        """Write one line. durable: wait until it is on the disk, so that it also survives the machine."""
        line = encode(row)
        before = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if durable:
                os.fsync(self._file)
        except OSError as error:
            # Half a line would be glued to the next one.
            with suppress(OSError):
                os.ftruncate(self._file, before)
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the file and let others write it; closing twice is harmless."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{self.path} is being written by another process: this run is going on already; use another run.name, or wait for its end"
            ) from error
        except OSError:
            pass  # some network file systems have no locks: the run goes on without one

    def _cut_torn_line(self) -> None:
        size = os.fstat(self._file).st_size
        keep = size
        while keep:
            start = max(0, keep - 65536)
            newline = os.pread(self._file, keep - start, start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep < size:
            os.ftruncate(self._file, keep)


def encode(row: Row) -> bytes:
    """One row as a line of valid JSON, newline included."""
    unusual = {name: _name(value) for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    if unusual:
        row = {name: None if name in unusual else value for name, value in row.items()} | {NONFINITE: unusual}
    return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "surrogateescape") + b"\n"


def decode(line: bytes) -> Row:
    """The row that `encode` was given; ValueError where the line is not one."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("a line holds no JSON object")
    return row | {name: float(text) for name, text in row.pop(NONFINITE, {}).items()}


def read_lines(path: Path) -> Iterator[Row]:
    """The rows of a file, in the order they were written; nothing where there is no file. A torn last line does not count.

    Raises ConfigError naming the line where one in the middle is damaged.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield decode(line)
            except ValueError as error:
                raise ConfigError(f"{path}, line {number} is damaged ({error}); remove that line, or restore the file") from error


def read_whole_lines(path: Path) -> list[Row]:
    """The rows of a file to which several processes append, oldest first; none where there is no file. Lines that one of them left torn do not count."""
    rows = []
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            if line:
                rows.append(decode(line))
        except ValueError:
            continue
    return rows


def count_lines(path: Path) -> int:
    """How many rows `read_lines` gives, without reading what is in them."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _name(value: float) -> str:
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def _cannot_write(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path} cannot be written ({error.strerror}); make room or use run.root=PATH with a folder that you may write")
