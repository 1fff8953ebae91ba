"""What a run has spent so far, while it goes on: the account of `kan cost show`, kept up step by step, and the forecast of its end.

At the start, and after a rewind, which throws steps of any start away, the account is made from the ledger. In between it grows by what this process
does, under the same names (account.py): reading a long ledger at every step would cost more than the step.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kan_train.accounting.account import BUCKETS, OPENING, StartAccount, account_of, fitted
from kan_train.accounting.allocation import read_attempts
from kan_train.accounting.forecast import Forecast, Interval, events_left
from kan_train.accounting.ledger import LEDGER, read_ledger
from kan_train.accounting.lines import Row
from kan_train.config import Config

FORECAST_EVERY_SECONDS = 0.5
"""A forecast stands for so long: making one takes a tenth of a millisecond."""

IN_BUCKET = {
    "save": "saving", "save_wait": "saving", "validation": "validation", "validation_stopped": "validation", "evaluation": "validation",
    "evaluation_stopped": "validation",
}  # fmt: skip
"""Event -> the bucket of its seconds."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a run has cost up to a moment."""

    buckets: dict[str, float]
    """Device-seconds by bucket."""
    dollars: float | None
    """None where a start has no price."""
    retained_tokens: int
    """Tokens of the steps that were not thrown away."""

    @property
    def device_seconds(self) -> float:
        """Of all devices of all starts."""
        return sum(self.buckets.values())

    @property
    def hours(self) -> float:
        """Device-hours."""
        return self.device_seconds / 3600


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a run will have cost at its last step, as it looks now."""

    hours: Interval
    """Device-hours."""
    dollars: Interval | None
    """None where a start has no price."""


class Spend:
    """What a run has spent, in the process that writes its ledger."""

    def __init__(self, config: Config, run_dir: Path, segment: int) -> None:
        """segment: number of this start, whose segment_start is in the ledger."""
        self.config, self.run_dir, self.segment = config, run_dir, segment
        self.steps_here = 0
        """Steps of this start."""
        self.forecast = Forecast()
        self.longest_save = 0.0
        """Seconds from the beginning of a save until it was on the disk, at most, in any start; 0 where none was seen."""
        self.save_in_flight: int | None = None
        """Step of the save that the background is writing, as far as is known; None where there is none."""
        self._stalls: dict[int, float] = {}
        self.recent: list[float] = []
        """Seconds of this start's last steps, waiting for data included."""
        self._outlook: tuple[float, Outlook | None] = (-FORECAST_EVERY_SECONDS, None)
        events = self._read()
        self._learn(events)
        self.budget_events = [event for event in events if event["event"] == "budget"]
        """Of all starts before."""

    # --- the account --------------------------------------------------------------------------------------------------------------------------------------

    def _read(self) -> list[Row]:
        events = read_ledger(self.run_dir / LEDGER)
        account = account_of(events, read_attempts(self.run_dir))
        (own,) = [start for start in account.starts if start.segment == self.segment]
        self.starts = account.starts
        """All starts, by time."""
        self.own: StartAccount = own
        """This start, up to the last event that was read."""
        before = [start for start in account.starts if start is not own]
        self._before = {bucket: sum(start.devices * start.buckets[bucket] for start in before) for bucket in BUCKETS}
        prices = [start.price for start in before if start.device_seconds]
        self.a_second = None if own.price is None else own.price.per_second
        """Dollars of a device and a second, in this start."""
        known = self.a_second is not None and None not in prices
        self._dollars_before = sum(start.device_seconds * start.price.per_second for start in before if start.price is not None) if known else None
        here = [event for event in events if event["segment"] == self.segment]
        self._since, self._tokens, self._tokens_then = here[-1]["elapsed"], account.tokens_retained, here[-1]["tokens"]
        self._opening = all(event["event"] in OPENING for event in here)
        self._named, self._steps_since = dict.fromkeys(BUCKETS, 0.0), 0
        self._used = here[0]["world_size"] / own.devices
        self.forecast.retained = account.steps_retained
        return events

    def step(self, row: Row) -> None:
        """A step was done."""
        seconds, data = row["time/step"], min(row["time/data"], row["time/step"])
        self._named["step"] += seconds - data
        self._named["data"] += data
        self._tokens, self._tokens_then = self._tokens + row["tokens"] - self._tokens_then, row["tokens"]
        self.forecast.retained += 1
        self._steps_since += 1
        self.steps_here += 1
        self.recent = [*self.recent[-19:], seconds]
        if self.steps_here > 1:  # the first one compiles, and fills caches
            self.forecast.step_times.add(seconds)

    def event(self, kind: str, fields: Row, elapsed: float) -> None:
        """Something else happened, and is in the ledger. elapsed: the event's own."""
        self._opening = self._opening and kind in OPENING
        if self._opening:
            self._named["start-up"] = elapsed - self._since
        elif kind in IN_BUCKET:
            self._named[IN_BUCKET[kind]] += fields["seconds"]
            self._learn_event(kind, fields)
        elif kind == "saved":
            self._learn_event(kind, fields)
        elif kind == "rewind":
            self._read()
        # That the save before is on the disk may be told after the next one was begun.
        if kind == "save":
            self.save_in_flight = fields["step"]
        elif fields.get("saved_step") == self.save_in_flight and (kind == "saved" or fields.get("attempt", 0) > self.config.checkpoint.retries):
            self.save_in_flight = None

    def at(self, elapsed: float) -> Spent:
        """What was spent when the ledger's clock was at `elapsed` seconds."""
        here, _ = fitted({bucket: self._used * seconds for bucket, seconds in self._named.items()}, max(0.0, elapsed - self._since))
        own, devices = self.own.buckets, self.own.devices
        buckets = {bucket: self._before[bucket] + devices * (own[bucket] + here[bucket]) for bucket in BUCKETS}
        dollars = None
        if self._dollars_before is not None and self.a_second is not None:
            dollars = self._dollars_before + devices * (self.own.seconds + sum(here.values())) * self.a_second
        return Spent(buckets=buckets, dollars=dollars, retained_tokens=self._tokens)

    # --- the forecast -------------------------------------------------------------------------------------------------------------------------------------

    def _learn(self, events: Sequence[Row]) -> None:
        """From the starts before this one: all of its restarts, and the times of those that had the same devices."""
        starts = {start.segment: start for start in self.starts}
        alike = {number for number, start in starts.items() if (start.devices, start.device) == (self.own.devices, self.own.device)}
        seen: set[int] = set()
        for event in events:
            if event["segment"] not in alike:
                continue
            if event["event"] == "steps" and event["segment"] in seen:
                self.forecast.step_times.add(event.get("seconds_step", 0.0), event["steps"])
            elif event["event"] == "steps":
                seen.add(event["segment"])  # with the first step of its start, which is like no other
            else:
                self._learn_event(event["event"], event)
        for before, start in itertools.pairwise(self.starts):  # the first of all came after no failure
            if before.status == "finished":  # nor does one that makes a run longer
                continue
            # What else is idle is between the steps: it is not lost, and forecast with them.
            lost = before.wall("replayed") + before.wall("hang") + before.wall("shutdown") + (before.tail if before.status == "killed" else 0.0)
            self.forecast.restarts.add((before.devices * lost + start.devices * start.wall("start-up")) / self.own.devices)

    def _learn_event(self, kind: str, fields: Row) -> None:
        if kind in ("save", "save_wait"):
            self.forecast.saves.add(fields["seconds"], more=kind == "save")
            if kind == "save":
                self._stalls[fields["step"]] = fields["seconds"] - fields.get("seconds_waiting", 0.0)
            else:
                self.longest_save = max(self.longest_save, fields["seconds"])
        elif kind == "saved":
            stall, writing = self._stalls.pop(fields["saved_step"], 0.0), fields.get("seconds_writing", 0.0)
            # Where training waited for the writing too, its seconds are among those that it waited.
            self.longest_save = max(self.longest_save, stall if stall >= writing else stall + writing)
        elif kind in ("validation", "validation_stopped"):
            self.forecast.validations.add(fields["seconds"], more=kind == "validation")
        elif kind in ("evaluation", "evaluation_stopped"):
            self.forecast.evaluations.add(fields["seconds"], more=kind == "evaluation")

    def outlook(self, step: int, elapsed: float) -> Outlook | None:
        """The forecast after `step` steps, at most FORECAST_EVERY_SECONDS old; None where too few steps were seen."""
        last = step >= self.config.train.steps
        if last or elapsed - self._outlook[0] >= FORECAST_EVERY_SECONDS:
            self._outlook = (elapsed, self._made(step, elapsed))
        return self._outlook[1]

    def _made(self, step: int, elapsed: float) -> Outlook | None:
        config, forecast = self.config, self.forecast
        steps = config.train.steps
        here, _ = fitted(self._named, max(0.0, elapsed - self._since))
        forecast.between = here["idle"] / self._steps_since if self._steps_since else 0.0
        validations, evaluations = (
            events_left(every, step, steps) if every else 0 for every in (config.train.validate_every, config.train.evaluate_every)
        )
        # The save of a step comes after its row, its validation before.
        rest = forecast.rest(max(0, steps - step), events_left(config.checkpoint.every, step - 1, steps), validations, evaluations)
        if rest is None:
            return None
        spent, devices = self.at(elapsed), self.own.devices
        dollars = None
        if spent.dollars is not None and self.a_second is not None:
            dollars = _after(spent.dollars, rest, devices * self.a_second)
        return Outlook(hours=_after(spent.hours, rest, devices / 3600), dollars=dollars)


def _after(spent: float, rest: Interval, a_second: float) -> Interval:
    return Interval(spent + a_second * rest.mean, spent + a_second * rest.low, spent + a_second * rest.high)


def cost_row(spent: Spent, outlook: Outlook | None) -> Row:
    """The figures of a row of metrics.jsonl; those that are not known are not there."""
    row: Row = {"cost/device_hours": spent.hours} | {f"cost/bucket/{bucket}_hours": seconds / 3600 for bucket, seconds in spent.buckets.items()}
    if spent.dollars is not None:
        row["cost/spent_usd"] = spent.dollars
        if spent.retained_tokens:
            row["cost/usd_per_million_tokens"] = 1e6 * spent.dollars / spent.retained_tokens
    if outlook is not None:
        for name, interval in (("hours", outlook.hours), ("usd", outlook.dollars)):
            if interval is not None:
                row |= {f"cost/forecast_{name}": interval.mean, f"cost/forecast_{name}_low": interval.low, f"cost/forecast_{name}_high": interval.high}
    return row
