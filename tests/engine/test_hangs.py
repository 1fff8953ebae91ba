"""Records written by hand: what ranks say that they wait in, and who is then said not to have arrived."""

from typing import Any

import pytest

from kan_train.engine.hangs import hang_report, report_text

CALLER = {"file": "train.py", "line": 5, "function": "step", "code": "f()"}


def wait(collective: str, group: str | None, call: int | None = None, *, peer: int | None = None, how: str = "frame") -> dict[str, Any]:
    caller = None if how == "unfinished" else CALLER
    return {"collective": collective, "group": group, "call": call, "peer": peer, "how": how, "caller": caller, "thread": "MainThread"}


def record(*waits: dict[str, Any], **issued: tuple[list[int], int | None]) -> dict[str, Any]:
    """issued: group -> its ranks, and how many collectives this rank has started in it."""
    place = {"file": "data.py", "line": 7, "function": "read", "code": "loss.item()"}
    groups = {name: {"desc": f"{name} group", "ranks": ranks, "issued": number} for name, (ranks, number) in issued.items()}
    common = {"host": "a", "pid": 1, "phase": "step", "step": 3, "seconds": 1.0, "at": place, "project": None, "stack": ["x"]}
    return common | {"groups": groups, "waits": list(waits)}


def absent(report: dict[str, Any]) -> list[int]:
    return [entry["rank"] for entry in report["did_not_arrive"]]


def test_without_counts_the_same_place_is_what_counts():
    """One member does not know its count: those in the same collective have arrived, and nobody else."""
    records = {
        0: record(wait("all_reduce", "data", 4), data=([0, 1, 2], 4)),
        1: record(wait("all_reduce", "data", 7), data=([0, 1, 2], 7)),
        2: record(data=([0, 1, 2], None)),
    }
    report = hang_report(records, 3)
    (call,) = report["collectives"]
    assert (call["call"], call["waiting"], call["absent"], absent(report)) == (None, [0, 1], [2], [2])


def test_a_rank_behind_by_one_call_of_the_same_kind():
    records = {
        0: record(wait("all_reduce", "data", 5), data=([0, 1], 5)),
        1: record(wait("all_reduce", "data", 4), data=([0, 1], 4)),
    }
    report = hang_report(records, 2)
    assert absent(report) == [1]
    assert "rank 1 did not arrive at all_reduce of group data group (ranks 0-1), its call 5" in report["summary"]


@pytest.mark.parametrize("names", [("all_gather_into_tensor", "all_gather_single"), ("reduce_scatter_tensor", "reduce_scatter_single")])
def test_two_names_of_one_collective(names):
    first, second = names
    group = ([0, 1, 2], 5)
    records = {0: record(wait(first, "z", 5), z=group), 1: record(wait(second, "z", 5, how="work"), z=group), 2: record(z=([0, 1, 2], 4))}
    report = hang_report(records, 3)
    assert [call["waiting"] for call in report["collectives"]] == [[0, 1]]
    assert absent(report) == [2]


def test_queued_collectives_lead_to_the_rank_that_did_not_queue():
    """As with NCCL: nobody is seen to wait. 0 waits for 1 in its pair, which cannot go on because 2 is missing in another group."""
    records = {
        0: record(wait("all_reduce", "pair", 8, how="unfinished"), pair=([0, 1], 8)),
        1: record(wait("all_gather", "data", 6, how="unfinished"), pair=([0, 1], 7), data=([1, 2], 6)),
        2: record(data=([1, 2], 5)),
    }
    report = hang_report(records, 3)
    assert absent(report) == [2]
    assert "flight recorder" in report_text(report)
    assert report["ranks"]["2"]["where"].startswith("is in `loss.item()` at data.py:7 in read; phase step, step 3")


def test_what_is_under_way_and_started_by_all_is_left_out():
    records = {rank: record(wait("all_reduce", "data", 8, how="unfinished"), data=([0, 1], 8)) for rank in range(2)}
    report = hang_report(records, 2)
    assert (report["collectives"], report["did_not_arrive"]) == ([], [])


def test_a_sleeper_with_a_collective_under_way_is_the_one():
    """Rank 1 has started what rank 0 has not, but sleeps, and rank 0 waits for it: the sleeper waits for nobody."""
    records = {
        0: record(wait("barrier", "data", 3), data=([0, 1], 3), z=([0, 1], 1)),
        1: record(wait("all_gather", "z", 2, how="unfinished"), data=([0, 1], 2), z=([0, 1], 2)),
    }
    assert absent(hang_report(records, 2)) == [1]


def test_a_started_collective_that_the_recorder_names_otherwise():
    """torch records all_gather_object as the all_gather in it: no mismatch."""
    records = {
        0: record(wait("all_gather_object", "data", 5), data=([0, 1, 2], 5)),
        1: record(wait("all_reduce", "data", 5, how="unfinished"), data=([0, 1, 2], 5)),
        2: record(data=([0, 1, 2], 4)),
    }
    report = hang_report(records, 3)
    assert [(call["waiting"], call["absent"]) for call in report["collectives"]] == [([0], [2])]


def test_a_dead_rank_during_start_up():
    """No group is there yet: all processes are meant."""
    report = hang_report({rank: record(wait("init_process_group", None)) for rank in (0, 1, 3)}, 4)
    assert (absent(report), report["silent"]) == ([2], [2])
    assert "rank 2 did not arrive at init_process_group of all processes" in report["summary"]


def test_a_wait_in_a_group_that_cannot_be_seen_accuses_nobody():
    report = hang_report({0: record(wait("all_reduce", None, how="work")), 1: record()}, 2)
    assert report["did_not_arrive"] == []
    assert "who did not arrive cannot be seen" in report["summary"]


def test_a_silent_rank_is_told_of_where_nobody_is_seen_to_wait():
    report = hang_report({0: record()}, 2)
    assert report["summary"].startswith("rank 1: no answer")


def test_the_two_halves_of_a_transfer_have_met():
    records = {
        0: record(wait("send", "pipe", peer=1), pipe=([0, 1, 2], 0)),
        1: record(wait("recv", "pipe", peer=0), pipe=([0, 1, 2], 0)),
        2: record(wait("recv", "pipe", peer=1), pipe=([0, 1, 2], 0)),
    }
    calls = {tuple(call["waiting"]): call["absent"] for call in hang_report(records, 3)["collectives"]}
    assert calls == {(0,): [], (1,): [], (2,): [1]}


def test_alike_stacks_are_written_once():
    records = {rank: record() | {"stack": ["sleep" if rank == 5 else "x"]} for rank in (0, 1, 2, 5, 6)}
    text = report_text(hang_report(records, 7))
    assert text.count("Stack of") == 2
    assert "Stack of ranks 0-2, 6, outermost call first:\n    x\n" in text
    assert "Stack of rank 5, outermost call first:\n    sleep\n" in text
    assert "ranks 3-4: no answer" in text
