"""Text shards: webdataset tars with one .txt and one .json a document, each part of the source written by one process.

The source's units are cut into parts by size, before anything runs, so that the shards do not depend on the number of workers. A part that is done has a
file of its own that says so: an interrupted preparation continues with the parts that are missing.
"""

import contextlib
import hashlib
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import webdataset

from kan_train.config import ConfigError, PrepareConfig
from kan_train.data_tools.files import atomic_write, sha256_of, write_json
from kan_train.data_tools.sources import Document, Source, Unit, read_unit

SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Part:
    """Units that one process turns into shards."""

    number: int
    units: list[Unit]

    @property
    def digest(self) -> str:
        """Names and sizes of the units, as a hash: files that changed since an interruption are read again."""
        return hashlib.sha256(json.dumps([(unit.name, unit.size) for unit in self.units]).encode()).hexdigest()


def cut_into_parts(source: Source, shard_bytes: int) -> list[Part]:
    """Consecutive units of about `shard_bytes` together; a larger unit is a part of its own and makes several shards."""
    parts: list[list[Unit]] = [[]]
    size = 0
    for unit in source.units:
        if parts[-1] and size + unit.size > shard_bytes:
            parts.append([])
            size = 0
        parts[-1].append(unit)
        size += unit.size
    return [Part(number, units) for number, units in enumerate(parts)]


def write_part(config: PrepareConfig, part: Part, folder: Path) -> dict[str, Any]:
    """Write the shards of `part`; returns its record, which `folder` keeps as part-NNNNN.json: shards with counts, empty documents."""
    record_file = folder / f"part-{part.number:05d}.json"
    if record_file.exists() and (record := json.loads(record_file.read_text())).get("units") == part.digest:
        return record
    documents: Iterator[Document] = itertools.chain.from_iterable(read_unit(config.corpus, unit) for unit in part.units)
    if config.corpus.max_documents is not None:
        documents = itertools.islice(documents, config.corpus.max_documents)
    counter = _Counter(documents)
    shards: list[dict[str, Any]] = []
    while (shard := _write_shard(config, counter, folder, f"text-{part.number:05d}-{len(shards):04d}.tar")) is not None:
        shards.append(shard)
    record = {"part": part.number, "units": part.digest, "shards": shards, "empty_documents": counter.empty}
    write_json(record_file, record)
    return record


class _Counter:
    """Documents that are not empty, and how many were."""

    def __init__(self, documents: Iterator[Document]) -> None:
        self.documents, self.empty = documents, 0

    def __iter__(self) -> Iterator[Document]:
        for document in self.documents:
            if document.text.strip():
                yield document
            else:
                self.empty += 1


def _write_shard(config: PrepareConfig, documents: "_Counter", folder: Path, name: str) -> dict[str, Any] | None:
    """One tar of at most about shard_megabytes of text, or None when no document is left."""
    limit = int(config.shard_megabytes * 1e6)
    iterator = iter(documents)
    first = next(iterator, None)
    if first is None:
        return None
    path = folder / (name + (".zst" if config.compression == "zstd" else ""))
    counts = {split: {"documents": 0, "bytes": 0} for split in SPLITS}
    written = 0
    with atomic_write(path) as file, contextlib.closing(_compressor(config, file)) as stream:
        # A fixed time stamp makes the same documents the same file.
        with webdataset.TarWriter(stream, mtime=1.0, encoder=False) as tar:
            for number, document in enumerate(itertools.chain([first], iterator)):
                data = _utf8(document)
                split = split_of(document.text, config.heldout)
                facts = {"source": document.source, "split": split, "bytes": len(data)}
                tar.write({"__key__": f"{number:07d}", "txt": data, "json": json.dumps(facts).encode()})
                counts[split]["documents"] += 1
                counts[split]["bytes"] += len(data)
                written += len(data)
                if written >= limit:
                    break
    return {"file": path.name, "size": path.stat().st_size, "sha256": sha256_of(path), **counts}


def _utf8(document: Document) -> bytes:
    try:
        return document.text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(document.text[error.start]):04x}"
        raise ConfigError(
            f"{document.source}: character {error.start} is {half}, half of a surrogate pair, which no UTF-8 text can hold; repair the row (JSON escapes a "
            "character beyond U+FFFF as two halves), or leave it out"
        ) from error


class _Uncompressed:
    """The file as it is; closing it is the owner's affair."""

    def __init__(self, file: Any) -> None:
        self.write, self.flush = file.write, file.flush

    def close(self) -> None:
        pass


def _compressor(config: PrepareConfig, file: Any) -> Any:
    if config.compression == "none":
        return _Uncompressed(file)
    import zstandard

    return zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False)


def split_of(text: str, heldout: float) -> str:
    """'heldout' for the given share of all texts, by a hash of the text alone: a document's copies all land on the same side."""
    return "heldout" if int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < heldout * 2**64 else "train"


def read_documents(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(text, facts) of every document of a text shard."""
    stream: Any = path.open("rb")
    if path.suffix == ".zst":
        import zstandard

        stream = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(stream, closefd=True))
    with stream:
        members = ({**member, "__url__": str(path)} for member in webdataset.tariterators.tar_file_iterator(stream))
        for sample in webdataset.tariterators.group_by_keys(members):
            yield sample["txt"].decode(), json.loads(sample["json"])


