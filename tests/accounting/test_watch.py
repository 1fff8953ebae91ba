"""The hook as the training loop uses it: what a run directory holds afterwards."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kan_train.accounting.ledger import read_ledger
from kan_train.accounting.sinks.jsonl import read_metrics
from kan_train.accounting.watch import Watch, default_hooks
from kan_train.config import Config, ConfigError

CPU = torch.device("cpu")


@dataclass
class Process:
    is_first: bool = True
    world_size: int = 2
    local_world_size: int = 2
    device: torch.device = CPU


class Recorder:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def start(self, start: dict[str, Any]) -> None:
        self.rows = []

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def event(self, kind: str, fields: dict[str, Any]) -> None:
        pass

    def close(self, end: dict[str, Any]) -> None:
        pass


def config(steps: int = 10, **logging: Any) -> Config:
    made = Config()
    made.train.steps = steps
    made.run.name = "first"
    for name, value in logging.items():
        setattr(made.logging, name, value)
    return made


def row(step: int, loss: float = 3.0, **more: float) -> dict[str, Any]:
    times = {"time/data": 0.1, "time/forward_backward": 0.6, "time/optimizer": 0.2, "time/step": 1.0}
    return {"step": step, "tokens": 100 * step, "loss": loss, "tokens_per_second": 100.0, "skipped_steps": 0, "segment": 1, **times, **more}


def run(hook: Watch, first: int, last: int, status: str | None = "finished", skipped: int | None = None, validated: int | None = None) -> None:
    """What the loop says in a segment of steps first + 1 to last; without a status it is killed."""
    hook.on_start({"step": first, "steps": 10, "tokens": 100 * first, "segment": 1, "origin": "new"})
    for step in range(first + 1, last + 1):
        if step == skipped:
            hook.on_event("skipped_step", {"step": step, "in_a_row": 1, "loss": math.nan, "grad_norm": math.nan})
        if step == validated:
            hook.on_event("validation", {"step": step, "loss": 4.0, "bits_per_byte": 2.0, "heldout_tokens": 64, "seconds": 0.25})
        figures = {"validation/loss": 4.0} if step == validated else {}
        hook.on_step(row(step, math.nan if step == skipped else 3.0, **figures))
    if status is None:
        assert hook._ledger is not None
        hook._ledger.close()
        hook.sinks[0].close({})
    else:
        hook.on_end({"status": status, "step": last, "tokens": 100 * last, "segment": 1})


def test_it_is_a_hook_of_the_loop(tmp_path: Path):
    from kan_train.engine.hooks import Hook

    (hook,) = default_hooks(config(), tmp_path, Process())
    assert isinstance(hook, Hook)
    assert list(tmp_path.iterdir()) == [], "nothing is written before the loop begins"


def test_only_the_first_process_writes(tmp_path: Path):
    assert default_hooks(config(), tmp_path, Process(is_first=False)) == []


def test_a_run_leaves_rows_events_and_a_picture(tmp_path: Path):
    (hook,) = default_hooks(config(), tmp_path, Process())
    run(hook, 0, 10, validated=5)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [one["step"] for one in rows] == list(range(1, 11))
    assert all(one["flops_per_token"] > 0 and one["segment"] == 1 and one["resumed_from"] == 0 for one in rows)
    assert [one.get("validation/loss") for one in rows].index(4.0) == 4
    events = read_ledger(tmp_path / "ledger.jsonl")
    assert [event["event"] for event in events] == ["segment_start", "steps", "validation", "steps", "segment_end"]
    assert [event["steps"] for event in events if event["event"] == "steps"] == [4, 6]
    assert events[-1]["status"] == "finished"
    assert {event["world_size"] for event in events} == {2}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_rows_are_written_as_often_as_asked_and_when_something_happened(tmp_path: Path):
    recorder = Recorder()
    run(Watch(config(every=4), tmp_path, Process(), [recorder]), 0, 10, skipped=3, validated=6)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [one["step"] for one in rows] == [3, 4, 6, 8, 10]
    assert math.isnan(rows[0]["loss"])
    assert repr(rows) == repr(recorder.rows), "every sink shows the rows of metrics.jsonl"
    steps = sum(event["steps"] for event in read_ledger(tmp_path / "ledger.jsonl") if event["event"] == "steps")
    assert steps == 10, "the account has every step"


def test_segments_are_counted_by_starts(tmp_path: Path):
    """A run that died before its first save starts from the beginning, and the loop calls that its first segment again."""
    run(default_hooks(config(), tmp_path, Process())[0], 0, 3, status=None)
    run(default_hooks(config(), tmp_path, Process())[0], 0, 2, status="interrupted")
    assert [(one["step"], one["segment"]) for one in read_metrics(tmp_path / "metrics.jsonl")] == [(1, 2), (2, 2)]
    assert not (tmp_path / "loss.png").exists(), "an interrupted run has no time for pictures"


def test_a_run_is_trained_by_one_job_at_a_time(tmp_path: Path):
    (hook,) = default_hooks(config(), tmp_path, Process())
    hook.on_start({"step": 0, "steps": 10, "tokens": 0, "segment": 1, "origin": "new"})
    with pytest.raises(ConfigError, match=r"use another run\.name"):
        default_hooks(config(), tmp_path, Process())[0].on_start({"step": 0, "steps": 10, "tokens": 0, "segment": 1, "origin": "new"})
    hook.on_end({"status": "interrupted", "step": 0, "tokens": 0})


def test_the_end_never_hides_the_error_that_led_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    class Failing(Recorder):
        def close(self, end: dict[str, Any]) -> None:
            raise OSError("no route to host")

    run(Watch(config(), tmp_path, Process(), [Failing()]), 0, 2)
    assert "no route to host" in capsys.readouterr().err
    assert read_ledger(tmp_path / "ledger.jsonl")[-1]["event"] == "segment_end"


def test_a_run_that_failed_before_any_step_ends_quietly(tmp_path: Path):
    (hook,) = default_hooks(config(), tmp_path, Process())
    hook.on_end({"status": "failed", "step": 0, "tokens": 0})
    assert list(tmp_path.iterdir()) == []


def test_lines_are_json_for_everybody(tmp_path: Path):
    """The events of a skipped step hold numbers that JSON does not have."""
    run(default_hooks(config(), tmp_path, Process())[0], 0, 4, skipped=2)
    for name in ("metrics.jsonl", "ledger.jsonl"):
        lines = (tmp_path / name).read_text().splitlines()
        assert any("nonfinite" in json.loads(line, parse_constant=pytest.fail) for line in lines)
