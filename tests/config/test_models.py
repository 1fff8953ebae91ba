"""The shipped models: each is valid, has the size that its comment says, and its twins differ from it in the feed-forward width alone."""

import re
from functools import cache
from pathlib import Path

import pytest

from kan_train.config import ModelConfig
from kan_train.config.compose import compose_train
from kan_train.model.lm import count_parameters, parameter_table

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "model"
NAMES = sorted(leaf.stem for leaf in FOLDER.glob("*.yaml"))
SIZES = ["tiny", "125m", "1b", "340b"]
UNITS = {"M": 1e6, "B": 1e9}


@cache
def model(name: str) -> ModelConfig:
    return compose_train([f"model={name}"]).model


@cache
def counts(name: str) -> tuple[int, int]:
    return count_parameters(model(name))


def shape(config: ModelConfig) -> tuple[int, ...]:
    heads = config.ada.num_heads if config.attention_pattern == 0 else config.attention.num_heads
    return config.num_layers, config.width, heads, config.vocab_size, config.sequence_length


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_named_after_its_file_and_valid(name: str):
    config = model(name)
    config.validate()
    assert config.name == name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["total", "active"])
def test_a_twin_differs_in_the_feed_forward_width_alone(size: str, kind: str):
    grove, dense = model(f"kan_{size}"), model(f"dense_{size}_{kind}")
    assert shape(grove) == shape(dense)
    assert (dense.ffn, dense.attention_pattern) == ("swiglu", 1)
    assert (grove.ffn, grove.attention_pattern) == ("kalmagrove", 0)
    of = ("total", "active").index(kind)
    assert counts(dense.name)[of] == pytest.approx(counts(grove.name)[of], rel=0.002)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("dense")])
def test_a_dense_model_is_all_active_and_counted_by_hand(name: str):
    config = model(name)
    width, kv_width = config.width, config.width // config.attention.num_heads * config.attention.num_kv_heads
    block = 2 * width * width + 2 * width * kv_width + 3 * width * config.ffn_width + 2 * width
    by_hand = 2 * config.vocab_size * width + config.num_layers * block + width
    assert counts(name) == (by_hand, by_hand)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("kan")])
def test_the_comment_says_the_size(name: str):
    """The first figures in the file are the total and the active parameters, right to the last digit written."""
    comment = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    said = re.findall(r"(\d+\.?(\d*))([MB])\b", comment)[:2]
    for (digits, decimals, unit), counted in zip(said, counts(name), strict=False):
        assert counted / UNITS[unit] == pytest.approx(float(digits), abs=0.6 * 10 ** -len(decimals)), comment
    assert said or name == "kan_literal"


@pytest.mark.parametrize("size", SIZES)
def test_all_sizes_have_the_sparsity_of_the_paper(size: str):
    grove = model(f"kan_{size}").grove
    assert 1 - grove.active_groves / grove.num_groves == pytest.approx(0.94, abs=0.0051)


def test_the_literal_model_is_the_size_of_the_tiny_one():
    assert shape(model("kan_literal")) == shape(model("kan_tiny"))
    assert counts("kan_literal")[0] == pytest.approx(counts("kan_tiny")[0], rel=0.01)


def test_the_baseline_with_a_linear_router_has_the_groves_of_the_tiny_model():
    tiny, baseline = model("kan_tiny").grove, model("moe_tiny").grove
    assert (baseline.num_groves, baseline.active_groves, baseline.width) == (tiny.num_groves, tiny.active_groves, tiny.width)
    assert (baseline.score, baseline.edge.kind, model("moe_tiny").attention_pattern) == ("linear", "silu", 1)


def test_the_340b_model_is_the_one_of_the_specification():
    """docs/model.md, section 6; nothing of it is given memory."""
    total, active = counts("kan_340b")
    assert (round(total / 1e9), round(total / active, 2)) == (342, 9.37)
    assert active / 1e9 == pytest.approx(36.5, abs=0.06)
    outside = sum(spec.numel for spec in parameter_table(model("kan_340b")).values() if not spec.grove)
    assert round(100 * outside / total, 1) == 4.7
    grove = model("kan_340b").grove
    for group in (8, 16):
        assert grove.num_groves % group == 0
        assert model("kan_340b").ada.num_heads % group == 0


def test_the_published_dense_340b():
    assert round(counts("dense_340b")[0] / 1e9, 1) == 341.0
    config = model("dense_340b")
    assert (config.num_layers, config.width, config.attention.num_heads, config.attention.num_kv_heads) == (96, 18432, 96, 8)
    assert (config.vocab_size, config.ffn_width) == (256000, 49152)
