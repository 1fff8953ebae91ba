"""From logits to tokens: repetition penalty, temperature, top-k, top-p, and a draw that a seed determines.  B sequences, V vocabulary."""

import hashlib
from collections.abc import Iterable, Sequence
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
    repetition_penalty: float = 1.0
    """Logits of tokens that came before, in the prompt too, are divided by this where they are positive, else multiplied (Keskar et al., arXiv:1909.05858)."""


def generator(seed: int, sample: int) -> torch.Generator:
    """The generator of one sequence: what it becomes does not depend on how many are drawn beside it."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{sample}".encode()).digest()[:7], "little"))


def distribution(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(probabilities, tokens), each [B, V] and by falling probability: float64, zero outside top-k and top-p, summing to 1; int64.

    Equal logits are ordered by token. temperature must be above 0.
    """
    wide_BV = logits_BV.double()
    # The largest is 0 before the division: however small the temperature, it stays a number.
    wide_BV = (wide_BV - wide_BV.amax(dim=-1, keepdim=True)) / sampling.temperature
    ordered_BV, tokens_BV = wide_BV.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered_BV[:, sampling.top_k :] = -torch.inf
    probabilities_BV = ordered_BV.softmax(dim=-1)
    # A token stays while those before it have not reached top_p: the one that crosses the mark belongs to the set, the first always does.
    before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
    if sampling.top_p < 1:
        probabilities_BV = torch.where(before_BV < sampling.top_p, probabilities_BV, 0.0)
    return probabilities_BV / probabilities_BV.sum(dim=-1, keepdim=True), tokens_BV


def penalised(logits_V: Tensor, tokens: Iterable[int], penalty: float) -> Tensor:
    """Logits of one sequence after its repetition penalty for `tokens`."""
    if penalty == 1:
        return logits_V
    before = torch.tensor(sorted(set(tokens)), device=logits_V.device)
    old = logits_V[before]
    return logits_V.index_copy(0, before, torch.where(old > 0, old / penalty, old * penalty))


def choose(logits_BV: Tensor, samplings: Sequence[Sampling], chance: Sequence[torch.Generator]) -> Tensor:
    """The next token of every sequence by its own sampling, int64 [B] on CPU; one number is drawn from its generator, none at temperature 0.

    Logits of -inf are never chosen. ConfigError where the model gives logits that are no numbers.
    """
    if logits_BV.isnan().any() or (logits_BV == torch.inf).any():
        raise ConfigError("the model's logits are not finite: its weights have diverged; use run=PATH of an earlier checkpoint")
    chosen_B = logits_BV.argmax(dim=-1).cpu()
    for number, (sampling, generator) in enumerate(zip(samplings, chance, strict=True)):
        if sampling.temperature > 0:
            # Drawn on the CPU whatever the model runs on: a seed means the same text wherever the logits are the same.
            chosen_B[number] = _draw(logits_BV[number].cpu(), sampling, generator)
    return chosen_B


def _draw(logits_V: Tensor, sampling: Sampling, chance: torch.Generator) -> Tensor:
    probabilities_1V, tokens_1V = distribution(logits_V[None], sampling)
    cumulative_V = probabilities_1V[0].cumsum(dim=-1)
    drawn = torch.rand((), dtype=torch.float64, generator=chance) * cumulative_V[-1]
    place = torch.searchsorted(cumulative_V, drawn, right=True)
    # Rounding may leave the last sums equal: never past the last token that has a probability.
    return tokens_1V[0, torch.minimum(place, (probabilities_1V[0] > 0).sum() - 1)]
