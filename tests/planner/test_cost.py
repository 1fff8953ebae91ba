"""Money by hand and by simulation: Young and Daly's interval is the best one, and failures cost what a simulated run loses."""

import dataclasses
import math
import random
from pathlib import Path

import pytest

from kan_train.config import ConfigError
from kan_train.config.compose import compose_train
from kan_train.planner.cost import FAILURES, Reliability, counted, money_of, reliability_of
from kan_train.planner.quantity import given
from kan_train.planner.step import StepTime

STEP = StepTime(compute=2.0, recompute=0.0, imbalance=0.0, communication=0.0, bubble=0.0, reduction=0.0, optimizer=0.0, hidden=0.0)
CONFIG = compose_train(["model=kan_125m", "train.global_batch_size=64"], world_size=1)
TOKENS = 64 * CONFIG.model.sequence_length * 200_000.0


def reliability(failures: float, *, stall: float = 1.0, storage: float = 1e9, restart: float = 300.0) -> Reliability:
    return Reliability(failures=given(failures, "test"), storage=given(storage, "test"), restart=given(restart, "test"), stall=given(stall, "test"))


def test_without_failures_a_run_is_its_steps():
    money = money_of(CONFIG, 16, STEP, TOKENS, reliability(0.0, stall=0.0), 2.0)
    assert money.hours == pytest.approx(200_000 * 2 / 3600)
    assert money.dollars == pytest.approx(money.hours * 16 * 2)
    assert money.per_million_tokens == pytest.approx(1e6 * money.dollars / TOKENS)
    assert money.goodput == pytest.approx(1)
    assert money.failures == 0


def test_a_price_that_is_not_given_is_no_price():
    money = money_of(CONFIG, 16, STEP, TOKENS, reliability(1e-4), None)
    assert money.dollars is None
    assert money.per_million_tokens is None


def test_the_interval_is_the_best_one():
    """No other number of steps between saves makes the run shorter by more than rounding."""
    how = reliability(3e-3, stall=40.0)
    best = money_of(CONFIG, 16, STEP, TOKENS, how, None)
    stall = best.checkpoint_bytes / 16 / 1e9 * 40.0
    between = 3600 / (3e-3 * 16)

    def hours(every: float) -> float:
        return best.working_hours * (1 + stall / every) / (1 - (every / 2 + best.write_seconds + 300) / between)

    assert best.hours == pytest.approx(hours(best.save_every_seconds))
    assert min(hours(factor * best.save_every_seconds) for factor in (0.3, 0.5, 0.8, 1.25, 2, 3)) > 0.999 * best.hours


def test_a_simulated_run_takes_as_long_as_planned():
    """Failures at random, each losing what was not yet written; the mean of many runs is the plan's."""
    how = reliability(2e-3, stall=20.0, restart=200.0)
    plan = money_of(CONFIG, 16, STEP, TOKENS, how, None)
    stall, between, every, write = plan.checkpoint_bytes / 16 / 1e9 * 20.0, 3600 / (2e-3 * 16), plan.save_every_seconds, plan.write_seconds
    generator, totals, counts = random.Random(0), [], []
    for _ in range(300):
        clock = failures = done = 0.0
        failing = generator.expovariate(1 / between)
        saved = [(0.0, 0.0)]  # (when it was written, work in it)
        while done < plan.working_hours * 3600:
            if clock + every + stall < failing:
                clock, done = clock + every + stall, done + every
                saved.append((clock + write, done))
            else:
                saved = [save for save in saved if save[0] <= failing]
                clock, done, failures = failing + 200.0, saved[-1][1], failures + 1
                failing = clock + generator.expovariate(1 / between)
        totals.append(clock / 3600)
        counts.append(failures)
    assert sum(totals) / 300 == pytest.approx(plan.hours, rel=0.01)
    assert sum(counts) / 300 == pytest.approx(plan.failures, rel=0.08)  # of which 200 s each do not fail again


def test_more_devices_fail_more_often():
    assert FAILURES.value * 16384 * 54 * 24 == pytest.approx(419)
    one, two = (money_of(CONFIG, world, STEP, TOKENS, Reliability(), None) for world in (1024, 2048))
    assert two.failures == pytest.approx(2 * one.failures, rel=0.02)


def test_failures_faster_than_a_restart_are_refused():
    with pytest.raises(ConfigError, match=r"leaves no time to train.*--restart"):
        money_of(CONFIG, 4096, STEP, TOKENS, reliability(0.5), None)


def test_the_slow_end_alone_does_not_refuse_a_plan():
    """65,536 devices work as expected; at half the hours between failures and twice the time to start again they do not."""
    expected, slow, fast = (money_of(CONFIG, 65536, STEP, TOKENS, Reliability(), 2.0, end) for end in ("expected", "slow", "fast"))
    assert 0.6 < expected.goodput < fast.goodput
    assert (slow.hours, slow.dollars, slow.goodput) == (math.inf, math.inf, 0)
    assert counted(slow.hours, "{:.1f}") == "never"
    assert counted(expected.working_hours, "{:.1f}") == "111.1"


def test_what_was_measured_is_used_and_what_is_given_goes_before(tmp_path: Path):
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    assert reliability_of(results).stall.status == "measured"
    assert reliability_of(tmp_path).stall.status == "assumed"
    own = reliability_of(tmp_path, failures=0.02, storage_gb=0.5, restart_minutes=10)
    assert (own.failures.value, own.storage.value, own.restart.value) == (2e-5, 5e8, 600.0)
    assert reliability_of(tmp_path, failures=0).failures.value == 0
    with pytest.raises(ConfigError, match="--storage"):
        reliability_of(tmp_path, storage_gb=0)
    with pytest.raises(ConfigError, match="--restart"):
        reliability_of(tmp_path, restart_minutes=math.nan)


def test_the_slow_end_costs_more():
    how = Reliability()
    expected, slow = (money_of(CONFIG, 1024, dataclasses.replace(STEP, compute=2.0), TOKENS, how, 2.0, end) for end in ("expected", "slow"))
    assert slow.failures > expected.failures
    assert slow.dollars > expected.dollars
