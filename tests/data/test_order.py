"""The order of samples: a bijection for every key, shares that are exact, and nothing that depends on where one starts to count."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kan_train.data.order import Blend, Permutation, SampleOrder


@given(size=st.integers(1, 3000), key=st.integers())
@settings(max_examples=60, deadline=None)
def test_a_permutation_meets_every_number_once(size: int, key: int) -> None:
    assert np.array_equal(np.sort(Permutation(size, key)(np.arange(size))), np.arange(size))


@pytest.mark.parametrize("size", [2**31 + 11, 10**12 + 39])
def test_a_large_permutation_stays_in_range_and_has_no_collision(size: int) -> None:
    images = Permutation(size, "key")(np.arange(size - 200_000, size))
    assert images.min() >= 0
    assert images.max() < size
    assert len(np.unique(images)) == len(images)


def test_keys_give_unrelated_permutations() -> None:
    size = 20_000
    images = [Permutation(size, seed, 0, epoch)(np.arange(size)) for seed in (1, 2) for epoch in (0, 1)]
    identity = np.arange(size)
    for first in range(4):
        for second in [identity, *images[first + 1 :]]:
            # Random permutations agree in about one place, and their correlation has a standard deviation of 1 / sqrt(size) = 0.007.
            assert (images[first] == second).sum() < 12
            assert abs(np.corrcoef(images[first], second)[0, 1]) < 0.04


def test_the_permutation_spreads_neighbours_evenly() -> None:
    """Every tenth of the order holds about a tenth of every tenth of the corpus (chi squared, 81 degrees of freedom)."""
    size = 10_000
    images = Permutation(size, 7)(np.arange(size))
    table = np.histogram2d(np.arange(size), images, bins=10)[0]
    assert ((table - size / 100) ** 2 / (size / 100)).sum() < 140
    steps = np.diff(images)
    assert (np.abs(steps) < size // 100).mean() == pytest.approx(0.02, abs=0.006)


WEIGHTS = [[1.0], [1.0, 1.0], [0.5, 0.3, 0.2], [3, 1, 2.5], [0.7, 0.2, 0.05, 0.05], [1 / 3, 1 / 7, 0.5238], [1e-7, 3e-7], [1e6, 1.0, 1e-3]]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_a_blend_keeps_the_shares_at_every_moment(weights: list[float]) -> None:
    count = 50_000
    corpus, within = Blend(weights)(np.arange(count))
    share = np.array(weights) / sum(weights)
    for number in range(len(weights)):
        mine = corpus == number
        assert np.array_equal(within[mine], np.arange(mine.sum())), "a corpus is read without gaps and in order"
        drawn = np.cumsum(mine)
        # Give or take one a corpus; the second term is the rounding of the weights, where they cannot be had with 2^20 parts.
        assert np.abs(drawn - np.arange(1, count + 1) * share[number]).max() <= len(weights) + count * 2**-19


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=5), start=st.integers(0, 2**38))
@settings(max_examples=100, deadline=None)
def test_far_into_a_run_a_blend_still_counts_right(weights: list[float], start: int) -> None:
    """Numbers of samples beyond any run's and weights of any digits: no product may overflow, or a corpus would be read out of order."""
    corpus, within = Blend(weights)(np.arange(start, start + 2000))
    assert within.min() >= 0
    for number in range(len(weights)):
        assert (np.diff(within[corpus == number]) == 1).all()
    total = sum(within[corpus == number][0] if (corpus == number).any() else np.nan for number in range(len(weights)))
    if not np.isnan(total):  # a sample number counts the samples before it, of all corpora together
        assert abs(total - start) < 2000


@pytest.mark.parametrize("shuffle", [True, False])
def test_any_piece_of_the_order_is_the_same_piece(shuffle: bool) -> None:
    order = lambda: SampleOrder([50, 7, 23], [3, 1, 2], seed=5, shuffle=shuffle)  # noqa: E731
    whole = order()(0, 1000)
    for start, count in ((0, 1), (13, 200), (999, 1)):
        piece = order()(start, count)
        assert np.array_equal(piece[0], whole[0][start : start + count])
        assert np.array_equal(piece[1], whole[1][start : start + count])


def test_each_epoch_of_each_corpus_reads_every_sequence_once_in_a_new_order() -> None:
    sizes = [50, 7]
    corpus, sequence = SampleOrder(sizes, [1, 1], seed=5, shuffle=True)(0, 1000)
    for number, size in enumerate(sizes):
        mine = sequence[corpus == number]
        epochs = mine[: len(mine) // size * size].reshape(-1, size)
        assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(size), (len(epochs), 1)))
        assert len(np.unique(epochs, axis=0)) > len(epochs) * 0.9


def test_without_shuffling_the_order_is_the_corpus() -> None:
    _, sequence = SampleOrder([10], [1.0], seed=5, shuffle=False)(0, 25)
    assert np.array_equal(sequence, np.arange(25) % 10)
