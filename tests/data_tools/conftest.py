"""A folder of small texts, and a tokenizer trained on them once."""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from kan_train.config import CorpusConfig, PrepareConfig, TokenizerConfig
from kan_train.data_tools.tokenizer import train_tokenizer

WORDS = ["grove", "spline", "Tabelle", "größer", "語", "naïve", "def", "return", "self", "12", "3.14", "\t\n", "\n\n", "()", "==", "▁", "🙂", "\r\n"]
SYLLABLES = ["ka", "lo", "mi", "ter", "gro", "ve", "spli", "ne", "al", "ma", "sur", "ti", "kon", "da"]


def _texts(count: int, seed: int) -> list[str]:
    """Texts of words, symbols, accents, line breaks and, rarely, characters that the tokenizer has never met."""
    generator = random.Random(seed)
    texts = []
    for _ in range(count):
        words = [generator.choice(WORDS) for _ in range(generator.randint(10, 150))]
        words += ["".join(generator.choices(SYLLABLES, k=generator.randint(1, 4))) for _ in range(generator.randint(10, 150))]
        generator.shuffle(words)
        words.append(chr(generator.choice([0, 7, 0x3B1, 0x4E00, 0xE001, 0xFEFF, 0x1F600])))
        texts.append(" ".join(words))
    return texts


@pytest.fixture(scope="session")
def some_texts() -> Callable[[int, int], list[str]]:
    """(count, seed) -> texts."""
    return _texts


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 400 pieces."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(_texts(60, 0), TokenizerConfig(vocab_size=400), path)
    return path


@pytest.fixture
def folder_of_texts(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder with 60 text files in three subfolders, and their contents by name."""
    folder, contents = tmp_path / "texts", {}
    for number, text in enumerate(_texts(60, 1)):
        name = f"{'abc'[number % 3]}/{number:03d}.txt"
        contents[name] = text
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder, contents


@pytest.fixture
def make_config(tmp_path: Path, tokenizer_path: Path, folder_of_texts: tuple[Path, dict[str, str]]) -> Callable[..., PrepareConfig]:
    """(root=, workers=, corpus settings ...) -> a preparation of `folder_of_texts` in many small shards, with the tokenizer of the session."""

    def make(*, corpus: dict | None = None, **settings: object) -> PrepareConfig:
        chosen = {"root": str(tmp_path / "corpora"), "workers": 1, "heldout": 0.2, "shard_megabytes": 0.01, **settings}
        chosen.setdefault("tokenizer", TokenizerConfig(path=str(tokenizer_path)))
        return PrepareConfig(corpus=CorpusConfig(**{"kind": "directory", "name": "mine", "path": str(folder_of_texts[0]), **(corpus or {})}), **chosen)

    return make


@pytest.fixture(scope="session")
def hashes() -> Callable[[Path], dict[str, str]]:
    """(folder) -> SHA-256 of every file below it, by relative name."""

    def compute(folder: Path) -> dict[str, str]:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    return compute
