"""What is measured about a step besides its loss: throughput, share of the device's peak, memory."""

import psutil
import torch

from kan_train.accounting.flops import flops_per_token
from kan_train.accounting.lines import Row
from kan_train.accounting.peaks import known_peak_flops
from kan_train.config import Config


class StepMeter:
    """Adds to a row what follows from its throughput: flops_per_token, and shares of the peak where that of the device is known.

    flops_per_token: of training (forward and backward), as `flops.flops_per_token` counts: masked products in full, nothing twice.
    mfu: tokens_per_second * flops_per_token / (peak of one device * devices).
    mfu_causal: the same, of masked products only what a token may see.
    hfu: the same as mfu, with what runs besides the model's FLOPs, recomputation under activation checkpointing included.
    """

    def __init__(self, config: Config, device: torch.device, world_size: int) -> None:
        count = flops_per_token(config.model)
        self.flops_per_token = count.training
        self.causal_flops_per_token = flops_per_token(config.model, counting="causal").training
        self.executed_flops_per_token = count.executed(activation_checkpointing=config.train.activation_checkpointing)
        peak = known_peak_flops(device_name(config, device), config.train.precision, config.cluster.peak_tflops)
        self.peak = None if peak is None else peak * world_size
        """Dense peak of all devices together in FLOP/s; None if it is not known."""

    def add_to(self, row: Row) -> Row:
        """`row` with what this meter knows."""
        row = row | {"flops_per_token": self.flops_per_token}
        if self.peak is None:
            return row
        share = row["tokens_per_second"] / self.peak
        return row | {
            "mfu": share * self.flops_per_token,
            "mfu_causal": share * self.causal_flops_per_token,
            "hfu": share * self.executed_flops_per_token,
        }


def throughput(tokens: int, seconds: float, world_size: int) -> Row:
    """tokens_per_second of all devices together, and of one."""
    rate = tokens / max(seconds, 1e-9)
    return {"tokens_per_second": rate, "tokens_per_second_per_device": rate / world_size}


def memory(device: torch.device) -> Row:
    """memory/host_rss_bytes: resident memory of this process now. memory/device_peak_bytes (CUDA): the most that tensors took."""
    row: Row = {"memory/host_rss_bytes": psutil.Process().memory_info().rss}
    if device.type == "cuda":
        row["memory/device_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return row


def devices_of(config: Config, world_size: int, local_world_size: int) -> int:
    """Devices that a start has of all its nodes: cluster.devices_per_node of each, or one a process where these are more."""
    return max(world_size, world_size // max(1, local_world_size) * config.cluster.devices_per_node)


def device_name(config: Config, device: torch.device) -> str:
    """The device as the table of peaks names it: cluster.device_name, else what the driver reports, else "cpu"."""
    if config.cluster.device_name:
        return config.cluster.device_name
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
