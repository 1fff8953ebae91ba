"""Tokens to text, piece by piece."""

from collections.abc import Sequence
from typing import Protocol

_ESCAPE = "\ue001"  # the tokenizer's escape: alone at the end, its meaning depends on what follows


class TextTokenizer(Protocol):
    """What decoding needs of kan_train.data_tools.tokenizer.Tokenizer."""

    boundary: int
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...
    def byte_of(self, token: int) -> int | None: ...
    def bytes_of_tokens(self) -> list[int]: ...


class TextStream:
    """Tokens to text piece by piece: the pieces together are the decoding of all tokens, and none ends inside a character."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.held: list[int] = []

    def add(self, token: int) -> str:
        """Take one more token; the text that is now whole, often empty inside a character that is written in bytes."""
        self.held.append(token)
        ready = len(self.held) - _unfinished(self.tokenizer, self.held)
        text = self.tokenizer.decode(self.held[:ready])
        if text.endswith(_ESCAPE):
            return ""
        self.held = self.held[ready:]
        return text

    def finish(self) -> str:
        """The text of what is left; an unfinished character becomes U+FFFD."""
        text = self.tokenizer.decode(self.held)
        self.held = []
        return text


def _unfinished(tokenizer: TextTokenizer, tokens: list[int]) -> int:
    """How many of the last tokens are the first bytes of a character whose other bytes may still come."""
    for length in range(1, min(3, len(tokens)) + 1):
        byte = tokenizer.byte_of(tokens[-length])
        if byte is None or byte < 0x80:
            return 0
        if byte >= 0xC0:
            wanted = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return length if length < wanted else 0
    return 0
