"""`kan launch logs`: the right lines of the right file, and what is written later, over requeues."""

import threading
import time
from pathlib import Path

import pytest

from kan_train.config import ConfigError
from kan_train.launch.attempts import record
from kan_train.launch.logs import Selection, Tail, follow, show
from kan_train.launch.spec import log_dir, output_file


def event(run: Path, kind: str, job: int = 1, job_id: str = "41", restart: int = 0, **fields: object) -> None:
    record(run, kind, job=job, scheduler="slurm", job_id=job_id, restart=restart, **fields)


def started(run: Path, job: int = 1, job_id: str = "41", restart: int = 0, ranks: int = 2) -> None:
    """An attempt whose ranks have each written two lines."""
    event(run, "started", job, job_id, restart, hosts=["n0"], step=0)
    folder = log_dir(run, job_id, restart)
    folder.mkdir(parents=True)
    for rank in range(ranks):
        (folder / f"rank-{rank:05d}.log").write_text(f"{job_id}.{restart} of {rank}\nsecond\n")
    with output_file(run, job_id).open("a") as file:
        file.write(f"merged {job_id}.{restart}\n")


def ended(run: Path, job: int = 1, job_id: str = "41", restart: int = 0, final: str = "finished") -> None:
    event(run, "ended", job, job_id, restart, exit_code=0, hosts=["n0"], step=1, failed_host=None, cause="finished", reason="")
    event(run, final, job, job_id, restart)


def shown(run: Path, lines: int = 0, **selection: object) -> list[str]:
    found: list[str] = []
    show(run, Selection(**selection), lines=lines, print_line=found.append)
    return found


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with two attempts of job 41, and job 42."""
    run = tmp_path / "runs" / "first"
    for kind, job, job_id, restart in (("started", 1, "41", 0), ("requeued", 1, "41", 0), ("started", 1, "41", 1), ("started", 2, "42", 0)):
        started(run, job, job_id, restart) if kind == "started" else event(run, kind, job, job_id, restart, reason="time limit", exclude=[])
    return run


def test_the_newest_job_is_shown_unless_another_is_asked_for(run):
    assert shown(run) == ["merged 42.0"]
    assert shown(run, job="41") == ["merged 41.0", "merged 41.1"]
    assert shown(run, job="1") == shown(run, job="41")  # by its number in the run
    assert shown(run, job="41", lines=1) == ["merged 41.1"]


def test_ranks_own_output(run):
    assert shown(run, rank=1) == ["42.0 of 1", "second"]
    assert shown(run, rank=0, job="41") == ["41.1 of 0", "second"]  # its last attempt
    assert shown(run, rank=0, job="41", restart=0) == ["41.0 of 0", "second"]
    assert shown(run, by_rank=True) == ["[rank 0] 42.0 of 0", "[rank 0] second", "[rank 1] 42.0 of 1", "[rank 1] second"]
    assert shown(run, job="41", restart=0, lines=1) == ["[rank 0] second", "[rank 1] second"]


@pytest.mark.parametrize(
    ("selection", "says"),
    [
        ({"job": "7"}, "--job 7 is no job of .*; use one of: 41, 42"),
        ({"job": "41", "restart": 5}, "--restart 5 is no attempt of job 41; there are: 0, 1"),
        ({"rank": 9}, "--rank 9 is no rank of job 42; use one of 0 to 1"),
    ],
)
def test_what_is_not_there_is_answered_with_what_is(run, selection, says):
    with pytest.raises(ConfigError, match=says):
        shown(run, **selection)


def test_a_job_that_waits_has_written_nothing_yet(tmp_path):
    event(tmp_path, "submitted", nodes=1, processes_per_node=1)
    with pytest.raises(ConfigError, match=r"written nothing yet \(submitted\); use --follow"):
        shown(tmp_path)
    with pytest.raises(ConfigError, match="has had no job; start one with `kan launch local"):
        shown(tmp_path / "other")


def test_a_line_is_shown_once_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one\ntw")
    tail = Tail(path)
    assert list(tail.lines()) == ["one"]
    with path.open("ab") as file:
        file.write(b"o\n\xff three")
    assert list(tail.lines()) == ["two"]
    assert list(tail.lines(whole=True)) == ["\ufffd three"]
    path.write_bytes(b"anew\n")
    assert list(tail.lines()) == ["anew"]


def following(run: Path, **selection: object) -> tuple[list[str], threading.Thread]:
    found: list[str] = []
    arguments = {"lines": 0, "print_line": found.append, "poll": 0.01}
    thread = threading.Thread(target=follow, args=(run, Selection(**selection)), kwargs=arguments, daemon=True)
    thread.start()
    return found, thread


def wait_for(found: list[str], line: str) -> None:
    deadline = time.monotonic() + 10
    while line not in found and time.monotonic() < deadline:
        time.sleep(0.01)
    assert line in found


def test_following_goes_on_over_requeues_and_resubmissions_to_the_end(tmp_path):
    started(tmp_path)
    merged, first = following(tmp_path)
    own, second = following(tmp_path, rank=1)
    wait_for(merged, "merged 41.0")
    wait_for(own, "41.0 of 1")
    event(tmp_path, "ended", exit_code=75, hosts=["n0"], step=4, failed_host=None, cause="time_limit", reason="time limit")
    event(tmp_path, "requeued", reason="time limit", exclude=[])
    started(tmp_path, restart=1)
    wait_for(merged, "merged 41.1")
    wait_for(own, "41.1 of 1")
    event(tmp_path, "submitted", 2, "42", nodes=1, processes_per_node=1)
    ended(tmp_path, restart=1, final="resubmitted")
    started(tmp_path, 2, "42")
    ended(tmp_path, 2, "42")
    for thread in (first, second):
        thread.join(10)
        assert not thread.is_alive()
    assert merged == ["merged 41.0", "merged 41.1", "==> 42.out <==", "merged 42.0"]
    assert own == ["41.0 of 1", "second", "==> 41.1 <==", "41.1 of 1", "second", "==> 42.0 <==", "42.0 of 1", "second"]


def test_following_waits_for_a_job_that_has_not_started(tmp_path):
    event(tmp_path, "submitted", nodes=1, processes_per_node=1)
    found, thread = following(tmp_path, by_rank=True)
    started(tmp_path, ranks=1)
    ended(tmp_path)
    thread.join(10)
    assert found == ["==> 41.0 <==", "[rank 0] 41.0 of 0", "[rank 0] second"]


def test_following_ends_with_a_launcher_that_has_gone_without_a_word(tmp_path):
    record(tmp_path, "started", job=1, scheduler="local", job_id="local-1", hosts=["127.0.0.1"], step=0)
    output_file(tmp_path, "local-1").parent.mkdir()
    output_file(tmp_path, "local-1").write_text("one\nno newline")
    found, thread = following(tmp_path)
    thread.join(10)
    assert found == ["one", "no newline"]
