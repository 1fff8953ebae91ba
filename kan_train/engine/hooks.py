"""What may watch a run. The loop calls hooks and knows nothing of consoles, files or W&B."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

Row = dict[str, Any]
"""One step as everybody sees it: flat names ("loss", "time/optimizer", "load/cv/3") to numbers."""


@runtime_checkable
class Hook(Protocol):
    """Called in every process, in the order of the list; one that writes does so in the first process alone."""

    def on_start(self, start: Row) -> None:
        """The loop begins: `start` has step, steps, tokens, segment and origin (where the run's state came from)."""

    def on_step(self, row: Row) -> None:
        """A step was done; called for every step."""

    def on_event(self, kind: str, fields: Row) -> None:
        """Something else happened: weights (their checksum at step 0), save (training waited), save_wait (for one in the background), saved (it is on
        disk), save_failed, prune_failed, validation, validation_stopped, evaluation, evaluation_stopped, skipped_step, spike_step, rewind,
        signal, budget (a limit ended the run), energy (joules of all devices and steps since the last one), ranks, straggler, links, slow_link, hang (from
        another thread, while the loop is stuck)."""

    def totals(self) -> dict[str, float]:
        """What a checkpoint keeps of the account so far; empty where there is none."""

    def on_end(self, end: Row) -> None:
        """The loop has ended: `end` has status ("finished", "interrupted" or "failed"), step and tokens. Nothing is called after it."""


@runtime_checkable
class Limit(Protocol):
    """A hook that may end the run."""

    def over_budget(self) -> str:
        """Why the run must be saved and end now; empty where it need not. Asked before every step, and now and then in a validation."""


class Hooks:
    """A list of hooks called as one."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self.hooks = list(hooks)
        self.limits = [hook for hook in self.hooks if isinstance(hook, Limit)]

    def on_start(self, start: Row) -> None:
        for hook in self.hooks:
            hook.on_start(start)

    def on_step(self, row: Row) -> None:
        for hook in self.hooks:
            hook.on_step(row)

    def on_event(self, kind: str, fields: Row) -> None:
        for hook in self.hooks:
            hook.on_event(kind, fields)

    def totals(self) -> dict[str, float]:
        return {name: value for hook in self.hooks for name, value in hook.totals().items()}

    def over_budget(self) -> str:
        return next((why for hook in self.limits if (why := hook.over_budget())), "")

    def on_end(self, end: Row) -> None:
        for hook in self.hooks:
            hook.on_end(end)
