"""The row of a step: what metrics.jsonl, the console and W&B all show."""

import resource
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

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


def step_row(
    config: Config,
    runtime: Runtime,
    progress: Progress,
    result: StepResult,
    seconds: StepTimes,
    learning_rate: float,
    validation: ValidationResult | None,
) -> Row:
    """The row of the step that `progress` has just counted."""
    tokens_per_second = config.train.global_batch_size * config.model.sequence_length / seconds.step
    row: Row = {
        "step": progress.step,
        "tokens": progress.tokens,
        "loss": result.loss,
        "cross_entropy": result.cross_entropy,
        "grad_norm": result.grad_norm,
        "learning_rate": learning_rate,
        "tokens_per_second": tokens_per_second,
        "tokens_per_second_per_device": tokens_per_second / runtime.world_size,
        "time/data": seconds.data,
        "time/forward_backward": seconds.forward_backward,
        "time/optimizer": seconds.optimizer,
        "time/step": seconds.step,
        "memory/host_rss_bytes": host_rss_bytes(),
        "skipped_steps": progress.skipped_steps,
        "segment": progress.segment,
    }
    if runtime.device.type == "cuda":
        row["memory/device_peak_bytes"] = torch.cuda.max_memory_allocated(runtime.device)
    if result.statistics is not None:
        row |= grove_figures(config.model, result.statistics)
    if validation is not None:
        row |= {"validation/loss": validation.loss, "validation/bits_per_byte": validation.bits_per_byte, "time/validation": validation.seconds}
    return row


def grove_figures(model: ModelConfig, statistics: Tensor) -> Row:
    """Load balance and measured sparsity of the global batch, from its routing statistics fp32 [layers, 3N+1].

    load/cv/LAYER: standard deviation over mean of the groves' token counts. sparsity/touched/LAYER: share of the groves that any token ran.
    sparsity/nominal: 1 - K/N.
    """
    grove = model.grove
    counts = statistics[:, : grove.num_groves].double().cpu()
    variation = counts.std(dim=1, correction=0) / counts.mean(dim=1).clamp(min=1e-12)
    touched = (counts > 0).double().mean(dim=1)
    row: Row = {"sparsity/nominal": 1 - grove.active_groves / grove.num_groves}
    for layer, (cv, share) in enumerate(zip(variation.tolist(), touched.tolist(), strict=True)):
        row[f"load/cv/{layer}"], row[f"sparsity/touched/{layer}"] = cv, share
    return row


def host_rss_bytes() -> int:
    """Largest resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
