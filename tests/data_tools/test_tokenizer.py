"""The tokenizer gives back every text exactly, never makes the boundary out of text, and is the same for the same texts."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kan_train.config import ConfigError, TokenizerConfig
from kan_train.data_tools.tokenizer import BOUNDARY, Tokenizer, require_exact, train_tokenizer

# Every character that UTF-8 can hold; more often those that a tokenizer may spoil.
TRICKY = st.sampled_from(
    ["▁", "\ue001", "\ue001s", "\ue001e", "\x00", "\n", "\r", "\t", " ", "  ", "\ufeff", "\u3000", "ﬁ", "①", "e\u0301", "<document>", "<0x0A>", "🙂"]
)
TEXTS = st.lists(st.one_of(st.text(max_size=20), TRICKY, st.characters(categories=["Cc", "Co", "Zs", "Zl", "Zp"])), max_size=20).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(tokenizer_path)


@given(text=TEXTS)
@example("")
@example("\ue001\ue001s▁\ue001e")
@example(" ▁ ▁▁  ")
@settings(max_examples=400, deadline=None)
def test_every_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert BOUNDARY not in tokens
    assert 0 not in tokens, "the unknown token has no text to come back to"


@given(texts=st.lists(TEXTS, max_size=5))
@settings(max_examples=50, deadline=None)
def test_a_batch_is_its_texts_one_by_one(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@given(text=TEXTS.filter(lambda text: "▁" not in text and "\ue001" not in text))
@settings(max_examples=100, deadline=None)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    """Bits a byte divides by them. (A text's own U+2581 and U+E001 are escaped, and count one byte more.)"""
    lengths = tokenizer.bytes_of_tokens()
    assert sum(lengths[token] for token in tokenizer.encode(text)) == len(text.encode())
    assert lengths[BOUNDARY] == 0


def test_boundaries_are_no_text(tokenizer: Tokenizer) -> None:
    tokens = [BOUNDARY, *tokenizer.encode("one"), BOUNDARY, *tokenizer.encode(" two")]
    assert tokenizer.decode(tokens) == "one two"
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)


def test_training_twice_gives_the_same_file(tokenizer_path: Path, some_texts: Callable, tmp_path: Path) -> None:
    train_tokenizer(some_texts(60, 0), TokenizerConfig(vocab_size=400), tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == tokenizer_path.read_bytes()
    assert Tokenizer(tokenizer_path).vocab_size == 400


def test_a_vocabulary_that_the_text_cannot_fill_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.vocab_size=4096.*smaller tokenizer\.vocab_size"):
        train_tokenizer(["a few words", "and no more"], TokenizerConfig(vocab_size=4096), tmp_path / "none.model")
    assert not (tmp_path / "none.model").exists()


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 1000])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.model").write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.model"):
        Tokenizer(tmp_path / "bad.model")
    with pytest.raises(ConfigError, match=r"missing\.model"):
        Tokenizer(tmp_path / "missing.model")


def train_foreign(texts: list[str], path: Path, **settings: object) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, vocab_size=400, minloglevel=2, **settings)
    path.write_bytes(model.getvalue())
    return path


def test_a_tokenizer_that_changes_text_is_refused(some_texts: Callable, tmp_path: Path) -> None:
    """sentencepiece's own defaults normalise and squeeze blanks: such a corpus would be of another text."""
    path = train_foreign(some_texts(40, 0), tmp_path / "lossy.model", byte_fallback=True)
    with pytest.raises(ConfigError, match=r"lossy\.model does not give text back"):
        require_exact(Tokenizer(path), path)


def test_a_tokenizer_whose_boundary_is_text_is_refused(some_texts: Callable, tmp_path: Path) -> None:
    path = train_foreign(some_texts(40, 0), tmp_path / "other.model", byte_fallback=True, bos_id=-1, eos_id=-1)
    with pytest.raises(ConfigError, match=r"other\.model has a piece of text as token 1"):
        Tokenizer(path)
