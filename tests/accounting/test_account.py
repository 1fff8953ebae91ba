"""Every second of every device is in one bucket: on ledgers written by hand, and on generated runs whose true times are kept beside."""

import itertools
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kan_train.accounting import ledger as ledger_module
from kan_train.accounting.account import BUCKETS, Account, account_of, as_json, on_grid, read_account
from kan_train.accounting.ledger import Ledger, Where, read_ledger
from kan_train.accounting.money import cost_of
from kan_train.accounting.prices import chosen_price
from kan_train.config import ConfigError

TOKENS = 100  # of a step
T0 = 1.8e9


def row(kind: str, elapsed: float, segment: int = 1, *, world_size: int = 2, begun: float = T0, **fields: Any) -> dict[str, Any]:
    where = {"world_size": world_size, "device": "NVIDIA H200", "host": "node1", "pid": 3}
    return {"event": kind, "time": begun + elapsed, "elapsed": elapsed, "segment": segment, "step": 0, "tokens": 0, **where, **fields}


def attempt(kind: str, time: float, restart: int = 0, **fields: Any) -> dict[str, Any]:
    return {"event": kind, "time": time, "job": 1, "scheduler": "slurm", "job_id": "7", "restart": restart, **fields}


def check_invariants(account: Account) -> None:
    for start in account.starts:
        assert sum(start.buckets.values()) == start.seconds, "to the last bit"
        assert min(start.buckets.values()) >= 0
    assert sum(account.buckets.values()) == account.device_seconds
    told = json.loads(json.dumps(as_json(account)))
    assert sum(told["buckets"].values()) == told["device_seconds"]
    assert sum(start["device_seconds"] for start in told["starts"]) == told["device_seconds"]
    assert 0 <= account.tokens_retained <= account.tokens_processed


def seconds_of(account: Account) -> dict[str, float]:
    """Device-seconds of the buckets that have any, to the millisecond."""
    return {bucket: round(seconds, 3) for bucket, seconds in account.buckets.items() if seconds > 5e-4}


# Two devices; saved at step 4, killed after step 8; goes on with four devices from step 4, and is stopped at step 6.
KILLED = [
    row("segment_start", 0.0, origin="new", process_seconds=10.0),
    row("weights", 1.0),
    row("steps", 10.0, step=4, tokens=400, first_step=1, steps=4, seconds_step=8.0, seconds_data=1.0),
    row("save", 12.0, step=4, tokens=400, seconds=1.5, seconds_waiting=0.0),
    row("validation", 17.0, step=4, tokens=400, seconds=4.0),
    row("steps", 25.0, step=8, tokens=800, first_step=5, steps=4, seconds_step=8.0, seconds_data=2.0),
]
RESUMED = [
    row("segment_start", 0.0, 2, world_size=4, begun=T0 + 100, step=4, tokens=400, origin="resumed from x", process_seconds=20.0),
    row("restart", 0.0, 2, world_size=4, begun=T0 + 100, step=4, tokens=400, lost_steps=4),
    row("steps", 3.0, 2, world_size=4, begun=T0 + 100, step=6, tokens=600, first_step=5, steps=2, seconds_step=2.5, seconds_data=0.5),
    row("save", 4.0, 2, world_size=4, begun=T0 + 100, step=6, tokens=600, seconds=0.75, seconds_waiting=0.0),
    row("segment_end", 4.25, 2, world_size=4, begun=T0 + 100, step=6, tokens=600, status="interrupted"),
]


def test_a_restart_makes_replayed_steps_of_those_after_the_checkpoint():
    before = account_of(KILLED)
    assert seconds_of(before) == {"start-up": 22, "step": 26, "data": 6, "saving": 3, "validation": 8, "idle": 5}
    assert before.device_seconds == 2 * 35
    assert (before.steps_retained, before.tokens_retained, before.tokens_processed) == (8, 800, 800)
    account = account_of([*KILLED, *RESUMED])
    check_invariants(account)
    assert [start.status for start in account.starts] == ["killed", "interrupted"]
    assert [(start.devices, start.seconds) for start in account.starts] == [(2, 35), (4, 24.25)]
    assert seconds_of(account) == {
        "start-up": 22 + 80, "step": 2 * 7 + 4 * 2, "data": 2 * 1 + 4 * 0.5, "saving": 3 + 3, "validation": 8, "replayed": 2 * 8, "idle": 5 + 4 * 1.0,
    }  # fmt: skip
    assert (account.steps_retained, account.steps_processed, account.tokens_retained, account.tokens_processed) == (6, 10, 600, 1000)
    assert account.goodput == pytest.approx(22 / (70 + 97))


def test_a_launcher_knows_the_time_before_and_after():
    """10 s of launching, a tail of 7.5 s after the kill, a start that died in its health check, and one whose end nobody saw."""
    attempts = [
        attempt("submitted", T0 - 99, nodes=1, processes_per_node=2),
        attempt("started", T0 - 20), attempt("ended", T0 + 25 + 7.5), attempt("requeued", T0 + 33),
        attempt("started", T0 + 40, 1), attempt("unhealthy", T0 + 44, 1, host="a", problem="b"), attempt("ended", T0 + 46, 1),
        attempt("started", T0 + 70, 2), attempt("ended", T0 + 900, 2, seen=False),
    ]  # fmt: skip
    account = account_of([*KILLED, *RESUMED], attempts)
    check_invariants(account)
    alone = account_of([*KILLED, *RESUMED]).buckets
    added = {bucket: seconds - alone[bucket] for bucket, seconds in account.buckets.items() if seconds != alone[bucket]}
    assert added == {"start-up": 2 * 10 + 2 * 6 + 4 * 10, "idle": 2 * 7.5}
    assert [(start.segment, start.status, start.devices, start.device) for start in account.starts] == [
        (1, "killed", 2, "NVIDIA H200"), (None, "never began", 2, "NVIDIA H200"), (2, "interrupted", 4, "NVIDIA H200"),
    ]  # fmt: skip
    seen = account_of([*KILLED, *RESUMED], [*attempts[:-1], attempt("ended", T0 + 100 + 4.25 + 3, 2)])
    assert seen.buckets["shutdown"] == 4 * 3
    running = account_of([*KILLED, *RESUMED], attempts[:-1])
    assert running.buckets == account.buckets, "a start that goes on counts up to its last event"


def test_processes_that_start_again_by_themselves_share_a_start_of_the_launcher():
    attempts = [attempt("started", T0 - 11), attempt("ended", T0 + 110)]
    account = account_of([*KILLED, *RESUMED], attempts)
    check_invariants(account)
    assert [start.seconds for start in account.starts] == [11 + 80, 20 + 4.25 + 5.75], "from the first start on to the second, and to the end"
    assert sum(start.seconds for start in account.starts) == 121


def test_a_rewind_throws_steps_away_and_its_save_is_counted_once():
    events = [
        row("segment_start", 0.0, origin="new", process_seconds=0.0),
        row("steps", 10.0, step=10, tokens=1000, first_step=1, steps=10, seconds_step=10.0, seconds_data=0.0),
        row("save_wait", 12.0, step=10, tokens=1000, seconds=2.0),
        row("save", 17.0, step=6, tokens=1000, seconds=3.0, seconds_waiting=0.0),
        row("rewind", 17.0, step=6, tokens=600, from_step=10, seconds=5.0),
        row("steps", 19.0, step=8, tokens=800, first_step=7, steps=2, seconds_step=2.0, seconds_data=0.0),
        row("validation_stopped", 20.0, step=8, tokens=800, seconds=0.5),
        row("segment_end", 21.0, step=8, tokens=800, status="failed"),
    ]  # fmt: skip
    account = account_of(events)
    check_invariants(account)
    assert seconds_of(account) == {"step": 16, "saving": 10, "replayed": 12, "validation": 1, "idle": 3}
    assert (account.steps_retained, account.steps_processed, account.rewinds) == (8, 12, 1)
    assert (account.tokens_retained, account.tokens_processed) == (800, 1200)


def test_a_hang_lasts_from_the_last_sign_of_progress_to_the_end():
    steps = row("steps", 480.0, step=3, tokens=300, first_step=1, steps=3, seconds_step=6.0, seconds_data=0.0)
    events = [row("segment_start", 0.0, origin="new", process_seconds=1.0), steps, row("hang", 480.0, step=3, tokens=300, report="r", summary="s")]
    account = account_of(events, [attempt("started", T0 - 1), attempt("ended", T0 + 490)])
    assert seconds_of(account) == {"start-up": 2, "step": 12, "hang": 2 * (474 + 10)}
    assert account.starts[0].status == "hung"


def test_a_run_that_begins_again_from_other_weights_keeps_nothing_of_before():
    branched = [event | {"segment": 2} for event in KILLED]
    branched[0] |= {"origin": "branched from y", "step": 50, "tokens": 5000}
    branched[2] |= {"first_step": 51, "step": 54, "tokens": 5400}
    account = account_of([*KILLED, *branched[:3]])
    assert (account.steps_retained, account.tokens_retained, account.tokens_processed) == (4, 400, 1200)


def test_steps_in_the_middle_of_what_was_told_together_are_kept_by_their_number():
    """Ten steps in one event; the run goes on from step 6, and then from step 3."""
    ten = row("steps", 10.0, step=10, tokens=1000, first_step=1, steps=10, seconds_step=10.0, seconds_data=0.0)
    events = [row("segment_start", 0.0, origin="new", process_seconds=0.0), ten]
    for segment, step, kept in ((2, 6, 6), (3, 3, 3)):
        events.append(row("segment_start", 0.0, segment, begun=T0 + 100 * segment, step=step, tokens=100 * step, origin="resumed from x"))
        account = account_of(events)
        assert (account.steps_retained, account.steps_processed, account.tokens_retained) == (kept, 10, 100 * kept)
        assert seconds_of(account) == {"step": 2 * kept, "replayed": 2 * (10 - kept)}


def test_steps_that_were_saved_and_never_told_count_without_their_time():
    """Killed after a save was on the disk and before it was in the ledger: the next start goes on beyond what is known."""
    start = row("segment_start", 0.0, 2, begun=T0 + 100, step=11, tokens=1100, origin="resumed from x", process_seconds=0.0)
    more = row("steps", 2.0, 2, begun=T0 + 100, step=12, tokens=1200, first_step=12, steps=1, seconds_step=2.0, seconds_data=0.0)
    account = account_of([*KILLED, start, more])
    check_invariants(account)
    assert (account.steps_retained, account.steps_processed, account.tokens_retained, account.tokens_processed) == (12, 12, 1200, 1200)
    assert seconds_of(account)["step"] == 26 + 4
    back = row("segment_start", 0.0, 3, begun=T0 + 200, step=10, tokens=1000, origin="resumed from x", process_seconds=0.0)
    account = account_of([*KILLED, start, more, back])
    assert (account.steps_retained, account.steps_processed, account.tokens_retained, account.tokens_processed) == (10, 12, 1000, 1200)


def test_old_ledgers_are_read():
    events = [{name: value for name, value in event.items() if name not in ("process_seconds", "seconds_data")} for event in KILLED]
    account = account_of(events)
    check_invariants(account)
    assert account.device_seconds == 2 * 25


def test_seconds_that_do_not_fit_are_told_and_in_no_bucket():
    events = [row("segment_start", 0.0, origin="new", process_seconds=0.0), row("save", 5.0, seconds=4.0), row("validation", 5.0, seconds=3.0)]
    account = account_of(events)
    check_invariants(account)
    assert account.starts[0].overbooked == 2.0
    assert seconds_of(account) == {"saving": 8, "validation": 2}


def test_a_run_without_a_ledger_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="has no events yet"):
        read_account(tmp_path)


# --- money ----------------------------------------------------------------------------------------------------------------------------------------------


def test_dollars_follow_the_device_hours():
    account = account_of([*KILLED, *RESUMED])
    cost = cost_of(account, "3.6")
    assert cost.total == pytest.approx(167e-3)
    assert sum(cost.buckets.values()) == pytest.approx(cost.total)
    assert cost.buckets["replayed"] == pytest.approx(16e-3)
    assert cost.per_million_processed == pytest.approx(167e-3 / 1000 * 1e6)
    assert cost.per_million_retained == pytest.approx(167e-3 / 600 * 1e6)
    assert cost_of(account, "spot").total == pytest.approx(167 / 3600 * 1.45), "of an H200"
    with pytest.raises(ConfigError, match=r"--price=capacity_blocks: there is no price of 'NVIDIA H200' in capacity_blocks; there is on_demand"):
        cost_of(account, "capacity_blocks")


def test_each_start_costs_what_it_recorded():
    with pytest.raises(ConfigError, match="start 1 of the run recorded no price; use --price"):
        cost_of(account_of([*KILLED, *RESUMED]))
    first, second = (chosen_price(text, "NVIDIA H200").as_row() for text in ("3.6", "7.2"))
    events = [KILLED[0] | {"price": first}, *KILLED[1:], RESUMED[0] | {"price": second}, *RESUMED[1:]]
    cost = cost_of(account_of(events))
    assert cost.total == pytest.approx(70e-3 + 2 * 97e-3)
    assert [price.per_device_hour for price in cost.prices] == [3.6, 7.2]
    # One that died before its loop costs what the next one says.
    cost = cost_of(account_of(events, [attempt("started", T0 + 40), attempt("ended", T0 + 50)]))
    assert cost.total == pytest.approx(70e-3 + 2 * 97e-3 + 4 * 10 * 2e-3)


# --- generated runs -------------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Step:
    number: int
    seconds: float
    data: float
    start: int
    told: bool = False
    alive: bool = True


@dataclass
class Truth:
    """What one start really did with its time, in seconds of the wall clock."""

    devices: int
    named: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BUCKETS, 0.0))
    seconds: float = 0.0


class Run:
    """Writes a ledger with the real writer on a clock of its own, and keeps what truly happened."""

    def __init__(self, folder: Path) -> None:
        self.path, self.now = folder / "ledger.jsonl", 1000.0
        self.steps: list[Step] = []
        self.truths: list[Truth] = []
        self.attempts: list[dict[str, Any]] = []
        self.saved = [0]
        self.step = 0
        self.ledger: Ledger

    def clock(self) -> SimpleNamespace:
        return SimpleNamespace(time=lambda: T0 + self.now, monotonic=lambda: self.now)

    def begin(self, devices: int, lead: float, process: float, launched: bool) -> None:
        truth = Truth(devices)
        self.truths.append(truth)
        self.launched, self.allocated = launched, self.now
        if launched:
            self.attempts.append(attempt("started", T0 + self.now, len(self.truths)))
            self.now += lead
        else:
            lead = 0.0
        self.now += process
        truth.named["start-up"] += lead + process
        step = self.saved[-1]
        for one in self.steps:
            one.alive = one.alive and one.number <= step
        resumed = len(self.truths) > 1
        self.step = step
        self.ledger = Ledger(self.path, Where(world_size=devices, device="cpu"))
        with mock.patch.object(ledger_module, "_process_seconds", return_value=process):
            self.ledger.begin(step, TOKENS * step, "resumed from x" if resumed else "new")

    def tell(self, kind: str, **fields: Any) -> None:
        self.ledger.write_steps()
        self.ledger.event(kind, **fields)
        self._all_counted_are_told()

    def train(self, seconds: float, data: float, validation: float | None = None) -> None:
        self.now += seconds
        self.step += 1
        if validation is not None:  # inside the step, which is counted after it
            self.now += validation
            self.tell("validation", step=self.step, seconds=validation)
            self.truths[-1].named["validation"] += validation
        self.steps.append(Step(self.step, seconds, data, len(self.truths) - 1))
        self.ledger.count_step({"step": self.step, "tokens": TOKENS * self.step, "time/step": seconds, "time/data": data})
        if not self.ledger._pending:
            self._all_counted_are_told()

    def save(self, seconds: float, kind: str = "save") -> None:
        self.now += seconds
        self.tell(kind, step=self.step, seconds=seconds)
        self.truths[-1].named["saving"] += seconds
        if kind == "save":
            self.saved.append(self.step)

    def rewind(self, seconds: float, saving: float, which: int) -> None:
        self.now += seconds
        target = self.saved[which % len(self.saved)]
        came_from, self.step = self.step, target
        self.saved = [step for step in self.saved if step <= target]
        self.save(saving)
        self.tell("rewind", step=target, tokens=TOKENS * target, from_step=came_from, seconds=seconds + saving)
        self.truths[-1].named["replayed"] += seconds
        for one in self.steps:
            one.alive = one.alive and one.number <= target

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def break_off_validation(self, seconds: float) -> None:
        self.now += seconds
        self.tell("validation_stopped", step=self.step, seconds=seconds)
        self.truths[-1].named["validation"] += seconds

    def end(self, how: str, tail: float) -> None:
        truth = self.truths[-1]
        if how == "hang":
            self.tell("ranks", step=self.step)  # the last sign of progress
            self.now += 480
            self.tell("hang", step=self.step)
            truth.named["hang"] += 480
        elif how == "finished":
            self.tell("segment_end", step=self.step, status="finished")
        elif how == "killed in a save":  # on the disk, and not told
            self.now += 1
            self.saved.append(self.step)
        last = read_ledger(self.path)[-1]
        self.ledger.close()
        self.now += tail
        ended = T0 + self.now if self.launched else last["time"]
        bucket = {"hang": "hang", "finished": "shutdown"}.get(how)
        if bucket is not None:
            truth.named[bucket] += ended - last["time"]
        if self.launched:
            self.attempts.append(attempt("ended", ended, len(self.truths)))
        truth.seconds = ended - (T0 + self.allocated)

    def by_bucket(self, number: int) -> dict[str, float]:
        truth = self.truths[number]
        named = dict(truth.named)
        for one in self.steps:
            if one.start == number and one.told:
                named["step"] += one.alive * (one.seconds - one.data)
                named["data"] += one.alive * one.data
                named["replayed"] += (not one.alive) * one.seconds
        named["idle"] = truth.seconds - sum(named.values())
        return named

    def _all_counted_are_told(self) -> None:
        for one in self.steps:
            if one.start == len(self.truths) - 1:
                one.told = True


SECONDS = st.floats(0.01, 30.0)
ACTIONS = st.one_of(
    st.tuples(st.just("train"), SECONDS, st.floats(0, 1)),
    st.tuples(st.just("train"), SECONDS, st.floats(0, 1)),
    st.tuples(st.just("validate"), SECONDS, SECONDS),
    st.tuples(st.just("save"), SECONDS, st.just(0.0)),
    st.tuples(st.just("wait for a save"), SECONDS, st.just(0.0)),
    st.tuples(st.just("break off"), SECONDS, st.just(0.0)),
    st.tuples(st.just("rewind"), SECONDS, st.floats(0, 9)),
    st.tuples(st.just("wait"), SECONDS, st.just(0.0)),
)
ENDS = st.sampled_from(["killed", "killed", "killed in a save", "finished", "hang"])
STARTS = st.tuples(st.sampled_from([1, 2, 3, 8]), SECONDS, SECONDS, st.booleans(), st.lists(ACTIONS, max_size=14), ENDS, SECONDS)


def play(run: Run, starts: list[Any]) -> None:
    with mock.patch.object(ledger_module, "time", run.clock()), mock.patch("os.fsync"):
        for devices, lead, process, launched, actions, how, tail in starts:
            run.begin(devices, lead, process, launched)
            for kind, first, second in actions:
                match kind:
                    case "train":
                        run.train(first, second * first)
                    case "validate":
                        run.train(first, 0.0, validation=second)
                    case "save":
                        run.save(first)
                    case "wait for a save":
                        run.save(first, "save_wait")
                    case "break off":
                        run.break_off_validation(first)
                    case "rewind":
                        run.rewind(first, 0.5, int(second))
                    case "wait":
                        run.wait(first)
            run.end(how, tail)
            run.wait(5.0)  # in the queue: nobody's time


@settings(max_examples=120, deadline=None)
@given(st.lists(STARTS, min_size=1, max_size=5))
def test_generated_runs_are_accounted_as_they_were(starts: list[Any]):
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        play(run, starts)
        events = read_ledger(run.path)
    account = account_of(events, run.attempts)
    check_invariants(account)
    assert len(account.starts) == len(run.truths)
    for number, (start, truth) in enumerate(zip(account.starts, run.truths, strict=True)):
        assert start.devices == truth.devices
        assert start.seconds == pytest.approx(truth.seconds, abs=1e-3)
        assert start.buckets == pytest.approx(run.by_bucket(number), abs=2e-3)
        assert start.overbooked == pytest.approx(0, abs=1e-3)
    assert account.tokens_retained == events_tokens(events) - events[0]["tokens"]


@settings(max_examples=40, deadline=None)
@given(st.lists(STARTS, min_size=1, max_size=3))
def test_a_kill_at_any_event_leaves_an_account_that_adds_up(starts: list[Any]):
    """A prefix of a ledger is what a kill leaves; every one of them, with and without a launcher that saw the end, tells of the whole time up to it."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        play(run, starts)
        events = read_ledger(run.path)
    for length in range(1, len(events) + 1):
        prefix = events[:length]
        account = account_of(prefix)
        check_invariants(account)
        last = {event["segment"]: event for event in prefix}
        first = {event["segment"]: event for event in reversed(prefix)}
        wanted = sum(on_grid(last[one]["elapsed"] + first[one]["process_seconds"]) * last[one]["world_size"] for one in last)
        assert account.device_seconds == pytest.approx(wanted, abs=1e-2)
        seen = account_of(prefix, [attempt("started", first[1]["time"] - first[1]["process_seconds"]), attempt("ended", prefix[-1]["time"] + 9)])
        check_invariants(seen)
        gaps = [first[later]["time"] - first[later]["process_seconds"] - last[one]["time"] for one, later in itertools.pairwise(sorted(last))]
        tails = sum(gap * last[one]["world_size"] for one, gap in zip(sorted(last), [*gaps, 9.0], strict=True))
        assert seen.device_seconds == pytest.approx(wanted + tails, abs=1e-2), "to the start of the next processes, and to the end"


def events_tokens(events: list[dict[str, Any]]) -> int:
    """How far the run is: by the last event that tells of tokens itself."""
    return next(event["tokens"] for event in reversed(events) if event["event"] in ("segment_start", "steps", "rewind"))
