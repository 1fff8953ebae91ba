"""The exported model in transformers beside an installed kan_train: its cache, padding, loss and gradients in float64, and what it refuses."""

import copy
import importlib.util
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from kan_train.cli import main
from kan_train.config import AdaConfig, AttentionConfig, EdgeConfig, GroveConfig, ModelConfig
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


TURN = {"max_new_tokens": 4, "eos_token_id": None, "suppress_tokens": None}


@pytest.mark.parametrize("pads", [0, 5], ids=["whole", "padded"])
def test_a_second_turn_from_the_cache_is_one_over_the_whole_text(pads, pair):
    model, prompt, mask = pair[1].eval(), draw(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, :pads] = 0
    first = model.generate(prompt, attention_mask=mask, cache=KanCache(), return_dict_in_generate=True, **TURN)
    read = first.cache.get_seq_length()
    assert read == 11
    text = torch.cat((first.sequences, draw(2, 3)), dim=1)
    seen = torch.nn.functional.pad(mask, (0, text.shape[1] - 8), value=1)
    alone = model.generate(text, attention_mask=seen, **TURN)[:, -4:]
    for turn in (text, text[:, read:]):  # all of the text, or what the cache has not read
        given = model.generate(turn, attention_mask=seen, cache=copy.deepcopy(first.cache), **TURN)
        assert torch.equal(given[:, -4:], alone)
    assert torch.equal(model.generate(text, attention_mask=seen, prefill_chunk_size=3, **TURN)[:, -4:], alone)


def hidden(*where: slice) -> torch.Tensor:
    """A mask [2, 8] that is 0 in the second row at `where`."""
    mask = torch.ones(2, 8, dtype=torch.long)
    for columns in where:
        mask[1, columns] = 0
    return mask


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"attention_mask": hidden(slice(3, 4))}, "between tokens of a row"),
        ({"attention_mask": hidden(slice(0, 2), slice(5, 6))}, "between tokens of a row"),
        ({"attention_mask": hidden()[:, :5]}, r"= \[2, 8\], .* not \[2, 5\]"),
        ({"attention_mask": hidden()[None]}, r"not \[1, 2, 8\]"),
        ({"attention_mask": hidden(slice(5, 8)), "use_cache": True}, "padding_side='left'"),
        ({"attention_mask": hidden(slice(5, 8)), "cache": KanCache()}, "padding_side='left'"),
        ({"inputs_embeds": torch.zeros(2, 8, 32)}, "pass input_ids"),
        ({"position_ids": torch.arange(8)[None] % 4}, "leave them out"),
        ({"position_ids": torch.arange(8)[None], "attention_mask": hidden(slice(0, 2))}, "leave them out"),
        ({"position_ids": torch.arange(9)[None]}, "leave them out"),
    ],
    ids=["hole", "padding and hole", "short", "of 3 dimensions", "behind", "behind, cache", "embeddings", "two documents", "padding counted", "too many"],
)
def test_what_would_give_other_logits_is_refused(arguments, words, pair):
    with pytest.raises(ValueError, match=words):
        pair[1].eval()(draw(2, 8), **arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"attention_mask": hidden(slice(5, 8))}, "padding_side='left'"),
        ({"attention_mask": hidden(slice(5, 8)), "use_cache": False}, "padding_side='left'"),
        ({"position_ids": torch.arange(8)[None] % 4}, "leave them out"),
        ({"cache": 8}, "pass the whole text, of more tokens"),
        ({"cache": 4, "use_cache": False}, "leave one of them out"),
    ],
    ids=["behind", "behind, no cache", "two documents", "cache of the whole text", "cache unused"],
)
def test_what_generate_would_go_on_from_wrongly_is_refused(arguments, words, pair):
    model, tokens = pair[1].eval(), draw(2, 8)
    if (read := arguments.get("cache")) is not None:
        arguments = {**arguments, "cache": KanCache()}
        model(tokens[:, :read], cache=arguments["cache"])
    with pytest.raises(ValueError, match=words):
        model.generate(tokens, max_new_tokens=2, **arguments)


def test_a_mask_of_other_padding_than_the_caches_is_refused(pair):
    model, tokens, cache = pair[1].eval(), draw(2, 8), KanCache()
    model(tokens[:, :6], cache=cache)
    with pytest.raises(ValueError, match="other padding than the tokens of the cache"):
        model(tokens[:, 6:], attention_mask=hidden(slice(0, 2)), cache=cache)


def test_padding_behind_a_row_and_the_positions_of_its_tokens_change_nothing(pair):
    model, tokens, mask = pair[1].eval(), draw(2, 8), hidden(slice(0, 2), slice(6, 8))
    with torch.no_grad():
        given = model(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1) * mask)
        assert_close(given.logits[1, 2:6], model(tokens[1:, 2:6]).logits[0], rtol=1e-11, atol=1e-11)
    assert "cache" not in given  # it could not go on


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
