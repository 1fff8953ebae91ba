"""Where documents come from: the standard library, Debian packages, a directory, a Hugging Face dataset.

A source lists units (files, or one stream), and reads the documents of a unit; units are read in parallel.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kan_train.config import ConfigError, CorpusConfig
from kan_train.data_tools import debian
from kan_train.data_tools.files import named_errors

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
ROW_SUFFIXES = (".jsonl", ".parquet")
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass(frozen=True)
class Document:
    """One text."""

    text: str
    source: str
    """Where it comes from: a path below the corpus's root, or a row."""


@dataclass(frozen=True)
class Unit:
    """A piece of a source that one process reads: a file, or a stream."""

    path: str
    name: str
    """Path below the source's root."""
    size: int
    """Bytes on disk: how units are spread over shards."""


@dataclass(frozen=True)
class Source:
    """What a corpus is made of."""

    config: CorpusConfig
    units: list[Unit]
    description: str
    licence: str


def open_source(config: CorpusConfig, work: Path) -> Source:
    """List what `config` names; `work` is a folder for downloads. ConfigError names the setting that is wrong."""
    match config.kind:
        case "stdlib":
            root = Path(sysconfig.get_paths()["stdlib"])
            units = _files_below(root, lambda path: path.suffix == ".py", leave_out=("site-packages", "dist-packages"))
            return Source(config, units, f"standard library of Python {sysconfig.get_python_version()}", config.licence or "PSF-2.0")
        case "debian_docs":
            versions = debian.download_packages(work)
            units = _files_below(work, lambda path: debian.is_document(work, path))
            return Source(config, units, f"Debian packages {', '.join(versions)}", config.licence or "GPL-2.0 (linux-doc, anarchism), PSF-2.0 (python3-doc)")
        case "directory":
            return Source(config, _directory_units(Path(config.path or "")), f"directory {Path(config.path or '').name}", config.licence or "unknown")
        case "huggingface":
            name = "/".join(part for part in (config.dataset, config.subset, config.split) if part)
            return Source(config, [Unit(path=name, name=name, size=0)], f"Hugging Face dataset {name}", config.licence or "see the dataset's card")
    raise AssertionError(config.kind)


def read_unit(config: CorpusConfig, unit: Unit) -> Iterator[Document]:
    """The documents of `unit`, empty ones included. ConfigError names a file that may not be read or is not text."""
    if config.kind == "huggingface":
        yield from _stream_rows(config)
        return
    path = Path(unit.path)
    with named_errors(path):
        if config.kind == "stdlib":
            # Python says in a comment which encoding a source file has; the tests' deliberately broken files are passed over.
            with contextlib.suppress(SyntaxError, UnicodeDecodeError), tokenize.open(path) as file:
                yield Document(file.read(), unit.name)
        elif config.kind == "debian_docs":
            yield Document(debian.plain_text(path), unit.name)
        else:
            yield from _read_file(config, path, unit.name)


def _files_below(root: Path, wanted: Callable[[Path], bool], leave_out: tuple[str, ...] = ()) -> list[Unit]:
    """Regular files in sorted order, so that every machine and every number of workers makes the same shards."""
    units = []
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = sorted(set(folders).difference(leave_out))
        for name in sorted(names):
            path = Path(folder, name)
            if wanted(path.relative_to(root)) and path.is_file() and not path.is_symlink():
                units.append(Unit(str(path), str(path.relative_to(root)), path.stat().st_size))
    return units


def _raise(error: OSError) -> None:
    raise ConfigError(f"{error.filename}: {error.strerror}; give this user the right to read it, or leave it out")


# --- a directory of the user's ---


def _directory_units(root: Path) -> list[Unit]:
    if not root.exists():
        raise ConfigError(f"corpus.path={root} does not exist; name a folder with .txt, .md, .jsonl or .parquet files, or one such file")
    if root.is_file():
        return [Unit(str(root), root.name, root.stat().st_size)]
    units = _files_below(root, lambda path: not any(part.startswith(".") for part in path.parts) and _kind(path) is not None)
    if not units:
        raise ConfigError(f"corpus.path={root} holds no .txt, .md, .jsonl or .parquet file (plain or .gz, .bz2, .xz, .zst); name another folder")
    return units


def _kind(path: Path) -> str | None:
    """'text', 'jsonl' or 'parquet' by the ending before a compression's; None for other files."""
    suffix = Path(path.stem).suffix if path.suffix in (*COMPRESSED, ".zst") else path.suffix
    if suffix in TEXT_SUFFIXES:
        return "text"
    return suffix[1:] if suffix in ROW_SUFFIXES else None


def _read_file(config: CorpusConfig, path: Path, name: str) -> Iterator[Document]:
    kind = _kind(path) or "text"
    if kind == "parquet":
        yield from _parquet_rows(config, path, name)
        return
    try:
        with _open(path) as file:
            if kind == "text":
                yield Document(file.read().decode(config.encoding), name)
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield Document(_field(config, json.loads(line.decode(config.encoding)), f"{path}, line {number}"), f"{name}:{number}")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not valid {config.encoding} (byte {error.start}); set corpus.encoding to its encoding, for example corpus.encoding=latin-1, "
            "or convert the file"
        ) from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON lines: {error}; every line must be an object with the field corpus.text_field={config.text_field}") from error
    except LookupError as error:
        raise ConfigError(f"corpus.encoding={config.encoding} is not an encoding; use corpus.encoding=utf-8") from error
    except Exception as error:
        if _is_damage(error):
            raise ConfigError(f"{path} cannot be decompressed ({error}): it is damaged or not what its name says; replace it, or move it away") from error
        raise


def _is_damage(error: Exception) -> bool:
    """Whether a decompressor raised it; every library has an error of its own for the same thing."""
    if isinstance(error, (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)):
        return True
    # bz2 and Arrow say it with a bare OSError, which has no number where the system's have one.
    return type(error).__module__.startswith("pyarrow") or (type(error) is OSError and error.errno is None)


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".zst":
        import pyarrow

        # Not the zstandard library's reader, which takes a file that was cut short for a complete one.
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return COMPRESSED.get(path.suffix, open)(path, "rb")  # type: ignore[operator, return-value]


def _parquet_rows(config: CorpusConfig, path: Path, name: str) -> Iterator[Document]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{path} is not a parquet file ({error}): it is damaged or not what its name says; replace it, or move it away") from error
    columns = [field.name for field in table.schema_arrow if pyarrow.types.is_string(field.type) or pyarrow.types.is_large_string(field.type)]
    if config.text_field not in columns:
        raise ConfigError(f"{path} has no column of text named {config.text_field!r}; set corpus.text_field to one of: {', '.join(columns) or '(it has none)'}")
    number = 0
    for batch in table.iter_batches(columns=[config.text_field]):
        for text in batch.column(0).to_pylist():
            number += 1
            yield Document(text or "", f"{name}:{number}")


def _field(config: CorpusConfig, row: Any, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(config.text_field), str):
        fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ConfigError(f"{where} has no text in the field {config.text_field!r} (it has: {fields}); set corpus.text_field to the field with the text")
    return row[config.text_field]


# --- Hugging Face ---


def _stream_rows(config: CorpusConfig) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("corpus=huggingface needs the datasets library: pip install 'kan-train[eval]'") from error
    try:
        rows = datasets.load_dataset(config.dataset, config.subset, split=config.split, streaming=True)
        for number, row in enumerate(rows):
            yield Document(_field(config, row, f"dataset {config.dataset}, row {number}"), f"{config.dataset}:{number}")
    except ConfigError:
        raise
    except Exception as error:  # the library raises many kinds for one cause: no such dataset, or no way to reach it
        raise ConfigError(
            f"corpus.dataset={config.dataset} cannot be streamed ({error}); check the name, corpus.subset, corpus.split and the network"
        ) from error
