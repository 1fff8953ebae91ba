"""One node's process with trainers that are small shell scripts: words, environment, output, signals, statuses, and the end of them all."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kan_train.launch.place import EXIT_UNHEALTHY, Place, node_file, trainer_environment
from kan_train.launch.spec import log_dir, write_spec
from kan_train.launch.trainers import status_of

ODD = ["a=b c", "q='x' \"y\"", "d=$(touch pwned) `touch pwned` $HOME", "n=a\nb", "t=~/*;|&"]


@pytest.fixture
def job_id() -> str:
    """One whose port is free."""
    for number in range(1, 500):
        place = Place(node=0, nodes=1, head="127.0.0.1", job_id=str(number * 31 + os.getpid() % 31), restart=0, host="a")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", place.port))
                return place.job_id
            except OSError:
                continue
    raise AssertionError("no port is free")


@pytest.fixture
def node(make_spec, tmp_path, job_id):
    """Start nodes whose trainers run `body`; returns their processes."""
    started: list[subprocess.Popen] = []

    def start(body: str, *, nodes: int = 1, processes: int = 2, scheduler: str = "local", only: int | None = None, **changes) -> list[subprocess.Popen]:
        trainer = tmp_path / "trainer"
        trainer.write_text(f"#!/bin/bash\n{body}\n")
        trainer.chmod(stat.S_IRWXU)
        changes = {"health_check": False} | changes
        spec = make_spec(python=str(trainer), nodes=nodes, processes_per_node=processes, scheduler=scheduler, **changes)
        path = write_spec(spec)
        for number in range(nodes) if only is None else [only]:
            words = {"node": number, "nodes": nodes, "head": "127.0.0.1", "job-id": job_id, "restart": 0, "host": "ab"[number]}
            command = [sys.executable, "-m", "kan_train.launch.node", str(path), *(word for name, value in words.items() for word in (f"--{name}", str(value)))]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path))
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


def report(make_spec, job_id: str, number: int = 0) -> dict:
    return json.loads(node_file(log_dir(make_spec().run_dir, job_id, 0), number).read_text())


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_every_word_reaches_every_trainer_unchanged_and_runs_nothing(node, tmp_path):
    (process,) = node('printf "%s\\0" "$@" >words.$RANK', overrides=ODD, config_dirs=["/a b"])
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    wanted = ["-m", "kan_train", "train", "--config-dir", "/a b", "--", *ODD]
    for rank in range(2):
        assert (tmp_path / f"words.{rank}").read_text().split("\0")[:-1] == wanted
    assert not list(tmp_path.rglob("pwned"))


def test_each_rank_has_a_file_and_all_are_merged_with_their_rank(node, make_spec, job_id):
    (process,) = node('echo "hello of $RANK"; echo "error of $RANK" >&2; printf unfinished')
    output = process.communicate(timeout=60)[0].decode()
    logs = log_dir(make_spec().run_dir, job_id, 0)
    for rank in range(2):
        assert (logs / f"rank-{rank:05d}.log").read_text() == f"hello of {rank}\nerror of {rank}\nunfinished"
        assert f"[rank {rank}] hello of {rank}\n" in output
        assert f"[rank {rank}] unfinished\n" in output


def test_trainers_have_what_torchrun_would_give_them(make_spec):
    place = Place(node=1, nodes=2, head="n0", job_id="12", restart=3, host="n1")
    found = trainer_environment(make_spec(processes_per_node=4), place, 2, {"RANK": "99", "HOME": "/root"})
    wanted = {"RANK": "6", "LOCAL_RANK": "2", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", "MASTER_ADDR": "n0", "HOME": "/root"}
    assert wanted.items() <= found.items()
    assert found["TORCHELASTIC_RUN_ID"] == "12.3"


def test_a_restart_meets_elsewhere_than_the_start_before_it():
    places = [Place(node=0, nodes=2, head="n0", job_id=job, restart=restart, host="n0") for job in ("7", "8", "9_3") for restart in range(3)]
    assert len({place.port for place in places}) == len(places)
    assert all(10000 <= place.port < 32768 for place in places)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_and_saving_takes_as_long_as_it_takes(number, node, make_spec, job_id, tmp_path):
    body = f"trap 'sleep 1.5; touch saved.$RANK; exit 75' {signal.Signals(number).name[3:]}; touch ready.$RANK; while :; do sleep 0.05; done"
    (process,) = node(body)
    for rank in range(2):
        wait_for(tmp_path / f"ready.{rank}")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert (tmp_path / "saved.0").exists()
    assert (tmp_path / "saved.1").exists()
    assert report(make_spec, job_id)["signal"] == signal.Signals(number).name
    assert report(make_spec, job_id)["failures"] == []


def test_slurm_is_not_told_of_a_failure_where_the_run_was_saved(node, make_spec, job_id):
    (process,) = node("exit 75", scheduler="slurm")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert report(make_spec, job_id)["exit_code"] == 75


def test_a_signal_during_start_up_loses_nothing_and_counts_as_stopped(node, tmp_path):
    (process,) = node("touch ready.$RANK; exec sleep 60")  # as Python before it can catch a signal
    for rank in range(2):
        wait_for(tmp_path / f"ready.{rank}")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75


@pytest.mark.parametrize(("end", "code", "name"), [("exit 3", 3, None), ("exit 76", 76, None), ("kill -9 $$", 137, "SIGKILL")])
def test_the_status_of_a_trainer_is_the_nodes_and_its_rank_and_last_words_are_kept(end, code, name, node, make_spec, job_id):
    (process,) = node(f'[ "$RANK" = 0 ] || {{ echo "it broke"; {end}; }}')
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == code
    (failure,) = report(make_spec, job_id)["failures"]
    assert (failure["rank"], failure["exit_code"], failure["signal"], failure["last_line"]) == (1, code, name, "it broke")
    assert "kan: rank 1 on a" in output


def test_where_one_node_fails_the_others_trainers_are_ended_too(node, make_spec, job_id, monkeypatch):
    """Their collective would wait for the lost one until its time-out."""
    processes = node('[ "$GROUP_RANK" = 0 ] && exit 1; exec sleep 600', nodes=2, processes=1)
    for process in processes:
        process.communicate(timeout=90)
    assert [failure["rank"] for failure in report(make_spec, job_id, 0)["failures"]] == [0]
    assert report(make_spec, job_id, 1)["failures"] == []
    assert report(make_spec, job_id, 1)["state"] == "ended"


def test_nodes_leave_together_when_they_save(node, tmp_path):
    """A scheduler kills the other nodes when one leaves with a status that is not 0."""
    body = "trap 'sleep $((3 * GROUP_RANK)); exit 75' USR1; touch ready.$RANK; while :; do sleep 0.05; done"
    first, second = node(body, nodes=2, processes=1)
    for rank in range(2):
        wait_for(tmp_path / f"ready.{rank}")
    for process in (first, second):
        process.send_signal(signal.SIGUSR1)
    time.sleep(1.5)
    assert first.poll() is None
    assert (first.wait(60), second.wait(60)) == (75, 75)


def test_a_missing_head_is_named(node, make_spec, job_id, monkeypatch):
    monkeypatch.setenv("KAN_LAUNCH_MEETING_SECONDS", "2")
    (process,) = node("exit 0", nodes=2, only=1)
    output = process.communicate(timeout=90)[0].decode()
    assert process.returncode == EXIT_UNHEALTHY
    assert "cannot reach the meeting point 127.0.0.1:" in output
    assert "127.0.0.1" in report(make_spec, job_id, 1)["problems"]


def test_a_missing_node_is_named(node, make_spec, job_id, monkeypatch):
    monkeypatch.setenv("KAN_LAUNCH_MEETING_SECONDS", "2")
    (process,) = node("exit 0", nodes=2, only=0)
    process.communicate(timeout=90)
    assert process.returncode == EXIT_UNHEALTHY
    assert list(report(make_spec, job_id)["problems"]) == ["node 1"]


def test_an_unhealthy_node_is_named_before_any_trainer_starts(node, make_spec, job_id, tmp_path):
    (process,) = node("touch started", health_check=True, data=[str(tmp_path / "not mounted")])
    output = process.communicate(timeout=90)[0].decode()
    assert process.returncode == EXIT_UNHEALTHY
    assert "not mounted is not there" in report(make_spec, job_id)["problems"]["a"]
    assert "kan: a: " in output
    assert not (tmp_path / "started").exists()


def test_healthy_nodes_train(node, make_spec, job_id, tmp_path):
    processes = node("touch started.$RANK", nodes=2, processes=1, health_check=True)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert (tmp_path / "started.1").exists()


@pytest.mark.parametrize(("code", "stopping", "status"), [(0, False, 0), (75, True, 75), (-9, False, 137), (-15, False, 143), (-15, True, 75), (-9, True, 137)])
def test_status_of_a_return_code(code, stopping, status):
    assert status_of(code, stopping) == status
