"""What had been spent when a step was done: device-seconds and dollars, from the ledger and the launcher's events, by the clock of `kan cost show`.

A row of metrics.jsonl has no time. The ledger has one for every few seconds of steps, and between two of those steps are taken to be equally long.
Everything that was paid for by then counts: earlier starts, also those that came to nothing, what was thrown away, and this start from its allocation on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kan_train.accounting.account import Account
from kan_train.accounting.allocation import Allocation, allocations
from kan_train.accounting.lines import Row
from kan_train.accounting.prices import Price, chosen_price
from kan_train.report.rows import Column

_LATER = 1e-6
"""Steps: a stretch that begins right after the last one begins at another time, if training was saved between them."""


@dataclass
class _Line:
    """Steps of one start without a rewind, ascending, and when each was done: device-seconds of the whole run until then, dollars, wall-clock."""

    steps: list[float] = field(default_factory=list)
    device_seconds: list[float] = field(default_factory=list)
    dollars: list[float] = field(default_factory=list)
    time: list[float] = field(default_factory=list)


class Spending:
    """Answers what had been spent at any step or event of a run."""

    def __init__(self, account: Account, events: Sequence[Row], attempts: Sequence[Row], choice: str | None = None) -> None:
        """account: that of `events` and `attempts`. choice: a price instead of what the starts recorded.

        ConfigError where the group `choice` has no price of a device.
        """
        self.account = account
        self.prices = [start_price(start.price, start.device, choice) for start in account.starts]
        self.has_dollars = all(price is not None or not start.device_seconds for price, start in zip(self.prices, account.starts, strict=True))
        """Whether every start that cost something has a price."""
        self._lines: dict[tuple[int, int], _Line] = {}
        self._bases: dict[int, tuple[float, float, float, float, float]] = {}
        device_seconds = dollars = 0.0
        for allocation, start, price in zip(allocations(events, attempts), account.starts, self.prices, strict=True):
            a_second = 0.0 if price is None else price.per_second
            if allocation.events:
                self._read(allocation, device_seconds, dollars, a_second)
            device_seconds += start.device_seconds
            dollars += start.device_seconds * a_second

    def at_steps(self, segment: Column, rewinds: Column, step: Column) -> tuple[Column, Column, Column]:
        """Device-seconds, dollars and the time (seconds since 1970) when steps were done, fp64 [rows] each; NaN where the ledger does not know them."""
        found = np.full((3, len(step)), np.nan)
        for (number, rewound), line in self._lines.items():
            here = (segment == number) & (rewinds == rewound)
            # The ledger may lag behind: steps that it does not have yet are not given the time of its last one.
            here &= step <= line.steps[-1]
            if here.any():
                for row, values in zip(found, (line.device_seconds, line.dollars, line.time), strict=True):
                    row[here] = np.interp(step[here], line.steps, values)
        return found[0], found[1], found[2]

    def at_event(self, event: Row) -> tuple[float, float]:
        """Device-seconds and dollars when an event of the ledger was written."""
        device_seconds, dollars, devices, offset, a_second = self._bases[event["segment"]]
        own = devices * (offset + event["elapsed"])
        return device_seconds + own, dollars + own * a_second

    def of_seconds(self, event: Row, seconds: float) -> float | None:
        """Dollars of so many seconds of all devices of the event's start; None without a price."""
        _, _, devices, _, a_second = self._bases[event["segment"]]
        return devices * seconds * a_second if self.has_dollars else None

    def _read(self, allocation: Allocation, device_seconds: float, dollars: float, a_second: float) -> None:
        events = allocation.events
        offset = allocation.lead + events[0].get("process_seconds", 0.0)
        self._bases[events[0]["segment"]] = (device_seconds, dollars, float(allocation.devices), offset, a_second)
        rewinds = 0

        def add(step: float, elapsed: float) -> None:
            line = self._lines.setdefault((events[0]["segment"], rewinds), _Line())
            if line.steps and step <= line.steps[-1]:
                return
            own = allocation.devices * (offset + elapsed)
            line.steps.append(step)
            line.device_seconds.append(device_seconds + own)
            line.dollars.append(dollars + own * a_second)
            line.time.append(events[0]["time"] - events[0]["elapsed"] + elapsed)

        for event, following in zip(events, (*events[1:], {}), strict=True):
            kind = event["event"]
            if kind == "rewind":
                rewinds += 1
            if kind in ("segment_start", "rewind"):
                add(event["step"], event["elapsed"])
            elif kind == "steps":
                # Steps are written down when something else has happened, which they were before.
                done = min(event["elapsed"], following.get("elapsed", np.inf) - following.get("seconds", 0.0))
                add(event["first_step"] - 1 + _LATER, done - event.get("seconds_step", 0.0))
                add(event["step"], done)


def start_price(recorded: Price | None, device: str, choice: str | None) -> Price | None:
    """What a device of a start costs: `choice`, else what it recorded; None where it recorded nothing. ConfigError where `choice` has none of it."""
    return recorded if choice is None else chosen_price(choice, device, setting="--price")
