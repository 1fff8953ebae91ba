"""What DeepSpeed is told, and which settings a run may change: both name things that must exist."""

from dataclasses import asdict

import pytest

from kan_train.config import Config, ModelConfig
from kan_train.engine.progress import FREE_SETTINGS, INITIAL_SETTINGS
from kan_train.engine.sharded import BUCKET_ELEMENTS, deepspeed_settings
from kan_train.parallel.layout import Layout


def made(stage: int, **train) -> tuple[Config, dict]:
    config = Config()
    config.train.global_batch_size, config.train.micro_batch_size = 24, 3
    config.run.device = "cpu"
    for name, value in train.items():
        setattr(config.train, name, value)
    return config, deepspeed_settings(config, Layout(world_size=4, zero_stage=stage), 2, 1000)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_clips_where_it_knows_the_norm(stage):
    config, settings = made(stage)
    assert settings["gradient_clipping"] == (config.optimizer.clip_norm if stage else 0.0)
    assert settings["zero_optimization"]["stage"] == stage


def test_buckets_are_no_larger_than_the_model_and_never_without_bound():
    config = Config()
    small, large = (deepspeed_settings(config, Layout(world_size=2, zero_stage=3), 1, count)["zero_optimization"] for count in (1000, 10**12))
    assert small["reduce_bucket_size"] == 1000
    assert large["reduce_bucket_size"] == large["stage3_prefetch_bucket_size"] == BUCKET_ELEMENTS


def test_bf16_accumulates_in_fp32_and_keeps_fp32_buffers():
    _, settings = made(2, precision="bf16")
    assert settings["data_types"] == {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": ["*"]}
    assert settings["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert "bf16" not in made(2)[1]


def test_settings_that_may_change_are_settings():
    """A misspelled name would quietly forbid what it means to allow."""
    model = asdict(ModelConfig())
    for name in FREE_SETTINGS + INITIAL_SETTINGS:
        found = model
        for part in name.split("."):
            assert part in found, name
            found = found[part]


@pytest.mark.parametrize("stage", [1, 2])
def test_buckets_are_even(stage):
    """DeepSpeed halves them: with an odd one it fails when the engine is built."""
    config = Config()
    zero = [deepspeed_settings(config, Layout(world_size=2, zero_stage=stage), 1, count)["zero_optimization"] for count in (1, 1001, 1002, 10**12)]
    assert [settings["reduce_bucket_size"] % 2 for settings in zero] == [0, 0, 0, 0]
    assert zero[1]["reduce_bucket_size"] == zero[2]["reduce_bucket_size"] == zero[1]["allgather_bucket_size"] == 1002
