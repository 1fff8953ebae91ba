"""The row of a step: what metrics.jsonl, the console and W&B all show, put together from the figures of the accounting room."""

from dataclasses import dataclass

from kan_train.accounting.meters import memory, throughput
from kan_train.accounting.sparsity import grove_figures
from kan_train.config import Config
from kan_train.engine.engine import StepResult
from kan_train.engine.hooks import Row
from kan_train.engine.progress import Progress
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
    measured: Row,
) -> Row:
    """The row of the step that `progress` has just counted; `measured`: what its examination found."""
    row: Row = {
        "step": progress.step,
        "tokens": progress.tokens,
        "loss": result.loss,
        "cross_entropy": result.cross_entropy,
        "grad_norm": result.grad_norm,
        "learning_rate": learning_rate,
        **throughput(config.train.global_batch_size * config.model.sequence_length, seconds.step, runtime.world_size),
        "time/data": seconds.data,
        "time/forward_backward": seconds.forward_backward,
        "time/optimizer": seconds.optimizer,
        "time/step": seconds.step,
        **memory(runtime.device),
        "skipped_steps": progress.skipped_steps,
        "segment": progress.segment,
    }
    if result.statistics is not None:
        row |= grove_figures(config.model, result.statistics)
    return row | measured
