"""Intervals and tests against scipy, and against what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from kan_train.evaluation.statistics import bootstrap_ratio, mcnemar, wilson


@given(st.integers(1, 3000), st.data())
@settings(max_examples=60, deadline=None)
def test_wilson_is_scipys(trials, data):
    successes = data.draw(st.integers(0, trials))
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.integers(0, 900), st.integers(0, 900))
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_the_exact_sign_test(here, there):
    expected = binomtest(here, here + there).pvalue if here + there else 1.0
    assert mcnemar(here, there) == pytest.approx(expected, rel=1e-8)


def test_nothing_measured_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)
    assert all(map(math.isnan, bootstrap_ratio([3.0], [2], seed=0)))
    assert mcnemar(0, 0) == 1.0


def test_the_bootstrap_covers_the_truth_as_often_as_it_says():
    """Documents of very different lengths, of a known loss: about 95 of 100 intervals hold it."""
    generator, held = np.random.default_rng(1), 0
    for number in range(200):
        sizes = generator.integers(1, 100, 60)
        nats = 2.5 * sizes + generator.normal(0, 4, 60) * np.sqrt(sizes)
        low, high = bootstrap_ratio(nats.tolist(), sizes.tolist(), seed=number, draws=400)
        held += low <= 2.5 <= high
    assert 176 <= held <= 200  # 190 expected; five standard deviations below


def test_units_that_count_nothing_do_not_divide_by_nothing():
    low, high = bootstrap_ratio([1.0, 4.0, 0.0], [1, 2, 0], seed=0)
    assert 1.0 <= low <= high <= 2.0
