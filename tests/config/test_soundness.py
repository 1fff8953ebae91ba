"""The layouts that train the same model are let through, all others are refused, and what a refusal suggests is let through."""

import copy
import itertools
import time
from typing import Any

import pytest
import yaml

from kan_train.config import AdaConfig, AttentionConfig, Config, ConfigError, GroveConfig, ModelConfig, TrainConfig
from kan_train.config.compose import compose_train
from kan_train.config.layout import layout_of

SHORT = {"tp": "tensor_parallel", "pp": "pipeline_parallel", "vpp": "virtual_pipeline", "cp": "context_parallel", "ep": "expert_parallel"}
SHORT |= {"etp": "expert_tensor_parallel", "sp": "sequence_parallel", "zero": "zero_stage", "stages": "stage_layers"}


def config_of(*, dense: bool = False, precision: str = "fp32", optimizer: str = "adamw", **parallel: Any) -> Config:
    """Eight layers of eight heads, a batch of 16 micro-batches."""
    model = ModelConfig(num_layers=8, width=64, vocab_size=1024, sequence_length=64, ada=AdaConfig(num_heads=8), grove=GroveConfig(num_groves=8, width=128))
    if dense:
        model.ffn, model.attention_pattern, model.attention = "swiglu", 2, AttentionConfig(num_heads=8, num_kv_heads=4)
    config = Config(model=model, train=TrainConfig(micro_batch_size=1, global_batch_size=16, precision=precision))
    config.optimizer.kind, config.run.name = optimizer, "test"
    for name, value in parallel.items():
        setattr(config.parallel, SHORT[name], value)
    return config


SOUND = [
    *((1, {"zero": stage}) for stage in (None, 0, 1, 2, 3)),
    *((4, {"tp": 2, "sp": sp, "zero": stage}) for sp in (False, True, None) for stage in (1, 2, 3)),
    *((4, {"tp": 2, "zero": stage, "dense": True}) for stage in (0, 1, 2, 3)),
    *((4, {"tp": 2, "etp": 2, "zero": stage}) for stage in (0, 1, 2)),
    *((4, {"ep": ep, "zero": stage}) for ep in (2, 4) for stage in (1, 2, 3)),
    *((4, {"tp": 2, "ep": ep, "zero": stage}) for ep in (2, 4) for stage in (1, 2, 3)),  # experts spanning tensor ranks
    (4, {"tp": 2, "ep": 2, "etp": 2, "zero": 2}),
    *((4, {"cp": cp, "zero": stage}) for cp in (2, 4) for stage in (0, 1, 2, 3)),
    *((8, {"cp": 2, "tp": 2, "ep": ep, "zero": stage}) for ep in (2, 4, 8) for stage in (1, 2, 3)),
    *((4, {"pp": pp, "zero": stage}) for pp in (2, 4) for stage in (None, 1, 2)),
    *((8, {"pp": 2, "tp": 2, "ep": 2, "zero": stage}) for stage in (1, 2)),
    *((8, {"pp": 2, "cp": 2, "ep": 4, "zero": stage, "vpp": 2}) for stage in (1, 2)),
    *((2, {"pp": 2, "vpp": vpp, "zero": 2, "precision": "bf16"}) for vpp in (1, 2, 4)),
    (2, {"pp": 2, "stages": [3, 5], "zero": 2}),
    (4, {"cp": 2, "zero": 0, "optimizer": "muon"}),
    (4, {"tp": 4, "cp": 1, "dense": True}),
    *((2, {"precision": "bf16", "zero": stage}) for stage in (1, 2, 3)),
]


@pytest.mark.parametrize(("world_size", "layout"), SOUND, ids=[f"{size}: {layout}" for size, layout in SOUND])
def test_what_was_measured_to_work_is_let_through(world_size: int, layout: dict[str, Any]):
    config_of(**layout).validate(world_size)


def refusal(config: Config, world_size: int) -> str | None:
    try:
        config.validate(world_size)
    except ConfigError as error:
        return str(error)
    return None


def suggestions(message: str) -> list[dict[str, Any]]:
    """Every alternative that the error names, as settings; advice in words is left out."""
    found: list[dict[str, Any]] = []
    for alternative in message.partition("; use ")[2].split(", or "):
        first, *others = alternative.split(" or ")
        if "=" not in first:
            continue
        settings = dict(pair.split("=", 1) for pair in first.split(" "))
        found.append(settings)
        found += [dict.fromkeys(settings, other) for other in others]
    return [{name: yaml.safe_load(value) for name, value in settings.items()} for settings in found]


def with_settings(config: Config, settings: dict[str, Any]) -> Config:
    changed = copy.deepcopy(config)
    for path, value in settings.items():
        section: Any = changed
        *sections, name = path.split(".")
        for one in sections:
            section = getattr(section, one)
        setattr(section, name, value)
    return changed


SIZES = {"tp": (1, 2, 3), "pp": (1, 2), "cp": (1, 4), "ep": (1, 8), "etp": (None, 2), "vpp": (1, 3), "sp": (None, True), "zero": (None, 0, 3)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dense", [False, True], ids=["groves", "dense"])
@pytest.mark.parametrize("world_size", [1, 4, 6])
def test_whatever_is_refused_the_suggestions_work(world_size: int, dense: bool, precision: str):
    """Every combination of sizes, most of them wrong in several ways at once."""
    refused = 0
    for values in itertools.product(*SIZES.values()):
        layout = dict(zip(SIZES, values, strict=True))
        config = config_of(dense=dense, precision=precision, **layout)
        message = refusal(config, world_size)
        if message is None:
            sizes = layout_of(config, world_size)
            tensor, expert_tensor, expert = sizes.tensor_parallel, sizes.expert_tensor_parallel, sizes.expert_parallel
            assert world_size == tensor * sizes.pipeline_parallel * sizes.context_parallel * sizes.data_parallel
            assert world_size == expert_tensor * sizes.pipeline_parallel * expert * sizes.expert_data_parallel
            continue
        refused += 1
        found = suggestions(message)
        assert found, f"{layout}: {message}"
        for settings in found:
            assert refusal(with_settings(config, settings), world_size) is None, f"{layout}: {message}"
    assert refused > 100


def test_a_refusal_over_a_thousand_processes_takes_seconds():
    config = config_of(tp=3, pp=5, cp=7, ep=9)
    config.train.global_batch_size = 1000
    start = time.process_time()
    message = refusal(config, 1024)
    assert time.process_time() - start < 10
    assert message is not None
    assert "must divide the number of processes, 1024; use " in message
    (settings,) = suggestions(message)
    assert refusal(with_settings(config, settings), 1024) is None


def test_the_largest_model_has_a_layout_on_a_thousand_processes():
    sizes = ["parallel.tensor_parallel=8", "parallel.pipeline_parallel=8", "parallel.expert_parallel=16", "parallel.zero_stage=2"]
    config = compose_train(["model=kan_340b", *sizes, "train.precision=bf16", "train.micro_batch_size=1", "train.global_batch_size=1024"], world_size=1024)
    layout = layout_of(config, 1024)
    assert (layout.data_parallel, layout.expert_data_parallel, layout.sequence_parallel) == (16, 8, True)
