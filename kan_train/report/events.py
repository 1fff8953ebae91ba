"""What happened in a run besides steps, as lines of a table and marks on curves."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kan_train.accounting.lines import Row
from kan_train.report import text
from kan_train.report.spending import Spending

KINDS = {
    "start": "starts and ends",
    "restart": "restarts and rewinds",
    "save": "saves",
    "validation": "validations and evaluations",
    "trouble": "hangs, stragglers, bad steps",
    "budget": "budget",
}
"""Kind of an event -> what it is called, in the order in which they are shown."""

OF_LEDGER = {
    "segment_start": "start", "segment_end": "start", "signal": "start", "restart": "restart", "rewind": "restart", "save": "save", "save_failed": "trouble",
    "prune_failed": "trouble", "validation": "validation", "validation_stopped": "validation", "evaluation": "validation", "evaluation_stopped": "validation",
    "hang": "trouble", "straggler": "trouble", "slow_link": "trouble", "skipped_step": "trouble", "spike_step": "trouble", "budget": "budget",
}  # fmt: skip
"""Event of the ledger -> its kind; others are not shown."""

OF_LAUNCHER = {"unhealthy": "trouble", "ended": "start", "requeued": "restart", "resubmitted": "restart", "gave_up": "trouble", "cancelled": "start"}
"""The same of a launcher's events."""

COMMON = ("save", "validation")
"""Kinds of which a long run has thousands."""

SHOWN, SHOWN_COMMON = 300, 60
"""Lines of the table: of the rare kinds, and of each of the common ones; the newest are kept."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened."""

    time: float
    """Seconds since 1970."""
    kind: str
    """One of KINDS."""
    name: str
    """As the ledger or the launcher calls it, in words."""
    detail: str
    """What is known of it."""
    segment: int | None
    """Start of the run; None of a launcher's."""
    step: int | None
    tokens: int | None
    """How far the run was; None of a launcher's."""
    seconds: float | None
    """What it took; None where that is not told."""
    dollars: float | None
    """What those seconds of all devices cost; None without a price."""
    device_seconds: float | None
    """What the run had spent by then."""
    spent: float | None
    """The same in dollars."""


def events_of(ledger: Iterable[Row], attempts: Iterable[Row], spending: Spending) -> list[Event]:
    """Everything worth a line, oldest first."""
    found = [_of_ledger(row, spending) for row in ledger if row["event"] in OF_LEDGER]
    found += [_of_launcher(row) for row in attempts if row["event"] in OF_LAUNCHER and row.get("reason", row.get("problem"))]
    return sorted(found, key=lambda event: event.time)


def shown(events: Sequence[Event]) -> list[Event]:
    """Those that a table has room for, oldest first."""
    kept: list[Event] = []
    for kind in (None, *COMMON):
        of_kind = [event for event in events if (event.kind if event.kind in COMMON else None) == kind]
        kept += of_kind[-(SHOWN if kind is None else SHOWN_COMMON) :]
    return sorted(kept, key=lambda event: event.time)


def _of_ledger(row: Row, spending: Spending) -> Event:
    kind, seconds = row["event"], row.get("seconds")
    device_seconds, dollars = spending.at_event(row)
    return Event(
        time=row["time"],
        kind=OF_LEDGER[kind],
        name=kind.replace("_", " ").replace("segment", "run"),
        detail=_detail(row),
        segment=row["segment"],
        step=row["step"],
        tokens=row["tokens"],
        seconds=seconds,
        dollars=None if seconds is None else spending.of_seconds(row, seconds),
        device_seconds=device_seconds,
        spent=dollars if spending.has_dollars else None,
    )


def _of_launcher(row: Row) -> Event:
    detail = " ".join(str(row[name]) for name in ("cause", "host", "problem", "reason") if row.get(name))
    nothing = dict.fromkeys(("segment", "step", "tokens", "seconds", "dollars", "device_seconds", "spent"))
    return Event(time=row["time"], kind=OF_LAUNCHER[row["event"]], name=f"launcher: {row['event'].replace('_', ' ')}", detail=detail, **nothing)


def _detail(row: Row) -> str:
    match row["event"]:
        case "segment_start":
            return f"start {row['segment']} on {row['world_size']} x {row['device']}, {row['origin']}"
        case "segment_end":
            return str(row["status"])
        case "restart":
            return f"the start before was {row['previous_status']}; {row['lost_steps']:,} steps to be done again"
        case "rewind":
            return f"{row['bad_steps']} bad steps in a row: back from step {row['from_step']:,} to step {row['step']:,}"
        case "validation":
            return f"loss {row['loss']:.4f}, {row['bits_per_byte']:.4f} bits a byte"
        case "evaluation":
            return ", ".join(f"{task} {score['accuracy']:.1%}" for task, score in row["tasks"].items())
        case "validation_stopped" | "evaluation_stopped":
            return "broken off by a signal"
        case "save":
            return "training waited for it"
        case "save_failed":
            return f"step {row['saved_step']:,}, attempt {row['attempt']}: {row['error']}"
        case "skipped_step" | "spike_step":
            return f"loss {row['loss']:g}, gradient norm {row['grad_norm']:g}; {row['in_a_row']} in a row"
        case "signal":
            return str(row["signal"])
        case "budget":
            forecast = f", forecast {row['forecast']:.4g}" if row.get("forecast") is not None else ""
            return f"{row['kind']}: {row['setting']}={row['cap']:g}, spent {row['spent']:.4g}{forecast}"
        case _:
            return str(row.get("summary", row.get("error", "")))


def counted(events: Iterable[Event]) -> str:
    """In words: restart 3 times, save 41 times."""
    names: dict[str, int] = {}
    for event in events:
        names[event.name] = names.get(event.name, 0) + 1
    return ", ".join(f"{name} {'once' if number == 1 else f'{text.count(number)} times'}" for name, number in names.items())
