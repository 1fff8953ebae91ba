"""What a run says that it has spent, as it goes on, is what its ledger says afterwards: on generated runs, after every step and event."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kan_train.accounting.account import BUCKETS, account_of
from kan_train.accounting.budget import LEAVING_SECONDS, Budget, refusal
from kan_train.accounting.ledger import Ledger, Where, read_ledger
from kan_train.accounting.lines import encode
from kan_train.accounting.money import cost_of
from kan_train.accounting.prices import chosen_price
from kan_train.accounting.spend import Spend, cost_row
from kan_train.config import Config

from .ledgers import T0, TOKENS, attempt, check_invariants, row
from .test_account_runs import STARTS, Run, play


class Spending(Run):
    """A generated run that counts what it spends, and compares it with the account of its ledger at every moment."""

    def __init__(self, folder: Path, config: Config) -> None:
        super().__init__(folder)
        self.folder, self.config, self.spend, self.compared = folder, config, None, 0

    def begin(self, devices: int, lead: float, process: float, launched: bool) -> None:
        self.spend = None
        super().begin(devices, lead, process, launched)
        (self.folder / "launch").mkdir(exist_ok=True)
        (self.folder / "launch" / "attempts.jsonl").write_bytes(b"".join(map(encode, self.attempts)))
        self.spend = Spend(self.config, self.folder, self.ledger.segment)
        self.compare()

    def tell(self, kind: str, **fields: Any) -> None:
        super().tell(kind, **fields)
        assert self.spend is not None
        self.spend.event(kind, fields, self.ledger.elapsed())
        if kind != "hang":  # nothing comes after it
            self.compare()

    def train(self, seconds: float, data: float, validation: float | None = None) -> None:
        super().train(seconds, data, validation)
        assert self.spend is not None
        self.spend.step({"step": self.step, "tokens": TOKENS * self.step, "time/step": seconds, "time/data": data})
        self.ledger.write_steps()
        self._all_counted_are_told()
        self.compare()

    def compare(self) -> None:
        assert self.spend is not None
        elapsed = self.ledger.elapsed()
        account, spent = account_of(read_ledger(self.path), self.attempts), self.spend.at(elapsed)
        # The ledger's last event may be older than now: what came since has no name, and is idle.
        later = elapsed - next(event for event in reversed(read_ledger(self.path)) if event["segment"] == self.ledger.segment)["elapsed"]
        expected = account.buckets
        expected["idle"] += later * self.truths[-1].devices
        assert spent.buckets == pytest.approx(expected, abs=1e-3)
        assert spent.retained_tokens == account.tokens_retained
        self.compared += 1


@settings(max_examples=60, deadline=None)
@given(st.lists(STARTS, min_size=1, max_size=4))
def test_what_is_told_on_the_way_is_what_the_ledger_says(starts: list[Any]):
    """Kills, restarts on other devices, rewinds into earlier starts, hangs: every bucket within 1 ms, the tokens exactly."""
    with tempfile.TemporaryDirectory() as folder:
        run = Spending(Path(folder), Config())
        play(run, starts)
    assert run.compared >= len(starts)


def begun(folder: Path, prices: list[str | None], devices: int = 2, unused: int = 0) -> tuple[Ledger, Spend]:
    """A run with a start for each of `prices`; the last is going on."""
    config = Config()
    config.train.steps = 100
    for number, price in enumerate(prices):
        ledger = Ledger(folder / "ledger.jsonl", Where(world_size=devices, device="cpu", devices=devices + unused))
        ledger.begin(0, 0, "new" if number == 0 else "resumed from x", None if price is None else chosen_price(price, "cpu").as_row())
        if number < len(prices) - 1:
            ledger.close()
    return ledger, Spend(config, folder, ledger.segment)


def test_dollars_are_those_of_every_start_at_its_own_price(tmp_path: Path):
    ledger, spend = begun(tmp_path, ["3600", "1800"])
    spent = spend.at(100.0)
    account = account_of(read_ledger(tmp_path / "ledger.jsonl"))
    now = 2 * 0.5 * (100.0 - read_ledger(tmp_path / "ledger.jsonl")[-1]["elapsed"])
    assert spent.dollars == pytest.approx(cost_of(account).total + now, rel=1e-6)
    ledger.close()


@pytest.mark.parametrize("prices", [[None], ["3600", None], [None, "3600"]])
def test_dollars_are_not_guessed(prices: list[str | None], tmp_path: Path):
    ledger, spend = begun(tmp_path, prices)
    told = cost_row(spend.at(10.0), None)
    assert told["cost/device_hours"] > 0
    assert not [name for name in told if "usd" in name]
    ledger.close()


def test_buckets_add_up_to_the_hours(tmp_path: Path):
    ledger, spend = begun(tmp_path, ["3600"])
    spend.event("save", {"step": 0, "seconds": 1.0}, 1.5)
    spend.step({"step": 1, "tokens": 100, "time/step": 0.5, "time/data": 0.1})
    told = cost_row(spend.at(4.0), None)
    hours = {bucket: told[f"cost/bucket/{bucket}_hours"] for bucket in BUCKETS}
    assert sum(hours.values()) == pytest.approx(told["cost/device_hours"])
    assert hours["saving"] == pytest.approx(2 * 1.0 / 3600)
    assert told["cost/usd_per_million_tokens"] == pytest.approx(1e6 * told["cost/spent_usd"] / 100)
    ledger.close()


def test_devices_that_a_run_leaves_unused_are_paid_for_and_idle(tmp_path: Path):
    """Two processes on a node of eight devices: three quarters of every second are idle."""
    ledger, spend = begun(tmp_path, ["3600"], unused=6)
    begin = spend.at(0.0).device_seconds
    spend.step({"step": 1, "tokens": 100, "time/step": 8.0, "time/data": 0.0})
    spent = spend.at(10.0)
    assert spent.device_seconds - begin == pytest.approx(80, abs=0.1)
    assert spent.buckets["step"] == pytest.approx(16, abs=0.01)
    assert spent.dollars == pytest.approx(spent.device_seconds)
    ledger.close()
    events = [row("segment_start", 0, origin="new", devices=8), row("steps", 8, first_step=1, steps=1, seconds_step=8.0, step=1, tokens=TOKENS)]
    account = account_of(events, [attempt("started", T0), attempt("ended", T0 + 10)])
    check_invariants(account)
    assert account.device_seconds == 80
    assert (account.buckets["step"], account.buckets["idle"]) == (16, 64)
    never = account_of(events, [attempt("submitted", T0 - 20, nodes=1, processes_per_node=2), attempt("started", T0 - 10, 1), attempt("ended", T0 - 5, 1)])
    assert [(start.status, start.devices) for start in never.starts] == [("never began", 8), ("killed", 8)]


def restarted(folder: Path, status: str) -> tuple[Spend, Budget]:
    """Two processes on a node of eight: 100 s of starting, 100 steps in an hour and 6 s between two, 20 thrown away, and 30 s until it was noticed."""
    where = {"world_size": 2, "devices": 8, "device": "cpu"}
    events = [row("segment_start", 0.0, origin="new", process_seconds=100.0)]
    for last in range(10, 101, 10):
        steps = {"step": last, "tokens": TOKENS * last, "first_step": last - 9, "steps": 10, "seconds_step": 300.0, "seconds_data": 0.0}
        events.append(row("steps", 36.0 * last, **steps))
    if status != "killed":
        events.append(row("segment_end", 3600.0, step=100, tokens=100 * TOKENS, status=status))
    kept = 80 if status == "killed" else 100
    events.append(row("segment_start", 0.0, 2, begun=T0 + 3730, step=kept, tokens=TOKENS * kept, origin="resumed from x", process_seconds=100.0))
    (folder / "launch").mkdir(parents=True)
    (folder / "ledger.jsonl").write_bytes(b"".join(encode(event | where) for event in events))
    attempts = [attempt("started", T0 - 100), attempt("ended", T0 + 3630), attempt("started", T0 + 3630, 1)]
    (folder / "launch" / "attempts.jsonl").write_bytes(b"".join(map(encode, attempts)))
    config = Config()
    config.train.steps, config.checkpoint.every, config.train.validate_every, config.accounting.budget_hours = 200, 0, 0, 1000.0
    spend = Spend(config, folder, 2)
    return spend, Budget(config.accounting, spend)


@pytest.mark.parametrize(
    ("status", "restarts", "lost", "leaving"),
    [("killed", 1, 20 * 30.0 + 30 + 100, LEAVING_SECONDS), ("interrupted", 1, 30.0 + 100, 30.0), ("finished", 0, 0.0, 30.0)],
)
def test_a_restart_costs_what_it_lost_and_not_what_was_idle_anyway(status: str, restarts: int, lost: float, leaving: float, tmp_path: Path):
    """Neither devices that no process uses, nor the time between the steps, came by chance; nor did the start of a run that was made longer."""
    spend, budget = restarted(tmp_path, status)
    assert (spend.forecast.restarts.count, spend.forecast.restarts.total) == (restarts, pytest.approx(lost, abs=1e-3))
    assert budget.room() == pytest.approx(100 + leaving, abs=1e-3), "a save that was never seen is as long as starting, and that on the clock of the wall"
    if status == "killed":
        error = refusal(spend.config, tmp_path, 8, None)
        assert error is None
        spend.config.accounting.budget_hours = spend.at(0.0).hours + 8 * (100 + 30) / 3600 - 1e-3
        assert "is used up" in str(refusal(spend.config, tmp_path, 8, None))


def test_the_reserve_is_for_the_save_in_flight_and_for_one_more(tmp_path: Path):
    spend, budget = restarted(tmp_path, "finished")
    told: list[float] = []
    for kind, fields in (
        ("steps", {}),
        ("save", {"step": 104, "seconds": 2.0, "seconds_waiting": 0.0}),  # it may be as long as the start
        ("saved", {"step": 105, "saved_step": 104, "seconds_writing": 40.0}),
        ("save", {"step": 108, "seconds": 3.0, "seconds_waiting": 0.0}),
        ("save", {"step": 112, "seconds": 43.0, "seconds_waiting": 38.0}),
        ("saved", {"step": 112, "saved_step": 108, "seconds_writing": 41.0}),  # told late: the next one is in flight
        ("save_failed", {"step": 113, "saved_step": 112, "attempt": 1, "error": ""}),  # it is tried again
        ("save_failed", {"step": 113, "saved_step": 112, "attempt": 1 + spend.config.checkpoint.retries, "error": ""}),
        ("save", {"step": 116, "seconds": 45.0, "seconds_waiting": 0.0}),
        ("saved", {"step": 116, "saved_step": 116, "seconds_writing": 44.0}),  # training waited for it
    ):
        spend.event(kind, fields, 1.0)
        told.append(budget.room() - 30.0)
    assert told == pytest.approx([100, 200, 42, 84, 84, 88, 88, 44, 88, 45], abs=1e-3)
