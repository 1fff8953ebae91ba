"""What a training run will cost: tokens a second, dollars, how often to save, and what failures add.

    work W = tokens / (tokens a second of all devices)        M = 1 / (failures of a device and hour * devices): hours between failures
    save every t = max(sqrt(2 s M) - s, w)                    Young 1974 (first order), Daly 2006; s seconds that training stands still for a save,
                                                              w seconds until it is written: saves do not overlap
    a failure loses t / 2 + w + R                             half an interval, what was not yet written, and R to start again
    time = W (1 + s / t) / (1 - (t / 2 + w + R) / M)          saves while working; failures while anything runs

Checkpoints hold weights in fp32 or their fp32 copies and two moments, in bf16 the weights too: 12 or 14 bytes a parameter, written by all devices at once.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from kan_train.accounting.flops import parameter_counts
from kan_train.config import Config, ConfigError
from kan_train.planner.candidate import Candidate
from kan_train.planner.quantity import ENDS, Quantity, assumed, given
from kan_train.planner.step import StepTime
from kan_train.planner.time import Clock

_LLAMA = "The Llama 3 Herd of Models (arXiv 2407.21783): 419 unexpected interruptions in 54 days of 16,384 H100"
FAILURES = Quantity(
    value=419 / (54 * 24 * 16384), low=0.5 * 419 / (54 * 24 * 16384), high=2 * 419 / (54 * 24 * 16384), status="cited",
    source=f"{_LLAMA}; half and twice as many at the ends",
)  # fmt: skip
"""Failures of one device in an hour that end a run."""
STORAGE = Quantity(
    value=2e12 / 16384, low=1e12 / 16384, high=7e12 / 16384, status="cited",
    source="the same paper: storage of 2 TB/s sustained and 7 TB/s at best, over 16,384 GPUs; half of the sustained at the slow end",
)  # fmt: skip
"""Bytes a second that one device writes into a checkpoint."""
RESTART = assumed(900.0, 300.0, 1800.0, "from a failure to the next step: finding it, queueing, loading, 5 to 30 minutes; not measured at this size")
"""Seconds."""


STALL = assumed(0.1, 0.02, 0.2, "copying to the host's memory; not measured")
"""Seconds a GB."""


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """What saving and failing take."""

    failures: Quantity = FAILURES
    """A device and hour."""
    storage: Quantity = STORAGE
    """Bytes a second and device."""
    restart: Quantity = RESTART
    """Seconds from a failure to the next step."""
    stall: Quantity = STALL
    """Seconds that training stands still, a GB that a device writes."""


@dataclass(frozen=True, kw_only=True)
class Money:
    """A whole training run at one end of all intervals."""

    tokens_per_second: float
    """Of one device, in its steps."""
    working_hours: float
    """Hours of steps alone."""
    hours: float
    """Hours with saves, failures, replayed steps and restarts; infinite where failures come faster than the run can start again."""
    device_hours: float
    """Of all devices."""
    dollars: float | None
    """None without a price."""
    per_million_tokens: float | None
    """Dollars a million tokens, all included; None without a price."""
    save_every_seconds: float
    """Young and Daly's interval."""
    save_every_steps: int
    """The same as checkpoint.every."""
    checkpoint_bytes: int
    """Of one checkpoint."""
    write_seconds: float
    """To write it, in the background."""
    saving_hours: float
    """Training stands still for saves."""
    failures: float
    """Expected failures, each a restart."""
    replayed_hours: float
    """Steps done again, and work that was lost."""
    restarting_hours: float
    """From failures to the next step."""

    @property
    def goodput(self) -> float:
        """Share of all hours in retained steps."""
        return self.working_hours / self.hours


def reliability_of(results: Path, *, failures: float | None = None, storage_gb: float | None = None, restart_minutes: float | None = None) -> Reliability:
    """What is known: as the user gives it, else the stall from a benchmark of saving, the rest cited or assumed.

    failures: a device and 1,000 hours, 0: none; storage_gb: GB/s of all devices' writes, a device; restart_minutes: from a failure to the next step.
    """
    require_positive("--failures", failures, 0.02, or_zero=True)
    require_positive("--storage", storage_gb, 0.1)
    require_positive("--restart", restart_minutes, 10, or_zero=True)
    files = sorted(results.glob("????-??-??-*-saving.json"))
    stall = Reliability().stall
    if files:
        rows = [row for row in json.loads(files[-1].read_text(encoding="utf-8"))["rows"] if row.get("method") == "kan, background"]
        found = sorted(row["stall_ms_per_gb_of_a_rank"] / 1000 for row in rows)
        if found:
            source = f"benchmarks/results/{files[-1].name}, rows of 'kan, background': on a CPU, with this machine's memory"
            stall = Quantity(value=median(found), low=found[0], high=2 * found[-1], status="measured", source=source)
    return Reliability(
        failures=FAILURES if failures is None else given(failures / 1000, f"--failures {failures}"),
        storage=STORAGE if storage_gb is None else given(storage_gb * 1e9, f"--storage {storage_gb}"),
        restart=RESTART if restart_minutes is None else given(60 * restart_minutes, f"--restart {restart_minutes}"),
        stall=stall,
    )


def require_positive(flag: str, value: float | None, working: float, *, or_zero: bool = False) -> None:
    """ConfigError unless `value` of `flag` is a finite number above 0, or nothing. or_zero: 0 will do. working: a value for the message."""
    if value is not None and not (math.isfinite(value) and (value > 0 or (or_zero and value == 0))):
        raise ConfigError(f"{flag} {value:g} must be a number {'of 0 or more' if or_zero else 'above 0'}; use {flag} {working:g}")


def counted(number: float | None, form: str) -> str:
    """A sum of a run for people, in the format `form`: "-" where it is not known, "never" where the run has no end."""
    return "-" if number is None else "never" if math.isinf(number) else form.format(number)


def money_of(config: Config, world_size: int, step: StepTime, tokens: float, reliability: Reliability, price: float | None, end: str = "expected") -> Money:
    """What `tokens` cost with steps of `step` on world_size devices. price: dollars a device-hour; end: that at which `step` was computed.

    Where failures come faster than the run can start again, ConfigError as expected; at the slow end, which is only assumed, infinite hours.
    """
    batch = config.train.global_batch_size * config.model.sequence_length
    elements, _ = parameter_counts(config.model)
    checkpoint = elements * (14 if config.train.precision == "bf16" else 12)
    write = checkpoint / world_size / reliability.storage.rate(end)
    stall = checkpoint / world_size / 1e9 * reliability.stall.burden(end)
    between = 3600 / (reliability.failures.burden(end) * world_size) if reliability.failures.burden(end) else math.inf
    working = tokens / batch * step.total
    every = max(math.sqrt(2 * stall * between) - stall, write, step.total) if math.isfinite(between) else working
    steps = max(1, round(every / step.total))
    every = steps * step.total
    lost, restart = every / 2 + write, reliability.restart.burden(end)
    ends = lost + restart < between
    if not ends and end == "expected":
        raise ConfigError(
            f"a failure every {between:.0f} s on {world_size} devices leaves no time to train: a failure costs {lost + restart:.0f} s; "
            f"use --restart {between / 600:.2g}, --failures {250 / (lost + restart) / world_size * 3600:.2g}, or fewer devices"
        )
    total = working * (1 + stall / every) / (1 - (lost + restart) / between) if ends else math.inf
    count = total / between
    hours = total / 3600
    dollars = None if price is None else hours * world_size * price
    return Money(
        tokens_per_second=batch / step.total / world_size, working_hours=working / 3600, hours=hours, device_hours=hours * world_size, dollars=dollars,
        per_million_tokens=None if dollars is None else 1e6 * dollars / tokens, save_every_seconds=every, save_every_steps=steps,
        checkpoint_bytes=checkpoint, write_seconds=write, saving_hours=working * stall / every / 3600, failures=count,
        replayed_hours=count * lost / 3600, restarting_hours=count * restart / 3600,
    )  # fmt: skip


def money_at_all_ends(clock: Clock, candidate: Candidate, tokens: float, reliability: Reliability, price: float | None) -> dict[str, Money]:
    """`money_of` with every quantity at its slow end, as expected, and at its fast end."""
    found = {}
    for end in ENDS:
        step = clock.step(candidate.layout, candidate.micro_batch_size, recompute=candidate.recompute, offload=candidate.offload, end=end)
        found[end] = money_of(clock.config, candidate.layout.world_size, step, tokens, reliability, price, end)
    return found
