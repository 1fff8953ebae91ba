"""The ledger accounts for a run's time across restarts."""

import time
from pathlib import Path

import pytest

from kan_train.accounting import ledger as ledger_module
from kan_train.accounting.ledger import Ledger, Where, read_ledger

WHERE = Where(world_size=4, device="NVIDIA H200", host="node7", pid=11)
EVERY_EVENT = {"event", "time", "elapsed", "segment", "step", "tokens", "world_size", "device", "host", "pid"}


def segment(path: Path, first: int, last: int, status: str | None) -> Ledger:
    """A segment of steps first + 1 to last, 100 tokens each; killed where there is no status."""
    ledger = Ledger(path, WHERE)
    ledger.begin(first, 100 * first, "new" if first == 0 else f"resumed from step {first}")
    for step in range(first + 1, last + 1):
        ledger.count_step({"step": step, "tokens": 100 * step, "time/data": 0.5, "time/forward_backward": 2.0, "time/optimizer": 1.0, "time/step": 3.75})
    ledger.write_steps()
    if status is not None:
        ledger.event("segment_end", status=status)
    ledger.close()
    return ledger


def of_kind(path: Path, kind: str) -> list[dict]:
    return [event for event in read_ledger(path) if event["event"] == kind]


def test_every_event_says_when_where_and_how_far(tmp_path: Path):
    before = time.time()
    segment(tmp_path / "ledger.jsonl", 0, 3, "finished")
    events = read_ledger(tmp_path / "ledger.jsonl")
    assert [event["event"] for event in events] == ["segment_start", "steps", "segment_end"]
    for event in events:
        assert event.keys() >= EVERY_EVENT
        assert (event["world_size"], event["device"], event["host"], event["pid"]) == (4, "NVIDIA H200", "node7", 11)
        assert before <= event["time"] <= time.time()
    assert [(event["step"], event["tokens"]) for event in events] == [(0, 0), (3, 300), (3, 300)]
    elapsed = [event["elapsed"] for event in events]
    assert elapsed == sorted(elapsed)
    assert elapsed[0] >= 0
    assert events[0]["process_seconds"] > 0


def test_segments_count_starts_also_of_processes_that_were_killed(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    assert segment(path, 0, 0, None).segment == 1
    assert segment(path, 0, 7, None).segment == 2
    assert segment(path, 5, 6, "interrupted").segment == 3
    assert segment(path, 6, 9, "finished").segment == 4
    restarts = of_kind(path, "restart")
    assert [event["segment"] for event in restarts] == [2, 3, 4]
    assert [event["previous_segment"] for event in restarts] == [1, 2, 3]
    assert [event["previous_status"] for event in restarts] == ["killed", "killed", "interrupted"]
    assert [event["lost_steps"] for event in restarts] == [0, 2, 0]
    assert all(event["previous_time"] <= event["time"] for event in restarts)


@pytest.mark.parametrize("every", [0.0, 1e9], ids=["written at each step", "written at the end"])
def test_no_step_is_counted_twice_or_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: float):
    monkeypatch.setattr(ledger_module, "STEPS_EVERY_SECONDS", every)
    path = tmp_path / "ledger.jsonl"
    segment(path, 0, 20, "finished")
    events = of_kind(path, "steps")
    assert len(events) == (20 if every == 0 else 1)
    assert sum(event["steps"] for event in events) == 20
    assert sum(event["seconds_step"] for event in events) == pytest.approx(20 * 3.75)
    assert sum(event["seconds_data"] for event in events) == pytest.approx(20 * 0.5)
    assert sum(event["seconds_forward_backward"] for event in events) == pytest.approx(20 * 2.0)
    assert sum(event["seconds_optimizer"] for event in events) == pytest.approx(20 * 1.0)
    assert [event["first_step"] + event["steps"] - 1 for event in events] == [event["step"] for event in events]


def test_totals_add_up_over_segments(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    segment(path, 0, 7, None)
    segment(path, 5, 9, "interrupted")
    ledger = Ledger(path, WHERE)
    ledger.begin(9, 900, "resumed")
    ledger.event("save", seconds=1.5, seconds_waiting=0.5)
    ledger.event("save", seconds=2.0, seconds_waiting=0.0)
    ledger.close()
    totals = ledger.totals
    assert (totals["segments"], totals["steps.steps"], totals["save.seconds"], totals["save.seconds_waiting"]) == (3, 11, 3.5, 0.5)
    assert totals["steps.seconds_step"] == pytest.approx(11 * 3.75)
    starts = sum(event["process_seconds"] for event in of_kind(path, "segment_start"))
    assert totals["segment_start.process_seconds"] == pytest.approx(starts)
    again = Ledger(path, WHERE)
    assert again.totals == totals
    again.close()


def test_steps_lost_after_going_back_are_those_since(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, WHERE)
    ledger.begin(0, 0, "new")
    ledger.event("save", step=20, tokens=2000, seconds=0.1)
    ledger.event("rewind", step=10, tokens=1000, from_step=20)
    ledger.event("save", step=12, tokens=1200, seconds=0.1)
    ledger.close()
    after = Ledger(path, WHERE)
    after.begin(10, 1000, "resumed")
    after.close()
    assert of_kind(path, "restart")[0]["lost_steps"] == 2


def test_a_second_run_of_a_process_pays_for_its_own_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ledger_module, "_paid_until", 0.0)
    segment(tmp_path / "first.jsonl", 0, 1, "finished")
    before = time.time()
    segment(tmp_path / "second.jsonl", 0, 1, "finished")
    first, second = (of_kind(tmp_path / f"{name}.jsonl", "segment_start")[0]["process_seconds"] for name in ("first", "second"))
    assert 0 < second < time.time() - before + 0.1 < first, "the first has what the process did before"


def test_energy_of_steps_that_were_written_already_is_not_lost(tmp_path: Path):
    segment(tmp_path / "ledger.jsonl", 0, 2, None)
    ledger = Ledger(tmp_path / "ledger.jsonl", WHERE)
    ledger.begin(2, 200, "resumed from step 2")
    ledger.add_joules(5.0)
    ledger.write_steps()
    ledger.close()
    assert [(event["event"], event["joules"]) for event in read_ledger(tmp_path / "ledger.jsonl") if "joules" in event] == [("energy", 5.0)]
    assert ledger.totals["energy.joules"] == 5.0


def test_a_torn_ledger_goes_on(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    segment(path, 0, 4, None)
    path.write_bytes(path.read_bytes()[:-7])
    assert segment(path, 0, 2, "finished").segment == 2
    assert [event["event"] for event in read_ledger(path)] == ["segment_start", "segment_start", "restart", "steps", "segment_end"]


def test_where_is_this_process():
    import os
    import socket

    assert Where.here(2, "cpu") == Where(world_size=2, device="cpu", host=socket.gethostname(), pid=os.getpid())
