"""What is asked of the engine, and how far it is: one request, one continuation."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from kan_train.inference.sample import Sampling, generator
from kan_train.inference.text import TextStream, TextTokenizer

_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Request:
    """One continuation of a prompt."""

    prompt: str = ""
    """Text to continue; empty: the start of a document."""
    max_tokens: int = 128
    """Tokens to give at most, at least 1."""
    sampling: Sampling = field(default_factory=Sampling)
    """How each token is chosen."""
    seed: int = 0
    """With `sample` it determines what is drawn, whatever is decoded beside it."""
    sample: int = 0
    """Number of this continuation among several of one prompt and seed."""
    stop: tuple[str, ...] = ()
    """Texts that end the continuation; none of them is given."""


class Continuation:
    """A request under way. The engine alone changes it."""

    def __init__(self, request: Request, tokenizer: TextTokenizer) -> None:
        self.request, self.number = request, next(_numbers)
        self.prompt = [tokenizer.boundary, *tokenizer.encode(request.prompt)]
        """Tokens of the prompt; a document begins with the boundary, as in training."""
        self.tokens: list[int] = []
        """Tokens given, without those behind the end."""
        self.text = ""
        """Text given."""
        self.finish: str | None = None
        """Why it has ended: "stop" (a stop text, or the end of the document), "length" or "cancelled"; None: it goes on."""
        self.chance = generator(request.seed, request.sample)
        self._stream, self._stops = TextStream(tokenizer), StopTexts(request.stop)

    def add(self, token: int, boundary: int) -> str:
        """Take the next token; returns the text that is certain now. Sets `finish` where it was the last."""
        if token == boundary:
            return self._end("stop", self._stream.finish())
        self.tokens.append(token)
        text = self._stream.add(token)
        if len(self.tokens) >= self.request.max_tokens:
            return self._end("length", text + self._stream.finish())
        given, stopped = self._stops.add(text)
        self.text += given
        if stopped:
            self.finish = "stop"
        return given

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.finish = self.finish or "cancelled"

    def _end(self, finish: str, text: str) -> str:
        given, stopped = self._stops.add(text)
        given += "" if stopped else self._stops.finish()
        self.text += given
        self.finish = "stop" if stopped else finish
        return given


class StopTexts:
    """Text piece by piece up to the first stop text: what may still become one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held = tuple(stops), ""

    def add(self, piece: str) -> tuple[str, bool]:
        """(text that may be given, whether a stop text has come)."""
        self.held += piece
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            given, self.held = self.held[: min(found)], ""
            return given, True
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        given, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return given, False

    def finish(self) -> str:
        """What was held back: no more comes."""
        given, self.held = self.held, ""
        return given


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((length for length in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:length])), 0)
