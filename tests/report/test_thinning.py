"""A thinned curve is short, and shows what the whole one does."""

import numpy as np
import pytest

from kan_train.report.thinning import extremes, medians, parts, running_median, short


@pytest.mark.parametrize(("length", "points"), [(0, 5), (1, 5), (5, 5), (7, 5), (100_001, 400)])
def test_parts_cover_everything_once(length: int, points: int):
    found = parts(length, points)
    assert len(found) == min(length, points)
    assert [index for part in found for index in range(length)[part]] == list(range(length))


def test_a_spike_of_one_step_stays_and_moves_no_median():
    values = np.ones(100_000)
    values[31_234], values[77_777] = 50.0, -50.0
    kept = extremes(values, 400)
    assert len(kept) <= 400
    assert {31_234, 77_777} <= set(kept.tolist())
    assert medians(values, 400).tolist() == [1.0] * 400
    assert running_median(medians(values, 400), 6).tolist() == [1.0] * 400


def test_what_is_not_finite_leaves_a_gap():
    values = np.array([1.0, np.nan, np.inf, 3.0, np.nan, np.nan])
    assert medians(values, 3).tolist()[:2] == [1.0, 3.0]
    assert np.isnan(medians(values, 3)[2])
    assert extremes(values, 6).tolist() == [0, 3]
    assert short(values) == [1.0, None, None, 3.0, None, None]
    assert short([1.23456789e-7]) == [1.23457e-7]
