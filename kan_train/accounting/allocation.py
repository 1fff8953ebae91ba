"""When which devices were a run's: the starts of its ledger, and what its launcher knows of them (RUN/launch/attempts.jsonl).

A ledger begins when the loop does and ends with the last event before a process dies. The launcher knows when it was given the devices, and when it saw
the processes ended: also of a start that never came to its loop, and of one that was killed. Of an end that the launcher did not live to see (it says so:
"seen": false, at the time of the next start) the scheduler may know when it was ("until"); where nobody does, the last event stands for it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kan_train.accounting.lines import Row, read_whole_lines

ATTEMPTS = Path("launch") / "attempts.jsonl"
"""Where a launcher records its starts, below a run directory."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Devices that one start of a run had, and its events."""

    events: tuple[Row, ...]
    """Of one segment of the ledger; none where the start never came to its loop."""
    devices: int
    """How many, those that the run left unused on its nodes included."""
    used: int
    """Those that a process of the run had."""
    device: str
    """As the driver reports it."""
    started: float
    """When they were allocated, seconds since 1970."""
    lead: float
    """Seconds from then until the first process began."""
    tail: float
    """Seconds from the last event, or where there is none from `started`, until the devices were free; 0 where nobody knows."""


@dataclass(frozen=True)
class _Span:
    """A start as its launcher saw it."""

    started: float
    ended: float | None
    devices: int | None


def read_attempts(run_dir: Path) -> list[Row]:
    """The launcher's events, oldest first; none where the run was not launched. Torn lines do not count."""
    return read_whole_lines(run_dir / ATTEMPTS)


def allocations(events: Iterable[Row], attempts: Iterable[Row] = ()) -> list[Allocation]:
    """Every start of a run, by time: from the events of its ledger, and of its launcher where there was one."""
    segments: dict[int, list[Row]] = {}
    for event in events:
        segments.setdefault(event["segment"], []).append(event)
    waiting = list(segments.values())
    found: list[Allocation] = []
    spans = _spans(attempts)
    for number, span in enumerate(spans):
        until = span.ended if span.ended is not None else spans[number + 1].started if number + 1 < len(spans) else float("inf")
        own = [rows for rows in waiting if span.started <= rows[0]["time"] <= until]
        waiting = [rows for rows in waiting if rows not in own]
        found += _of_span(span, own)
    found += [_of_segment(rows, started=_process_start(rows), ended=None) for rows in waiting]
    found.sort(key=lambda allocation: allocation.started)
    return _named(found)


def _of_span(span: _Span, segments: Sequence[list[Row]]) -> list[Allocation]:
    """One start of the launcher: usually one segment; several where processes were started again without it, none where they died early."""
    if not segments:
        seconds = max(0.0, span.ended - span.started) if span.ended is not None else 0.0
        return [Allocation(events=(), devices=span.devices or 0, used=span.devices or 0, device="", started=span.started, lead=0.0, tail=seconds)]
    found = []
    for number, rows in enumerate(segments):
        started = span.started if number == 0 else _process_start(rows)
        ended = _process_start(segments[number + 1]) if number + 1 < len(segments) else span.ended
        found.append(_of_segment(rows, started=started, ended=ended))
    return found


def _of_segment(rows: list[Row], *, started: float, ended: float | None) -> Allocation:
    first, last = rows[0], rows[-1]
    lead = max(0.0, _process_start(rows) - started)
    tail = max(0.0, ended - last["time"]) if ended is not None else 0.0
    used = first["world_size"]
    devices = max(used, first.get("devices", used))
    return Allocation(events=tuple(rows), devices=devices, used=used, device=first["device"], started=started, lead=lead, tail=tail)


def _process_start(rows: Sequence[Row]) -> float:
    return rows[0]["time"] - rows[0].get("process_seconds", 0.0)


def _named(found: list[Allocation]) -> list[Allocation]:
    # A start that never came to its loop says nothing of its devices: those of the next one that did, or else of the last, are taken for them.
    named = []
    for number, one in enumerate(found):
        others = [other for other in (*found[number:], *reversed(found[:number])) if other.events]
        if not one.events and others:
            other = others[0]
            same = one.used in (0, other.used)
            one = replace(one, device=other.device, devices=other.devices if same else one.devices, used=other.used if same else one.used)
        named.append(one)
    return named


def _spans(attempts: Iterable[Row]) -> list[_Span]:
    devices: dict[int, int] = {}
    started: dict[tuple[str, int], Row] = {}
    ended: dict[tuple[str, int], float] = {}
    for row in attempts:
        key = (row["job_id"], row["restart"])
        if row["event"] == "submitted" and "nodes" in row:
            devices[row["job"]] = row["nodes"] * row["processes_per_node"]
        elif row["event"] == "started":
            started[key] = row
        elif row["event"] == "ended" and (row.get("seen", True) or "until" in row):
            ended.setdefault(key, row["until"] if "until" in row else row["time"])
    spans = [_Span(row["allocated"] if "allocated" in row else row["time"], ended.get(key), devices.get(row["job"])) for key, row in started.items()]
    return sorted(spans, key=lambda span: span.started)
