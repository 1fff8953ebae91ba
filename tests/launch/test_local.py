"""`kan launch local`: restarts, signals, other hosts, and a real training that loses a process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from stubs import SSH, install, path_with, seen, stub_python

from kan_train.cli import main
from kan_train.launch.attempts import read_events
from kan_train.launch.hosts import ssh_command

ODD = """it's "odd"; $HOME $(touch hurt) `touch hurt` \\ \n # two lines"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with a run folder `runs`."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def words(folder: Path, *more: str) -> list[str]:
    return ["launch", "local", "run.device=cpu", "run.name=first", f"cluster.python={folder / 'python'}", "cluster.health_check=false", *more]


def local(folder: Path, plan: list[dict], *more: str) -> int:
    stub_python(folder, plan)
    return main(words(folder, *more))


def kinds(folder: Path) -> list[str]:
    return [event["event"] for event in read_events(folder / "runs" / "first")]


def started(folder: Path, plan: list[dict], *more: str, **environment: str) -> subprocess.Popen:
    """The command as a process of its own, whose trainers have begun."""
    stub_python(folder, plan)
    command = [sys.executable, "-m", "kan_train", *words(folder, *more)]
    process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not all((folder / f"begun-0-{rank}").exists() for rank in (0, 1)) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    assert process.poll() is None, process.stdout.read()
    return process


def test_a_run_that_finishes(folder, capfd):
    assert local(folder, [{"exit": 0, "save": 9}], "--processes", "2") == 0
    assert kinds(folder) == ["submitted", "started", "ended", "finished"]
    output = capfd.readouterr().out
    assert "\nrank 0 begins\n" in f"\n{output}"  # as `kan train` shows it
    assert "[rank 1] rank 1 begins\n" in output
    run = folder / "runs" / "first"
    (job_id,) = {event["job_id"] for event in read_events(run)}
    assert "[rank 0] rank 0 begins" in (run / "logs" / f"{job_id}.out").read_text()
    assert (run / "logs" / f"{job_id}.0" / "rank-00001.log").read_text() == "rank 1 begins\n"
    environment = seen(folder, 0, 1)["environment"]
    assert [environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")] == ["1", "1", "2", "127.0.0.1"]


def test_failures_are_followed_by_restarts_while_there_is_progress(folder):
    plan = [{"exit": 1, "save": 3}, {"exit": 76, "save": 5}, {"exit": 0, "save": 9}]
    assert local(folder, plan, "--max-restarts", "0") == 0
    assert kinds(folder) == ["submitted", *["started", "ended", "requeued"] * 2, "started", "ended", "finished"]
    assert [event["step"] for event in read_events(folder / "runs" / "first") if event["event"] == "started"] == [0, 3, 5]


def test_without_progress_a_run_is_given_up(folder, capfd):
    assert local(folder, [{"exit": 7}], "--max-restarts", "1") == 7
    assert kinds(folder) == ["submitted", "started", "ended", "requeued", "started", "ended", "gave_up"]
    assert "no newer checkpoint" in read_events(folder / "runs" / "first")[-1]["reason"]


@pytest.mark.parametrize("status", [2, 3])
def test_what_would_end_the_same_way_is_not_tried_again(folder, status):
    assert local(folder, [{"exit": status}]) == status
    assert kinds(folder) == ["submitted", "started", "ended", "gave_up"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_reaches_each_trainer_once_and_the_run_is_saved(folder, name):
    process = started(folder, [{"seconds": 100}], "--processes", "2")
    # A second launcher of the run is refused meanwhile, and leaves the first alone.
    assert main(words(folder)) == 2
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == 75
    assert [seen(folder, 0, rank)["signals"] for rank in (0, 1)] == [[name], [name]]
    assert kinds(folder) == ["submitted", "started", "cancelled", "ended"]
    assert read_events(folder / "runs" / "first")[-1]["step"] == 77
    # The same command goes on.
    assert local(folder, [{"exit": 0, "save": 90}]) == 0


def test_a_launcher_that_is_killed_leaves_no_trainer_and_no_lock(folder):
    process = started(folder, [{"seconds": 100}], "--processes", "2")
    trainers = [child for child in psutil.Process(process.pid).children(recursive=True) if "trainer.py" in " ".join(child.cmdline())]
    assert len(trainers) >= 2
    process.kill()
    _, left = psutil.wait_procs(trainers, 30)
    assert not left  # they were told to save
    assert local(folder, [{"exit": 0, "save": 90}]) == 0


def test_other_hosts_are_reached_by_ssh_with_every_word_unchanged(folder, monkeypatch):
    install(folder / "bin", "ssh", SSH)
    monkeypatch.setenv("PATH", path_with(folder / "bin"))
    monkeypatch.setenv("SSH_CALLS", str(folder / "calls"))
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    (folder / "hosts").write_text("127.0.0.2  # the first\n\n127.0.0.3\n")
    assert local(folder, [{"exit": 0, "save": 9}], "--hosts-file", "hosts", "--processes", "1", "train.global_batch_size=8", f"data.root={ODD}") == 0
    calls = (folder / "calls").read_text()
    assert [f" {host} " in calls for host in ("127.0.0.2", "127.0.0.3")] == [True, True]
    assert "secret" not in calls
    assert ODD not in calls
    for rank in (0, 1):
        found = seen(folder, 0, rank)
        assert f"data.root={ODD}" in found["words"]
        assert found["directory"] == str(folder)
        assert [found["environment"][name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "WANDB_API_KEY")] == [
            str(rank), "2", "0", "127.0.0.2", "secret",
        ]  # fmt: skip
    assert not (folder / "hurt").exists()


def test_signals_reach_other_hosts(folder):
    install(folder / "bin", "ssh", SSH)
    hosts = ("--hosts", "127.0.0.1,127.0.0.3", "--processes", "1")
    process = started(folder, [{"seconds": 100}], *hosts, PATH=path_with(folder / "bin"), SSH_CALLS=str(folder / "calls"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert [seen(folder, 0, rank)["signals"] for rank in (0, 1)] == [["SIGTERM"], ["SIGTERM"]]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--hosts", "-oProxyCommand=reboot"], "is no name of a host"),
        (["--hosts", "a b"], "is no name of a host"),
        (["--hosts", "a", "--hosts-file", "b"], "--hosts and --hosts-file both name hosts"),
        (["--hosts-file", "none"], "--hosts-file none cannot be read"),
        (["--processes", "0"], "--processes=0"),
        (["--processes", "3"], "train.global_batch_size"),
    ],
)
def test_mistakes(folder, more, says, capsys):
    assert main(words(folder, *(["--hosts=-oProxyCommand=reboot"] if more[1].startswith("-") else more))) == 2
    assert says in capsys.readouterr().err
    assert not (folder / "runs" / "first" / "launch" / "job-001.json").exists()


def test_ssh_is_given_the_interpreter_alone():
    assert ssh_command("node1", "/opt/my python")[-2:] == ["node1", "exec '/opt/my python' -m kan_train.launch.remote"]


SETTINGS = (
    "~data.blend.stdlib", "+data.blend.tiny=1.0", "model.num_layers=2", "model.width=32", "model.vocab_size=384", "model.sequence_length=32",
    "model.grove.num_groves=8", "model.grove.width=16", "train.global_batch_size=4", "train.micro_batch_size=2", "train.validate_every=0",
    "checkpoint.every=4", "optimizer.schedule.warmup_steps=2", "run.threads=1", "run.device=cpu",
)  # fmt: skip


@pytest.mark.slow
def test_a_training_that_loses_a_process_goes_on_as_if_nothing_had_been(folder, corpora):
    """Two processes, one killed in the middle: the losses are those of a run that nobody disturbed, bit for bit."""

    def command(name: str) -> list[str]:
        return ["launch", "local", "--processes", "2", *SETTINGS, f"data.root={corpora}", f"run.name={name}", "train.steps=24"]

    assert main(command("whole")) == 0
    process = subprocess.Popen([sys.executable, "-m", "kan_train", *command("again")], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(rows(folder, "again")) < 10 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    victims = [child for child in psutil.Process(process.pid).children(recursive=True) if child.environ().get("RANK") == "1"]
    victims[0].kill()
    assert process.wait(300) == 0
    figures = [{row["step"]: [row[key] for key in ("tokens", "loss", "grad_norm")] for row in rows(folder, name)} for name in ("again", "whole")]
    assert figures[0] == figures[1]  # of the steps that were done twice the second time
    assert len(rows(folder, "again")) - len(figures[0]) < 2 * 4  # at most what lies between two saves, and one more save under way
    assert kinds_of(folder, "again") == ["submitted", "started", "ended", "requeued", "started", "ended", "finished"]


def kinds_of(folder: Path, name: str) -> list[str]:
    return [event["event"] for event in read_events(folder / "runs" / name)]


def rows(folder: Path, name: str) -> list[dict]:
    path = folder / "runs" / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
