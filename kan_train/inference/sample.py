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


def distribution(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(probabilities, tokens), each [n]: float64, zero outside top-p, summing to 1; int64. n is top_k, or V without it.

    By falling probability, equal logits by token, where there is a top-k or a top-p; else in the order of tokens. temperature must be above 0.
    """
    wide_V = logits_V.double()
    # The largest is 0 before the division: however small the temperature, it stays a number.
    wide_V, size = (wide_V - wide_V.amax()) / sampling.temperature, logits_V.numel()
    tokens_n = torch.arange(size, device=logits_V.device)
    top_k = min(sampling.top_k or size, size)
    if top_k == size and sampling.top_p == 1:
        return wide_V.softmax(dim=-1), tokens_n
    # Sorting is what takes time: as few as can be. Of those that equal the k-th all are there, topk itself says not which it takes.
    if top_k < size:
        tokens_n = (wide_V >= wide_V.topk(top_k).values[-1]).nonzero()[:, 0]
    ordered_n, order_n = wide_V[tokens_n].sort(descending=True, stable=True)
    probabilities_n, tokens_n = ordered_n[:top_k].softmax(dim=-1), tokens_n[order_n[:top_k]]
    # A token stays while those before it have not reached top_p: the one that crosses the mark belongs to the set, the first always does.
    before_n = probabilities_n.cumsum(dim=-1) - probabilities_n
    if sampling.top_p < 1:
        probabilities_n = torch.where(before_n < sampling.top_p, probabilities_n, 0.0)
    return probabilities_n / probabilities_n.sum(), tokens_n


def penalised(logits_V: Tensor, tokens: Iterable[int], penalty: float) -> Tensor:
    """Logits of one sequence after its repetition penalty for `tokens`, in their dtype (bf16 would round a small penalty away). None becomes inf."""
    if penalty == 1:
        return logits_V
    before = torch.tensor(sorted(set(tokens)), device=logits_V.device)
    old = logits_V[before]
    new = torch.where(old > 0, old / penalty, old * penalty)
    return logits_V.index_copy(0, before, new.clamp_max(torch.finfo(new.dtype).max))


def require_finite_logits(logits_BV: Tensor) -> None:
    """Raise ConfigError where the model gives logits that are no numbers; -inf is one. Before any penalty: no request shall be able to cause it."""
    if logits_BV.isnan().any() or (logits_BV == torch.inf).any():
        raise ConfigError("the model's logits are not finite: its weights have diverged; use run=PATH of an earlier checkpoint")


def choose(logits_BV: Tensor, samplings: Sequence[Sampling], chance: Sequence[torch.Generator]) -> Tensor:
    """The next token of every sequence by its own sampling, int64 [B] on CPU; one number is drawn from its generator, none at temperature 0.

    Logits of -inf are never chosen; the others are finite (`require_finite_logits`).
    """
    chosen_B = logits_BV.argmax(dim=-1).cpu()
    for number, (sampling, generator) in enumerate(zip(samplings, chance, strict=True)):
        if sampling.temperature > 0:
            # Drawn on the CPU whatever the model runs on: a seed means the same text wherever the logits are the same.
            chosen_B[number] = _draw(logits_BV[number].cpu(), sampling, generator)
    return chosen_B


def _draw(logits_V: Tensor, sampling: Sampling, chance: torch.Generator) -> Tensor:
    probabilities_n, tokens_n = distribution(logits_V, sampling)
    cumulative_n = probabilities_n.cumsum(dim=-1)
    drawn = torch.rand((), dtype=torch.float64, generator=chance) * cumulative_n[-1]
    place = torch.searchsorted(cumulative_n, drawn, right=True)
    # Rounding may leave the last sums equal: never past the last token that has a probability.
    return tokens_n[torch.minimum(place, probabilities_n.nonzero()[-1, 0])]
