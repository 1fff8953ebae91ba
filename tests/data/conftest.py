"""Prepared corpora written by hand, so that every token of them is known: nothing here uses the tools that make real ones."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

BOUNDARY = 1


def _write_corpus(
    root: Path,
    name: str,
    documents: list[np.ndarray],
    *,
    shards: int = 3,
    heldout: list[np.ndarray] | None = None,
    vocab_size: int = 256,
    tokenizer: bytes = b"a tokenizer",
) -> np.ndarray:
    """Write corpus `name`; returns the training stream: every document after a boundary token, document after document."""
    folder = root / name
    (folder / "tokens").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    dtype = np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")
    members, streams = [], {"train": [np.empty(0, dtype)], "heldout": [np.empty(0, dtype)]}
    for split, texts in (("train", documents), ("heldout", heldout if heldout is not None else documents[:2])):
        for number in range(shards):
            mine = texts[len(texts) * number // shards : len(texts) * (number + 1) // shards]
            if mine:
                tokens = np.concatenate([np.concatenate([[BOUNDARY], text]) for text in mine]).astype(dtype)
                streams[split].append(tokens)
                members.append(_write_shard(folder / "tokens" / f"{split}-{number:05d}.tar", tokens, split, len(mine)))
    (folder / "tokenizer" / "tokenizer.model").write_bytes(tokenizer)
    lengths = np.arange(vocab_size) % 7
    lengths[BOUNDARY] = 0
    np.save(folder / "tokenizer" / "bytes.npy", lengths.astype(np.uint16))
    manifest = {
        "format": 1,
        "tokenizer": {"sha256": hashlib.sha256(tokenizer).hexdigest(), "vocab_size": vocab_size, "boundary": BOUNDARY},
        "bytes_of_tokens": {"file": "tokenizer/bytes.npy", "sha256": _sha256(folder / "tokenizer" / "bytes.npy")},
        "dtype": dtype.str,
        "tokens": members,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return np.concatenate(streams["train"]).astype(np.int64)


def _write_shard(path: Path, tokens: np.ndarray, split: str, documents: int) -> dict:
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("00000.tokens")
        info.size = tokens.nbytes
        tar.addfile(info, io.BytesIO(tokens.tobytes()))
    with tarfile.open(path) as tar:
        offset = tar.getmember("00000.tokens").offset_data
    facts = {"file": path.name, "size": path.stat().st_size, "sha256": _sha256(path), "offset": offset}
    return {**facts, "split": split, "documents": documents, "tokens": len(tokens)}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _random_documents(count: int, seed: int, *, vocab_size: int = 256) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(2, vocab_size, size=size) for size in generator.integers(3, 60, size=count)]


@pytest.fixture
def write_corpus() -> Callable[..., np.ndarray]:
    """(root, name, documents, shards=, heldout=, vocab_size=, tokenizer=) -> the training stream, int64."""
    return _write_corpus


@pytest.fixture
def random_documents() -> Callable[..., list[np.ndarray]]:
    """(count, seed, vocab_size=) -> documents of 3 to 59 tokens without boundaries."""
    return _random_documents


@pytest.fixture
def corpora(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder with the corpora "one" (many tokens) and "two" (few), and their training streams."""
    root = tmp_path / "corpora"
    streams = {
        "one": _write_corpus(root, "one", _random_documents(60, seed=1)),
        "two": _write_corpus(root, "two", _random_documents(11, seed=2), shards=2),
    }
    return root, streams
