"""A Llama of transformers and the run that it becomes have the same logits; split into groves, so long as a token runs all of them."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

HERE = Path(__file__).parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from upcycle_llamas import SHAPES, in_float64, make_llama  # noqa: E402

from kan_train.checkpoint import read_manifest  # noqa: E402
from kan_train.checkpoint.export import export  # noqa: E402
from kan_train.cli import main  # noqa: E402
from kan_train.config.compose import compose_train  # noqa: E402
from kan_train.export.upcycle import upcycle  # noqa: E402
from kan_train.inference.load import load_run  # noqa: E402


def tokens_of(vocab: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(vocab, (3, 41), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def both_logits(theirs, checkpoint: Path, *, wide: bool):
    """(theirs, ours) [3, 41, V], of the tokens that they have."""
    ours = load_run(str(checkpoint), device="cpu").model
    if wide:
        theirs, ours = in_float64(theirs), ours.double()
    vocab = theirs.config.vocab_size
    tokens = tokens_of(vocab)
    return theirs(tokens).logits, ours.logits(tokens)[..., :vocab]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_logits_are_the_same(shape: dict, tied: bool, tmp_path: Path):
    theirs = make_llama(tmp_path / "hf", tie_word_embeddings=tied, **shape)
    made = upcycle(tmp_path / "hf", tmp_path / "runs" / "llama")
    wanted, found = both_logits(theirs, made, wide=False)
    assert wanted.std() > 0.3
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    wanted, found = both_logits(theirs, made, wide=True)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_a_mistral_in_bf16_and_several_files(tmp_path: Path):
    """Weights in bf16 are numbers of fp32 too: nothing is rounded."""
    theirs = make_llama(tmp_path / "hf", mistral=True, shard="40KB", dtype=torch.bfloat16)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    wanted, found = both_logits(theirs, upcycle(tmp_path / "hf", tmp_path / "runs" / "mistral"), wide=True)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_the_padding_of_a_vocabulary_takes_at_most_its_share(tmp_path: Path):
    theirs = make_llama(tmp_path / "hf", **SHAPES["padded"])
    ours = load_run(str(upcycle(tmp_path / "hf", tmp_path / "runs" / "llama")), device="cpu").model
    with torch.no_grad():
        for scale in (1.0, 20.0):
            ours.head.weight *= scale
            share = ours.logits(tokens_of(333)).softmax(-1)[..., 333:].sum(-1)
            assert share.max() <= 51 / 384 * (1 + 1e-5)
    assert theirs.config.vocab_size == 333
    assert ours.config.vocab_size == 384


@pytest.mark.parametrize("wide", [False, True], ids=["fp32", "float64"])
def test_all_groves_together_are_the_layer(wide: bool, tmp_path: Path):
    theirs = make_llama(tmp_path / "hf")
    made = upcycle(tmp_path / "hf", tmp_path / "runs" / "split", split=8)
    tolerance = 1e-10 if wide else 1e-5
    wanted, found = both_logits(theirs, made, wide=wide)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    grove = load_run(str(made), device="cpu").model.config.grove
    assert (grove.num_groves, grove.active_groves, grove.width, grove.shared_width) == (8, 8, 8, 0)


def layer_error(model, active: int, *, at_random: bool) -> float:
    """Mean squared error of the feed-forward layers' outputs, over their mean square, with `active` of the groves."""
    inputs = torch.randn(1, 400, model.config.width, generator=torch.Generator().manual_seed(5))
    wrong = whole = 0.0
    draws = torch.Generator().manual_seed(6)

    def drawn(scores_TN: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        return torch.rand(scores_TN.shape, generator=draws).topk(index_TK.shape[1]).indices

    for block in model.layers:
        router, x_BTD = block.ffn.router, inputs * block.ffn_norm.weight
        router.active, router.selector = model.config.grove.num_groves, None
        wanted = block.ffn(x_BTD)
        router.active, router.selector = active, drawn if at_random else None
        wrong += float((block.ffn(x_BTD) - wanted).square().mean())
        whole += float(wanted.square().mean())
    return wrong / whole


@torch.no_grad()
def test_fewer_groves_are_another_function_which_the_scores_bring_nearer_than_chance(tmp_path: Path):
    make_llama(tmp_path / "hf", hidden_size=64, intermediate_size=256, num_attention_heads=4)
    model = load_run(str(upcycle(tmp_path / "hf", tmp_path / "runs" / "split", split=16, active=4)), device="cpu").model
    assert all(bool((layer.router.gate == 0).all()) for layer in model.grove_layers())
    errors = {active: layer_error(model, active, at_random=False) for active in (2, 4, 8, 12, 16)}
    chance = {active: layer_error(model, active, at_random=True) for active in errors}
    # Of parts that do not depend on each other, leaving out the share 1 - K/N leaves out that share of the square.
    assert all(chance[active] == pytest.approx(1 - active / 16, abs=0.06) for active in errors)
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    assert all(errors[active] < 0.9 * chance[active] for active in (2, 4, 8, 12))
    assert errors[4] > 0.3, "what is lost is much: it must be trained"
    assert errors[16] < 1e-10


@torch.no_grad()
def test_score_statistics_are_those_of_normal_inputs(tmp_path: Path):
    make_llama(tmp_path / "hf", hidden_size=64, intermediate_size=256, num_attention_heads=4)
    model = load_run(str(upcycle(tmp_path / "hf", tmp_path / "runs" / "split", split=4)), device="cpu").model
    for block in model.layers:
        router = block.ffn.router
        inputs = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(1)) * block.ffn_norm.weight
        z = torch.einsum("nrd,td->tnr", router.score, inputs)
        scores = z.norm(dim=-1) / router.score.flatten(1).norm(dim=1)
        torch.testing.assert_close(router.score_mean, scores.mean(0), rtol=0.02, atol=0)
        torch.testing.assert_close(router.score_std, scores.std(0), rtol=0.06, atol=0)


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: whole and split."""
    root = tmp_path_factory.mktemp("upcycled")
    make_llama(root / "hf")
    for words in (["whole"], ["split", "--split", "4", "--active", "2"]):
        assert main(["checkpoint", "upcycle", str(root / "hf"), "--root", str(root / "runs"), "--run", *words]) == 0
    return root / "runs"


def test_a_text_comes_back_as_it_was_and_decoding_is_the_forward_pass(upcycled: Path, capsys):
    run = load_run("whole", str(upcycled), device="cpu")
    text = "Hello  world\n\t▁ 你"
    tokens = run.tokenizer.encode(text)
    assert "".join(run.tokenizer.decode([token]) for token in run.tokenizer.encode("the quick fox")) == "the quick fox"
    assert run.tokenizer.decode(tokens) == text
    with torch.no_grad():
        whole = run.model.logits(torch.tensor([tokens]))[0, -1]
        logits, state = run.model.prefill(torch.tensor([tokens[:-3]]), run.model.init_state(1))
        for token in tokens[-3:]:
            logits, state = run.model.step(torch.tensor([token]), state)
    torch.testing.assert_close(logits[0], whole, rtol=1e-5, atol=1e-5)
    for name in ("whole", "split"):
        assert main(["generate", f"run={name}", f"root={upcycled}", "prompt=the", "max_tokens=5"]) == 0
        assert capsys.readouterr().out.startswith("the")


def test_an_export_of_it_is_the_same_model(upcycled: Path, tmp_path: Path):
    for name in ("whole", "split"):
        run = load_run(name, str(upcycled), device="cpu")
        export(run.checkpoint, tmp_path / f"{name}.safetensors")
        again = load_run(str(tmp_path / f"{name}.safetensors"), device="cpu")
        tokens = tokens_of(300)
        with torch.no_grad():
            assert torch.equal(run.model.logits(tokens), again.model.logits(tokens))


def test_back_in_transformers_it_is_the_llama_that_it_was(upcycled: Path, tmp_path: Path):
    """Llama -> run -> a folder of ours for transformers: the logits of the first are those of the last."""
    from transformers import AutoModelForCausalLM

    assert main(["export", "hf", "whole", str(tmp_path / "back"), "--root", str(upcycled)]) == 0
    theirs, back = (
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=folder.name == "back", dtype=torch.float32).eval()
        for folder in (upcycled.parent / "hf", tmp_path / "back")
    )
    tokens = tokens_of(300)
    with torch.no_grad():
        torch.testing.assert_close(back(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["whole", "split"])
def test_its_settings_are_there_for_training(name: str, upcycled: Path):
    config = compose_train([f"model={name}"], [upcycled / name / "conf"], world_size=1)
    manifest = read_manifest(load_run(name, str(upcycled), device="cpu").checkpoint)
    assert manifest.state["transform"]["kind"] == "upcycle"
    assert config.model == load_run(name, str(upcycled), device="cpu").model.config
    assert yaml.safe_load((upcycled / name / "config.yaml").read_text())["model"] == manifest.state["model"]
