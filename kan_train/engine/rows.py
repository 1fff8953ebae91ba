"""The row of a step: what metrics.jsonl, the console and W&B all show."""

import platform
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from kan_train.accounting.flops import executed_flops_share, flops_per_token
from kan_train.accounting.peaks import peak_flops
from kan_train.config import Config, ModelConfig
from kan_train.engine.engine import StepResult
from kan_train.engine.hooks import Row
from kan_train.engine.progress import Progress
from kan_train.engine.validation import ValidationResult
from kan_train.parallel.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Wall-clock seconds of a step in this process; validation and saving are not part of it."""

    data: float
    forward_backward: float
    optimizer: float
    step: float


class RowMaker:
    """Makes the rows of a run; holds what is the same in all of them."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.flops_per_token = flops_per_token(config.model).training
        self.peak = peak_flops(device_name(config, runtime), config.train.precision, config.cluster.peak_tflops)
        self.constant: Row = {"flops_per_token": self.flops_per_token}
        if config.model.ffn == "kalmagrove":
            self.constant["sparsity/nominal"] = 1 - config.model.grove.active_groves / config.model.grove.num_groves
            self.constant["sparsity/executed_flops_share"] = executed_flops_share(config.model)

    def row(
        self, progress: Progress, result: StepResult, seconds: StepTimes, learning_rate: float, validation: ValidationResult | None
    ) -> Row:
        """The row of the step that `progress` has just counted."""
        tokens_per_second = self.config.train.global_batch_size * self.config.model.sequence_length / seconds.step
        a_device = tokens_per_second / self.runtime.world_size
        row: Row = {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": result.loss,
            "cross_entropy": result.cross_entropy,
            "grad_norm": result.grad_norm,
            "learning_rate": learning_rate,
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_device": a_device,
            "time/data": seconds.data,
            "time/forward_backward": seconds.forward_backward,
            "time/optimizer": seconds.optimizer,
            "time/step": seconds.step,
            "memory/host_rss_bytes": host_rss_bytes(),
            "skipped_steps": progress.skipped_steps,
            "segment": progress.segment,
            **self.constant,
        }
        if self.peak is not None:  # a peak is never guessed: no MFU without one
            row["mfu"] = a_device * self.flops_per_token / self.peak
        if self.runtime.device.type == "cuda":
            row["memory/device_peak_bytes"] = torch.cuda.max_memory_allocated(self.runtime.device)
        if result.statistics is not None:
            row |= grove_figures(self.config.model, result.statistics)
        if validation is not None:
            row |= {"validation/loss": validation.loss, "validation/bits_per_byte": validation.bits_per_byte, "time/validation": validation.seconds}
        return row


def device_name(config: Config, runtime: Runtime) -> str:
    """The device as the tables of peaks and prices know it."""
    if config.cluster.device_name:
        return config.cluster.device_name
    return torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else platform.processor() or platform.machine()


def grove_figures(model: ModelConfig, statistics: Tensor) -> Row:
    """Load balance and measured sparsity of the global batch, from its routing statistics fp32 [layers, 3N+1].

    load/cv/LAYER: standard deviation over mean of the groves' token counts. sparsity/touched/LAYER: share of the groves that any token ran.
    """
    grove = model.grove
    counts = statistics[:, : grove.num_groves].double().cpu()
    variation = counts.std(dim=1, correction=0) / counts.mean(dim=1).clamp(min=1e-12)
    touched = (counts > 0).double().mean(dim=1)
    row: Row = {}
    for layer, (cv, share) in enumerate(zip(variation.tolist(), touched.tolist(), strict=True)):
        row[f"load/cv/{layer}"], row[f"sparsity/touched/{layer}"] = cv, share
    return row


def host_rss_bytes() -> int:
    """Resident memory of this process."""
    return psutil.Process().memory_info().rss
