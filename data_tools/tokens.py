"""Token shards: webdataset tars whose members are long arrays of tokens, read through an index of offsets.

Each text shard becomes one member a split: document after document, each begun by the boundary token. Few long members, not one a sequence, because a tar
header costs more than a sequence's tokens to read.
"""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from kan_train.data_tools.files import atomic_write, sha256_of, write_json
from kan_train.data_tools.shards import SPLITS, read_documents
from kan_train.data_tools.tokenizer import BOUNDARY, Tokenizer

_BATCH = 64  # documents encoded in one call
LONGEST = 5  # documents named as the longest


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where it is wide enough, else uint32 (little-endian)."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def write_token_shard(text_shard: Path, tokenizer_path: Path, folder: Path) -> dict[str, Any]:
    """Tokenise one text shard; returns its record, which `folder` keeps: per split file, size, SHA-256, byte offset, tokens, documents."""
    name = text_shard.name.split(".")[0].replace("text-", "")
    record_file = folder / f"tokens-{name}.json"
    tokenizer = Tokenizer(tokenizer_path)
    made_from = {"text": sha256_of(text_shard), "tokenizer": tokenizer.sha256}
    if record_file.exists() and (record := json.loads(record_file.read_text())).get("made_from") == made_from:
        return record
    pieces: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    documents = dict.fromkeys(SPLITS, 0)
    longest: list[dict[str, Any]] = []
    for texts, facts in _batches(text_shard):
        for tokens, fact in zip(tokenizer.encode_batch(texts), facts, strict=True):
            pieces[fact["split"]].append(np.array([BOUNDARY, *tokens], dtype=token_dtype(tokenizer.vocab_size)))
            documents[fact["split"]] += 1
            longest.append({"tokens": len(tokens), "source": fact["source"]})
    members = [_write_member(folder / f"{split}-{name}.tar", name, pieces[split], documents[split], split) for split in SPLITS if pieces[split]]
    record = {"name": name, "made_from": made_from, "members": members, "longest": sorted(longest, key=lambda fact: -fact["tokens"])[:LONGEST]}
    write_json(record_file, record)
    return record


def _batches(text_shard: Path) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    texts: list[str] = []
    facts: list[dict[str, Any]] = []
    for text, fact in read_documents(text_shard):
        texts.append(text)
        facts.append(fact)
        if len(texts) == _BATCH:
            yield texts, facts
            texts, facts = [], []
    if texts:
        yield texts, facts


def _write_member(path: Path, name: str, pieces: list[np.ndarray], documents: int, split: str) -> dict[str, Any]:
    tokens = np.concatenate(pieces)
    facts = {"split": split, "documents": documents, "tokens": len(tokens), "dtype": tokens.dtype.str}
    with atomic_write(path) as file:
        with webdataset.TarWriter(file, mtime=1.0, encoder=False) as tar:
            tar.write({"__key__": name, "tokens": tokens.tobytes(), "json": json.dumps(facts).encode()})
    with tarfile.open(path) as tar_file:
        offset = tar_file.getmember(f"{name}.tokens").offset_data
    return {"file": path.name, "size": path.stat().st_size, "sha256": sha256_of(path), "offset": offset, **facts}
