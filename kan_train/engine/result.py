"""What came of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kan_train.engine.progress import Progress


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What came of a run, the same in every process."""

    finished: bool
    """Whether all steps of the run are done."""
    exit_code: int
    """0, EXIT_STOPPED after a signal, EXIT_BUDGET, or EXIT_BAD_STEPS."""
    run_dir: Path
    """The run directory."""
    steps: int
    """Steps done, in all segments of the run."""
    tokens: int
    """Tokens trained on, in all segments."""
    validation_loss: float | None
    """Last validation loss in nats a token; None if there was none."""
    bits_per_byte: float | None
    """The same in bits a byte of text."""
    tokens_per_second: float | None
    """Training throughput of the last segment: tokens a step over the median step time, all processes together."""


def result_of(run_dir: Path, progress: Progress, *, finished: bool, code: int) -> RunResult:
    """After `progress`, whose figures it has."""
    figures: dict[str, Any] = progress.figures
    return RunResult(
        finished=finished,
        exit_code=code,
        run_dir=run_dir,
        steps=progress.step,
        tokens=progress.tokens,
        validation_loss=figures.get("validation_loss"),
        bits_per_byte=figures.get("bits_per_byte"),
        tokens_per_second=figures.get("tokens_per_second"),
    )
