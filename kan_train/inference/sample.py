"""From logits to tokens: temperature, top-k, top-p, and a draw that a seed determines.  B sequences, V vocabulary."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kan_train.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; the fields are those of GenerateConfig."""

    temperature: float = 1.0
    """0: the likeliest token; 1: the model's own distribution."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Choose among the smallest set of likeliest tokens whose probabilities sum to this, after top-k."""


def generators(seed: int, samples: int) -> list[torch.Generator]:
    """One generator a sequence: what a sequence becomes does not depend on how many are drawn beside it."""
    seeds = (int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:7], "little") for index in range(samples))
    return [torch.Generator().manual_seed(value) for value in seeds]


def distribution(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(probabilities, tokens), each [B, V] and by falling probability: float64, zero outside top-k and top-p, summing to 1; int64.

    Equal logits are ordered by token. temperature must be above 0.
    """
    ordered_BV, tokens_BV = (logits_BV.double() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered_BV[:, sampling.top_k :] = -torch.inf
    probabilities_BV = ordered_BV.softmax(dim=-1)
    # A token stays while those before it have not reached top_p: the one that crosses the mark belongs to the set, the first always does.
    before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
    if sampling.top_p < 1:
        probabilities_BV = torch.where(before_BV < sampling.top_p, probabilities_BV, 0.0)
    return probabilities_BV / probabilities_BV.sum(dim=-1, keepdim=True), tokens_BV


def choose(logits_BV: Tensor, sampling: Sampling, chance: Sequence[torch.Generator]) -> Tensor:
    """The next token of every sequence, int64 [B] on CPU; one number is drawn from each generator of `chance`, none at temperature 0.

    Logits of -inf are never chosen. ConfigError where the model gives logits that are no numbers.
    """
    # Drawn on the CPU whatever the model runs on: a seed means the same text wherever the logits are the same.
    logits_BV = logits_BV.detach().cpu()
    if logits_BV.isnan().any() or (logits_BV == torch.inf).any():
        raise ConfigError("the model's logits are not finite: its weights have diverged; use run=PATH of an earlier checkpoint")
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    probabilities_BV, tokens_BV = distribution(logits_BV, sampling)
    drawn_B = torch.stack([torch.rand((), dtype=torch.float64, generator=generator) for generator in chance])
    cumulative_BV = probabilities_BV.cumsum(dim=-1)
    places_B = torch.searchsorted(cumulative_BV, (drawn_B * cumulative_BV[:, -1])[:, None], right=True)[:, 0]
    # Rounding may leave the last sums equal: never past the last token that has a probability.
    last_B = (probabilities_BV > 0).sum(dim=-1) - 1
    return tokens_BV.gather(1, torch.minimum(places_B, last_B)[:, None])[:, 0]
