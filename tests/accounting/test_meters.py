"""Throughput, share of the peak, memory."""

import mmap

import pytest
import torch

from kan_train.accounting.flops import flops_per_token
from kan_train.accounting.meters import StepMeter, device_name, memory, throughput
from kan_train.config import Config

CPU = torch.device("cpu")


def test_throughput_is_tokens_over_seconds():
    assert throughput(4096, 0.5, 4) == {"tokens_per_second": 8192.0, "tokens_per_second_per_device": 2048.0}


def test_mfu_is_the_share_of_all_devices_peaks():
    config = Config()
    config.cluster.peak_tflops = 0.25
    row = StepMeter(config, CPU, world_size=4).add_to({"tokens_per_second": 10_000.0})
    assert row["flops_per_token"] == flops_per_token(config.model).training
    assert row["mfu"] == pytest.approx(10_000 * row["flops_per_token"] / (4 * 0.25e12))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_masked_or_runs_again_makes_other_shares(checkpointing: bool):
    config = Config()
    config.cluster.peak_tflops, config.train.activation_checkpointing = 0.25, checkpointing
    row = StepMeter(config, CPU, world_size=1).add_to({"tokens_per_second": 10_000.0})
    causal, full = flops_per_token(config.model, counting="causal"), flops_per_token(config.model)
    assert row["mfu_causal"] / row["mfu"] == pytest.approx(causal.training / full.training)
    assert row["hfu"] / row["mfu"] == pytest.approx(full.executed(activation_checkpointing=checkpointing) / full.training)
    assert row["mfu_causal"] < row["mfu"] < row["hfu"]


def test_the_table_of_peaks_is_asked_by_the_devices_name():
    config = Config()
    config.cluster.device_name, config.train.precision = "NVIDIA H100 80GB HBM3", "bf16"
    assert StepMeter(config, CPU, world_size=2).peak == 2 * 989.4e12


def test_without_a_known_peak_there_is_no_mfu():
    """None is guessed: a share of another device's peak would be a lie."""
    row = StepMeter(Config(), CPU, world_size=1).add_to({"tokens_per_second": 1.0})
    assert row.keys() == {"tokens_per_second", "flops_per_token"}
    assert device_name(Config(), CPU) == "cpu"


def test_host_memory_follows_what_the_process_holds():
    before = memory(CPU)["memory/host_rss_bytes"]
    held = mmap.mmap(-1, 64 * 2**20)  # pages of its own: what a process has freed may be given out again without growing it
    held.write(b"1" * len(held))
    assert memory(CPU)["memory/host_rss_bytes"] - before > 0.9 * len(held)
    assert "memory/device_peak_bytes" not in memory(CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_memory_is_the_peak():
    device = torch.device("cuda")
    held = torch.ones(64 * 2**20, dtype=torch.uint8, device=device)
    size = held.numel()
    del held
    assert memory(device)["memory/device_peak_bytes"] >= size
