"""`kan cost sync` with the real W&B, offline: its files are read back byte by byte."""

import json
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kan_train.accounting.lines import read_lines
from kan_train.accounting.sinks.jsonl import read_metrics
from kan_train.accounting.sinks.wandb import RUN_ID, set_logged_lines
from kan_train.cli import main
from kan_train.report.history import read_history
from kan_train.report.sync import MARKER

from ..accounting.test_wandb import Offline, read_offline
from .conftest import ODD, STEPS

THROUGHPUT = ("tokens_per_second", "tokens_per_second_per_device", "flops_per_token", "mfu", "mfu_causal", "hfu")


@pytest.fixture
def run_dir(runs: Path, tmp_path: Path) -> Path:
    """A copy of the killed and resumed run, to be changed."""
    shutil.copytree(runs / "first", tmp_path / "runs" / "first", ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path / "runs" / "first"


def sync(run_dir: Path, *more: str) -> int:
    return main(["cost", "sync", str(run_dir), "--offline", *more])


def rows_of(found: list[Offline]) -> list[dict[str, Any]]:
    return [row for one in found for row in one.rows]


def cut(run_dir: Path, runs: Path, rows: int, events: int) -> None:
    """The files as they were after so many lines."""
    for name, lines in (("metrics.jsonl", rows), ("ledger.jsonl", events)):
        (run_dir / name).write_bytes(b"".join((runs / "first" / name).read_bytes().splitlines(keepends=True)[:lines]))


def test_every_row_that_counts_is_sent_once_under_grouped_names(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert sync(run_dir) == 0
    (found,) = read_offline(run_dir)
    said = capsys.readouterr()
    assert f"first: {STEPS} rows into {run_dir / 'wandb'}/offline-run-" in said.out
    assert said.err == ""
    expected = read_metrics(run_dir / "metrics.jsonl")
    lines = [(row["segment"], row["step"]) for row in read_lines(run_dir / "metrics.jsonl")]
    assert len(lines) > len(expected), "some were thrown away"
    assert found.steps == [lines.index((row["segment"], row["step"])) for row in expected]
    for row, wanted in zip(found.rows, expected, strict=True):
        grouped = {f"throughput/{name}" if name in THROUGHPUT else name: value for name, value in wanted.items()}
        assert {name: row[name] for name in grouped} == grouped
        assert {name.split("/")[0] for name in row.keys() - grouped.keys()} <= {"cost", "events"}
    for group in ("cost/*", "throughput/*", "sparsity/*", "load/*", "*"):
        assert found.metrics[group] == "tokens"
    assert found.config["model"]["num_layers"] == 2


def test_events_and_cost_go_with_the_rows(run_dir: Path):
    assert sync(run_dir) == 0
    (found,) = read_offline(run_dir)
    history = read_history(run_dir)
    for kind in ("validation", "restart", "segment_start"):
        assert sum(row.get(f"events/{kind}", 0) for row in found.rows) == sum(event["event"] == kind for event in history.ledger)
    # One that was thrown away is told beside the row after it.
    assert [row["step"] for row in found.rows if "events/validation" in row][-3:] == [10, 20, 30]
    assert next(row["events/restart"] for row in found.rows if row["segment"] == 2) == 1
    spent = [row["cost/spent_usd"] for row in found.rows]
    assert all(before < after for before, after in pairwise(spent))
    for row in found.rows:
        assert row["cost/usd_per_million_tokens"] == pytest.approx(1e6 * row["cost/spent_usd"] / row["tokens"])
        assert row["cost/device_hours"] * 3.6 == pytest.approx(row["cost/spent_usd"])
    assert spent[-1] < history.cost.total  # type: ignore[union-attr]


def test_a_second_call_sends_nothing(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert sync(run_dir) == 0
    before = sorted(run_dir.rglob("*"))
    capsys.readouterr()
    assert sync(run_dir) == 0
    assert capsys.readouterr().out == "first: nothing new\n"
    assert sorted(run_dir.rglob("*")) == before


def test_a_run_is_sent_as_it_grows_and_nothing_that_can_be_thrown_away(run_dir: Path, runs: Path, capsys: pytest.CaptureFixture[str]):
    """At each of its events: after every call W&B has rows of the final lineage alone, and at the end all of them, once."""
    expected = read_metrics(runs / "first" / "metrics.jsonl")
    ledger = list(read_lines(runs / "first" / "ledger.jsonl"))
    rows = list(read_lines(runs / "first" / "metrics.jsonl"))
    for events in (1, len(ledger) // 4, len(ledger) // 2, 3 * len(ledger) // 4, len(ledger)):
        last = ledger[events - 1]
        known = sum(row["segment"] < last["segment"] or (row["segment"] == last["segment"] and row["step"] <= last["step"]) for row in rows)
        cut(run_dir, runs, known, events)
        assert sync(run_dir) == 0
        sent = [(row["segment"], row["step"], row["loss"]) for row in rows_of(read_offline(run_dir))]
        assert sent == [(row["segment"], row["step"], row["loss"]) for row in expected][: len(sent)]
    assert len(sent) == STEPS
    assert len({one.id for one in read_offline(run_dir)}) == 1
    steps = [step for one in read_offline(run_dir) for step in one.steps]
    assert all(before < after for before, after in pairwise(steps))
    assert "rows wait for the next checkpoint" in capsys.readouterr().out


CUT_OFF = """
import os, signal, sys
from kan_train.cli import main
from kan_train.report import sync
real, calls = sync.log, []
def log(run, row, line):
    if len(calls) == int(sys.argv[2]):
        if sys.argv[3] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ConnectionError("the line is cut")
    calls.append(line)
    real(run, row, line)
sync.log = log
sys.exit(main(["cost", "sync", sys.argv[1], "--offline"]))
"""


@pytest.mark.parametrize(("at", "how"), [(0, "error"), (17, "error"), (17, "kill")])
def test_a_call_that_was_broken_off_is_made_good(run_dir: Path, at: int, how: str):
    """By an error of W&B, or by SIGKILL: nothing is there twice afterwards, and nothing is missing."""
    done = subprocess.run([sys.executable, "-c", CUT_OFF, str(run_dir), str(at), how], capture_output=True, text=True, timeout=120, check=False)
    if how == "kill":
        assert done.returncode == -signal.SIGKILL
    else:
        assert done.returncode == 1
        assert "kan: W&B failed (the line is cut); the same command goes on from there" in done.stderr
    assert json.loads((run_dir / MARKER).read_text())["pending"] is not None
    assert sync(run_dir) == 0
    assert [row["step"] for row in rows_of(read_offline(run_dir))] == list(range(1, STEPS + 1))
    assert json.loads((run_dir / MARKER).read_text())["pending"] is None


def test_what_was_sent_and_then_thrown_away_is_said(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    """A run that was finished goes back to an older checkpoint, the newer ones being lost."""
    assert sync(run_dir) == 0
    rows, events = (list(read_lines(run_dir / name)) for name in ("metrics.jsonl", "ledger.jsonl"))
    again = events[0] | {"segment": 3, "time": events[-1]["time"] + 60, "step": 20, "tokens": 20 * 128, "origin": "resumed from step 20"}
    more = [again, again | {"event": "steps", "step": 31, "tokens": 31 * 128, "first_step": 21, "steps": 11, "seconds_step": 5.0, "elapsed": 5.0}]
    more.append(more[-1] | {"event": "segment_end", "status": "finished"})
    with (run_dir / "ledger.jsonl").open("a") as ledger, (run_dir / "metrics.jsonl").open("a") as metrics:
        ledger.writelines(json.dumps(event) + "\n" for event in more)
        metrics.writelines(json.dumps(rows[0] | {"step": step, "tokens": 128 * step, "segment": 3, "resumed_from": 20}) + "\n" for step in range(21, 32))
    capsys.readouterr()
    assert sync(run_dir) == 0
    assert "first: 11 rows into" in (said := capsys.readouterr().out)
    assert "10 rows were thrown away after they were sent, and stay in W&B" in said


@pytest.mark.parametrize("lines", [None, 3], ids=["an older version", "some rows"])
def test_a_run_that_logged_by_itself_is_not_sent_twice(run_dir: Path, lines: int | None, capsys: pytest.CaptureFixture[str]):
    (run_dir / RUN_ID).write_text("abc\n")
    if lines is not None:
        set_logged_lines(run_dir, lines)
    assert sync(run_dir) == 2
    assert "was trained with logging.wandb, and W&B has its rows: `wandb sync" in capsys.readouterr().err
    (run_dir / RUN_ID).unlink()
    assert sync(run_dir) == 0, "as the error says"
    assert [one.id for one in read_offline(run_dir)] == [(run_dir / RUN_ID).read_text().strip()]


def test_a_server_that_is_down_leaves_the_way_that_is_named(run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def down(**named: Any) -> None:
        raise TimeoutError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr("wandb.init", down)
        assert main(["cost", "sync", str(run_dir)]) == 1
    assert "kan: W&B failed (no answer); the same command goes on from there; `--offline` writes it here" in capsys.readouterr().err
    assert sync(run_dir) == 0
    assert len(rows_of(read_offline(run_dir))) == STEPS


def test_a_save_that_the_killed_start_could_not_tell_of_holds_nothing_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The ledger has the steps to 8, the checkpoint those to 10: nobody knows what steps 9 and 10 took."""
    common = {"host": "node", "pid": 1, "device": "gpu", "world_size": 1, "tokens": 0}
    events: list[dict[str, Any]] = []
    for segment, first, last, elapsed in ((1, 0, 8, 8.0), (2, 10, 20, 10.0)):
        where = common | {"segment": segment, "time": 1.8e9 + 100 * segment}
        origin = "resumed from step 10" if first else "new"
        events.append(where | {"event": "segment_start", "elapsed": 0.0, "step": first, "origin": origin, "process_seconds": 1.0})
        events.append(where | {"event": "steps", "elapsed": elapsed, "step": last, "first_step": first + 1, "steps": last - first, "seconds_step": elapsed})
    events.append(events[-1] | {"event": "segment_end", "status": "finished"})
    rows = [
        {"step": step, "tokens": 128 * step, "loss": 1.0, "segment": 1 + (step > 10), "resumed_from": 10 if step > 10 else 0, "rewinds": 0}
        for step in range(1, 21)
    ]
    for name, lines in (("ledger.jsonl", events), ("metrics.jsonl", rows)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sync(tmp_path) == 0
    assert "wait for" not in capsys.readouterr().out
    (found,) = read_offline(tmp_path)
    assert [row["step"] for row in found.rows] == list(range(1, 21))
    hours = [3600 * row["cost/device_hours"] for row in found.rows]
    assert hours == pytest.approx([*range(2, 10), 9, 9, *range(11, 21)], abs=1e-3)


def test_the_workspace_is_built_without_an_account(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["cost", "sync", str(runs / ODD), "--workspace-json", str(tmp_path / "ws.json"), "--entity", "me", "--project", "llm"]
    assert main(words) == 0
    assert "what --workspace would publish" in capsys.readouterr().out
    told = json.loads((tmp_path / "ws.json").read_text())
    assert (told["entity"], told["project"]) == ("me", "llm")
    sections = told["spec"]["section"]["panelBankConfig"]["sections"]
    charts = {panel["config"]["chartTitle"]: panel["config"] for section in sections for panel in section["panels"]}
    assert {section["name"] for section in sections} >= {"Cost", "Throughput", "Sparsity and load"}
    assert {config["xAxis"] for config in charts.values()} == {"tokens"}
    assert charts["Share of the peak"]["metrics"] == ["throughput/mfu", "throughput/mfu_causal", "throughput/hfu"]
    assert main([*words[:3], "--offline", "--workspace"]) == 2
