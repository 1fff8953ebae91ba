"""Every second of every device is in one bucket, on generated runs whose true times are kept beside."""

import itertools
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
from kan_train.accounting.account import BUCKETS, account_of, on_grid
from kan_train.accounting.ledger import Ledger, Where, read_ledger

from .ledgers import T0, TOKENS, attempt, check_invariants


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
    with mock.patch.multiple(ledger_module, time=run.clock(), _paid_until=0.0), mock.patch("os.fsync"):
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
