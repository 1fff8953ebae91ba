"""`kan audit` from end to end: what was planted is found, its files, its section in the report page, and refusals."""

import json
import re
import struct

import pytest
import torch

from kan_train.audit.audit import Settings, audit
from kan_train.audit.functions import functions_of
from kan_train.audit.results import AUDIT, audit_of, write_audit
from kan_train.cli import main
from kan_train.config import ConfigError
from kan_train.evaluation.perplexity import packed_documents
from kan_train.report.history import read_history
from kan_train.report.page import render

from .conftest import KINDS, make_model, never_choose, plant, write_run

FEW = ["--sequences", "4", "--batch-size", "2", "--device", "cpu"]


def planted(kind: str):
    """Layer 1, grove 2: function (0, 0) is 4 sin(1.6 x); grove 4 of layer 0 is never chosen, and has no learned parts."""
    model = make_model(kind, dtype=torch.float32)
    first, second = functions_of(model)
    with torch.no_grad():
        first.module.coefficients[4] = 0
        if kind == "edge":
            second.module.base[2, 0, 0] = 0
    plant(second, (2, 0, 0), lambda x: 4 * torch.sin(1.6 * x) - (0 if kind == "edge" else torch.nn.functional.silu(x)))
    never_choose(model, 0, 4)
    model.layers[1].ffn.router.balance[2] = 10.0  # used by every token
    return model


def loss_of(model, corpus) -> float:
    losses = packed_documents(model, corpus, 8, batch_size=4)
    return sum(each.nats for each in losses) / sum(each.tokens for each in losses)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_planted_is_found(kind, corpus, tokenizer):
    model = planted(kind)
    readings: list[None] = []
    found = audit(model, tokenizer, corpus, Settings(sequences=8, batch_size=4, top=2), lambda: readings.append(None))
    first, second = found["functions"]
    assert first["groves_without_importance"] == [4]
    assert found["groves"][0]["unused"] == [4]
    assert first["without_importance"] == first["functions"] / 6
    assert second["groves_without_importance"] == found["groves"][1]["unused"] == []
    best = second["most"][0]
    assert (best["grove"], best["input"], best["output"]) == (2, 0, 0 if kind == "edge" else None)
    assert best["summary"]["shape"] == "sin"
    assert best["summary"]["r2"] > 0.99
    assert re.search(r"sin\(-?1\.[56]", best["summary"]["formula"])
    assert ["x" in one for one in second["most"][:3]] == [True, True, False]
    pruning = found["pruning"]
    assert pruning["loss"] == pytest.approx(loss_of(model, corpus), rel=1e-6)
    assert len(readings) == len(pruning["rows"]) + 2
    with torch.no_grad():
        for each in functions_of(model):
            each.module.coefficients.zero_()
    everything = pruning["rows"][-1]
    assert (everything["order"], everything["functions"]) == ("all", pruning["functions"])
    assert pruning["loss"] + everything["rise"] == pytest.approx(loss_of(model, corpus), rel=1e-6)
    low, high = everything["interval"]
    assert low < everything["rise"] < high


def test_functions_that_are_never_used_cost_nothing(corpus, tokenizer):
    """Three of six groves of both layers sleep: half of the functions are the least important ones, and the loss is the same without them."""
    model = make_model(dtype=torch.float32)
    for layer in (0, 1):
        for grove in (0, 3, 4):
            never_choose(model, layer, grove)
    rows = audit(model, tokenizer, corpus, Settings(sequences=4, batch_size=4))["pruning"]["rows"]
    rises = {(row["order"], row["share"]): row["rise"] for row in rows}
    assert rises["importance", 0.25] == rises["importance", 0.5] == rises["size", 0.5] == 0
    assert rises["importance", 0.75] != 0
    assert rises["random", 0.5] != 0


def test_a_shared_grove_alone_has_functions_and_no_groves(corpus, tokenizer):
    model = make_model(grove={"num_groves": 0, "active_groves": 0, "shared_width": 8})
    found = audit(model, tokenizer, corpus, Settings(sequences=2, batch_size=2, prune=False))
    assert (found["groves"], found["pruning"]) == ([], None)
    assert [one["grove"] for layer in found["functions"] for one in layer["most"]] == ["shared"] * 4


@pytest.mark.parametrize("where", ["embedding", "coefficients"])
def test_a_diverged_model_is_told(corpus, tokenizer, where):
    model = make_model(dtype=torch.float32)
    with torch.no_grad():
        (model.embedding.weight if where == "embedding" else functions_of(model)[0].module.coefficients).fill_(torch.nan)
    with pytest.raises(ConfigError, match="nan: the weights have diverged; use an earlier checkpoint, RUN/checkpoints/step-NUMBER"):
        audit(model, tokenizer, corpus, Settings(sequences=2, batch_size=2, prune=False))


def test_pictures_of_the_audit_before_do_not_stay(tmp_path):
    for name in ("pruning.png", "groves-0.png", "mine.png"):
        (tmp_path / name).write_bytes(b"")
    write_audit(tmp_path, {"pictures": ["pruning.png", "groves-0.png"]})
    write_audit(tmp_path, {"pictures": ["groves-0.png"]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit.json", "groves-0.png", "mine.png"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_audit(tmp_path / "file", {})


def size_of(picture) -> tuple[int, int]:
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def test_files_table_and_report(tmp_path, corpus, capsys):
    run_dir = write_run(tmp_path / "runs" / "first", planted("gated"), corpus, reset_at_documents=False)
    assert audit_of(run_dir) is None
    assert main(["audit", "first", "--root", str(run_dir.parent), "--text", str(corpus.folder), *FEW]) == 0
    printed = capsys.readouterr().out
    found = audit_of(run_dir)
    assert (found["step"], found["tokens"], found["grove_kind"], found["settings"]["reset_at_documents"]) == (20, 256, "gated", False)
    assert re.search(rf"^ *100% +24 +{found['pruning']['loss'] + found['pruning']['rows'][-1]['rise']:.4f} +[+-]", printed, re.MULTILINE)
    assert {*found["pictures"], "audit.json"} == {path.name for path in (run_dir / AUDIT).iterdir()}
    assert {"functions-0.png", "functions-1.png", "groves-1.png", "importance.png", "pruning.png", "specialisation.png"} <= {*found["pictures"]}
    for name in found["pictures"]:
        width, height = size_of(run_dir / AUDIT / name)
        assert width > 600
        assert height > 300


def test_the_report_page_has_the_audit_where_there_is_one(tmp_path, corpus, capsys):
    run_dir = write_run(tmp_path / "runs" / "first", planted("edge"), corpus)
    row = {
        "event": "segment_start", "time": 1e9, "elapsed": 0.0, "segment": 0, "step": 0, "tokens": 0, "world_size": 1, "rewinds": 0,
        "origin": "new", "device": "cpu", "started": 1e9, "seconds_start_up": 1.0,
    }  # fmt: skip
    (run_dir / "ledger.jsonl").write_text(json.dumps(row) + "\n")
    before = render([read_history(run_dir)])
    assert "Edge functions and groves" not in before
    assert main(["audit", "first", "--root", str(run_dir.parent), "--text", str(corpus.folder), "--no-prune", *FEW]) == 0
    after = render([read_history(run_dir)])
    section = after[after.index('<section class="card wide audit"') :].partition("</section>")[0]
    assert section.count("<svg") == 12
    assert "sin(" in section
    assert "layer 1, grove 2, 0 to 0" in section
    assert "Loss without the learned parts" not in section
    assert not re.search(r'(src|href)="', section)
    assert len(after) - len(before) < 60_000
    assert render([read_history(run_dir), read_history(run_dir)]).count("Edge functions and groves: first") == 2
    (run_dir / AUDIT / "audit.json").write_text('{"format": 0}')
    with pytest.raises(ConfigError, match="is no audit of this version"):
        render([read_history(run_dir)])


def test_an_exported_file_of_plain_silu(tmp_path, corpus, capsys):
    write_run(tmp_path / "runs" / "first", make_model("gated", "silu", grove={"score": "linear"}, dtype=torch.float32), corpus)
    file = tmp_path / "first.safetensors"
    assert main(["checkpoint", "export", "first", str(file), "--root", str(tmp_path / "runs")]) == 0
    assert main(["audit", str(file), "--text", str(corpus.folder), *FEW]) == 0
    assert "there are no learned functions" in capsys.readouterr().out
    assert "groves-0.png" in json.loads((tmp_path / "first.audit" / "audit.json").read_text())["pictures"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dense"], "dense_small is a dense model"), (["nope"], "nope"), (["dense", "--top", "65"], "--top 65 must be between 1 and 64; use --top 12"),
        (["dense", "--sequences", "0"], "--sequences 0 must be at least 1"), (["dense", "--seed", "-1"], "--seed -1 must not be negative; use --seed 0"),
        (["dense", "-o", "pyproject.toml"], "pyproject.toml is no folder; use --output=FOLDER"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)  # fmt: skip
def test_what_makes_no_sense_is_one_line_and_status_2(words, message, tmp_path, corpus, capsys):
    model = make_model(name="dense_small", ffn="swiglu", ffn_width=16, dtype=torch.float32)
    write_run(tmp_path / "runs" / "dense", model, corpus)
    assert main(["audit", *words, "--root", str(tmp_path / "runs"), "--text", str(corpus.folder)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs" / "dense" / AUDIT).exists()


def test_help_teaches_with_examples(capsys):
    with pytest.raises(SystemExit):
        main(["audit", "--help"])
    assert len(re.findall(r"\n  kan audit kan_tiny", capsys.readouterr().out)) == 5
