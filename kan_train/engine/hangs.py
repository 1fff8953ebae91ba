"""From what each rank says that it waits in: who did not arrive.

A record is what `waiting.look` gives, with the rank, host, pid, phase, step and seconds since the last beat. Knows neither files nor torch.

Whether a rank has arrived at a collective is told by the count of the collectives that it has started in that group, where every member that answers knows
its count; else by whether it waits in the same collective of the same group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kan_train.engine.waiting import EVERYONE, TRANSFERS

Records = Mapping[int, Mapping[str, Any]]

SILENT = "no answer: stopped, dead, or cut off from the run directory"

# torch has several names for one thing: all_gather_into_tensor and all_gather_single meet each other.
_KINDS = ("all_gather", "all_reduce", "all_to_all", "reduce_scatter", "broadcast", "barrier", "gather", "scatter", "reduce")


@dataclass
class _Call:
    """A collective that somebody waits in."""

    collective: str
    group: str | None
    desc: str
    members: tuple[int, ...]
    number: int | None
    peers: dict[int, int] = field(default_factory=dict)  # waiting rank -> other end of its transfer
    waiting: dict[int, Any] = field(default_factory=dict)  # rank -> where it asked for it
    absent: list[int] = field(default_factory=list)
    how: str = "frame"

    def identity(self) -> tuple[Any, ...]:
        """Equal for what ranks believe to be the same collective, whichever it is."""
        return self.group, self.members, self.number


def hang_report(records: Records, world_size: int) -> dict[str, Any]:
    """What the ranks that answered tell together, as JSON can hold it.

    summary: one or two sentences. did_not_arrive: [{rank, where}], the ranks that others wait for and that wait for nobody themselves; where ranks wait for
    each other in a ring, those that most ranks wait for. collectives: [{collective, group, desc, ranks, call, waiting, absent, peers, caller, how}].
    silent: ranks without a record. ranks: rank -> {where, host, pid, phase, step, seconds}. stacks: [{ranks, frames}], alike ones once.
    """
    calls = _calls(records, world_size)
    silent = [rank for rank in range(world_size) if rank not in records]
    first, ring = _first(calls)
    where = {rank: _where(rank, records, calls) for rank in range(world_size)}
    return {
        "summary": _summary(calls, first, where, ring, world_size),
        "did_not_arrive": [{"rank": rank, "where": where[rank]} for rank in first],
        "silent": silent,
        "collectives": [_as_json(call) for call in calls],
        "ranks": {str(rank): _position(record) | {"where": where[rank]} for rank, record in sorted(records.items())},
        "stacks": _stacks(records),
    }


def _first(calls: Sequence["_Call"]) -> tuple[list[int], bool]:
    """The ranks at which the waiting begins, and whether they wait for each other in a ring."""
    absent = sorted({rank for call in calls for rank in call.absent})
    # A rank may sleep with a collective under way that others have not started: it waits in it only if nothing better is known.
    for believed in (calls, [call for call in calls if call.how != "unfinished"]):
        waiting = {rank for call in believed if call.absent for rank in call.waiting}
        if first := [rank for rank in absent if rank not in waiting]:
            return first, False
    most = max((len(call.waiting) for call in calls if call.absent), default=0)
    return sorted({rank for call in calls if len(call.waiting) == most for rank in call.absent}), bool(absent)


def report_text(report: Mapping[str, Any]) -> str:
    """A `hang_report`, with the watchdog's own entries, for people."""
    lines = [f"HANG: {report['summary']}"]
    for call in report["collectives"]:
        lines.append(f"  {_title(call)}: {_there(call['waiting'])}{_how(call)}")
        lines.append(f"    not there: {ranks_text(call['absent'])}" if call["absent"] else "    who is not there cannot be seen")
    lines += [f"  rank {rank} {entry['where']}" for rank, entry in report["ranks"].items()]
    if report["silent"]:
        lines.append(f"  {ranks_text(report['silent'])}: {SILENT}")
    for stack in report["stacks"]:
        lines += [f"  Stack of {ranks_text(stack['ranks'])}, outermost call first:", *(f"    {line}" for line in stack["frames"])]
    return "\n".join(lines) + "\n"


def _calls(records: Records, world_size: int) -> list[_Call]:
    found: dict[tuple[Any, ...], _Call] = {}
    for rank, record in sorted(records.items()):
        for wait in record["waits"]:
            group = record["groups"].get(wait["group"])
            # Of a group that cannot be seen it is known that this rank is in it.
            members = tuple(range(world_size)) if wait["collective"] in EVERYONE else tuple(group["ranks"]) if group else (rank,)
            number = wait["call"] if _counted(records, wait["group"], members) else None
            key = (wait["group"], members, _kind(wait["collective"]), number, (rank, wait["peer"]) if wait["collective"] in TRANSFERS else None)
            call = found.setdefault(key, _Call(wait["collective"], wait["group"], group["desc"] if group else "", members, number, how=wait["how"]))
            call.waiting[rank] = wait["caller"] or call.waiting.get(rank)
            if wait["how"] != "unfinished":
                call.how = wait["how"]
            if wait["peer"] is not None:
                call.peers[rank] = wait["peer"]
    seen = {call.identity() for call in found.values() if call.how != "unfinished"}
    calls = [call for call in found.values() if call.how != "unfinished" or call.identity() not in seen]
    for call in calls:
        call.absent = _absent(call, calls, records)
    # A collective that the recorder alone names and that all have started is on its way: it tells nothing.
    return sorted((call for call in calls if call.absent or call.how != "unfinished"), key=lambda call: (-len(call.waiting), call.members))


def _kind(collective: str) -> str:
    return next((kind for kind in _KINDS if collective.startswith(kind)), collective)


def _counted(records: Records, group: str | None, members: Sequence[int]) -> bool:
    entries = [records[rank]["groups"].get(group) for rank in members if rank in records]
    return all(entry is not None and entry["issued"] is not None for entry in entries)


def _absent(call: _Call, calls: Sequence[_Call], records: Records) -> list[int]:
    if call.collective in TRANSFERS:
        return sorted(set(call.peers.values()) - _other_ends(call, calls))
    # A rank that waits in another collective under the same number has not arrived at this one, whatever the count says.
    others = [other for other in calls if other is not call and other.identity() == call.identity() and other.collective not in TRANSFERS]
    mistaken = {rank for other in others if other.how != "unfinished" for rank in other.waiting}
    return [rank for rank in call.members if rank not in call.waiting and (rank in mistaken or not _started(rank, call, records))]


def _other_ends(call: _Call, calls: Sequence[_Call]) -> set[int]:
    """Ranks that wait in the other half of a transfer with the one that waits here."""
    (rank,) = call.waiting
    other = "recv" if "send" in call.collective else "send"
    return {there for found in calls if other in found.collective for there, peer in found.peers.items() if peer == rank}


def _started(rank: int, call: _Call, records: Records) -> bool:
    if rank not in records or call.number is None:
        return False
    return records[rank]["groups"][call.group]["issued"] >= call.number


def _where(rank: int, records: Records, calls: Sequence[_Call]) -> str:
    """What a rank does, to follow its number."""
    if rank not in records:
        return f"gives {SILENT}"
    record = records[rank]
    position = f"phase {record['phase']}, step {record['step']}, {record['seconds']:.1f} s after its last beat, {record['host']} pid {record['pid']}"
    waits = [f"{_title(_as_json(call))} ({place})" for call in calls if call.how != "unfinished" and (place := _called(call, rank))]
    if waits:
        return f"waits in {' and in '.join(waits)}; {position}"
    at, own = record["at"], record["project"]
    inside = f", for {own['file']}:{own['line']} in {own['function']}" if own is not None and own != at else ""
    return f"is in `{at['code']}` at {at['file']}:{at['line']} in {at['function']}{inside}; {position}"


def _called(call: _Call, rank: int) -> str | None:
    place = call.waiting.get(rank)
    return None if place is None else f"called from {place['file']}:{place['line']} in {place['function']}"


def _summary(calls: Sequence[_Call], first: Sequence[int], where: Mapping[int, str], ring: bool, world_size: int) -> str:
    if not first:
        silent = [rank for rank in range(world_size) if where[rank].endswith(SILENT)]
        if silent:
            return f"{ranks_text(silent)}: {SILENT}; no other rank is seen to wait in a collective"
        if calls:
            return f"{_title(_as_json(calls[0]))} is waited for by {ranks_text(list(calls[0].waiting))}; who did not arrive cannot be seen from here"
        return "no rank waits for another: " + "; ".join(f"rank {rank} {where[rank]}" for rank in range(min(world_size, 4)))
    told = [f"{_title(_as_json(call))} ({_there(list(call.waiting))})" for call in calls if set(call.absent) & set(first)]
    names = "; ".join(f"rank {rank} {where[rank]}" for rank in first[:8]) + (f"; and {len(first) - 8} more" if len(first) > 8 else "")
    return f"{ranks_text(first)} did not arrive at {', nor at '.join(told)}{': ranks wait for each other' if ring else ''}. {names}"


def _as_json(call: _Call) -> dict[str, Any]:
    caller = next((place for rank in call.waiting if (place := _called(call, rank)) is not None), None)
    return {
        "collective": call.collective,
        "group": call.group,
        "desc": call.desc,
        "ranks": list(call.members),
        "call": call.number,
        "waiting": list(call.waiting),
        "absent": call.absent,
        "peers": {str(rank): peer for rank, peer in call.peers.items()},
        "caller": caller,
        "how": call.how,
    }


def _title(call: Mapping[str, Any]) -> str:
    name = f"group {call['group']}" if call["desc"] in ("", "undefined") else f"group {call['desc']}"
    place = f"{name} ({ranks_text(call['ranks'])})"
    if call["group"] is None:
        place = "all processes" if call["collective"] in EVERYONE else "a group that cannot be seen"
    for peer in call["peers"].values():
        return f"{call['collective']} {'to' if 'send' in call['collective'] else 'from'} rank {peer} in {place}"
    return f"{call['collective']} of {place}" + ("" if call["call"] is None else f", its call {call['call']}")


def _there(ranks: Sequence[int]) -> str:
    return f"{ranks_text(ranks)} {'is' if len(ranks) == 1 else 'are'} there"


def _how(call: Mapping[str, Any]) -> str:
    if call["how"] == "unfinished":
        return " as torch's flight recorder has it: started, and not finished"
    return f" ({call['caller']})" if call["caller"] else ""


def _position(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("host", "pid", "phase", "step", "seconds")}


def _stacks(records: Records) -> list[dict[str, Any]]:
    alike: dict[tuple[str, ...], list[int]] = {}
    for rank, record in sorted(records.items()):
        alike.setdefault(tuple(record["stack"]), []).append(rank)
    return [{"ranks": ranks, "frames": list(frames)} for frames, ranks in alike.items()]


def ranks_text(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "ranks 0-2, 5"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'' if len(ranks) == 1 else 's'} {text}"
