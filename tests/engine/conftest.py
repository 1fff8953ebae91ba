"""A small model of each kind, batches drawn from a seed, and a corpus prepared from a few written files."""

from collections.abc import Callable

import pytest
import torch

from kan_train.config import AttentionConfig, Config, GroveConfig, ModelConfig, RunConfig, TrainConfig
from kan_train.data import Batch

VOCABULARY, LENGTH = 128, 24


@pytest.fixture(params=["kan", "dense"])
def config(request: pytest.FixtureRequest) -> Config:
    """fp32, one process, two micro-batches of two sequences, clipping active."""
    common = {"num_layers": 2, "width": 32, "vocab_size": VOCABULARY, "sequence_length": LENGTH, "attention": AttentionConfig(num_heads=2, num_kv_heads=1)}
    if request.param == "kan":
        model = ModelConfig(grove=GroveConfig(num_groves=8, active_groves=2, width=16), **common)
    else:
        model = ModelConfig(ffn="swiglu", ffn_width=48, attention_pattern=1, **common)
    made = Config(model=model, train=TrainConfig(global_batch_size=4, micro_batch_size=2), run=RunConfig(seed=3, threads=1, device="cpu"))
    made.optimizer.clip_norm = 0.5
    return made


@pytest.fixture
def draw() -> Callable[..., list[Batch]]:
    """draw(step, micro_batch): the micro-batches of a step, from the same four sequences whatever their size."""

    def batches(step: int, micro_batch: int = 2) -> list[Batch]:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, VOCABULARY, (4, LENGTH + 1), generator=generator)
        resets = torch.rand(4, LENGTH, generator=generator) < 0.1
        parts = [slice(start, start + micro_batch) for start in range(0, 4, micro_batch)]
        return [Batch(tokens[part, :-1].contiguous(), tokens[part, 1:].contiguous(), resets[part].contiguous()) for part in parts]

    return batches
