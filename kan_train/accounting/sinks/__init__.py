"""Where rows go. A sink is given the same rows as every other; metrics.jsonl is the truth, the others show it."""

from typing import Any, Protocol

from kan_train.accounting.lines import Row


class Sink(Protocol):
    """Takes what the first process of a run says about it. Every row has `segment` and `resumed_from`, see `jsonl.read_metrics`."""

    def start(self, start: Row) -> None:
        """The loop begins: step, steps, tokens, segment (how often the run was started) and origin."""

    def write(self, row: Row) -> None:
        """A step was done."""

    def event(self, kind: str, fields: dict[str, Any]) -> None:
        """Something else happened: validation, save, skipped_step, signal."""

    def close(self, end: Row) -> None:
        """The loop has ended: status, step and tokens. Nothing is called after it."""
