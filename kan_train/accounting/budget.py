"""What a run may cost: a warning as the forecast crosses the cap, and an end, saved, before the cap is crossed.

The cap holds for everything that the run costs, all its starts. So that it is kept, a run stops while what is left still pays for a step, a save and the
way out, as long as they took so far; and a start that what is left does not pay for is refused before it begins.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kan_train.accounting.account import account_of
from kan_train.accounting.allocation import read_attempts
from kan_train.accounting.ledger import LEDGER, read_ledger
from kan_train.accounting.lines import Row
from kan_train.accounting.money import cost_of
from kan_train.accounting.spend import Outlook, Spend, Spent
from kan_train.config import AccountingConfig, Config, ConfigError

LEAVING_SECONDS = 10.0
"""From the end of the loop until the launcher has seen the processes end, where no start has shown it yet."""


@dataclass(frozen=True, kw_only=True)
class Cap:
    """One limit."""

    setting: str
    """Its name."""
    limit: float
    """Its value."""
    in_dollars: bool
    """Dollars, or device-hours."""

    def of(self, spent: Spent) -> float:
        """What was spent, in its unit."""
        return (spent.dollars or 0.0) if self.in_dollars else spent.hours

    def a_second(self, spend: Spend) -> float:
        """What a second of all devices costs now, in its unit."""
        return spend.own.devices * ((spend.a_second or 0.0) if self.in_dollars else 1 / 3600)

    def text(self, value: float) -> str:
        """A value in its unit, for people."""
        return f"${value:.4g}" if self.in_dollars else f"{value:.4g} device-hours"


def caps_of(config: AccountingConfig) -> list[Cap]:
    """The limits that are set."""
    caps = [("accounting.budget_usd", config.budget_usd, True), ("accounting.budget_hours", config.budget_hours, False)]
    return [Cap(setting=setting, limit=limit, in_dollars=in_dollars) for setting, limit, in_dollars in caps if limit is not None]


class Budget:
    """Watches over the limits of a run, in the process that counts what it spends."""

    def __init__(self, config: AccountingConfig, spend: Spend) -> None:
        self.spend, self.caps = spend, caps_of(config)
        # What was warned of once is not warned of again.
        self._warned = {(event["setting"], event["cap"]) for event in spend.budget_events if event["kind"] == "warned"}
        seen = [start.wall("shutdown") for start in spend.starts if start.segment != spend.segment]
        self._leaving = max([LEAVING_SECONDS, *seen])

    def room(self) -> float:
        """Seconds that a run needs to stop within: the longest of its last steps, a save after the one that is being written, if there is one, and leaving.

        Until a save was seen it is taken to be as long as this start took to begin, which made or read the same tensors.
        """
        save = self.spend.longest_save or self.spend.own.wall("start-up")
        return max(self.spend.recent, default=0.0) + (1 if self.spend.save_in_flight is None else 2) * save + self._leaving

    def left(self, spent: Spent) -> Row:
        """What is left of each limit, for a row of metrics.jsonl."""
        return {f"cost/{cap.setting.rpartition('.')[2].replace('budget', 'budget_left')}": cap.limit - cap.of(spent) for cap in self.caps}

    def reached(self, spent: Spent) -> Cap | None:
        """The limit that the run must stop for now, if there is one."""
        room = self.room()
        return next((cap for cap in self.caps if cap.of(spent) + room * cap.a_second(self.spend) >= cap.limit), None)

    def warnings(self, spent: Spent, outlook: Outlook | None) -> list[Row]:
        """Events for the limits that the forecast has crossed, each once in the life of a run."""
        found = []
        for cap in self.caps:
            forecast = forecast_of(cap, outlook)
            if forecast is not None and forecast > cap.limit and (cap.setting, cap.limit) not in self._warned:
                self._warned.add((cap.setting, cap.limit))
                found.append(event_of("warned", cap, spent, forecast))
        return found

    def why(self, cap: Cap, spent: Spent, outlook: Outlook | None) -> str:
        """Why a run stops at `cap`, and what would let it go on."""
        forecast = forecast_of(cap, outlook) or 2 * max(cap.limit, cap.of(spent))
        return (
            f"{cap.setting}={cap.limit:g} is used up: {cap.text(cap.of(spent))} spent, and the rest is for the last save; "
            f"use {cap.setting}={working_value(max(forecast, 1.1 * cap.limit)):g} to go on"
        )


def forecast_of(cap: Cap, outlook: Outlook | None) -> float | None:
    """The forecast in the unit of `cap`."""
    interval = None if outlook is None else outlook.dollars if cap.in_dollars else outlook.hours
    return None if interval is None else interval.mean


def event_of(kind: str, cap: Cap, spent: Spent, forecast: float | None) -> Row:
    """Fields of a ledger's budget event."""
    return {"kind": kind, "setting": cap.setting, "cap": cap.limit, "spent": cap.of(spent), "forecast": forecast}


def warning(event: Row) -> str:
    """A "warned" event in a line, for people."""
    cap = Cap(setting=event["setting"], limit=event["cap"], in_dollars=event["setting"].endswith("usd"))
    return (
        f"the run will cost {cap.text(event['forecast'])}, more than {cap.setting}={cap.limit:g}, at which it will be saved and stopped; "
        f"use {cap.setting}={working_value(event['forecast']):g} to let it end"
    )


def working_value(needed: float) -> float:
    """A value a tenth above what is needed, rounded up to two digits."""
    wanted = 1.1 * needed
    unit = 10.0 ** (math.floor(math.log10(wanted)) - 1)
    return float(f"{math.ceil(wanted / unit) * unit:.6g}")


def refusal(config: Config, run_dir: Path, devices: int, a_second: float | None) -> ConfigError | None:
    """Why the run cannot go on within its limits: what is left does not pay for a start, a step and a save as they were; None where it can.

    devices: of this start. a_second: dollars of one and a second, which a limit in dollars needs. Reads the ledger alone.
    """
    caps = caps_of(config.accounting)
    events = read_ledger(run_dir / LEDGER) if caps else []
    if not events or _is_finished(events, config.train.steps):
        return None
    account = account_of(events, read_attempts(run_dir))
    starts = [start for start in account.starts if start.segment is not None]
    needed = sum(
        [
            statistics.median(start.wall("start-up") for start in starts),
            max((event["seconds"] for event in events if event["event"] == "save"), default=0.0),
            max((event["seconds_step"] / event["steps"] for event in events if event["event"] == "steps"), default=0.0),
        ]
    )
    for cap in caps:
        if cap.in_dollars and any(start.price is None and start.device_seconds for start in account.starts):
            working = cap.limit / (3600 * (a_second or 1.0))
            return ConfigError(
                f"{cap.setting}={cap.limit:g}, but an earlier start of this run recorded no price, so that its dollars are not known; "
                f"use accounting.budget_usd=null accounting.budget_hours={float(f'{working:.4g}'):g}"
            )
        spent = cost_of(account).total if cap.in_dollars else account.device_seconds / 3600
        start = needed * devices * ((a_second or 0.0) if cap.in_dollars else 1 / 3600)
        stopped = any(event["event"] == "budget" and event["kind"] == "stopped" and event["setting"] == cap.setting and event["cap"] >= cap.limit
                      for event in events)  # fmt: skip
        if stopped or spent + start >= cap.limit:
            done = account.steps_retained
            rest = (config.train.steps - events[-1]["step"]) * spent / done if done else cap.limit
            return ConfigError(
                f"{cap.setting}={cap.limit:g} is used up: {cap.text(spent)} spent, and a start with a step and a save takes {cap.text(start)}; "
                f"use {cap.setting}={working_value(max(spent + start + rest, 1.1 * cap.limit)):g} to go on"
            )
    return None


def _is_finished(events: Sequence[Row], steps: int) -> bool:
    last = events[-1]
    return last["event"] == "segment_end" and last["status"] == "finished" and last["step"] >= steps
