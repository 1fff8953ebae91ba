import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from kan_train.config import Config, ConfigError
from kan_train.parallel.runtime import runtime, single_process_runtime, zero_stage


def test_one_plain_process_starts_no_process_group():
    config = Config()
    config.run.device = "cpu"
    with runtime(config, environment={}) as process:
        assert not dist.is_initialized()
        assert (process.rank, process.world_size, process.is_first, process.distributed) == (0, 1, True, False)
        assert process.sum(torch.tensor([2.0])).item() == 2
        assert process.largest(7) == 7
        process.barrier()
        process.synchronise()


def test_one_process_with_zero_meets_itself_without_a_launcher():
    config = Config()
    config.run.device, config.parallel.zero_stage = "cpu", 1
    with runtime(config, environment={}) as process:
        assert dist.is_initialized()
        assert dist.get_backend() == "gloo"
        assert process.world_size == 1
        assert process.sum(torch.ones(2)).tolist() == [1.0, 1.0]
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("stage", "precision", "world_size", "expected"),
    [(None, "fp32", 1, None), (None, "fp32", 2, 1), (None, "bf16", 1, 1), (0, "fp32", 1, 0), (3, "bf16", 4, 3)],
)
def test_plain_pytorch_is_for_one_fp32_process_that_asks_for_no_stage(stage, precision, world_size, expected):
    config = Config()
    config.parallel.zero_stage, config.train.precision = stage, precision
    assert zero_stage(config, world_size) == expected


def test_threads_are_those_asked_for():
    config = Config()
    config.run.device, config.run.threads = "cpu", 1
    assert single_process_runtime(config).threads == 1 == torch.get_num_threads()


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_launch_is_refused_by_name(missing):
    environment = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    del environment[missing]
    with pytest.raises(ConfigError, match=rf"{missing} is not.*torchrun --nproc-per-node 2"), runtime(Config(), environment):
        pass


def test_a_world_size_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="WORLD_SIZE='two'"), runtime(Config(), {"WORLD_SIZE": "two"}):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_that_is_not_there_is_refused():
    config = Config()
    config.run.device = "cuda"
    with pytest.raises(ConfigError, match=r"run\.device=cuda.*use run\.device=cpu"):
        single_process_runtime(config)


def test_plain_training_imports_neither_deepspeed_nor_megatron():
    """They take seconds: a run in one process must not pay for them before its first step."""
    code = "import sys, kan_train.engine.trainer, kan_train.engine.plain; print([m for m in ('deepspeed', 'megatron', 'wandb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
