"""Hangs, made on purpose in processes of their own: each is ended, and told what it was."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kan_train.engine.exits import EXIT_HANG
from kan_train.engine.watchdog import Watchdog

SECONDS = 1.3
STEP = 17

Run = Callable[..., dict]


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment |= {"PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(Path(__file__).parent / "hanging_rank.py")]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()
        assert process.wait(timeout=60) == 0


@pytest.fixture
def run(server: subprocess.Popen, tmp_path: Path) -> Run:
    """run(scenario, world): {codes, seconds, stderr} of each rank, and the report of the one hang, or None."""

    def ranks(scenario: str, world: int, folder: Path | None = None) -> dict:
        folder = folder or tmp_path / "run" / "hangs"
        before = set(folder.glob("*"))
        job = {"scenario": scenario, "world": world, "folder": str(folder), "seconds": SECONDS}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        line = server.stdout.readline()
        assert line, "the server of ranks ended"
        new = [path for path in folder.glob("*") if path not in before and (path / "report.json").exists()]
        assert len(new) <= 1, "one hang, one report"
        told = folder.parent / "on_hang"
        found = {"hang": new[0], "report": json.loads((new[0] / "report.json").read_text()), "text": (new[0] / "report.txt").read_text()} if new else {}
        return {"report": None, "on_hang": told.read_text().splitlines() if told.exists() else []} | json.loads(line) | found

    return ranks


def absent(report: dict) -> list[int]:
    return [entry["rank"] for entry in report["did_not_arrive"]]


def test_a_rank_that_reads_data_for_ever_is_named(run, tmp_path):
    """Its own beats go on, so it learns of the hang from the others' folder. Reports of earlier starts stay as they are."""
    earlier = tmp_path / "run" / "hangs" / f"hang-0004-{Watchdog(tmp_path, 0, 1, 0).start_of}"
    earlier.mkdir(parents=True)
    found = run("data", 3)
    assert found["codes"] == [EXIT_HANG] * 3
    assert max(found["seconds"]) < SECONDS + 4
    report = found["report"]
    assert absent(report) == [2]
    assert "`time.sleep(seconds)` at " in report["did_not_arrive"][0]["where"]
    assert f"hanging_rank.py:{line_of('time.sleep(seconds)')} in read_sample; phase data, step {STEP}, 0." in report["did_not_arrive"][0]["where"]
    (call,) = report["collectives"]
    assert (call["collective"], call["desc"], call["ranks"], call["waiting"], call["absent"]) == ("all_reduce", "default_pg", [0, 1, 2], [0, 1], [2])
    assert call["caller"].endswith("in data")
    assert found["hang"].name.startswith("hang-0005-")
    assert list(earlier.iterdir()) == []
    assert len(found["on_hang"]) == 1, "rank 0 alone, once, although it raises"
    assert sum("HANG: rank 2 did not arrive at all_reduce of group default_pg (ranks 0-2)" in text for text in found["stderr"]) == 1
    for rank in range(3):  # the stack of every rank, by itself and in the report
        stack = (found["hang"] / f"rank-{rank:05d}.txt").read_text()
        assert ("in read_sample" in stack, "in all_reduce" in stack) == (rank == 2, rank != 2)
    assert "Stack of ranks 0-1, outermost call first:" in found["text"]
    assert "Stack of rank 2, outermost call first:" in found["text"]


def line_of(source: str) -> int:
    lines = (Path(__file__).parent / "hanging_rank.py").read_text().splitlines()
    (number,) = [number for number, line in enumerate(lines, 1) if line.strip() == source]
    return number


@pytest.mark.slow
def test_a_stopped_rank_does_not_answer(run):
    """The others wait for a transfer that they started earlier: no frame of torch is on their stacks."""
    found = run("stopped", 3)
    assert found["codes"] == [EXIT_HANG, -9, EXIT_HANG]
    assert max(found["seconds"]) < SECONDS + 8
    report = found["report"]
    assert (absent(report), report["silent"]) == ([1], [1])
    (call,) = report["collectives"]
    assert call["collective"].startswith("all_to_all")
    assert (call["desc"], call["call"], call["waiting"], call["absent"], call["how"]) == ("experts", 1, [0, 2], [1], "work")
    assert call["caller"].endswith("in Transfer.wait")
    assert "no answer: stopped, dead" in report["summary"]


def test_ranks_that_wait_for_each_other_in_two_groups(run):
    """Three wait in a barrier of all, the fourth in its pair for one of them."""
    found = run("mismatch", 4)
    assert found["codes"] == [EXIT_HANG] * 4, "the first to leave must not end the others with an error of their own"
    calls = {call["collective"]: call for call in found["report"]["collectives"]}
    assert (calls["barrier"]["waiting"], calls["barrier"]["absent"]) == ([1, 2, 3], [0])
    gather = calls["all_gather_into_tensor"]
    assert (gather["desc"], gather["ranks"], gather["waiting"], gather["absent"]) == ("pair 0", [0, 1], [0], [1])
    assert absent(found["report"]) == [0]
    assert "ranks wait for each other. rank 0 waits in all_gather_into_tensor of group pair 0 (ranks 0-1)" in found["report"]["summary"]


def test_a_rank_in_another_collective_of_the_same_group(run):
    """It has started as many as the others, but not this one."""
    found = run("other_call", 3)
    assert found["codes"] == [EXIT_HANG] * 3
    assert absent(found["report"]) == [2]
    calls = {call["collective"]: (call["call"], call["waiting"]) for call in found["report"]["collectives"]}
    assert calls == {"all_reduce": (2, [0, 1]), "broadcast": (2, [2])}


def test_the_end_of_a_chain_is_named(run):
    found = run("chain", 3)
    assert found["codes"] == [EXIT_HANG] * 3
    assert absent(found["report"]) == [2]
    calls = {call["collective"]: call for call in found["report"]["collectives"]}
    assert (calls["all_reduce"]["waiting"], calls["all_reduce"]["absent"]) == ([0], [1])
    assert (calls["recv"]["peers"], calls["recv"]["absent"]) == ({"1": 2}, [2])
    assert "recv from rank 2 in group default_pg" in found["text"]


def test_a_rank_that_has_started_the_collective_has_arrived(run):
    """Ranks 1 and 2 sleep in the same line: the number of collectives that each has started tells them apart."""
    found = run("count", 3)
    assert found["codes"] == [EXIT_HANG] * 3
    assert absent(found["report"]) == [2]
    (call,) = found["report"]["collectives"]
    assert (call["call"], call["absent"]) == (2, [2])


@pytest.mark.slow
def test_pipeline_neighbours_are_named(run):
    found = run("pipeline", 3)
    assert found["codes"] == [EXIT_HANG] * 3
    assert absent(found["report"]) == [1]
    assert [(call["collective"], call["peers"], call["absent"]) for call in found["report"]["collectives"]] == [
        ("recv", {"0": 1}, [1]),
        ("recv", {"2": 1}, [1]),
    ]
    assert "p2p_communication.py" in found["report"]["collectives"][0]["caller"]


@pytest.mark.slow
def test_a_writer_that_nobody_reads_is_ended(run):
    """The report cannot be printed, and is written."""
    found = run("full_pipe", 1)
    assert found["codes"] == [EXIT_HANG]
    assert max(found["seconds"]) < SECONDS + 9
    assert 'in full_pipe: sys.stderr.write("x" * 4096)\n' in found["text"]


def test_a_lost_reporter_is_succeeded(run):
    found = run("lost_reporter", 2)
    assert found["codes"] == [-9, EXIT_HANG]
    assert found["report"]["reporter"] == 1
    assert sorted(found["report"]["ranks"]) == ["0", "1"]


def test_a_slow_run_is_not_ended(run, tmp_path):
    """Neither by its slowness, nor by the report of an earlier start, nor by a process that one left behind."""
    (tmp_path / "run" / "hangs" / f"hang-0001-{Watchdog(tmp_path, 0, 1, 0).start_of}").mkdir(parents=True)
    found = run("slow", 2)
    assert found["codes"] == [0, 0], found["stderr"]
    assert min(found["seconds"]) > 2 * SECONDS
    assert found["report"] is None
    assert (tmp_path / "run" / "hangs" / "hang-0009-deadbeef").exists()


@pytest.mark.slow
def test_a_suspended_run_is_not_ended(run):
    """All processes stopped for longer than the watchdog's time, as by a laptop that sleeps, and continued."""
    found = run("suspended", 2)
    assert found["codes"] == [0, 0], found["stderr"]
    assert min(found["seconds"]) > 2 * SECONDS + 2


def test_one_process_and_its_patience(run):
    """A phase that was announced as long may be long; the next one may not."""
    found = run("alone", 1)
    assert found["codes"] == [EXIT_HANG]
    assert min(found["seconds"]) > 2.7 * SECONDS
    assert found["report"]["ranks"]["0"]["phase"] == "save"
    assert found["report"]["summary"].startswith("no rank waits for another: rank 0 is in `time.sleep(seconds)`")


def test_without_a_folder_each_rank_says_what_it_knows(run, tmp_path):
    (tmp_path / "file").write_text("")
    found = run("chain", 3, tmp_path / "file" / "hangs")
    assert found["codes"] == [EXIT_HANG] * 3
    assert "HANG: rank 1 did not arrive at all_reduce of group data parallel (ranks 0-1)" in found["stderr"][0]
    assert "HANG: rank 2 did not arrive at recv from rank 2" in found["stderr"][1]
    assert "hanging_rank.py" in found["stderr"][2]


def test_nothing_is_watched_without_a_time(tmp_path):
    with Watchdog(tmp_path / "hangs", 0, 1, 0.0) as watchdog:
        watchdog.beat("step", 1)
    assert not (tmp_path / "hangs").exists()


def test_a_beat_costs_nothing(tmp_path):
    watchdog = Watchdog(tmp_path, 0, 1, 900.0)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        for step in range(100):
            watchdog.beat("step", step)
        times.append((time.perf_counter() - started) / 100)
    assert min(times) < 20e-6
