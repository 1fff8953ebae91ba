"""Bad steps: which are, and what a run does about a row of them.

A step is bad if it was skipped (its loss or gradient was not finite), or if its loss is a spike. After recovery.max_bad_steps in a row the run
goes back to its newest checkpoint of before the first of them, and never reads the samples of the bad steps again. Losses are the same on every
rank, so every rank decides alike.
"""

import statistics
from pathlib import Path

from kan_train.checkpoint import Ranks, delete_checkpoint, folders, newest_valid, step_of
from kan_train.config import RecoveryConfig
from kan_train.engine.engine import StepResult
from kan_train.engine.progress import Progress

SMALLEST_DEVIATION = 1e-3
"""Nats: the deviation of a loss that hardly moves, so that its noise is no spike."""

NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


def judge(config: RecoveryConfig, progress: Progress, result: StepResult) -> str | None:
    """Count the step of `result` in `progress`: "skipped", "spike", or None for a good one."""
    kind = None
    if result.skipped:
        kind, progress.skipped_steps = "skipped", progress.skipped_steps + 1
    elif config.spike and len(progress.recent_losses) >= config.window and result.cross_entropy > spike_level(progress.recent_losses, config.spike):
        kind = "spike"
    if kind is None:
        progress.bad_steps = 0
        # Of good steps alone: a row of spikes must not become what is usual.
        progress.recent_losses = [*progress.recent_losses, result.cross_entropy][-config.window :]
    else:
        progress.bad_steps += 1
    return kind


def spike_level(losses: list[float], spike: float) -> float:
    """The loss above which a step is a spike: median + spike * (1.4826 * median absolute deviation) of the `losses` of good steps before it."""
    middle = statistics.median(losses)
    deviation = NORMAL * statistics.median(abs(loss - middle) for loss in losses)
    return middle + spike * max(deviation, SMALLEST_DEVIATION)


def last_good(directory: Path, progress: Progress) -> Path | None:
    """The newest valid checkpoint of before the bad steps that `progress` counts; None where there is none. Collective."""
    return newest_valid(directory, Ranks(), at_most=progress.step - progress.bad_steps)


def delete_after(directory: Path, step: int) -> None:
    """Delete the checkpoints of later steps: they hold what the run has gone back from. For one rank to call."""
    for path in folders(directory):
        if step_of(path) > step:
            delete_checkpoint(path)
