"""The study of the paper's claims: its arms are what they say, its statistics right, and its page what the result files hold."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest

from kan_train.accounting.flops import flops_per_token, parameter_counts
from kan_train.config.compose import compose_train, to_yaml

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import claims_arms  # noqa: E402
import claims_learning  # noqa: E402
import claims_page  # noqa: E402
import claims_speed  # noqa: E402
import claims_verdicts  # noqa: E402
import training_runs  # noqa: E402


@pytest.mark.parametrize("scale", claims_arms.SCALES.values(), ids=lambda scale: scale.name)
def test_the_arms_have_the_sizes_that_they_are_compared_by(scale):
    counts = {name: parameter_counts(claims_arms.composed(scale, arm.settings).model) for name, arm in claims_arms.arms_of(scale).items()}
    total, active = counts["kan"]
    assert counts["dense_total"][0] == pytest.approx(total, rel=0.01)
    assert counts["dense_active"][0] == pytest.approx(active, rel=0.01)
    # What an arm leaves out (scoring matrices, convolutions, the output's gate) is not made up for elsewhere.
    for name in ("moe", "no_edges", "no_norm_routing", "no_ada", "literal_ada", "finer"):
        assert counts[name] == (pytest.approx(total, rel=0.04), pytest.approx(active, rel=0.1)), name


def test_an_interval_is_student_s():
    """Three values with mean 2 and deviation 1: t(0.975, 2) = 4.302653 over the root of 3."""
    assert training_runs.mean_and_interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.302653 / math.sqrt(3), rel=1e-6))
    assert training_runs.best_rate({1e-3: [3.0, 3.2], 2e-3: [2.9, 3.4], 4e-3: [math.inf, 2.0]}) == 1e-3


def test_the_way_to_a_loss_is_read_off_a_curve():
    curve = [(100, 5.0), (200, 4.0), (300, 4.5), (400, 3.0)]
    assert claims_verdicts.tokens_to_reach(curve, 4.25) == 175.0
    assert claims_verdicts.tokens_to_reach(curve, 3.5) == pytest.approx(300 + 100 * 1.0 / 1.5)
    assert claims_verdicts.tokens_to_reach(curve, 6.0) == 100.0
    assert claims_verdicts.tokens_to_reach(curve, 2.0) is None


def study(**ends: list[tuple[int, float]]) -> dict:
    """A learning result with runs of these (tokens, loss), the last of an arm its equal tokens; every arm trains 10 tokens a second."""
    budgets = ("half", "tokens")
    rows = [{"arm": arm, "budget": budget, "tokens": run[0], "mean": run[1]} for arm, runs in ends.items() for budget, run in zip(budgets, runs, strict=True)]
    return {"config": {"speeds": dict.fromkeys(ends, 10.0)}, "rows": rows}


def test_a_loss_costs_what_lies_between_the_ends_of_runs():
    learning = study(kan=[(100, 5.0), (200, 4.0)], dense_total=[(100, 5.2), (200, 4.1)])
    assert claims_verdicts.seconds_to_reach(learning, "kan", 4.5) == pytest.approx(15.0)
    assert claims_verdicts.seconds_to_reach(learning, "kan", 6.0) == pytest.approx(10.0)
    assert claims_verdicts.seconds_to_reach(learning, "kan", 3.9) is None
    assert claims_verdicts.seconds_to_reach(learning, "untimed", 4.5) is None


@pytest.mark.parametrize(("tokens", "verdict"), [(220, "FAILS"), (1900, "HOLDS")])
def test_a_ninth_of_the_cost_is_a_ninth_and_not_any_advantage(tokens, verdict):
    learning = study(kan=[(100, 5.0), (200, 4.0)], dense_total=[(100, 6.0), (tokens, 4.0)])
    figures, found = claims_verdicts._cost(learning)
    assert found == getattr(claims_verdicts, verdict)
    assert f"{tokens / 200:.1f} times as much" in figures


@pytest.mark.parametrize(("differences", "verdict"), [((0.5, 0.3), "HOLDS"), ((0.5, 0.05), "OPEN"), ((0.5, -0.3), "FAILS")])
def test_one_rival_that_learns_more_for_the_same_dollars_decides(differences, verdict):
    rivals = zip(("dense_total", "moe"), differences, strict=True)
    rows = [{"arm": arm, "budget": "dollars", "difference_from_kan": mean, "difference_interval_95": 0.1} for arm, mean in rivals]
    assert claims_verdicts._more_for_dollars({"rows": rows})[1] == getattr(claims_verdicts, verdict)


def test_an_arm_that_diverges_is_worse_whatever_the_others_do():
    mean, half = training_runs.mean_and_interval([math.inf, 1.0, 2.0])
    assert (mean, half) == (math.inf, math.inf)
    row = {"difference_from_kan": mean, "difference_interval_95": half}
    assert claims_verdicts._sign(row, worse=True) == claims_verdicts.HOLDS
    assert claims_verdicts._sign(row, worse=False) == claims_verdicts.FAILS


def test_a_run_that_was_cut_off_is_not_taken_for_one_that_ended(tmp_path, monkeypatch):
    folder = tmp_path / "cut"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "tokens": 30, "validation/loss": 4.0}) + "\n")
    monkeypatch.setattr(training_runs.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="exit status 1"):
        training_runs.finished_run(tmp_path, "cut", 4, [], corpora=tmp_path)
    assert not folder.exists()


def test_a_kept_run_of_other_settings_is_trained_anew(tmp_path, monkeypatch):
    settings = ["model=kan_tiny", "model.sequence_length=64"]
    kept = compose_train([*settings, "train.steps=4", "optimizer.schedule.warmup_steps=1"], [])
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(kept))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 4, "tokens": 40, "validation/loss": 4.0}) + "\n")
    monkeypatch.setattr(training_runs.sys, "executable", "false")
    warm = "optimizer.schedule.warmup_steps=1"
    assert training_runs.finished_run(tmp_path, "kept", 4, [*settings, warm], corpora=tmp_path)[-1]["validation/loss"] == 4.0
    with pytest.raises(RuntimeError, match="exit status 1"):
        training_runs.finished_run(tmp_path, "kept", 4, [*settings, warm, "optimizer.learning_rate=0.001"], corpora=tmp_path)
    assert not folder.exists()


def test_the_page_is_what_the_results_hold():
    assert claims_page.PAGE.read_text() == claims_page.page(), "run `python benchmarks/claims.py page` and look at what changed"


def test_a_verdict_changes_with_its_figures(tmp_path):
    """A KAN that slows down with its context is told of as one."""
    results = tmp_path / "results"
    shutil.copytree(claims_page.RESULTS, results)
    newest = results / claims_page.newest_result("claims-speed-tiny", results)["file"]
    record = json.loads(newest.read_text())
    rows = [row for row in record["rows"] if row.get("arm") == "kan" and row["part"] == "training"]
    for row, speed in zip(rows, range(len(rows), 0, -1), strict=True):
        row["tokens_per_second"] = 1000.0 * speed
    newest.write_text(json.dumps(record))
    (line,) = [line for line in claims_page.page(results).splitlines() if line.startswith("| Attention in O(n d)")]
    assert claims_verdicts.FAILS in line
    assert "keeps 25% of its speed" in line


@pytest.mark.parametrize(("difference", "half", "worse", "better"), [(0.3, 0.1, "HOLDS", "FAILS"), (-0.3, 0.1, "FAILS", "HOLDS"), (0.1, 0.3, "OPEN", "OPEN")])
def test_a_difference_decides_only_beyond_its_interval(difference, half, worse, better):
    """`worse`: the claim is that the arm does worse than the KAN."""
    row = {"difference_from_kan": difference, "difference_interval_95": half}
    assert claims_verdicts._sign(row, worse=True) == getattr(claims_verdicts, worse)
    assert claims_verdicts._sign(row, worse=False) == getattr(claims_verdicts, better)


def test_an_arm_spends_what_the_kan_spends():
    scale = claims_arms.SCALES["tiny"]
    arms, speeds = claims_arms.arms_of(scale), {"kan": 4000.0, "dense_total": 1000.0}
    flops = {name: claims_learning._flops(scale, arms[name]) for name in ("kan", "dense_total")}
    steps = {budget: claims_learning._steps(scale, arms["dense_total"], arms["kan"], budget, speeds) for budget in claims_learning.BUDGETS}
    assert steps["tokens"] == scale.steps
    assert steps["half"] == scale.steps // 2
    assert steps["dollars"] == scale.steps // 4
    assert steps["flops"] * flops["dense_total"] == pytest.approx(scale.steps * flops["kan"], rel=0.1)
    # Softmax arms are charged for what a causal mask leaves: in full, they would get fewer steps than their FLOPs buy.
    assert claims_learning._flops(scale, arms["moe"]) < flops_per_token(claims_arms.composed(scale, arms["moe"].settings).model, counting="full").training


def test_dollars_are_counted_at_the_speed_of_the_learning_itself():
    rows = [{"part": "training", "arm": "kan", "context": 256, "tokens_per_second": 9000.0}, {"part": "workload", "arm": "kan", "tokens_per_second": 8000.0}]
    assert claims_speed.training_speeds(rows) == {"kan": 8000.0}
