"""The trace of a run: the steps asked for, in the form that Perfetto and chrome://tracing read."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from kan_train.config import Config, ConfigError
from kan_train.config.compose import compose_train
from kan_train.engine.profile import StepProfile, profile_hooks
from kan_train.engine.trainer import train
from kan_train.parallel.runtime import Runtime

SETTINGS = (
    "~data.blend.stdlib", "+data.blend.tiny=1.0", "model.num_layers=1", "model.width=32", "model.vocab_size=384", "model.sequence_length=32",
    "model.grove.num_groves=8", "model.grove.width=16", "train.global_batch_size=4", "train.micro_batch_size=2", "train.steps=8",
    "train.validate_every=0", "optimizer.schedule.warmup_steps=2", "run.threads=1", "run.device=cpu", "run.name=first",
)  # fmt: skip


@pytest.fixture
def run(corpora: Path, tmp_path: Path):
    """run(overrides): trains, and gives the run directory."""

    def trained(*overrides: str) -> Path:
        config = compose_train([*SETTINGS, f"data.root={corpora}", f"run.root={tmp_path}", *overrides], [])
        return train(config, lambda *_: []).run_dir

    return trained


def trace(path: Path) -> list[dict]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def steps_of(events: list[dict]) -> set[str]:
    return {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}


def test_the_trace_has_the_steps_asked_for_and_the_table_their_operators(run, capsys):
    folder = run("profile=on", "profile.wait=3", "profile.warmup=1", "profile.active=2", "profile.shapes=true", "profile.operators=5") / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-00000-step-00000005.json.gz", "rank-00000-step-00000005.txt"]
    events = trace(folder / "rank-00000-step-00000005.json.gz")
    assert steps_of(events) == {"ProfilerStep#5", "ProfilerStep#6"}
    complete = [event for event in events if event.get("ph") == "X"]
    assert len(complete) > 100
    assert all(isinstance(event["ts"], (int, float)) and event["dur"] >= 0 and "pid" in event and "tid" in event for event in complete)
    matmuls = [event for event in complete if event["name"] == "aten::mm"]
    assert matmuls
    assert all(event["args"]["Input Dims"] for event in matmuls)
    table = (folder / "rank-00000-step-00000005.txt").read_text()
    assert "Self CPU" in table
    printed = capsys.readouterr().err
    assert table.splitlines()[3] in printed
    assert "steps 5 to 6 of rank 0" in printed


def test_a_start_that_goes_on_traces_its_own_steps(run):
    run("train.steps=4")
    folder = run("profile=on", "profile.wait=1", "profile.warmup=0", "profile.active=1") / "profile"
    assert steps_of(trace(folder / "rank-00000-step-00000006.json.gz")) == {"ProfilerStep#6"}


def test_a_run_that_ends_amid_the_steps_leaves_what_there_is(tmp_path: Path, capsys):
    config = Config().profile
    config.enabled, config.wait, config.warmup, config.active = True, 0, 1, 5
    (hook,) = profile_hooks(config, tmp_path, Runtime())
    hook.on_start({"step": 0, "steps": 4})
    for step in range(1, 4):
        torch.ones(3).sum()
        hook.on_step({"step": step})
    hook.on_end({"step": 3})
    assert {"ProfilerStep#2", "ProfilerStep#3"} <= steps_of(trace(tmp_path / "profile" / "rank-00000-step-00000002.json.gz"))
    assert "the run ends with step 4" in capsys.readouterr().err


def test_off_there_is_no_hook_and_no_folder(run):
    assert not (run() / "profile").exists()
    assert profile_hooks(Config().profile, Path("nowhere"), Runtime()) == []


def test_the_ranks_that_are_not_asked_for_trace_nothing(tmp_path: Path):
    config = Config().profile
    config.enabled, config.ranks = True, [1]
    assert profile_hooks(config, tmp_path, Runtime(rank=0, world_size=2)) == []
    (hook,) = profile_hooks(config, tmp_path, Runtime(rank=1, world_size=2))
    assert isinstance(hook, StepProfile)
    assert hook.talks


def test_a_folder_that_cannot_be_written_does_not_end_the_run(run, tmp_path: Path, capsys):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "profile").write_text("in the way")
    run("profile=on", "profile.wait=0", "profile.warmup=0", "profile.active=1")
    assert "could not be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("profile.wait=5",), r"profile\.wait=5 .* is beyond train\.steps=8.*use train\.steps=10, or profile\.wait=0"),
        (("profile.wait=0", "profile.ranks=[0,1]"), r"profile\.ranks=\[0, 1\] has 1, which is not one of 1 process; use profile\.ranks=\[0\]"),
        (("profile.wait=0", "profile.active=0"), r"profile\.active=0 is too small; use profile\.active=1"),
    ],
)
def test_steps_and_ranks_that_are_not_there_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose_train([*SETTINGS, "profile=on", *overrides], [], world_size=1)
