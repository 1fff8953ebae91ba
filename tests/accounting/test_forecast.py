"""The forecast of what a run still takes: right on average, and its interval holds as often as it says where its assumptions do."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from kan_train.accounting.forecast import CHUNKS, LEAST_STEPS, Forecast, Interval, StepTimes, events_left, student

Draw = Callable[[np.random.Generator, int], np.ndarray]
RUNS = 300
"""Of which a share of 0.90 is 0.87 to 0.93 (two standard deviations)."""


def noise(generator: np.random.Generator, steps: int) -> np.ndarray:
    return generator.normal(1.0, 0.1, steps)


def skewed(generator: np.random.Generator, steps: int) -> np.ndarray:
    return generator.lognormal(0.0, 0.5, steps)


def neighbours(correlation: float) -> Draw:
    """Steps that resemble their neighbours: an autoregressive process."""

    def draw(generator: np.random.Generator, steps: int) -> np.ndarray:
        fresh = generator.normal(0, 0.1 * math.sqrt(1 - correlation**2), steps)
        drawn = np.empty(steps)
        drawn[0] = generator.normal(0, 0.1)
        for step in range(1, steps):
            drawn[step] = correlation * drawn[step - 1] + fresh[step]
        return 1.0 + drawn

    return draw


def interruptions(generator: np.random.Generator, steps: int) -> np.ndarray:
    return generator.normal(1.0, 0.05, steps) + (generator.random(steps) < 0.02) * generator.uniform(10, 30, steps)


def covered(draw: Draw, seen: int, steps: int) -> float:
    """Share of the runs whose rest lay within the interval."""
    generator = np.random.default_rng(7)
    hits = 0
    for _ in range(RUNS):
        seconds, forecast = draw(generator, steps), Forecast()
        for one in seconds[:seen].tolist():
            forecast.step_times.add(one)
        rest = forecast.rest(steps - seen, 0, 0)
        assert rest is not None
        hits += rest.low <= seconds[seen:].sum() <= rest.high
    return hits / RUNS


@pytest.mark.parametrize(
    ("draw", "seen", "steps", "least"),
    [
        (noise, 20, 200, 0.88), (noise, 500, 2000, 0.88), (skewed, 200, 2000, 0.88), (neighbours(0.5), 200, 2000, 0.86), (neighbours(0.9), 1000, 2000, 0.85),
        (interruptions, 1000, 3000, 0.85),
    ],
    ids=["noise, few", "noise", "skewed", "neighbours 0.5", "neighbours 0.9", "interruptions"],
)  # fmt: skip
def test_the_interval_holds_as_often_as_it_says(draw: Draw, seen: int, steps: int, least: float):
    """Nine of ten, not much less where it is hard, and not always either: an interval that always holds says nothing."""
    share = covered(draw, seen, steps)
    assert least <= share <= 0.975, share


def test_many_saves_validations_and_restarts_are_foreseen():
    """Of a whole run: restarts by chance, a save every 20 steps, a validation every 50."""
    generator = np.random.default_rng(3)
    hits = 0
    for _ in range(RUNS):
        forecast, total = Forecast(), 0.0
        for step in range(1, 2001):
            seconds = generator.normal(1.0, 0.1)
            save = generator.normal(3.0, 0.5) if step % 20 == 0 else 0.0
            validation = generator.normal(8.0, 0.2) if step % 50 == 0 else 0.0
            restart = generator.uniform(20, 60) if generator.random() < 0.01 else 0.0
            if step > 600:
                total += seconds + save + validation + restart
                continue
            forecast.retained += 1
            forecast.step_times.add(seconds)
            for kind, took in ((forecast.saves, save), (forecast.validations, validation), (forecast.restarts, restart)):
                if took:
                    kind.add(took)
        rest = forecast.rest(1400, events_left(20, 600, 2000), events_left(50, 600, 2000))
        assert rest is not None
        hits += rest.low <= total <= rest.high
    assert 0.86 <= hits / RUNS <= 0.97


def test_steady_steps_leave_no_doubt():
    forecast = Forecast()
    for _ in range(100):
        forecast.step_times.add(2.0)
    forecast.between = 0.5
    rest = forecast.rest(50, 0, 0)
    assert (rest.mean, rest.low, rest.high) == pytest.approx((125, 125, 125))
    assert forecast.rest(0, 0, 0) == Interval(0, 0, 0)


def test_too_few_steps_make_no_forecast():
    forecast = Forecast()
    for _ in range(LEAST_STEPS - 1):
        forecast.step_times.add(1.0)
    assert forecast.rest(10, 0, 0) is None
    forecast.step_times.add(1.0)
    assert forecast.rest(10, 0, 0) is not None


def test_many_steps_told_together_make_no_forecast_alone():
    """What a start before has told in one: nobody knows how its steps differed."""
    forecast = Forecast()
    for told in range(1, 5):
        forecast.step_times.add(300.0, 200)
        assert (forecast.rest(100, 0, 0) is not None) == (told == 4)


def test_one_long_step_does_not_become_the_usual_one():
    """It counts by its frequency, once in so many steps, and widens the interval; the others' length stays what it is."""
    times = StepTimes()
    for step in range(1000):
        times.add(500.0 if step == 500 else 1.0)
    mean, variance, _ = times.left(1000)
    assert (mean, variance) == pytest.approx((1000, 0), abs=1e-6)
    assert times.interruptions.at_this_rate(1.0)[0] == pytest.approx(499)


def test_memory_stays_small_however_many_steps():
    times = StepTimes()
    for step in range(50_000):
        times.add(1.0 + (step % 7) / 10)
    assert len(times._chunks) <= CHUNKS
    assert (times.steps, times.seconds) == (50_000, pytest.approx(sum(1.0 + (step % 7) / 10 for step in range(50_000))))
    assert sum(count for count, _ in times._chunks) == 50_000


def test_steps_told_together_count_as_many():
    one, other = StepTimes(), StepTimes()
    for _ in range(40):
        one.add(1.5)
    for _ in range(4):
        other.add(15.0, 10)
    assert (one.steps, one.seconds) == (other.steps, other.seconds)


@pytest.mark.parametrize(
    ("every", "done", "steps", "left"), [(10, 0, 100, 10), (10, 10, 100, 9), (10, 95, 100, 1), (10, 100, 100, 0), (0, 5, 100, 1), (30, 0, 100, 4)]
)
def test_what_comes_every_so_often_and_at_the_end(every: int, done: int, steps: int, left: int):
    assert events_left(every, done, steps) == left


@pytest.mark.parametrize(("degrees", "quantile"), [(3, 2.353), (5, 2.015), (10, 1.812), (15, 1.753), (1000, 1.646)])
def test_quantiles_are_those_of_the_tables(degrees: int, quantile: float):
    assert student(degrees) == pytest.approx(quantile, rel=0.005)
