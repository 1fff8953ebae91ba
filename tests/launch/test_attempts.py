"""attempts.jsonl: what is written is read back, whatever a crash left in between, and the questions about it have the answers a person would give."""

import pytest

from kan_train.launch.attempts import Attempt, attempts_file, attempts_of, bad_hosts, read_events, record, without_progress


def attempt(first: int, last: int | None, cause: str | None = "failed", **fields) -> Attempt:
    values = {"job": 1, "scheduler": "slurm", "job_id": "7", "restart": 0, "hosts": ["a", "b"], "started": 0.0}
    return Attempt(**(values | {"first_step": first, "step": last, "cause": cause} | fields))


def test_events_are_read_back_in_order_and_make_attempts(tmp_path):
    common = {"job": 1, "scheduler": "slurm", "job_id": "7"}
    record(tmp_path, "submitted", **common, nodes=2, processes_per_node=8)
    record(tmp_path, "started", **common, hosts=["a", "b"], step=0)
    record(tmp_path, "unhealthy", **common, host="b", problem="no device")
    record(tmp_path, "ended", **common, hosts=["a", "b"], step=5, exit_code=1, cause="failed", reason="it broke", failed_host="a")
    record(tmp_path, "started", **common, restart=1, hosts=["a", "c"], step=5)
    events = read_events(tmp_path)
    assert [event["event"] for event in events] == ["submitted", "started", "unhealthy", "ended", "started"]
    assert all(event["time"] > 1.7e9 and event["job_id"] == "7" for event in events)
    first, second = attempts_of(events)
    assert (first.first_step, first.step, first.cause, first.blamed) == (0, 5, "failed", {"a", "b"})
    assert (second.restart, second.hosts, second.ended) == (1, ["a", "c"], None)


@pytest.mark.parametrize("torn", [b'{"event":"sta', b"\x00\x00\x00", b"[1]\n"])
def test_a_line_torn_by_a_crash_costs_that_line_alone(torn, tmp_path):
    common = {"job": 1, "scheduler": "slurm", "job_id": "7"}
    record(tmp_path, "submitted", **common)
    with attempts_file(tmp_path).open("ab") as file:
        file.write(torn)
    record(tmp_path, "started", **common, hosts=["a"], step=0)
    assert [event["event"] for event in read_events(tmp_path)] == ["submitted", "started"]


def test_no_file_has_no_events(tmp_path):
    assert read_events(tmp_path) == []


def test_only_the_last_attempts_in_a_row_without_a_newer_checkpoint_count():
    assert without_progress([]) == 0
    assert without_progress([attempt(0, 0), attempt(0, 5)]) == 0
    assert without_progress([attempt(0, 0), attempt(0, 5), attempt(5, 5), attempt(5, 5)]) == 2
    assert without_progress([attempt(0, 0), attempt(0, None, None)]) == 1  # the one that runs now has not failed


def test_preemptions_do_not_count_and_do_not_hide_what_was_before():
    assert without_progress([attempt(0, 0), attempt(0, 0, "preempted"), attempt(0, 0, "taken_away"), attempt(0, 0)]) == 2


def test_a_host_is_bad_after_so_many_failures_of_its_own():
    attempts = [attempt(0, 0, failed_host="b"), attempt(0, 0, unhealthy={"b": "no device", "a": "slow"}), attempt(0, 9, "preempted")]
    assert bad_hosts(attempts, 2) == ["b"]
    assert bad_hosts(attempts, 1) == ["a", "b"]
    assert bad_hosts(attempts, 0) == []
