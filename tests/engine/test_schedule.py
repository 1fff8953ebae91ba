import math

import pytest

from kan_train.config import GroveConfig, ScheduleConfig
from kan_train.engine.schedule import balance_rate, learning_rate_factor

STEPS, WARMUP, FINAL = 100, 10, 0.1


def factors(kind: str, steps: int = STEPS, **settings) -> list[float]:
    schedule = ScheduleConfig(kind=kind, **({"warmup_steps": WARMUP, "final_fraction": FINAL, "decay_fraction": 0.2} | settings))
    return [learning_rate_factor(schedule, step, steps) for step in range(steps)]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_from_zero_and_reaches_the_peak(kind):
    """Step -1 would be 0; step `warmup_steps` is the peak; equal increments between."""
    assert factors(kind)[: WARMUP + 1] == pytest.approx([(step + 1) / (WARMUP + 1) for step in range(WARMUP + 1)], rel=1e-12)


def test_cosine_is_the_closed_form():
    u = [(step - WARMUP) / (STEPS - 1 - WARMUP) for step in range(WARMUP, STEPS)]
    expected = [FINAL + (1 - FINAL) * (0.5 + 0.5 * math.cos(math.pi * x)) for x in u]
    assert factors("cosine")[WARMUP:] == pytest.approx(expected, rel=1e-12)
    assert factors("cosine")[-1] == pytest.approx(FINAL, rel=1e-12)


def test_wsd_is_stable_then_linear():
    found = factors("wsd")
    assert found[WARMUP:80] == [1.0] * 70
    assert found[80:] == pytest.approx([1 - (1 - FINAL) * k / 20 for k in range(1, 21)], rel=1e-12)
    assert found[-1] == pytest.approx(FINAL, rel=1e-12)


def test_decay_branches_of_any_length_share_the_stable_part():
    """A branch may start from any checkpoint of the stable part of a longer run: up to its decay it sees the same rates."""
    long, short = factors("wsd", steps=1000, decay_fraction=0.2), factors("wsd", steps=60, decay_fraction=0.5)
    assert short[:30] == long[:30]
    assert short[29] == 1.0
    assert short[30] < 1.0


def test_constant_stays_at_the_peak():
    assert set(factors("constant")[WARMUP:]) == {1.0}


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize(("steps", "warmup", "decay"), [(1, 0, 0.0), (2, 1, 1.0), (3, 0, 1.0), (5, 4, 0.0), (7, 0, 0.01)])
def test_short_runs_have_positive_rates_at_most_the_peak(kind, steps, warmup, decay):
    assert all(0 < factor <= 1 for factor in factors(kind, steps=steps, warmup_steps=warmup, decay_fraction=decay))


def test_a_run_that_goes_on_beyond_its_plan_stays_at_the_final_rate():
    schedule = ScheduleConfig(kind="cosine", warmup_steps=WARMUP, final_fraction=FINAL)
    assert learning_rate_factor(schedule, 3 * STEPS, STEPS) == pytest.approx(FINAL, rel=1e-12)


def test_balance_rate_moves_linearly():
    grove = GroveConfig(balance_rate=1e-2, balance_rate_final=1e-3)
    expected = [1e-2 + (1e-3 - 1e-2) * step / 9 for step in range(10)]
    assert [balance_rate(grove, step, 10) for step in range(10)] == pytest.approx(expected, rel=1e-12)
    assert balance_rate(grove, 0, 1) == 1e-2
