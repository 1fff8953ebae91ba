"""Why an attempt ended, from what its nodes left behind, and what comes after it."""

import json
from pathlib import Path

import pytest

from kan_train.accounting.account import account_of
from kan_train.launch.attempts import Attempt, read_events, record_for
from kan_train.launch.place import node_file
from kan_train.launch.spec import log_dir, spec_file, write_spec
from kan_train.launch.supervise import EXIT_DONE, after, before, decide, judge, main, newest_step

HOSTS = ["a", "b"]


def node(number: int, code: int | None = None, signal: str | None = None, failures: list | None = None, problems: dict | None = None) -> dict:
    found = {"node": number, "host": HOSTS[number], "signal": signal, "failures": failures or [], "problems": problems or {}}
    return found | ({} if code is None else {"exit_code": code})


def failed(rank: int, code: int, time: float, signal: str | None = None) -> dict:
    return {"rank": rank, "exit_code": code, "signal": signal, "time": time, "last_line": "RuntimeError: connection closed by peer"}


KILLED = [node(0, 1, failures=[failed(0, 1, 5.0)]), node(1, 137, failures=[failed(1, 137, 5.2, "SIGKILL")])]
ENDINGS = {
    "finished": ([node(0, 0), node(1, 0)], 0, "none", "RUNNING", "finished", None),
    "time limit": ([node(0, 75, "SIGUSR1"), node(1, 75, "SIGUSR1")], 0, "USR1", "RUNNING", "time_limit", None),
    "preempted": ([node(0, 75, "SIGTERM"), node(1, 75, "SIGTERM")], 0, "none", "RUNNING", "preempted", None),
    "sent USR1 by hand": ([node(0, 75, "SIGUSR1"), node(1, 75, "SIGUSR1")], 0, "none", "RUNNING", "stopped", None),
    "cancelled": ([node(0, 75, "SIGTERM"), node(1, 75, "SIGTERM")], 143, "none", "COMPLETING", "taken_away", None),
    "preempted before Python ran": ([{}, {}], 143, "none", "RUNNING", "preempted", None),
    "time limit before Python ran": ([{}, {}], 138, "USR1", "RUNNING", "time_limit", None),
    "a trainer killed; the other fails first, of its lost connection": (KILLED, 137, "none", "RUNNING", "failed", "b"),
    "a worker node lost, the job being requeued by Slurm": ([node(0, 1, failures=[failed(0, 1, 5.0)]), node(1)], 1, "none", "COMPLETING", "lost", "b"),
    "the first node lost": ([node(0), node(1, 1, "SIGTERM", failures=[failed(1, 1, 5.0)])], 1, "none", "UNKNOWN", "lost", "a"),
    "every node lost": ([node(0), node(1)], 1, "none", "UNKNOWN", "lost", None),
    "wrong settings": ([node(0, 2, failures=[failed(0, 2, 5.0)]), node(1, 2, failures=[failed(1, 2, 5.0)])], 2, "none", "RUNNING", "settings", None),
    "bad steps": ([node(0, 3, failures=[failed(0, 3, 5.0)]), node(1, 3, failures=[failed(1, 3, 5.0)])], 3, "none", "RUNNING", "bad_steps", None),
    "budget": ([node(0, 4, failures=[failed(0, 4, 5.1)]), node(1, 4, failures=[failed(1, 4, 5.0)])], 4, "none", "RUNNING", "budget", None),
    "unhealthy": ([node(0, 77), node(1, 77, problems={"b": "no device"})], 77, "none", "RUNNING", "unhealthy", None),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDINGS)
def test_the_cause_and_the_host_to_blame(name):
    nodes, status, told, state, cause, host = ENDINGS[name]
    ending = judge(nodes, HOSTS, status, told, state)
    assert (ending.cause, ending.failed_host) == (cause, host)
    assert ending.reason


def test_in_a_hang_the_rank_that_did_not_arrive_is_to_blame_not_the_one_that_left_first():
    nodes = [node(0, 76, failures=[failed(0, 76, 5.0)]), node(1, 1)]
    ending = judge(nodes, HOSTS, 76, "none", "RUNNING", {"hang": "hang-0001", "world_size": 4, "did_not_arrive": [{"rank": 3}], "silent": []})
    assert (ending.cause, ending.exit_code, ending.failed_host) == ("hung", 76, "b")
    assert "rank 3 on b" in ending.reason


def test_of_a_budget_the_first_rank_says_which_and_what_would_work():
    """Only it knows: the other one, which left before it, has nothing to say of it."""
    said = failed(0, 4, 5.1) | {"last_line": "kan: accounting.budget_usd=50 is used up: ...; use accounting.budget_usd=110 to go on"}
    silent = failed(1, 4, 5.0) | {"last_line": ""}
    reason = judge([node(0, 4, failures=[said]), node(1, 4, failures=[silent])], HOSTS, 4, "none", "RUNNING").reason
    assert reason == "accounting.budget_usd=50 is used up: ...; use accounting.budget_usd=110 to go on"
    unclear = judge([node(0, 4, failures=[silent]), node(1, 4, failures=[silent])], HOSTS, 4, "none", "RUNNING").reason
    assert "accounting.budget_usd or accounting.budget_hours" in unclear


def attempt(cause: str, first: int = 0, last: int = 5, **fields) -> Attempt:
    values = {"job": 1, "scheduler": "slurm", "job_id": "7", "restart": 0, "hosts": HOSTS, "started": 0.0, "exit_code": 1, "reason": "why"}
    return Attempt(**(values | {"first_step": first, "step": last, "cause": cause} | fields))


DECISIONS = {
    "finished": ([attempt("finished", exit_code=0)], True, "finished"),
    "time limit": ([attempt("time_limit")], True, "requeue"),
    "preempted": ([attempt("preempted")], True, "requeue"),
    "failed once": ([attempt("failed", failed_host="b")], True, "requeue"),
    "failed twice on the same node": ([attempt("failed", failed_host="b"), attempt("lost", 5, 6, failed_host="b")], True, "resubmit x,b"),
    "unhealthy twice": ([attempt("unhealthy", unhealthy={"a": "slow"}), attempt("unhealthy", 0, 0, unhealthy={"a": "slow"})], True, "resubmit x,a"),
    "failed on a node that is excluded already": (
        [attempt("failed", failed_host="b"), attempt("failed", failed_host="b"), attempt("failed", hosts=["a", "c"], failed_host="c")], True, "requeue",
    ),
    "settings": ([attempt("settings", exit_code=2)], True, "give_up 2"),
    "bad steps": ([attempt("bad_steps", exit_code=3)], True, "give_up 3"),
    "budget": ([attempt("budget", exit_code=4)], True, "give_up 4"),
    "three starts without progress": ([attempt("failed", 5, 5)] * 3, True, "requeue"),
    "four starts without progress": ([attempt("failed", 5, 5)] * 4, True, "give_up 1"),
    "five preemptions without progress": ([attempt("preempted", 5, 5)] * 5, True, "requeue"),
    "cancelled": ([attempt("taken_away", exit_code=75)], False, "leave 75"),
    "a node lost, and Slurm requeues": ([attempt("lost", failed_host="b")], False, "leave 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", DECISIONS)
def test_what_comes_next(name, make_spec):
    attempts, running, line = DECISIONS[name]
    assert decide(make_spec(exclude=["x"]), attempts, running=running).line() == line


def test_giving_up_says_what_to_change(make_spec):
    decision = decide(make_spec(), [attempt("time_limit", 5, 5)] * 4)
    assert "cluster.max_restarts=3" in decision.reason
    assert "checkpoint.every" in decision.reason
    assert "cluster.time" in decision.reason


# --- the questions of the script ------------------------------------------------------------------------------------------------------------------------


def save(spec, step: int) -> None:
    folder = Path(spec.checkpoints) / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def leave(spec, restart: int, nodes: list[dict]) -> None:
    logs = log_dir(spec.run_dir, "7", restart)
    logs.mkdir(parents=True)
    for found in nodes:
        node_file(logs, found["node"]).write_text(json.dumps(found))


def test_a_job_starts_fails_comes_back_and_finishes(make_spec, capsys):
    spec = make_spec()
    write_spec(spec)
    words = [str(spec_file(spec.run_dir, 1)), "--job-id", "7"]
    assert main(["before", *words, "--restart", "0", "--hosts", *HOSTS]) == 0
    save(spec, 40)
    leave(spec, 0, KILLED)
    assert main(["after", *words, "--restart", "0", "--status", "137", "--state", "RUNNING", "--hosts", *HOSTS]) == 0
    assert capsys.readouterr().out == "requeue\n"
    assert main(["before", *words, "--restart", "1", "--hosts", *HOSTS]) == 0
    save(spec, 100)
    leave(spec, 1, [node(0, 0), node(1, 0)])
    assert main(["after", *words, "--restart", "1", "--status", "0", "--state", "RUNNING", "--hosts", *HOSTS]) == 0
    assert capsys.readouterr().out == "finished\n"
    events = read_events(spec.run_dir)
    assert [event["event"] for event in events] == ["started", "ended", "requeued", "started", "ended", "finished"]
    assert [event["step"] for event in events if event["event"] == "started"] == [0, 40]
    assert main(["before", *words, "--restart", "2", "--hosts", *HOSTS]) == EXIT_DONE


def test_the_next_start_writes_down_the_end_that_nobody_saw(make_spec):
    """A power cut of the first node: its script did not live to tell."""
    spec = make_spec()
    assert before(spec, "7", 0, HOSTS) == 0
    save(spec, 30)
    leave(spec, 0, [node(0), node(1, 1, failures=[failed(1, 1, 5.0)])])
    assert before(spec, "7", 1, HOSTS) == 0
    (ended,) = [event for event in read_events(spec.run_dir) if event["event"] == "ended"]
    assert (ended["restart"], ended["step"], ended["cause"], ended["failed_host"]) == (0, 30, "lost", "a")


def test_slurm_says_when_it_gave_the_nodes_and_had_them_back(make_spec):
    """Of a start whose end nobody saw: when the job came into the queue again. What is not known is not told."""
    spec = make_spec()
    write_spec(spec)
    words = [str(spec_file(spec.run_dir, 1)), "--job-id", "7", "--hosts", *HOSTS]
    assert main(["before", *words, "--restart", "0", "--allocated", "1000", "--queued", "990"]) == 0
    leave(spec, 0, [node(0), node(1)])
    assert main(["before", *words, "--restart", "1", "--allocated", "1070", "--queued", "1060"]) == 0
    leave(spec, 1, [node(0), node(1)])
    assert main(["before", *words, "--restart", "2", "--allocated", "", "--queued", ""]) == 0
    events = read_events(spec.run_dir)
    assert [event.get("allocated") for event in events if event["event"] == "started"] == [1000, 1070, None]
    assert [(event["seen"], event.get("until")) for event in events if event["event"] == "ended"] == [(False, 1060), (False, None)]
    (first, _, _) = account_of([], events).starts
    assert (first.started, first.seconds, first.buckets["start-up"]) == (1000, 60, 60)


def test_a_job_that_slurm_starts_again_and_again_in_vain_comes_to_its_end(make_spec):
    spec = make_spec(max_restarts=2)
    for restart in range(3):
        assert before(spec, "7", restart, HOSTS) == 0
        leave(spec, restart, [node(0), node(1, 1)])
    assert before(spec, "7", 3, HOSTS) == 1
    assert read_events(spec.run_dir)[-1]["event"] == "gave_up"


def test_a_new_job_of_the_run_has_a_new_budget(make_spec):
    old, new = make_spec(max_restarts=0), make_spec(max_restarts=0, job=2)
    assert before(old, "7", 0, HOSTS) == 0
    leave(old, 0, [node(0), node(1, 1)])
    assert before(old, "7", 1, HOSTS) == 1
    assert before(new, "8", 0, HOSTS) == 0


def test_after_a_cancellation_the_job_does_not_come_back(make_spec):
    spec = make_spec()
    before(spec, "7", 0, HOSTS)
    leave(spec, 0, [node(0, 75, "SIGTERM"), node(1, 75, "SIGTERM")])
    assert after(spec, "7", 0, HOSTS, 143, "none", "COMPLETING").action == "leave"
    assert [event["event"] for event in read_events(spec.run_dir)] == ["started", "ended"]


def test_a_checkpoint_without_a_manifest_is_none(make_spec):
    spec = make_spec()
    assert newest_step(spec) == 0
    save(spec, 5)
    (Path(spec.checkpoints) / "step-00000010").mkdir()
    assert newest_step(spec) == 5


def test_a_resubmission_is_recorded_with_its_reason(make_spec):
    spec = make_spec()
    path = write_spec(spec)
    before(spec, "7", 0, HOSTS)
    record_for(spec, "ended", "7", hosts=HOSTS, step=0, exit_code=1, cause="failed", reason="it broke", failed_host="b")
    assert main(["resubmitted", str(path), "--job-id", "7", "--new-job-id", "8", "--exclude", "b,c", "--hosts", *HOSTS]) == 0
    event = read_events(spec.run_dir)[-1]
    assert (event["event"], event["new_job_id"], event["exclude"], event["reason"]) == ("resubmitted", "8", ["b", "c"], "it broke")
