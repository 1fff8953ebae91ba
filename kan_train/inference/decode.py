"""Recurrent decoding: the prompt is read once, then every token costs one step, whatever lies before it (for ADA layers).

A document begins with the boundary token, in training and here; the model ends a document by giving the boundary again.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kan_train.config import ConfigError
from kan_train.inference.sample import Sampling, choose, generators
from kan_train.model.lm import LanguageModel

_ESCAPE = "\ue001"  # the tokenizer's escape: alone at the end, its meaning depends on what follows


class TextTokenizer(Protocol):
    """What decoding needs of kan_train.data_tools.tokenizer.Tokenizer."""

    boundary: int
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...
    def byte_of(self, token: int) -> int | None: ...
    def bytes_of_tokens(self) -> list[int]: ...


@dataclass
class Speed:
    """What a generation took; filled while it runs."""

    prompt_tokens: int = 0
    """Tokens read before the first one was given."""
    tokens: int = 0
    """Tokens given, over all samples."""
    prefill_seconds: float = 0.0
    """Seconds to read the prompt."""
    stepped: int = 0
    """Tokens that took a step of their own: all but the first of each sample, which comes from the prompt."""
    decode_seconds: float = 0.0
    """Seconds of those steps."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of decoding, over all samples; 0 where none took a step."""
        return self.stepped / self.decode_seconds if self.stepped else 0.0


def generate(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    max_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    samples: int = 1,
    on_text: Callable[[int, str], None] | None = None,
    speed: Speed | None = None,
) -> list[str]:
    """Continuations of `prompt` (without it), one a sample. An empty prompt continues the start of a document.

    on_text(sample, piece) is called with every piece of text as soon as it is whole: no piece ends inside a character.
    Ends at the end of the document or after `max_tokens`. Raises ConfigError where the tokenizer is not the model's.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    texts = [TextStream(tokenizer) for _ in range(samples)]
    result = [""] * samples
    length = {"max_tokens": max_tokens, "samples": samples}
    tokens = generate_tokens(model, tokenizer, prompt, **length, sampling=sampling, seed=seed, speed=speed or Speed())

    def give(sample: int, piece: str) -> None:
        result[sample] += piece
        if piece and on_text is not None:
            on_text(sample, piece)

    for step in tokens:
        for sample, token in step.items():
            give(sample, texts[sample].add(token))
    for sample, text in enumerate(texts):
        give(sample, text.finish())
    return result


def generate_tokens(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    max_tokens: int,
    samples: int,
    sampling: Sampling,
    seed: int,
    speed: Speed,
) -> Iterator[dict[int, int]]:
    """Each step's tokens, {sample: token}, of the samples whose document has not ended; boundaries are not given."""
    device = model.embedding.weight.device
    hidden_V = _not_text(tokenizer, model.config.vocab_size)
    chance = generators(seed, samples)
    read = [tokenizer.boundary, *tokenizer.encode(prompt)]
    running = set(range(samples))
    with _evaluating(model):
        started = time.perf_counter()
        logits_BV, state = model.prefill(torch.tensor([read] * samples, device=device), model.init_state(samples))
        next_B = choose(logits_BV.masked_fill(hidden_V.to(device), -torch.inf), sampling, chance)
        speed.prompt_tokens, speed.prefill_seconds = len(read), time.perf_counter() - started
        started = time.perf_counter()
        for position in range(max_tokens):
            if position:
                logits_BV, state = model.step(next_B.to(device), state)
                next_B = choose(logits_BV.masked_fill(hidden_V.to(device), -torch.inf), sampling, chance)
            given = {sample: token for sample, token in enumerate(next_B.tolist()) if sample in running and token != tokenizer.boundary}
            running &= given.keys()
            speed.tokens += len(given)
            speed.stepped += len(given) if position else 0
            speed.decode_seconds = time.perf_counter() - started
            if not running:
                return
            yield given


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


def _not_text(tokenizer: TextTokenizer, vocab_size: int) -> Tensor:
    """Bool [V]: entries that are no text and no boundary (the unknown token, and rows of a vocabulary larger than the tokenizer's)."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model only {vocab_size}: the model was trained with another one; "
            f"put the corpus's own tokenizer.model into the run directory"
        )
    hidden = torch.ones(vocab_size, dtype=torch.bool)
    hidden[: tokenizer.vocab_size] = torch.tensor(tokenizer.bytes_of_tokens()) == 0
    hidden[tokenizer.boundary] = False
    return hidden


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """Inference mode for the decoding; a model in training is in training again afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
