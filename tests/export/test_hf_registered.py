"""The exported model in transformers beside an installed kan_train: its cache, padding, loss and gradients in float64, and what is refused."""

import importlib.util
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kan_train.cli import main
from kan_train.config import AdaConfig, AttentionConfig, ConfigError, EdgeConfig, GroveConfig, ModelConfig
from kan_train.data_tools.tokenizer import Tokenizer
from kan_train.export.folder import CODE, write_folder
from kan_train.export.hf import KanCache, KanConfig, KanForCausalLM
from kan_train.export.source import open_source

GROVE = {"num_groves": 8, "active_groves": 2, "width": 16, "score_rank": 4, "edge": EdgeConfig(group_size=8)}
MODELS = {
    "ada": {"ada": AdaConfig(num_heads=2, chunk=4, mixture=2)},
    "hybrid": {"attention_pattern": 2, "attention": AttentionConfig(num_heads=4, num_kv_heads=2), "grove": GroveConfig(**GROVE, shared_width=8)},
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory, model_of, write_run):
    """(kan-train's model, the exported one) in float64, in training mode, loaded without trust: this process has the class."""
    root, model = tmp_path_factory.mktemp("runs"), model_of(**MODELS[request.param])
    write_run(root / "run", model)
    write_folder(open_source("run", root), root / "hf")
    return model.double(), AutoModelForCausalLM.from_pretrained(root / "hf", dtype=torch.float64)


@pytest.fixture
def runs(tmp_path, model_of, write_run) -> Path:
    write_run(tmp_path / "runs" / "first", model_of())
    return tmp_path / "runs"


def draw(*shape: int) -> torch.Tensor:
    return torch.randint(2, 300, shape, generator=torch.Generator().manual_seed(3))


def test_the_installed_class_is_used(pair):
    assert type(pair[1]) is KanForCausalLM
    assert {parameter.dtype for parameter in pair[1].parameters()} == {torch.float64}


@pytest.mark.parametrize("pieces", [(1,) * 21, (20, 1), (3, 1, 7, 1, 1, 8)], ids=str)
def test_reading_in_pieces_is_reading_at_once(pair, pieces):
    model, tokens, cache = pair[1].eval(), draw(3, 21), KanCache()
    with torch.no_grad():
        whole = model(tokens).logits
        parts = [model(piece, cache=cache).logits for piece in tokens.split(pieces, dim=1)]
    assert cache.get_seq_length() == 21
    assert_close(torch.cat(parts, dim=1), whole, rtol=1e-11, atol=1e-11)


def test_padding_before_a_row_leaves_no_trace_also_not_after_its_rows_were_reordered(pair):
    model, tokens, pads = pair[1].eval(), draw(3, 16), [0, 5, 11]
    mask = torch.stack([torch.arange(16) >= count for count in pads]).long()
    cache, order = KanCache(), torch.tensor([2, 2, 1])
    with torch.no_grad():
        padded = model(tokens[:, :13], attention_mask=mask[:, :13], cache=cache).logits
        after = model(tokens[order, 13:], attention_mask=mask[order], cache=cache.reorder_cache(order)).logits
        for row, count in enumerate(pads):
            assert_close(padded[row, count:], model(tokens[row : row + 1, count:13]).logits[0], rtol=1e-11, atol=1e-11)
        for place, row in enumerate(order.tolist()):
            assert_close(after[place], model(tokens[row : row + 1, pads[row] :]).logits[0, -3:], rtol=1e-11, atol=1e-11)


def test_loss_and_gradients_are_those_of_training(pair):
    model, exported = (part.train() for part in pair)
    tokens = draw(2, 19)
    labels = tokens.clone()
    labels[0, 4:9] = -100
    model.zero_grad(), exported.zero_grad()
    loss, _ = model(tokens, torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100))
    loss.backward()
    given = exported(tokens, labels=labels)
    assert_close(given.loss.double(), loss, rtol=1e-6, atol=0)  # transformers takes it in fp32
    torch.nn.functional.cross_entropy(given.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    expected = dict(model.named_parameters())
    for name, parameter in exported.named_parameters():
        scale = float(expected[name].grad.abs().max())
        assert_close(parameter.grad, expected[name].grad, rtol=1e-8, atol=1e-10 * scale, msg=lambda text, name=name: f"{name}: {text}")


def test_a_saved_copy_is_the_same_model_and_tokenizer(runs, tmp_path, tokenizer_path):
    write_folder(open_source("first", runs), tmp_path / "hf")
    model, tokenizer = (kind.from_pretrained(tmp_path / "hf") for kind in (AutoModelForCausalLM, AutoTokenizer))
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again, text = AutoModelForCausalLM.from_pretrained(tmp_path / "again"), " a \u2581<document> é你\n"
    assert AutoTokenizer.from_pretrained(tmp_path / "again").encode(text) == [1, *Tokenizer(tokenizer_path).encode(text)]
    with torch.no_grad():
        assert torch.equal(again(draw(1, 9)).logits, model(draw(1, 9)).logits)


def test_special_tokens_are_told_apart(runs, tmp_path, tokenizer_path):
    write_folder(open_source("first", runs), tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (1, 1, 0, Tokenizer(tokenizer_path).vocab_size)
    ids = tokenizer(["def", "def main and more"], padding=True, return_special_tokens_mask=True)
    assert ids["special_tokens_mask"][0] == [int(token < 2) for token in ids["input_ids"][0]]
    assert ids["attention_mask"][0] == [int(token > 0) for token in ids["input_ids"][0]]
    assert tokenizer.decode([1, *tokenizer.encode("a b", add_special_tokens=False), 1]) == "<document>a b<document>"


def test_capacity_drops_what_training_drops(tmp_path, model_of, write_run):
    model = model_of(grove=GroveConfig(**GROVE, capacity_factor=0.6))
    write_run(tmp_path / "run", model)
    write_folder(open_source("run", tmp_path), tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)
    with torch.no_grad():
        assert_close(exported(draw(2, 20)).logits, model.double().eval().logits(draw(2, 20)), rtol=1e-11, atol=1e-11)


def test_a_fresh_model_has_the_defaults_of_kan_train(model_of):
    ours = asdict(ModelConfig())
    given = KanConfig()
    for name in ("num_layers", "width", "vocab_size", "sequence_length", "norm_eps", "attention_pattern", "ffn", "ffn_width"):
        assert getattr(given, name) == ours[name]
    for name in ("ada", "attention", "grove"):
        section = getattr(given, name)
        assert {key: value for key, value in section.items() if key != "edge"} == {key: ours[name][key] for key in section if key != "edge"}
    assert given.grove["edge"] == {key: ours["grove"]["edge"][key] for key in given.grove["edge"]}
    grown = AutoModelForCausalLM.from_config(KanConfig(num_layers=1, width=16, vocab_size=128, grove={"num_groves": 4, "active_groves": 2}))
    assert grown(draw(1, 5) % 128).logits.isfinite().all()


def test_the_command_exports_runs_and_files_and_says_so(runs, tmp_path, capsys):
    file, folders = tmp_path / "first.safetensors", [tmp_path / "a", tmp_path / "b"]
    assert main(["checkpoint", "export", "first", str(file), "--root", str(runs)]) == 0
    for source, folder in zip(("first", str(file)), folders, strict=True):
        assert main(["export", "hf", source, str(folder), "--root", str(runs)]) == 0
    assert "step 20 of" in capsys.readouterr().out
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first == second
    assert {*CODE, "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"} == first.keys()
    assert AutoConfig.from_pretrained(folders[0]).hidden_size == 32
    assert json.loads(first["generation_config.json"])["suppress_tokens"] == [0, *range(310, 384)]


def test_only_its_own_folders_are_replaced_and_a_failure_leaves_them(runs, tmp_path, monkeypatch):
    source, folder, mine = open_source("first", runs), tmp_path / "hf", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match="exists already; use another name, or --overwrite"):
        write_folder(source, mine)
    with pytest.raises(ConfigError, match="was not written by `kan export hf` and is not replaced"):
        write_folder(source, mine, overwrite=True)
    write_folder(source, folder)
    before = (folder / "config.json").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kan_train.export.folder.shutil.copyfile", fail)
    with pytest.raises(ConfigError, match="no space left to write"):
        write_folder(source, folder, overwrite=True)
    monkeypatch.undo()
    assert (folder / "config.json").read_bytes() == before
    write_folder(source, folder, overwrite=True, dtype="bf16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mine", "runs"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nosuch", "x"], "nosuch"), (["first", "no/where"], "there is no folder .*mkdir -p"), (["first", "x", "--dtype", "fp16"], "--dtype='fp16' is not known")],
    ids=["run", "folder", "dtype"],
)
def test_what_cannot_be_is_refused(runs, arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(runs.parent)
    assert main(["export", "hf", *arguments, "--root", str(runs)]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_the_folders_code_imports_nothing_of_ours():
    remote = Path(importlib.util.find_spec("kan_train.export.remote").origin).parent
    assert {path.name for path in remote.glob("*.py")} == {*CODE, "__init__.py"}
    for name in CODE:
        assert "kan_train" not in (remote / name).read_text()
