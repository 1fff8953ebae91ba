"""`kan launch status`: what it makes of recorded events, of the queue, and of the files of a run."""

import json
import os
import time
from pathlib import Path

import pytest

from kan_train.cli import main
from kan_train.launch.attempts import record
from kan_train.launch.progress import last_rows, progress_of_run
from kan_train.launch.status import duration_text, status_of


def event(run: Path, kind: str, job_id: str = "41", restart: int = 0, job: int = 1, scheduler: str = "slurm", **fields: object) -> None:
    record(run, kind, job=job, scheduler=scheduler, job_id=job_id, restart=restart, **fields)


def started(run: Path, job_id: str = "41", restart: int = 0, **fields: object) -> None:
    event(run, "started", job_id, restart, hosts=["n0", "n1", "n2"], step=0, **fields)


def ended(run: Path, job_id: str = "41", restart: int = 0, **fields: object) -> None:
    usual = {"exit_code": 0, "hosts": ["n0"], "step": 9, "failed_host": None, "cause": "finished", "reason": "all done"}
    event(run, "ended", job_id, restart, **(usual | fields))


def trained(run: Path, steps: int = 40, of: int = 100) -> None:
    """The files of a run that was trained for `steps` of `of` steps, and saved at the last but one."""
    run.mkdir(parents=True, exist_ok=True)
    rows = [{"step": step, "tokens": 100 * step, "loss": 5 - step / 10, "tokens_per_second": 1000.0 + step, "time/step": 0.5} for step in range(1, steps + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 41, "tok')
    (run / "config.yaml").write_text(f"train:\n  steps: {of}\ncheckpoint:\n  location: ''\n")
    for step in (steps - 1, steps + 1):  # the newer one's save is under way
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (run / "checkpoints" / f"step-{steps - 1:08d}" / "manifest.json").write_text("{}")


@pytest.fixture
def run(tmp_path) -> Path:
    """A run trained for 40 of 100 steps."""
    trained(tmp_path / "runs" / "first")
    return tmp_path / "runs" / "first"


def test_progress_is_read_from_the_files(run):
    progress = progress_of_run(run)
    assert (progress.step, progress.steps, progress.tokens, progress.loss, progress.checkpoint) == (40, 100, 4000, 1.0, 39)
    assert progress.tokens_per_second == 1020.5
    assert not progress.stands_still()
    assert progress_of_run(run / "none").step is None


def test_the_tail_of_a_long_file_is_enough(run):
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(20000):
            file.write(json.dumps({"step": step}) + "\n")
    rows = last_rows(run / "metrics.jsonl")
    assert rows[-1]["step"] == 19999
    assert 1000 < len(rows) < 10000


def test_a_run_that_gives_no_sign_stands_still(run, slurm_stub):
    started(run)
    slurm_stub.queue(job41="RUNNING")
    assert not status_of([run], every_job=False)[0].stands_still
    old = time.time() - 600
    os.utime(run / "metrics.jsonl", (old, old))
    (row,) = status_of([run], every_job=False)
    assert not row.stands_still  # it has just been started again
    assert row.seconds_since_step == pytest.approx(600, abs=5)
    assert progress_of_run(run).stands_still(old)


@pytest.mark.parametrize(
    ("queue", "state", "why"),
    [
        ("RUNNING", "running", ""),
        ("PENDING Priority", "requeued", "Priority; its time limit was near"),
        ("COMPLETED", "completed", "its time limit was near"),
        ("NODE_FAIL", "node_fail", "its time limit was near"),
        (None, "lost", "it is no longer in the queue, and nothing was recorded of its end"),
    ],
)
def test_of_a_job_that_may_go_on_slurm_knows_more(run, slurm_stub, queue, state, why):
    started(run)
    ended(run, cause="time_limit", reason="its time limit was near", exit_code=75)
    event(run, "requeued", reason="its time limit was near", exclude=[])
    slurm_stub.queue(**({"job41": queue} if queue else {}))
    (row,) = status_of([run], every_job=False)
    assert (row.state, row.why) == (state, why)


def test_a_job_that_waits_for_the_first_time(run, slurm_stub):
    event(run, "submitted", nodes=2, processes_per_node=8)
    slurm_stub.queue(job41="PENDING Resources")
    (row,) = status_of([run], every_job=False)
    assert (row.state, row.why, row.hosts, row.restarts) == ("pending", "Resources", [], 0)


@pytest.mark.parametrize(("final", "state"), [("finished", "finished"), ("gave_up", "gave up"), ("cancelled", "cancelled")])
def test_of_a_job_that_is_over_slurm_is_not_asked(run, slurm_stub, final, state):
    started(run)
    ended(run)
    event(run, final, reason="so it is")
    (row,) = status_of([run], every_job=False)
    assert (row.state, row.why) == (state, "so it is")
    assert slurm_stub.calls("squeue") == []


def test_without_slurm_the_events_are_what_is_known(run, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    started(run)
    (row,) = status_of([run], every_job=False)
    assert row.state == "running"
    assert "squeue is not on this machine" in capsys.readouterr().err


def test_a_local_job_without_its_launcher_is_lost(run):
    event(run, "started", "local-1", scheduler="local", hosts=["127.0.0.1"], step=0)
    (row,) = status_of([run], every_job=False)
    assert row.state == "lost"


def test_figures_belong_to_the_job_that_made_them(run, slurm_stub):
    started(run)
    ended(run, step=20)
    event(run, "gave_up", reason="enough")
    started(run, "42", job=2)
    slurm_stub.queue(job42="RUNNING")
    first, second = status_of([run], every_job=True)
    assert (first.step, first.loss) == (20, None)
    assert (second.step, second.loss, second.hosts) == (40, 1.0, ["n0", "n1", "n2"])
    assert [row.job_id for row in status_of([run], every_job=False)] == ["42"]


def test_the_command(run, slurm_stub, monkeypatch, capsys):
    trained(run.parent / "plain")
    started(run)
    slurm_stub.queue(job41="RUNNING")
    monkeypatch.chdir(run.parent.parent)
    assert main(["launch", "status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "job", "state", "restarts", "hosts", "step", "tokens", "loss", "tokens/s", "checkpoint", "last", "step", "why"]
    assert lines[1].split()[:10] == ["first", "41", "running", "0", "n0,n1,+1", "40/100", "4,000", "1.0000", "1,020", "39"]
    assert lines[2].split()[:3] == ["plain", "-", "training"]
    assert main(["launch", "status", "first", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["run"], row["job_id"], row["state"], row["step"], row["stands_still"]) == ("first", "41", "running", 40, False)
    assert main(["launch", "status", "frist"]) == 2
    assert "one of the runs in runs (first, plain)" in capsys.readouterr().err


def test_durations():
    assert [duration_text(seconds) for seconds in (0.4, 59, 190, 18120, 300000)] == ["0 s", "59 s", "3 min 10 s", "5 h 2 min", "3 d 11 h"]
