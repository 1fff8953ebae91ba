"""Log-likelihoods, each context read once.  B sequences, T time, D width, V vocabulary.

A shared beginning (the solved examples of a subject) is read once and its state forked; a batch of contexts, sorted by length, is read together up to
the shortest one's last token and forked again, once for every choice. What a fork reads after that is padded on the right, which nothing before it sees.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kan_train.config import ConfigError
from kan_train.evaluation.questions import Reading, common_prefix
from kan_train.inference.engine import dropless, evaluating
from kan_train.inference.states import State, rows_of
from kan_train.model.lm import LanguageModel
from kan_train.model.norm import at_least_fp32

PIECE = 1024
"""Tokens of a sequence that are read at a time."""

SHARED = 16
"""Tokens of a common beginning from which it is worth reading apart."""

Advance = Callable[[int], None]


class Likelihood(NamedTuple):
    """How likely a continuation is after its context."""

    log_prob: float
    """Sum of the log-probabilities of its tokens: nats."""
    greedy: bool
    """Whether each of its tokens is the likeliest: what decoding at temperature 0 would write."""


def longest_context(model: LanguageModel) -> int | None:
    """Tokens that the model may read at most: those of its training where a layer has softmax attention; None for ADA, whose state forgets by itself."""
    softmax = any(model.config.is_softmax_layer(layer) for layer in range(model.config.num_layers))
    return model.config.sequence_length if softmax else None


def require_finite(values: Iterable[float], what: str) -> None:
    """ConfigError where one of `values` is NaN or infinite: nothing that is measured of such a model means anything."""
    wrong = next((value for value in values if not math.isfinite(value)), None)
    if wrong is not None:
        raise ConfigError(f"{what} is {wrong}: the weights have diverged; use an earlier checkpoint, RUN/checkpoints/step-NUMBER")


def continuation_log_probs(
    model: LanguageModel, asked: Sequence[Reading], *, batch_size: int = 32, advance: Advance = lambda _: None
) -> list[list[float]]:
    """The log-probabilities of `continuation_likelihoods`, nats."""
    return [[one.log_prob for one in some] for some in continuation_likelihoods(model, asked, batch_size=batch_size, advance=advance)]


def continuation_likelihoods(
    model: LanguageModel, asked: Sequence[Reading], *, batch_size: int = 32, advance: Advance = lambda _: None
) -> list[list[Likelihood]]:
    """Every continuation after its context: a list for each reading, in order.

    Readings that begin alike should come as one call: what all of them begin with is read once. A context that is too long for a softmax model loses its
    first tokens. Groves drop nothing, whatever their capacity. `advance` is told how many readings are done.
    """
    limit = longest_context(model)
    kept = [_within(reading, limit) for reading in asked]
    with evaluating(model), dropless(model):
        whole = [number for number, reading in enumerate(kept) if len(reading.context) == len(asked[number].context)]
        cut = [number for number in range(len(kept)) if len(kept[number].context) < len(asked[number].context)]
        found: dict[int, list[Likelihood]] = {}
        for numbers in (whole, cut):
            found |= _scored(model, kept, numbers, batch_size, advance)
    return [found[number] for number in range(len(asked))]


def _within(reading: Reading, limit: int | None) -> Reading:
    if limit is None:
        return reading
    # The last token of a continuation is predicted, never read.
    room = limit + 1 - max(map(len, reading.continuations))
    return Reading(reading.context[-max(1, room) :], reading.continuations)


def _scored(model: LanguageModel, asked: Sequence[Reading], numbers: list[int], batch_size: int, advance: Advance) -> dict[int, list[Likelihood]]:
    contexts = [asked[number].context for number in numbers]
    # Every context keeps a token of its own to read: its last logits are needed.
    shared = min(common_prefix(contexts), min(map(len, contexts), default=1) - 1) if len(contexts) > 1 else 0
    shared = shared if shared >= SHARED else 0
    state = read(model, torch.tensor([contexts[0][:shared]]), model.init_state(1)) if shared else model.init_state(1)
    found = {}
    ordered = sorted(numbers, key=lambda number: (len(asked[number].context), max(map(len, asked[number].continuations))))
    while ordered:
        choices = max(1, len(asked[ordered[0]].continuations))
        batch, ordered = ordered[: max(1, batch_size // choices)], ordered[max(1, batch_size // choices) :]
        for number, sums in zip(batch, _batch(model, [asked[number] for number in batch], shared, state), strict=True):
            found[number] = sums
        advance(len(batch))
    return found


def _batch(model: LanguageModel, batch: list[Reading], shared: int, state: State) -> list[list[Likelihood]]:
    """`batch`, sorted by length; `state` has read the first `shared` tokens."""
    cut = min(len(reading.context) for reading in batch) - 1
    forked = rows_of(state, [0] * len(batch))
    if cut > shared:
        forked = read(model, torch.tensor([reading.context[shared:cut] for reading in batch]), forked)
    # Choices of one token differ in what is predicted alone: one row serves them all.
    rows: dict[tuple[int, tuple[int, ...]], int] = {}
    for number, reading in enumerate(batch):
        for continuation in reading.continuations:
            rows.setdefault((number, reading.context[cut:] + continuation[:-1]), len(rows))
    owners, inputs = [number for number, _ in rows], [tokens for _, tokens in rows]
    wanted: list[tuple[int, int, int]] = []  # row, time, token
    for number, reading in enumerate(batch):
        for continuation in reading.continuations:
            tokens = reading.context[cut:] + continuation[:-1]
            row, first = rows[number, tokens], len(tokens) - len(continuation)
            wanted += [(row, first + place, token) for place, token in enumerate(continuation)]
    log_probs, likeliest = log_probs_at(model, inputs, rows_of(forked, owners), wanted)
    found: list[list[Likelihood]] = []
    start = 0
    for reading in batch:
        found.append([])
        for continuation in reading.continuations:
            here = slice(start, start + len(continuation))
            found[-1].append(Likelihood(float(log_probs[here].sum()), bool(likeliest[here].all())))
            start += len(continuation)
    return found


def log_probs_at(model: LanguageModel, inputs: Sequence[Sequence[int]], state: State, wanted: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    """log P of each token of `wanted` (row, time, token): of `token` after inputs[row][: time + 1] after `state`, and whether it is the likeliest there.

    Nats, float64 [wanted], and bool [wanted], on CPU.
    """
    device = model.embedding.weight.device
    longest = max(map(len, inputs))
    padded_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in inputs], device=device)
    rows, times, tokens = torch.tensor(list(wanted), device=device).T
    found, likeliest = torch.zeros(len(wanted), dtype=torch.float64), torch.zeros(len(wanted), dtype=torch.bool)
    for start in range(0, longest, PIECE):
        x_BTD, state = _stream(model, padded_BT[:, start : start + PIECE], state)
        here = ((times >= start) & (times < start + PIECE)).nonzero()[:, 0]
        for some in here.split(PIECE):  # logits of so many positions at a time
            logits = model.head(model.final_norm(x_BTD[rows[some], times[some] - start][None]))[0]
            of_token = at_least_fp32(logits).log_softmax(dim=-1).gather(-1, tokens[some, None])[:, 0]
            found[some.cpu()] = of_token.double().cpu()
            likeliest[some.cpu()] = (logits.argmax(dim=-1) == tokens[some]).cpu()
    return found, likeliest


def read(model: LanguageModel, tokens_BT: Tensor, state: State) -> State:
    """The state after T more tokens of every sequence."""
    tokens_BT = tokens_BT.to(model.embedding.weight.device)
    for start in range(0, tokens_BT.shape[1], PIECE):
        _, state = _stream(model, tokens_BT[:, start : start + PIECE], state)
    return state


def _stream(model: LanguageModel, tokens_BT: Tensor, state: State) -> tuple[Tensor, State]:
    """The residual stream [B, T, D] behind the last block, and the state after."""
    x_BTD = model.embedding(tokens_BT)
    after: list[Any] = []
    for layer, before in zip(model.layers, state, strict=True):
        x_BTD, layer_state = layer.prefill(x_BTD, before)
        after.append(layer_state)
    return x_BTD, after
