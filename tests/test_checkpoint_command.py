"""`kan checkpoint`: what its commands say of a run that was trained, and that nothing is lost by them."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import yaml

from kan_train.checkpoint import find_checkpoint, load_tensors, read_manifest
from kan_train.cli import main
from kan_train.commands.checkpoint_inspect import statistics
from kan_train.config.compose import compose_train
from kan_train.engine.trainer import train

COMMANDS = ("list", "verify", "inspect", "prune", "export", "refine", "average")
SETTINGS = (
    "~data.blend.stdlib", "+data.blend.tiny=1.0", "model.num_layers=2", "model.width=32", "model.vocab_size=384", "model.sequence_length=32",
    "model.grove.num_groves=8", "model.grove.width=16", "train.global_batch_size=4", "train.micro_batch_size=2", "train.steps=8",
    "train.validate_every=4", "train.validation_sequences=3", "checkpoint.every=2", "checkpoint.keep=0", "optimizer.schedule.warmup_steps=2",
    "run.threads=1", "run.device=cpu",
)  # fmt: skip
STEPS = (8, 6, 4, 2)

pytestmark = pytest.mark.xdist_group("checkpoint command")  # one trained run for all


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpora: Path) -> Path:
    """A folder with a corpus and a run of 8 steps, "first", saved every 2. Not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(corpora, folder / "corpora")
    assert train(configured(folder, "run.name=first")).finished
    return folder


def configured(folder: Path, *overrides: str):
    return compose_train([*SETTINGS, f"data.root={folder / 'corpora'}", f"run.root={folder / 'runs'}", *overrides], world_size=1)


@pytest.fixture
def root(trained, tmp_path) -> Path:
    """A folder of runs with a copy of the run, to be changed."""
    shutil.copytree(trained / "runs" / "first", tmp_path / "runs" / "first")
    return tmp_path / "runs"


def kan(*words: str | Path) -> int:
    return main(["checkpoint", *map(str, words)])


def folder_of(root: Path, step: int, run: str = "first") -> Path:
    return root / run / "checkpoints" / f"step-{step:08d}"


def steps_in(root: Path) -> list[int]:
    return sorted((int(path.name[5:]) for path in (root / "first" / "checkpoints").iterdir()), reverse=True)


def flip(folder: Path, pattern: str = "*.safetensors") -> Path:
    path = next(folder.glob(pattern))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_examples(command, capsys):
    with pytest.raises(SystemExit) as leaving:
        kan(command, "--help")
    text = capsys.readouterr().out
    assert leaving.value.code == 0
    assert len(re.findall(rf"\n  kan checkpoint {command} ", text)) >= 2 or command == "refine"
    assert f"\n  kan checkpoint {command} first" in text
    assert max(map(len, text.splitlines())) <= 150


def test_checkpoint_alone_lists_its_commands_without_loading_anything(capsys):
    assert kan() == 2
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in COMMANDS)
    code = "import sys; from kan_train.cli import main; main(['checkpoint']); assert not {'torch', 'yaml', 'rich', 'hydra'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_list_shows_every_checkpoint_and_why_one_is_not_complete(root, capsys):
    next(folder_of(root, 6).glob("*.safetensors")).unlink()
    (folder_of(root, 2) / "manifest.json").unlink()
    assert kan("list", "first", "--root", root) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0].strip() == "step"
    rows = {int(line.split()[0]): line.split() for line in lines[1:5]}
    assert list(rows) == [8, 6, 4, 2]
    manifest = read_manifest(folder_of(root, 8))
    assert rows[8][1] == f"{8 * 4 * 32:,}"
    assert rows[8][2] == f"{manifest.state['progress']['figures']['validation_loss']:.4f}"
    assert [rows[step][-1] for step in STEPS] == ["yes", "no", "yes", "no"]
    assert "process" in rows[8]
    assert re.match(r"step-00000006: .*rank-.*safetensors is missing", lines[5])
    assert re.match(r"step-00000002: .*its save did not finish", lines[6])


def test_list_takes_the_date_from_the_ledger(root, capsys):
    """A copied file's own time says when it was copied."""
    for path in root.glob("first/checkpoints/*/manifest.json"):
        os.utime(path, (1, 1))
    kan("list", root / "first")
    assert "1970" not in capsys.readouterr().out
    (root / "first" / "ledger.jsonl").unlink()
    kan("list", root / "first")
    assert capsys.readouterr().out.count("1970-01-01") == 4


def test_list_of_all_runs(root, capsys):
    shutil.copytree(root / "first", root / "second")
    shutil.rmtree(root / "second" / "checkpoints")
    assert kan("list", "--root", root) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["first", "4", "8"]
    assert lines[2].split() == ["second", "0"]


def test_a_run_that_is_not_there_is_named_with_those_that_are(root, capsys):
    for command in (["list", "secnd"], ["verify", "secnd"], ["prune", "secnd", "--keep", "1"], ["inspect", "secnd"], ["refine", "secnd", "--run", "x"]):
        assert kan(*command, "--root", root) == 2
        assert re.match(r"kan: run=secnd is neither a run nor a checkpoint; use one of the runs in .*: first\n", capsys.readouterr().err)


def test_verify_says_which_file_is_wrong_and_gives_status_1(root, capsys):
    assert kan("verify", "first", "--root", root, "--all") == 0
    assert capsys.readouterr().out.count("as it was written") == 4
    damaged = flip(folder_of(root, 8))
    assert kan("verify", "first", "--root", root) == 1, "the newest, not the newest good one"
    assert f"{damaged} does not have the SHA-256" in capsys.readouterr().out
    assert kan("verify", folder_of(root, 6)) == 0
    flip(folder_of(root, 6), "tensors-*.json")
    flip(folder_of(root, 4), "manifest.json")
    capsys.readouterr()
    assert kan("verify", "first", "--root", root, "--all") == 1
    text = capsys.readouterr().out
    assert "3 of 4 checkpoints cannot be used" in text
    assert re.search(r"step-00000006: .*tensors-.*json does not have the SHA-256", text)
    assert re.search(r"step-00000004: .*manifest.json is not as it was written", text)
    assert f"{folder_of(root, 2)}: as it was written" in text


def test_verify_names_every_file_that_is_wrong(root, capsys):
    flip(folder_of(root, 8), "tensors-*.json")
    cut = next(folder_of(root, 8).glob("rank*"))
    cut.write_bytes(cut.read_bytes()[:-1])
    assert kan("verify", folder_of(root, 8)) == 1
    text = capsys.readouterr().out
    assert "does not have the SHA-256" in text
    assert "it was truncated or altered" in text


def test_inspect_shows_what_there_is(root, capsys):
    assert kan("inspect", "first", "--root", root) == 0
    text = capsys.readouterr().out
    manifest = read_manifest(folder_of(root, 8))
    assert re.search(r"^step +8$", text, re.M)
    assert re.search(rf"^code version +{re.escape(manifest.code_version)}$", text, re.M)
    assert re.search(r"^  model\.width=32 +\(default 128\)$", text, re.M)
    assert "model.attention.rope_theta" not in text, "what is as by default"
    assert re.search(r"^param/head\.weight +float32 +\[384, 32\] +1 +49,152$", text, re.M)
    tensors = load_tensors(folder_of(root, 8), prefix="")
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert re.search(rf"^total +{len(tensors)} .* {total:,}$", text, re.M)


def test_inspect_gives_the_configuration_back(root, capsys):
    assert kan("inspect", folder_of(root, 4), "--config") == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(read_manifest(folder_of(root, 4)).config)


def test_inspect_has_statistics_of_tensors(root, capsys):
    assert kan("inspect", "first", "--root", root, "--tensors", "param/layers.?.ffn.router.score") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    array = load_tensors(folder_of(root, 8))["layers.1.ffn.router.score"].double().numpy()
    expected = [array.min(), array.max(), array.mean(), np.sqrt((array**2).mean())]
    name, elements, nonfinite, *figures, zeros = lines[2].split()
    assert (name, elements, nonfinite, zeros) == ("param/layers.1.ffn.router.score", f"{array.size:,}", "0", "0.0%")
    np.testing.assert_allclose(list(map(float, figures)), expected, rtol=1e-5)
    assert kan("inspect", "first", "--root", root, "--tensors", "nothing") == 2
    assert "--tensors 'nothing' matches no tensor" in capsys.readouterr().err


def test_statistics_tell_apart_what_is_not_finite():
    found = statistics(torch.tensor([0.0, -2.0, float("nan"), float("inf"), 4.0]))
    assert found == pytest.approx({"elements": 5, "nonfinite": 2, "min": -2, "max": 4, "mean": 2 / 3, "rms": (20 / 3) ** 0.5, "zeros": 1 / 3})
    assert statistics(torch.tensor([True, False, True]))["mean"] == pytest.approx(2 / 3)
    assert statistics(torch.full((3,), torch.nan))["nonfinite"] == 3
    assert statistics(torch.empty(0))["elements"] == 0


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["--keep", "1"], [8]),
        (["--keep", "2"], [8, 6]),
        (["--keep", "1", "--every", "4"], [8, 4]),
        (["--keep", "1", "--best", "2"], [8, 6]),
        (["--keep", "9"], [8, 6, 4, 2]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_prune_keeps_what_the_policy_says_and_a_dry_run_nothing_else(root, capsys, words, left):
    assert kan("prune", "first", "--root", root, *words, "--dry-run") == 0
    said = re.findall(r"^would delete (\S+)", capsys.readouterr().out, re.M)
    assert steps_in(root) == [8, 6, 4, 2]
    assert kan("prune", "first", "--root", root, *words) == 0
    assert re.findall(r"^deleted (\S+)", capsys.readouterr().out, re.M) == said
    assert steps_in(root) == left


def test_prune_refuses_while_the_run_is_trained(root, capsys):
    with (root / "first" / "ledger.jsonl").open("rb") as ledger:
        fcntl.flock(ledger, fcntl.LOCK_EX)
        assert kan("prune", "first", "--root", root, "--keep", "1") == 2
        assert "is being trained, and prunes itself" in capsys.readouterr().err
        assert steps_in(root) == [8, 6, 4, 2]
        assert kan("prune", "first", "--root", root, "--keep", "1", "--dry-run") == 0
        assert kan("prune", "first", "--root", root, "--keep", "1", "--force") == 0
    assert steps_in(root) == [8]
    assert kan("prune", "first", "--root", root, "--keep", "0") == 2


def test_export_and_generate(root, tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    assert kan("export", "first", file, "--root", root) == 0
    assert f"kan generate run={file}" in capsys.readouterr().out
    assert kan("verify", file) == 0
    texts = []
    for run in (file, root / "first"):
        assert main(["generate", f"run={run}", "prompt=alpha", "max_tokens=12", "seed=2", "device=cpu"]) == 0
        captured = capsys.readouterr()
        texts.append(captured.out.removeprefix(f"{file}: as it was written"))
    assert texts[0].endswith(texts[1])
    assert len(texts[1]) > len("alpha\n")
    flip(tmp_path, "model.safetensors")
    assert kan("verify", file) == 1
    assert kan("export", "first", file, "--root", root) == 2
    assert "exists already; use another name, or --overwrite" in capsys.readouterr().err
    assert kan("export", "first", file, "--root", root, "--overwrite", "--dtype", "bf16") == 0
    assert kan("verify", file) == 0


def test_checkpoints_in_an_object_store_are_found_by_their_run(root, tmp_path, capsys):
    """checkpoint.location puts them apart from the run directory, which keeps configuration and tokenizer."""
    local, remote = tmp_path / "local.safetensors", tmp_path / "remote.safetensors"
    assert kan("export", "first", local, "--root", root) == 0
    store, bucket = fsspec.filesystem("memory"), f"bucket-{tmp_path.name}"
    for path in (root / "first" / "checkpoints").glob("*/*"):
        store.pipe_file(f"/{bucket}/{path.parent.name}/{path.name}", path.read_bytes())  # a store has no folders that outlive their files
    shutil.rmtree(root / "first" / "checkpoints")
    config = yaml.safe_load((root / "first" / "config.yaml").read_text())
    config["checkpoint"]["location"] = f"memory://{bucket}"
    (root / "first" / "config.yaml").write_text(yaml.safe_dump(config))
    assert kan("export", "first", remote, "--root", root) == 0
    assert remote.read_bytes() == local.read_bytes()
    assert main(["generate", f"run={root / 'first'}", "max_tokens=3", "device=cpu"]) == 0
    assert kan("average", "first", "--last", "2", "--run", "mean", "--root", root) == 0
    assert folder_of(root, 8, "mean").is_dir()
    assert kan("verify", "first", "--all", "--root", root) == 0
    assert kan("inspect", f"memory://{bucket}/step-00000004") == 0
    assert kan("prune", "first", "--keep", "1", "--root", root) == 0
    capsys.readouterr()
    assert kan("list", "first", "--root", root) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].split()[0] == "8"
    assert lines[1].endswith("yes")
    assert kan("list", f"memory://{bucket}") == 0, "the folder itself, without a ledger"


def first_loss(folder: Path, name: str, *overrides: str) -> float:
    """Training loss of the first step of a new run."""
    settings = (f"run.name={name}", "train.steps=1", "optimizer.schedule.warmup_steps=0", "train.validate_every=0")
    train(configured(folder, *settings, *overrides))
    return json.loads((folder / "runs" / name / "metrics.jsonl").read_text().splitlines()[0])["loss"]


def test_training_goes_on_from_refined_weights(trained, capsys):
    """Where the weights it was made from would go on: the same loss on the same first batch."""
    runs = trained / "runs"
    assert kan("refine", "first", "--run", "fine", "--root", runs) == 0
    text = capsys.readouterr().out
    assert "on a grid of 10 cells (before: 5)" in text
    assert f"kan train init_from={runs / 'fine'} run.name=fine-trained model.grove.edge.grid=10" in text
    before = first_loss(trained, "go-on", "init_from=first")
    assert first_loss(trained, "go-finer", "init_from=fine", "model.grove.edge.grid=10") == pytest.approx(before, rel=1e-6)
    assert before < first_loss(trained, "anew") - 0.01, "not the loss of fresh weights"
    with pytest.raises(ValueError, match=r"model.grove.edge.grid=5, but .* was trained with model.grove.edge.grid=10"):
        train(configured(trained, "init_from=fine", "run.name=wrong"))
    with pytest.raises(ValueError, match=r"does not hold exp_avg.* start a new run from its weights with init_from"):
        train(configured(trained, "run.name=fine", "model.grove.edge.grid=10", "train.steps=20"))
    assert kan("refine", "first", "--run", "fine", "--root", runs) == 2
    assert "fine exists already" in capsys.readouterr().err


def test_training_goes_on_from_averaged_weights(trained, capsys):
    runs = trained / "runs"
    assert kan("average", "first", "--last", "3", "--ema", "0.5", "--run", "mean", "--root", runs) == 0
    text = capsys.readouterr().out
    assert re.findall(r"^  (0\.\d{4}) .*step-0*(\d+)$", text, re.M) == [("0.1429", "4"), ("0.2857", "6"), ("0.5714", "8")]
    made = find_checkpoint("run", "mean", str(runs))
    name = "param/layers.0.mixer.query.weight"
    parts = zip((1 / 7, 2 / 7, 4 / 7), (4, 6, 8), strict=True)
    expected = sum(share * load_tensors(folder_of(runs, step), name)[""].double() for share, step in parts)
    torch.testing.assert_close(load_tensors(made, name)[""].double(), expected, atol=1e-7, rtol=0)
    assert 0 < first_loss(trained, "go-mean", "init_from=mean") < first_loss(trained, "anew-2")
    assert main(["generate", f"run={runs / 'mean'}", "prompt=alpha", "max_tokens=5", "device=cpu"]) == 0
    assert kan("list", "mean", "--root", runs) == 0
    named = [folder_of(runs, 8), folder_of(runs, 2)]
    assert kan("average", *named, "--weights", "3,1", "--run", "two", "--root", runs) == 0
    assert read_manifest(folder_of(runs, 8, "two")).state["transform"]["weights"] == [0.75, 0.25]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["first", "--last", "9"], "--last=9, but .* holds 4 complete checkpoints; use --last 4 or less"),
        (["first", "--last", "1"], "--last=1 is too small; use --last=2"),
        (["first", "first", "--last", "2"], "--last=2 is of one run, and 2 were named"),
        (["first", "--last", "2", "--weights", "1,x"], "--weights=1,x must be numbers"),
        (["first", "--last", "2", "--weights", "1,1", "--ema", "0.5"], "both say how much each counts"),
        (["first", "--last", "2", "--ema", "2"], "--ema=2 must lie above 0 and not above 1"),
        (["first"], "1 checkpoint is no average"),
        (["first", "--last", "2", "--run", "a/b"], "--run 'a/b' must be a plain folder name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_average_that_cannot_be_is_refused(root, capsys, words, message):
    assert kan("average", "--root", root, "--run", "mean", *words) == 2
    assert re.match(f"kan: .*{message}", capsys.readouterr().err)
    assert [path.name for path in root.iterdir()] == ["first"]
