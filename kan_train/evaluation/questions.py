"""A question with choices, and its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class EncodingTokenizer(Protocol):
    """What evaluation needs of kan_train.data_tools.tokenizer.Tokenizer."""

    boundary: int

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question: which of the choices is likeliest to follow its context?"""

    contexts: tuple[str, ...]
    """Text before each choice: one for all, or one for each (WinoGrande)."""
    continuations: tuple[str, ...]
    """Text whose log-likelihood counts, one a choice, with the space before it."""
    answer: int
    """Number of the right choice."""
    group: str = ""
    """Subject, length, or whatever the results are also told by."""
    family: str = ""
    """Questions of one family begin alike, and are read together."""

    def context(self, choice: int) -> str:
        """The text before `choice`."""
        return self.contexts[choice if len(self.contexts) > 1 else 0]


@dataclass(frozen=True)
class Reading:
    """A context to be read once, and what may follow it."""

    context: tuple[int, ...]
    """Tokens, the boundary first: a document begins with it, as in training."""
    continuations: tuple[tuple[int, ...], ...]
    """Tokens of each continuation, at least one."""


def readings(question: Question, tokenizer: EncodingTokenizer) -> list[Reading]:
    """The question's contexts, each with the tokens of its continuations in the order of the choices.

    Context and continuation become tokens apart, and spaces at the context's end belong to the continuation (as in lm-evaluation-harness): no
    token lies across the border, so that one reading of the context serves all choices.
    """
    texts: dict[str, list[str]] = {}
    for choice, continuation in enumerate(question.continuations):
        context = question.context(choice)
        bare = context.rstrip(" ")
        texts.setdefault(bare, []).append(context[len(bare) :] + continuation)
    return [
        Reading((tokenizer.boundary, *tokenizer.encode(context)), tuple(tuple(tokenizer.encode(text)) for text in following))
        for context, following in texts.items()
    ]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with alike."""
    if not sequences:
        return 0
    # What the first and the last of a sorted list begin with, all between them begin with.
    low, high = min(map(tuple, sequences)), max(map(tuple, sequences))
    return next((place for place, (one, other) in enumerate(zip(low, high, strict=False)) if one != other), min(len(low), len(high)))
