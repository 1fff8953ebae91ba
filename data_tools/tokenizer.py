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
_TRAINING_THREADS = 4  # not the number of workers: it decides the order in which the trainer adds up, and so the tokenizer
_SENTENCE_BYTES = 2000  # longer lines are cut: the trainer passes over sentences of more than about 4000 bytes


class Tokenizer:
    """Text to tokens and back."""

    boundary = BOUNDARY

    def __init__(self, path: Path) -> None:
        try:
            content = path.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor()
            self._processor.load_from_serialized_proto(content)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; prepare the corpus again with `kan data prepare`, or set tokenizer.path to a .model file") from error
        except RuntimeError as error:
            raise ConfigError(f"{path} is not a sentencepiece model; set tokenizer.path to a .model file that sentencepiece has trained") from error
        if not self._processor.is_control(BOUNDARY):
            raise ConfigError(
                f"{path} has a piece of text as token {BOUNDARY}, which must mark the documents; set tokenizer.path to the tokenizer of a corpus that "
                "`kan data prepare` made, or leave it out to train one"
            )
        self.vocab_size: int = self._processor.vocab_size()
        self.sha256 = hashlib.sha256(content).hexdigest()

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


def require_exact(tokenizer: Tokenizer, path: Path) -> None:
    """ConfigError unless the tokenizer gives back what it is given: one that normalises text would make a corpus of another text."""
    probe = " a  b\t\n\r\n\u00e9e\u0301\ufb01\u2460\u3000\u2581\x00\U0001f642 "
    if tokenizer.decode(tokenizer.encode(probe)) != probe:
        raise ConfigError(
            f"tokenizer.path={path} does not give text back as it was; use one trained with byte_fallback=true, normalization_rule_name=identity, "
            "remove_extra_whitespaces=false and add_dummy_prefix=false, or leave tokenizer.path out to train one"
        )


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, path: Path) -> None:
    """Train on `texts` and write the model to `path`, the same for the same texts. ConfigError when the texts hold too little for the vocabulary."""
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
            # Half the candidates go in each round, of one step each: less than half the time of the trainer's defaults, and no more tokens.
            seed_sentencepiece_size=max(50_000, 12 * config.vocab_size),
            shrinking_factor=0.5,
            num_sub_iterations=1,
            num_threads=_TRAINING_THREADS,
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
