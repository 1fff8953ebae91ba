"""Results of `kan evaluate` and evaluations of a training on the page and in W&B."""

import json
import shutil
from pathlib import Path

import pytest

from kan_train.accounting.lines import read_lines
from kan_train.cli import main
from kan_train.config import ConfigError
from kan_train.evaluation.results import write_result
from kan_train.evaluation.statistics import wilson
from kan_train.report.evaluations import accuracy, counting, table_of
from kan_train.report.history import read_history
from kan_train.report.page import render

from ..accounting.test_wandb import records


def measured(task: str, right: int, questions: int, **more) -> dict:
    acc = {"value": right / questions, "interval": list(wilson(right, questions))}
    return {"task": task, "metric": "acc", "step": 30, "date": "2026-11-28T10:00:00+00:00", "questions": questions, "acc": acc,
            "baselines": {"random": 0.25, "majority": 0.3}} | more  # fmt: skip


@pytest.fixture
def evaluated(runs: Path, tmp_path: Path) -> Path:
    """A copy of the run `first`, with results and, in its ledger, evaluations of both of its starts."""
    run_dir = tmp_path / "first"
    shutil.copytree(runs / "first", run_dir)
    stem = measured("stem", 10, 40)
    write_result(run_dir / "evaluations", measured("mmlu", 30, 100, categories={"stem": stem, "other": stem}, groups={str(one): stem for one in range(57)}))
    bits = {"metric": "bits_per_byte", "bits_per_byte": {"value": 2.5, "interval": None}, "baselines": {"random": 8.0}, "documents": 1}
    write_result(run_dir / "evaluations", {"task": "perplexity", "step": 30, "date": "2026-11-28"} | bits)
    ledger = list(read_lines(run_dir / "ledger.jsonl"))
    lines = []
    for event in ledger:
        lines.append(event)
        if event["event"] == "validation":
            # What the start before had measured is replaced: half of it right in the first, three quarters in the second.
            right = 20 if event["segment"] == 1 else 30
            score = {"metric": "acc", "accuracy": right / 40, "right": right, "questions": 40, "random": 0.25, "majority": 0.3}
            lines.append(event | {"event": "evaluation", "seconds": 0.0, "tasks": {"needle<b>": score}})
    (run_dir / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


def test_the_table_has_every_task_with_its_interval_and_baselines(evaluated):
    mmlu, stem, other, perplexity = table_of([read_history(evaluated)])
    assert (mmlu["task"], mmlu["value"], mmlu["random"], mmlu["majority"], mmlu["count"], mmlu["step"]) == ("mmlu", "30.0%", "25.0%", "30.0%", "100", "30")
    low, high = wilson(30, 100)
    assert mmlu["interval"] == f"{low:.1%} to {high:.1%}"
    assert (stem["task"], stem["part"], other["task"]) == ("stem", True, "other")
    assert (perplexity["value"], perplexity["interval"], perplexity["random"], perplexity["majority"]) == ("2.5000", "", "8.0000", "")
    page = render([read_history(evaluated)])
    assert "What it can do" in page
    assert f"<td class=\"number\">{mmlu['interval']}</td>" in page


def test_accuracies_stand_over_tokens_with_intervals(evaluated):
    history = read_history(evaluated)
    picture = accuracy([history])
    assert picture is not None
    (curve,) = [trace for trace in picture.data if trace.get("mode") == "lines+markers"]
    assert curve["x"] == [10 * 128, 20 * 128, 30 * 128]
    assert curve["y"][-1] == 0.75
    assert curve["name"] == "needle&lt;b&gt;"
    bands = [trace for trace in picture.data if trace["name"] == "" and trace["line"]["width"] == 0]
    assert [band["y"][-1] for band in bands] == pytest.approx(list(wilson(30, 40)), abs=1e-4)
    low, high = wilson(30, 40)
    assert f"needle<b> 75.0% ({low:.1%} to {high:.1%}; 40 questions)" in picture.caption


def test_what_a_restart_threw_away_is_not_drawn():
    def event(kind: str, step: int, mark: int = 0) -> dict:
        return {"event": kind, "step": step, "mark": mark}

    ledger = [
        event("segment_start", 0), event("evaluation", 10, 1), event("evaluation", 20, 1), event("evaluation", 30, 1), event("segment_start", 20),
        event("evaluation", 30, 2), event("evaluation", 40, 2), event("rewind", 30), event("steps", 35),
    ]  # fmt: skip
    assert [(one["step"], one["mark"]) for one in counting(ledger)] == [(10, 1), (20, 1), (30, 2)]


def test_a_run_without_evaluations_has_no_section(runs):
    history = read_history(runs / "first")
    assert accuracy([history]) is None
    assert table_of([history]) == []
    assert "What it can do" not in render([history])


def test_a_damaged_result_is_told_by_name(evaluated):
    (evaluated / "evaluations" / "mmlu.json").write_text("{")
    with pytest.raises(ConfigError, match=r"mmlu\.json cannot be read .* measure it again with `kan evaluate`"):
        table_of([read_history(evaluated)])


def summary(run_dir: Path) -> dict:
    """What W&B's offline files put into the summary, the newest file last."""
    from wandb.proto import wandb_internal_pb2

    found = {}
    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "summary":
                found |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update}
    return found


def test_results_are_sent_once_and_again_when_they_change(evaluated, capsys):
    def sync() -> str:
        assert main(["cost", "sync", str(evaluated), "--offline"]) == 0
        return capsys.readouterr().out

    capsys.readouterr()
    sync()
    assert sync() == "first: nothing new\n"
    assert summary(evaluated)["evaluation/mmlu"] == 0.3
    assert summary(evaluated)["evaluation/mmlu/stem"] == 0.25
    write_result(evaluated / "evaluations", measured("mmlu", 40, 100))
    assert "first: 0 rows into" in sync()
    assert summary(evaluated)["evaluation/mmlu"] == 0.4
    assert sync() == "first: nothing new\n"
