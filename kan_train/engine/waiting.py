"""What the threads of a process are doing, read from their Python frames and from torch's flight recorder.

Nothing is patched, no collective is called, and torch is looked at only if the process has loaded it. What is known depends on the backend:

- gloo: the CPU blocks inside the collective, or in `wait()` of one that was started before. Its name, group and peer stand in the frames.
- NCCL: a collective returns when it is queued, and the CPU blocks later, where it needs a number: `.item()`, `synchronize()`. The frames then show that
  place and no collective. What was queued and has not finished comes from torch's flight recorder, which counts the collectives of each group
  (TORCH_FR_BUFFER_SIZE, on by default). gloo's are recorded too.
"""

import ast
import inspect
import itertools
import json
import linecache
import os
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

OWN_THREADS = "kan-watchdog"
"""Beginning of the names of threads that are left out: those that look."""

OPERATIONS = (
    "broadcast", "all_reduce", "all_reduce_coalesced", "reduce", "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "gather", "scatter",
    "reduce_scatter", "all_to_all_single", "all_to_all", "send", "recv", "recv", "barrier", "reduce_scatter_tensor",
)  # fmt: skip
"""Names of torch's OpType, by number: what a Work says that it is."""

TRANSFERS = ("send", "recv", "isend", "irecv")
"""Between two ranks; not counted among a group's collectives."""
EVERYONE = ("init_process_group", "new_group", "split_group")
"""Called by all processes, whatever the group."""

_HERE = Path(__file__).resolve().parent.parent
_CLOCK = str(Path(__file__).with_name("collectives.py"))
_COLLECTIVES = "torch/distributed/distributed_c10d.py"
# Wrappers between a collective and the code that asked for it: naming them would tell a reader nothing.
_WRAPPERS = ("-packages/torch/", "-packages/deepspeed/comm/", "-packages/deepspeed/utils/", "/typing_extensions.py")
_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]


def stacks_text() -> str:
    """Python stacks of all threads, the main one first."""
    parts = []
    for name, frame in _threads(threading.main_thread().ident):
        parts += [f"Thread {name}, outermost call first:\n", *traceback.format_stack(frame), "\n"]
    return "".join(parts)


def look(watched: int | None = None) -> dict[str, Any]:
    """This process now, as JSON can hold it. watched: ident of the thread that trains; None: the main thread.

    at: innermost frame of that thread. project: its innermost frame in this package, or None. stack: its frames as lines, outermost first.
    groups: name -> {desc, ranks, issued}; issued counts the collectives that this rank has started in the group, None where it is not known.
    waits: [{collective, group, call, peer, thread, how, caller}]. group: a name, None for all ranks. call: the number of this collective in its group.
    peer: the other rank of a transfer. how: "frame" and "work" stand in the stack; "unfinished" is the oldest of a group that the recorder knows of.
    """
    recorded = _recorded()
    groups = _groups(recorded)
    threads = list(_threads(watched if watched is not None else threading.main_thread().ident))
    waits = []
    for name, frame in threads:
        with suppress(Exception):  # another torch, with other names: the stack is still worth having
            wait = _wait(_outward(frame), groups, recorded)
            waits += [] if wait is None else [wait | {"thread": name}]
    named = {(wait["group"], wait["call"]) for wait in waits}
    for name in groups:
        oldest = next((entry for entry in recorded if entry["group"] == name and not entry["finished"] and not entry["transfer"]), None)
        if oldest is not None and (name, oldest["call"]) not in named:
            waits.append(_found(oldest["operation"], name, oldest["call"], None, "unfinished", None) | {"thread": None})
    frames = _outward(threads[0][1])
    own = next((frame for frame in frames if _HERE in Path(frame.f_code.co_filename).parents), None)
    return {
        "at": _place(frames[0]),
        "project": None if own is None else _place(own),
        "stack": [_line(_place(frame)) for frame in reversed(frames)],
        "groups": groups,
        "waits": waits,
    }


def _line(place: dict[str, Any]) -> str:
    return f"{place['file']}:{place['line']} in {place['function']}: {place['code']}"


def _threads(first: int | None) -> Iterator[tuple[str, FrameType]]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    for ident in sorted(frames, key=lambda ident: ident != first):
        # Threads of C++, such as autograd's on CUDA, run Python frames and have no name.
        name = names.get(ident, f"{ident}")
        if not name.startswith(OWN_THREADS):
            yield name, frames[ident]


def _outward(frame: FrameType | None) -> list[FrameType]:
    if frame is not None and frame.f_code.co_filename == _CLOCK:  # the clock around a collective is not where a thread waits
        frame = frame.f_back
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _place(frame: FrameType) -> dict[str, Any]:
    """Where a frame is: file, line, function, and the call that it is in."""
    name = frame.f_code.co_filename
    for prefix in (f"{_HERE.parent}{os.sep}", f"site-packages{os.sep}", f"{_STANDARD_LIBRARY}{os.sep}"):
        name = name.rpartition(prefix)[2]
    return {"file": name, "line": frame.f_lineno, "function": frame.f_code.co_qualname, "code": _expression(frame)[:160]}


def _expression(frame: FrameType) -> str:
    """Source of the call that a frame is in, on one line; empty where the source is not there."""
    span = next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None), (None,) * 4)
    line, end, column, end_column = span
    if line is None or end is None or column is None or end_column is None:
        return linecache.getline(frame.f_code.co_filename, frame.f_lineno or 0).strip()
    lines = [linecache.getline(frame.f_code.co_filename, number).encode() for number in range(line, end + 1)]  # columns count bytes
    lines[-1] = lines[-1][:end_column]
    lines[0] = lines[0][column:]
    return " ".join(b"".join(lines).decode(errors="replace").split())


# --- which collective ---------------------------------------------------------------------------------------------------------------------------------


def _wait(frames: Sequence[FrameType], groups: dict[str, Any], recorded: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The collective that a thread waits in; frames: innermost first."""
    inside = [frame for frame in frames if frame.f_code.co_filename.endswith(_COLLECTIVES) and frame.f_code.co_name != "wait"]
    if inside:
        entered = inside[-1]  # the outermost: all_gather_object rather than the all_gather in it
        operation, local = entered.f_code.co_name, entered.f_locals
        group = None if operation in EVERYONE else _name(local.get("group"))
        # What goes through the store or between two ranks is not counted.
        issued = groups[group]["issued"] if group in groups and operation not in (*TRANSFERS, "monitored_barrier") else None
        return _found(operation, group, issued, _peer(local) if operation in TRANSFERS else None, "frame", _caller(frames, entered))
    work = _awaited(frames[0])
    if work is None:
        return None
    number, seen = work._get_op_type(), _groups_in_sight(frames)
    operation = OPERATIONS[number] if number < len(OPERATIONS) else "a collective"
    entry = None if operation in TRANSFERS else _entry(operation, seen, recorded)
    group, call = (seen.pop() if len(seen) == 1 else None, None) if entry is None else (entry["group"], entry["call"])
    peer = _pipeline_peer(frames, work) if operation in TRANSFERS else None
    return _found(operation, group, call, peer, "work", _caller(frames, None))


def _found(operation: str, group: str | None, call: int | None, peer: int | None, how: str, caller: dict[str, Any] | None) -> dict[str, Any]:
    return {"collective": operation, "group": group, "call": call, "peer": peer, "how": how, "caller": caller}


def _caller(frames: Sequence[FrameType], entered: FrameType | None) -> dict[str, Any] | None:
    """The innermost frame outside torch and its wrappers that asked for a collective."""
    outside = itertools.dropwhile(lambda frame: frame is not entered, frames) if entered is not None else iter(frames)
    for frame in outside:
        name = frame.f_code.co_filename
        if not any(wrapper in name for wrapper in _WRAPPERS) and (not name.startswith(_STANDARD_LIBRARY) or "site-packages" in name):
            return _place(frame)
    return None


def _awaited(frame: FrameType) -> Any | None:
    """The torch Work whose wait() a frame is in. wait() is C++ and has no frame: the call is read from the source, and its object looked up."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None:
        return None
    try:
        node = ast.parse(_expression(frame), mode="eval").body
    except SyntaxError:
        return None
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("wait", "synchronize")):
        return None
    found = _looked_up(node.func.value, frame)
    return found if isinstance(found, distributed.Work) else None


def _looked_up(node: ast.expr, frame: FrameType) -> Any:
    if isinstance(node, ast.Name):
        return frame.f_locals.get(node.id, frame.f_globals.get(node.id))
    if isinstance(node, ast.Attribute):  # no property of another thread's object is run
        return inspect.getattr_static(_looked_up(node.value, frame), node.attr, None)
    return None


def _entry(operation: str, groups: set[str], recorded: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The oldest unfinished collective that a Work may stand for; None where that is not clear."""
    entries = [entry for entry in recorded if not entry["finished"] and not entry["transfer"] and (not groups or entry["group"] in groups)]
    # gloo records a reduce_scatter as the all_reduce that it is made of: what has no entry of its name may have another's.
    entries = [entry for entry in entries if operation.startswith(entry["operation"])] or entries
    return entries[0] if len({entry["group"] for entry in entries}) == 1 else None


def _groups_in_sight(frames: Sequence[FrameType]) -> set[str]:
    """Names of groups among the variables of the innermost frames and of their objects."""
    found = set()
    for frame in frames[:3]:
        local = frame.f_locals
        values = [*local.values(), *getattr(local.get("self"), "__dict__", {}).values()]
        found |= {name for value in values if type(value).__name__ == "ProcessGroup" and (name := _name(value)) is not None}
    return found


# --- the other end of a transfer ----------------------------------------------------------------------------------------------------------------------


def _peer(local: dict[str, Any]) -> int | None:
    """The other rank, from the variables of send, recv, isend or irecv."""
    for name in ("dst", "src"):
        if isinstance(local.get(name), int):
            return local[name]
    for name in ("group_dst", "group_src"):
        if isinstance(local.get(name), int):
            try:
                return sys.modules["torch.distributed"].get_process_group_ranks(local.get("group"))[local[name]]
            except Exception:  # a group that was given up
                return None
    return None


def _pipeline_peer(frames: Sequence[FrameType], work: Any) -> int | None:
    """The neighbour that one of Megatron's pipeline transfers goes to or comes from."""
    local = frames[0].f_locals
    ends = {"prev": local.get("prev_rank"), "next": local.get("next_rank")}
    communicator = getattr(local.get("p2p_communicator"), "__dict__", {})
    ends = {way: communicator.get(f"{way}_rank") if rank is None else rank for way, rank in ends.items()}
    requests = local.get("reqs")
    if isinstance(requests, dict):
        label = next((name for name, request in requests.items() if request is work), "")
    elif isinstance(requests, list):  # in the order in which the batch was put together
        names = [f"{kind}_{way}" for way in ("prev", "next") for kind in ("send", "recv")]
        asked = [name for name in names if local.get(f"tensor_{name}") is not None]
        label = next((name for name, request in zip(asked, requests, strict=False) if request is work), "")
    else:
        label = _expression(frames[0])  # recv_prev_wait_handle.wait()
    rank = next((ends[way] for way in ends if f"_{way}" in label), None)
    return rank if isinstance(rank, int) else None


# --- torch's own books --------------------------------------------------------------------------------------------------------------------------------


def _world() -> Any | None:
    module = sys.modules.get("torch.distributed.distributed_c10d")
    return getattr(module, "_world", None)


def _name(group: Any) -> str | None:
    world = _world()
    try:
        return None if world is None else world.pg_names.get(world.default_pg if group is None else group)
    except Exception:  # not a group, or none was started yet
        return None


def _groups(recorded: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    world = _world()
    if world is None:
        return found
    for group, name in list(world.pg_names.items()):
        try:
            calls = [entry["call"] for entry in recorded if entry["group"] == name and not entry["transfer"]]
            # torch's own number counts transfers as well, which are not alike on all ranks: it tells no more than that nothing was started.
            issued = max(calls) if calls else (0 if group._get_sequence_number_for_group() == 0 else None)
            found[name] = {"desc": group.group_desc, "ranks": sorted(world.pg_group_ranks[group]), "issued": issued}
        except Exception:
            continue  # a group that is being given up; the others are still worth knowing
    return found


def _recorded() -> list[dict[str, Any]]:
    """Collectives that torch's flight recorders remember, oldest first."""
    module, found = sys.modules.get("torch._C._distributed_c10d"), []
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        try:
            entries = json.loads(getattr(module, name)())["entries"]
        except Exception:  # not in this build of torch, or another form
            continue
        for entry in entries:
            operation = entry["profiling_name"].rpartition(":")[2]
            finished = bool(entry["retired"]) or entry["state"] == "completed"
            found.append(
                {
                    "group": entry["process_group"][0],
                    "operation": operation,
                    "call": entry["collective_seq_id"],
                    "transfer": bool(entry["is_p2p"]),
                    "finished": finished,
                }
            )
    return found
