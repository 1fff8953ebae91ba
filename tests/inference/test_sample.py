"""Temperature, top-k, top-p and the draw, against their definitions in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kan_train.config import ConfigError
from kan_train.inference.sample import Sampling, choose, distribution, generator, penalised, require_finite_logits


def reference(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities [V] by the definitions: softmax of logits / T; the k largest; the fewest of those that reach p; normalised."""
    p = np.exp(logits / temperature - (logits / temperature).max())
    order = sorted(range(len(p)), key=lambda i: (-logits[i], i))
    kept = order[:top_k] if top_k else order
    p = np.where(np.isin(np.arange(len(p)), kept), p, 0.0)
    p /= p.sum()
    if top_p < 1:
        nucleus, total = [], 0.0
        for i in kept:
            nucleus.append(i)
            total += p[i]
            if total >= top_p:
                break
        p = np.where(np.isin(np.arange(len(p)), nucleus), p, 0.0)
    return p / p.sum()


def generators(seed: int, count: int) -> list[torch.Generator]:
    return [generator(seed, sample) for sample in range(count)]


def chosen(logits: torch.Tensor, sampling: Sampling, chance: list[torch.Generator]) -> torch.Tensor:
    """By one sampling for all rows."""
    return choose(logits, [sampling] * len(logits), chance)


def by_token(logits: torch.Tensor, sampling: Sampling) -> np.ndarray:
    probabilities, tokens = distribution(logits, sampling)
    return torch.zeros(logits.numel(), dtype=torch.float64).scatter(0, tokens, probabilities).numpy()


@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=12),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.integers(0, 14),
    st.sampled_from([0.05, 0.37, 0.9, 0.999, 1.0]),
)
@settings(max_examples=400, deadline=None)
def test_the_distribution_is_the_defined_one(values, temperature, top_k, top_p):
    """Ties included: among equal logits the smaller token stays."""
    logits = np.array(values) / 8 + 0.001 * np.sin(np.arange(len(values))) * (len(values) % 2)
    found = by_token(torch.tensor(logits), Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    np.testing.assert_allclose(found, reference(logits, temperature, top_k, top_p), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("top_k", "top_p"), [(7, 0.95), (0, 1.0), (4, 1.0)])
def test_what_is_drawn_has_the_distribution(top_k, top_p):
    """10,000 draws: a chi-squared test against the probabilities, and nothing outside the nucleus, or of what is masked."""
    logits = torch.linspace(-2, 2, 9).double()
    logits[[0, 8]] = -torch.inf
    p = reference(logits.numpy(), 0.8, top_k, top_p)
    draws = chosen(logits.expand(10_000, 9), Sampling(temperature=0.8, top_k=top_k, top_p=top_p), generators(3, 10_000))
    counts = np.bincount(draws.numpy(), minlength=9)
    assert (counts[p == 0] == 0).all()
    assert stats.chisquare(counts[p > 0], 10_000 * p[p > 0]).pvalue > 1e-3


def test_only_what_must_be_is_sorted():
    """A vocabulary is long: the k likeliest tokens alone, ties and all, and none where neither top-k nor top-p chooses."""
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(3)).round(decimals=1)
    assert torch.equal(distribution(logits, Sampling())[1], torch.arange(1000))
    assert distribution(logits, Sampling(top_k=20))[1].tolist() == sorted(range(1000), key=lambda token: (-logits[token], token))[:20]


def test_temperature_0_is_the_likeliest_token_and_draws_nothing():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    chance = generators(0, 50)
    before = [generator.get_state() for generator in chance]
    assert torch.equal(chosen(logits, Sampling(temperature=0), chance), torch.tensor(np.argmax(logits.numpy(), axis=1)))
    assert all(torch.equal(a, b.get_state()) for a, b in zip(before, chance, strict=True))


def test_top_k_1_and_a_small_top_p_are_greedy_too():
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(2))
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-9), Sampling(temperature=1e-3), Sampling(temperature=1e-320)):
        assert torch.equal(chosen(logits, sampling, generators(0, 40)), logits.argmax(dim=-1))


def test_a_sequence_draws_the_same_numbers_whatever_is_drawn_beside_it():
    """samples=3 begins with the sequence that samples=1 gives; another seed or another sequence draws other numbers."""
    logits = torch.zeros(1, 1000)
    alone = [int(chosen(logits, Sampling(), chance)) for chance in [generators(7, 1)] for _ in range(20)]
    chance = generators(7, 3)
    together = torch.stack([chosen(logits.expand(3, -1), Sampling(), chance) for _ in range(20)])
    assert together[:, 0].tolist() == alone
    assert together[:, 1].tolist() != alone
    chance = generators(8, 1)
    assert [int(chosen(logits, Sampling(), chance)) for _ in range(20)] != alone


def test_masked_tokens_are_never_chosen():
    logits = torch.full((200, 6), -torch.inf)
    logits[:, 2], logits[:, 4] = 0.0, -1.0
    assert set(chosen(logits, Sampling(temperature=5), generators(0, 200)).tolist()) == {2, 4}
    assert set(chosen(logits, Sampling(temperature=0), generators(0, 200)).tolist()) == {2}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(bad):
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    with pytest.raises(ConfigError, match="diverged; use run=PATH of an earlier checkpoint"):
        require_finite_logits(logits)
    require_finite_logits(torch.tensor([[-torch.inf, 3e38]]))


def test_every_row_has_its_own_sampling():
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(4)).expand(3, 30)
    samplings = [Sampling(temperature=0), Sampling(temperature=50.0), Sampling(top_k=1)]
    draws = torch.stack([choose(logits, samplings, generators(seed, 3)) for seed in range(40)])
    assert set(draws[:, 0].tolist()) == set(draws[:, 2].tolist()) == {int(logits[0].argmax())}
    assert len(set(draws[:, 1].tolist())) > 15


def test_the_repetition_penalty_is_the_defined_one():
    """Divided where positive, multiplied where negative, once a token however often it came; a penalty of 1 is none."""
    logits = torch.tensor([2.0, -1.0, 0.5, 3.0], dtype=torch.float64)
    assert penalised(logits, [0, 1, 0, 0], 1.25).tolist() == [1.6, -1.25, 0.5, 3.0]
    assert torch.equal(penalised(logits, [0, 1], 1.0), logits)
    assert logits.tolist() == [2.0, -1.0, 0.5, 3.0]


def test_no_penalty_makes_a_logit_infinite():
    """It would be likelier than all, by an unknown amount, and its probability no number."""
    found = penalised(torch.tensor([2.0, -2.0, 1.0]), [0, 1], 1e-300)
    assert found[0] == torch.finfo(torch.float32).max
    assert int(chosen(found[None], Sampling(), generators(0, 1))) == 0
