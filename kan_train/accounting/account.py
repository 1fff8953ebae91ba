"""Where a run's time went: every second of every allocated device in exactly one bucket. Computed from the ledger, which is never changed.

Seconds are rounded to GRID, a power of two, so that sums of them are exact in float64: the buckets of a start add up to its allocation to the last bit.
Times are those of the first process, and count for all devices of the start: they meet in every step.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kan_train.accounting.allocation import Allocation, allocations, read_attempts
from kan_train.accounting.ledger import LEDGER, read_ledger
from kan_train.accounting.lineage import Stretch, stretches
from kan_train.accounting.lines import Row
from kan_train.accounting.prices import Price, price_from_row
from kan_train.config.errors import ConfigError

BUCKETS = {
    "start-up": "from the allocation to the first step: launcher, processes, model, checkpoint",
    "compile": "kernels and graphs, before the first step",
    "step": "steps that were retained, without waiting for data",
    "data": "retained steps waiting for their samples",
    "saving": "training waiting for a checkpoint",
    "validation": "validation and evaluation, broken off or not",
    "replayed": "steps thrown away by a restart or a rewind, and going back",
    "hang": "from the last sign of progress to the end of a run that hung",
    "idle": "what no event names; after the last event of a start that was killed",
    "shutdown": "from the end of the loop to the end of the allocation",
}
"""Bucket -> what is in it, in the order in which they are shown."""

GRID = 2.0**-16
"""Seconds are whole multiples of it (15 microseconds); sums stay exact up to 2^37 device-seconds, 38 million device-hours."""

OPENING = ("segment_start", "restart", "weights")
"""Events of the beginning of a segment: the time up to them is starting still."""


@dataclass(frozen=True, kw_only=True)
class StartAccount:
    """One start of the run: an allocation, and where its time went."""

    segment: int | None
    """Its number in the ledger; None where it never came to its loop."""
    status: str
    """finished, interrupted, failed, hung, killed (no end was written; or the run is going on), or never began."""
    started: float
    """When its devices were allocated, seconds since 1970."""
    devices: int
    """How many, those that no process used included."""
    device: str
    """As the driver reports it."""
    price: Price | None
    """What it recorded that a device costs."""
    seconds: float
    """Wall-clock of the allocation."""
    buckets: dict[str, float]
    """Wall-clock by bucket, all of BUCKETS, a device on average: those that the run left unused were idle. They add up to `seconds` exactly."""
    used_share: float
    """Share of the devices that a process used."""
    tail: float
    """Seconds from its last event to the end of the allocation: in `hang`, `idle` where it was killed, or `shutdown`."""
    overbooked: float
    """Seconds that events name beyond what the allocation had, which are in no bucket: 0 but for the rounding of clocks."""

    def __post_init__(self) -> None:
        assert self.buckets.keys() == BUCKETS.keys(), self.buckets
        assert all(seconds >= 0 for seconds in self.buckets.values()), self.buckets
        assert sum(self.buckets.values()) == self.seconds, f"{sum(self.buckets.values())} s in buckets of an allocation of {self.seconds} s"

    @property
    def device_seconds(self) -> float:
        """Of all its devices."""
        return self.devices * self.seconds

    def wall(self, bucket: str) -> float:
        """Seconds that the devices in use spent in `bucket`, any but `idle`, in which the others were all the time."""
        return self.buckets[bucket] / self.used_share


@dataclass(frozen=True, kw_only=True)
class Account:
    """All starts of a run."""

    starts: tuple[StartAccount, ...]
    """By time."""
    stretches: tuple[Stretch, ...]
    """All steps that were done."""
    rewinds: int
    """How often bad steps sent it back."""

    @property
    def buckets(self) -> dict[str, float]:
        """Device-seconds by bucket; they add up to `device_seconds` exactly."""
        return {bucket: sum((start.devices * start.buckets[bucket] for start in self.starts), 0.0) for bucket in BUCKETS}

    @property
    def device_seconds(self) -> float:
        """Of all devices of all starts."""
        return sum((start.device_seconds for start in self.starts), 0.0)

    @property
    def tokens_processed(self) -> int:
        """Tokens of all steps that were done."""
        return sum(stretch.tokens for stretch in self.stretches)

    @property
    def tokens_retained(self) -> int:
        """Tokens of those that were not thrown away."""
        return sum(stretch.kept_tokens for stretch in self.stretches)

    @property
    def steps_processed(self) -> int:
        """Steps that were done."""
        return sum(stretch.steps for stretch in self.stretches)

    @property
    def steps_retained(self) -> int:
        """Those that were not thrown away."""
        return sum(stretch.kept for stretch in self.stretches)

    @property
    def goodput(self) -> float:
        """Share of the device-seconds in steps that were retained, waiting for data left out; 0 of nothing."""
        return self.buckets["step"] / self.device_seconds if self.device_seconds else 0.0


def account_of(events: Sequence[Row], attempts: Iterable[Row] = ()) -> Account:
    """The account of a run from the events of its ledger and, where it was launched, those of its launcher."""
    done = stretches(events)
    starts = [_start(one, [stretch for stretch in done if one.events and stretch.segment == one.events[0]["segment"]]) for one in allocations(events, attempts)]
    return Account(starts=tuple(_with_prices(starts)), stretches=tuple(done), rewinds=sum(event["event"] == "rewind" for event in events))


def read_account(run_dir: Path) -> Account:
    """The account of the run in `run_dir`; ConfigError where it has no ledger."""
    events = read_ledger(run_dir / LEDGER)
    if not events:
        raise ConfigError(f"{run_dir / LEDGER} has no events yet: the run has not begun to train; `kan train run.name={run_dir.name}` starts it")
    return account_of(events, read_attempts(run_dir))


def _start(allocation: Allocation, done: Sequence[Stretch]) -> StartAccount:
    if not allocation.events:
        buckets = dict.fromkeys(BUCKETS, 0.0) | {"start-up": on_grid(allocation.tail)}
        return _start_account(allocation, None, "never began", None, buckets, 0.0)
    first, last = allocation.events[0], allocation.events[-1]
    body, tail = on_grid(last["elapsed"]), on_grid(allocation.tail)
    buckets, overbooked = fitted(_named_seconds(allocation.events, done), body)
    buckets["start-up"] += on_grid(allocation.lead) + on_grid(first.get("process_seconds", 0.0))
    status = last["status"] if last["event"] == "segment_end" else "hung" if last["event"] == "hang" else "killed"
    buckets[{"hung": "hang", "killed": "idle"}.get(status, "shutdown")] += tail
    price = first.get("price")
    return _start_account(allocation, first["segment"], status, None if price is None else price_from_row(price), buckets, overbooked)


def _start_account(
    allocation: Allocation, segment: int | None, status: str, price: Price | None, buckets: dict[str, float], overbooked: float
) -> StartAccount:
    process = allocation.events[0].get("process_seconds", 0.0) if allocation.events else 0.0
    body = allocation.events[-1]["elapsed"] if allocation.events else 0.0
    used_share = allocation.used / allocation.devices if allocation.devices else 1.0
    return StartAccount(
        segment=segment,
        status=status,
        started=allocation.started,
        devices=allocation.devices,
        device=allocation.device,
        price=price,
        seconds=on_grid(allocation.lead) + on_grid(process) + on_grid(body) + on_grid(allocation.tail),
        buckets=_of_all_devices(buckets, used_share),
        used_share=used_share,
        tail=on_grid(allocation.tail),
        overbooked=overbooked,
    )


def _named_seconds(events: Sequence[Row], done: Sequence[Stretch]) -> dict[str, float]:
    """Seconds of a segment's loop by bucket, as its events name them."""
    named = dict.fromkeys(BUCKETS, 0.0)
    for number, event in enumerate(events):
        if event["event"] not in OPENING:
            break
        named["start-up"] = events[number]["elapsed"]
    for stretch in done:
        data = min(stretch.seconds_data, stretch.seconds)
        named["step"] += stretch.share * (stretch.seconds - data)
        named["data"] += stretch.share * data
        named["replayed"] += (1 - stretch.share) * stretch.seconds
    for number, event in enumerate(events):
        match event["event"]:
            case "save" | "save_wait":
                named["saving"] += event["seconds"]
            case "validation" | "validation_stopped" | "evaluation" | "evaluation_stopped":
                named["validation"] += event["seconds"]
            case "rewind":
                named["replayed"] += _going_back(events, number)
            case "hang":
                named["hang"] += _hanging(events, number)
    return named


def _going_back(events: Sequence[Row], number: int) -> float:
    """Seconds of a rewind without the save that it ends with, which has an event of its own."""
    rewind = events[number]
    seconds = rewind.get("seconds", 0.0)
    began = rewind["elapsed"] - seconds
    # By its middle, as neither clock is read at the very ends.
    within = [event["seconds"] for event in events[:number] if event["event"] == "save" and event["elapsed"] - event["seconds"] / 2 > began]
    return max(0.0, seconds - sum(within))


def _hanging(events: Sequence[Row], number: int) -> float:
    """Seconds before a hang was seen in which nothing happened: since the event before it, without the steps that were still to be written down."""
    before = number - 1
    steps = 0.0
    if before > 0 and events[before]["event"] == "steps":
        steps = events[before].get("seconds_step", 0.0)
        before -= 1
    return max(0.0, events[number]["elapsed"] - events[max(before, 0)]["elapsed"] - steps)


def _of_all_devices(buckets: dict[str, float], used: float) -> dict[str, float]:
    """`buckets`, where only a share `used` of the devices had a process: the others were idle."""
    if used == 1:
        return buckets
    mean = {bucket: on_grid(used * seconds) for bucket, seconds in buckets.items() if bucket != "idle"}
    return {bucket: mean.get(bucket, sum(buckets.values()) - sum(mean.values())) for bucket in buckets}


def fitted(named: dict[str, float], seconds: float) -> tuple[dict[str, float], float]:
    """`named` on the grid within `seconds`: what is left is idle, and what is too much is cut, from the last bucket on; and how much that was."""
    left, overbooked = seconds, 0.0
    buckets = {}
    for bucket, wanted in named.items():
        buckets[bucket] = min(on_grid(wanted), left)
        overbooked += on_grid(wanted) - buckets[bucket]
        left -= buckets[bucket]
    buckets["idle"] += left
    return buckets, overbooked


def on_grid(seconds: float) -> float:
    """The nearest multiple of GRID."""
    return round(seconds / GRID) * GRID


def _with_prices(starts: list[StartAccount]) -> list[StartAccount]:
    """A start that never came to its loop could record no price: that of its neighbours is taken, the next one first."""
    priced = []
    for number, start in enumerate(starts):
        others = [other for other in (*starts[number:], *reversed(starts[:number])) if other.segment is not None]
        priced.append(replace(start, price=others[0].price) if start.segment is None and others else start)
    return priced


def account_as_json(account: Account) -> dict[str, Any]:
    """An account without money, as JSON can hold it."""
    return {
        "device_seconds": account.device_seconds,
        "buckets": account.buckets,
        "goodput": account.goodput,
        "steps": {"processed": account.steps_processed, "retained": account.steps_retained},
        "tokens": {"processed": account.tokens_processed, "retained": account.tokens_retained},
        "rewinds": account.rewinds,
        "starts": [
            {name: getattr(start, name) for name in ("segment", "status", "started", "devices", "device", "seconds", "buckets", "overbooked")}
            | {"device_seconds": start.device_seconds, "price": None if start.price is None else start.price.as_row()}
            for start in account.starts
        ],
    }
