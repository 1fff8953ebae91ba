"""A sentencepiece unigram tokenizer with an exact round trip: decode(encode(text)) == text for every text.

sentencepiece writes a space as U+2581, so a text's own U+2581 would come back as a space: it is escaped before encoding, and so is the escape.
Token 0 is unknown (never produced: unknown characters fall back to bytes); token 1 marks the start of every document, and so the end of the one before.
"""

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from kan_train.config import ConfigError, TokenizerConfig

BOUNDARY = 1
_SPACE, _ESCAPE = "\u2581", "\ue001"
_SENTENCE_BYTES = 2000  # longer lines are cut: the trainer passes over sentences of more than about 4000 bytes


class Tokenizer:
    """Text to tokens and back."""

    boundary = BOUNDARY

    def __init__(self, path: Path) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; prepare the corpus again with `kan data prepare`, or set tokenizer.path to a .model file") from error
        except RuntimeError as error:
            raise ConfigError(f"{path} is not a sentencepiece model; set tokenizer.path to a .model file that sentencepiece has trained") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Tokens of `text`, without a boundary."""
        return self._processor.encode(_escape(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, without boundaries, in one thread."""
        return self._processor.encode([_escape(text) for text in texts], num_threads=1)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`; boundaries are left out."""
        return _unescape(self._processor.decode([token for token in tokens if token != BOUNDARY and token < self.vocab_size]))

    def byte_of(self, token: int) -> int | None:
        """The byte that a byte-fallback token stands for; None for every other token."""
        return int(self._processor.id_to_piece(token)[1:-1], 16) if self._processor.is_byte(token) else None

    def bytes_of_tokens(self) -> list[int]:
        """UTF-8 bytes of text that each token stands for; 0 for the unknown and the boundary."""
        processor = self._processor
        sizes = []
        for token in range(self.vocab_size):
            if processor.is_control(token) or processor.is_unknown(token):
                sizes.append(0)
            else:
                sizes.append(1 if processor.is_byte(token) else len(processor.id_to_piece(token).replace(_SPACE, " ").encode()))
        return sizes


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, path: Path, *, threads: int) -> None:
    """Train on `texts` and write the model to `path`. ConfigError when the texts hold too little for the vocabulary."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(piece for text in texts for piece in _sentences(_escape(text))),
            model_writer=model,
            model_type="unigram",
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            # Indentation and line breaks are part of the text: pieces may hold them.
            split_by_whitespace=True,
            split_digits=True,
            unk_id=0,
            eos_id=BOUNDARY,
            eos_piece="<document>",
            bos_id=-1,
            pad_id=-1,
            seed_sentencepiece_size=max(100_000, 16 * config.vocab_size),
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"tokenizer.vocab_size={config.vocab_size} cannot be trained on this corpus ({str(error).strip().splitlines()[-1]}); "
            "use a smaller tokenizer.vocab_size, or more text (tokenizer.train_megabytes)"
        ) from error
    path.write_bytes(model.getvalue())


def _sentences(text: str) -> Iterable[str]:
    """Lines with their line breaks; long ones cut between characters."""
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), _SENTENCE_BYTES // 4):
            yield line[start : start + _SENTENCE_BYTES // 4]


def _escape(text: str) -> str:
    if _SPACE in text or _ESCAPE in text:
        return text.replace(_ESCAPE, _ESCAPE + "e").replace(_SPACE, _ESCAPE + "s")
    return text


def _unescape(text: str) -> str:
    if _ESCAPE not in text:
        return text
    return text.replace(_ESCAPE + "s", _SPACE).replace(_ESCAPE + "e", _ESCAPE)
