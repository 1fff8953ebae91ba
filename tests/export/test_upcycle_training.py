"""An upcycled run is where training starts: on a corpus of its tokenizer, from its loss, in its own settings; and what accounts for it knows N = 0."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from upcycle_llamas import TEXT, make_llama  # noqa: E402

from kan_train.accounting.flops import executed_flops_share, flops_per_token, parameter_counts  # noqa: E402
from kan_train.cli import main  # noqa: E402
from kan_train.config import ConfigError, GroveConfig, ModelConfig, ParallelConfig  # noqa: E402
from kan_train.config.compose import compose_train  # noqa: E402
from kan_train.config.soundness import check_layout  # noqa: E402
from kan_train.inference.load import load_run  # noqa: E402
from kan_train.parallel.layout import layout_of  # noqa: E402
from kan_train.planner.footprint import footprint_of  # noqa: E402

DENSE = ModelConfig(ffn="swiglu", ffn_width=256)
ALONE = ModelConfig(grove=GroveConfig(num_groves=0, active_groves=0, shared_width=256))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("training")
    make_llama(root / "hf")
    (root / "texts").mkdir()
    for number in range(40):
        (root / "texts" / f"{number}.txt").write_text("\n".join(TEXT[number % 6 :] * 8))
    runs = str(root / "runs")
    assert main(["checkpoint", "upcycle", str(root / "hf"), "--root", runs, "--run", "whole"]) == 0
    assert main(["checkpoint", "upcycle", str(root / "hf"), "--root", runs, "--run", "split", "--split", "4", "--active", "2"]) == 0
    tokenizer = root / "runs" / "whole" / "tokenizer.model"
    words = ["corpus=directory", f"corpus.path={root / 'texts'}", "corpus.name=mine", f"root={root / 'corpora'}", f"tokenizer.path={tokenizer}"]
    assert main(["data", "prepare", *words, "workers=1", "heldout=0.2"]) == 0
    return root


@pytest.mark.parametrize("name", ["whole", "split"])
def test_training_starts_from_it(name: str, place: Path):
    settings = [
        f"model={name}", f"init_from={place / 'runs' / name}", f"run.root={place / 'runs'}", f"run.name={name}-trained", "+data.blend.mine=1.0",
        "~data.blend.stdlib", f"data.root={place / 'corpora'}", "model.sequence_length=64", "train.steps=12", "train.global_batch_size=4",
        "train.micro_batch_size=4", "run.threads=1", "optimizer.schedule.warmup_steps=1",
    ]  # fmt: skip
    assert main(["train", "--config-dir", str(place / "runs" / name / "conf"), *settings]) == 0
    rows = [json.loads(line) for line in (place / "runs" / f"{name}-trained" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    before, after = (load_run(run, str(place / "runs"), "cpu").model.state_dict() for run in (name, f"{name}-trained"))
    assert losses[-1] < losses[0]
    assert before.keys() == after.keys()
    moved = "layers.0.ffn.shared.functions.coefficients" if name == "whole" else "layers.0.ffn.router.gate"
    assert not bool(before[moved].any())
    assert bool(after[moved].any()), f"{moved} is learned"
    assert torch.equal(before["final_norm.weight"], after["final_norm.weight"]) is False


def test_evaluation_takes_it(place: Path, capsys):
    words = ["tasks=[perplexity]", "run=whole", f"root={place / 'runs'}", f"text={place / 'corpora' / 'mine'}", "limit=2"]
    assert main(["evaluate", *words]) == 0, capsys.readouterr()


def test_a_model_without_groves_costs_what_its_dense_twin_does():
    assert flops_per_token(ALONE).training == flops_per_token(DENSE).training
    assert executed_flops_share(ALONE) == 1.0
    total, active = parameter_counts(ALONE)
    coefficients = ALONE.num_layers * 256 // 16 * 8
    assert total == active == parameter_counts(DENSE)[0] + coefficients


def test_a_model_without_groves_is_planned():
    configs = [replace(compose_train([], world_size=1), model=model) for model in (ALONE, DENSE)]
    alone, dense = (footprint_of(config, layout_of(config, 1)).total for config in configs)
    assert alone == pytest.approx(dense, rel=0.05)
    with pytest.raises(ConfigError, match="num_groves=0 has none"):
        check_layout(replace(configs[0], parallel=ParallelConfig(expert_parallel=2)), 2)


def test_a_head_width_of_its_own_counts():
    """Heads of 64 in the place of 32: the attention costs twice as much, the rest as before."""
    narrow = replace(DENSE, attention_pattern=1)
    wide = replace(narrow, attention=replace(narrow.attention, head_width=64))
    parts = [flops_per_token(model).by_part for model in (narrow, wide)]
    assert parts[1]["attention_scores"] == 2 * parts[0]["attention_scores"]
    assert parts[1]["attention_projections"] == 2 * parts[0]["attention_projections"]
    assert parts[1]["ffn"] == parts[0]["ffn"]
