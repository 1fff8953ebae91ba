"""Every planted mistake is refused by `kan launch slurm --dry-run`, named, before sbatch is called but to test. No cluster is needed: sbatch is a stub here."""

import json
import os
import stat
from pathlib import Path

import pytest

from kan_train.cli import main
from kan_train.config.compose import compose_train
from kan_train.launch import slurm
from kan_train.launch.checks import check_job
from kan_train.launch.spec import spec_for

SETTINGS = (
    "cluster=slurm", "cluster.nodes=2", "run.device=cpu", "model=kan_tiny", "model.sequence_length=64", "model.vocab_size=512", "~data.blend.stdlib",
    "+data.blend.tiny=1.0", "train.global_batch_size=8", "run.name=first",
)  # fmt: skip

LARGE = ("model=kan_340b", "model.sequence_length=64", "model.vocab_size=512")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch, corpora):
    """A working directory with a corpus, and a Slurm that takes everything but partition=closed."""
    (tmp_path / "corpora").symlink_to(corpora)
    stubs = {
        "sbatch": 'printf "%s\\n" "$*" >>sbatch.calls; grep -q "partition=closed" "${@: -1}" && { echo "sbatch: error: invalid partition" >&2; exit 1; }\n'
        'case "$*" in *--test-only*) echo "sbatch: Job 1 to start at 2030-01-01T00:00:00" >&2 ;; *) echo 12 ;; esac',
        "squeue": 'cat queue 2>/dev/null || true',
    }
    (tmp_path / "bin").mkdir()
    for name, body in stubs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)


def submitted() -> list[str]:
    calls = Path("sbatch.calls").read_text().splitlines() if Path("sbatch.calls").exists() else []
    return [call for call in calls if "--test-only" not in call]


MISTAKES = {
    "a setting that there is not": (("train.step=3",), "train.steps"),
    "a batch that the processes cannot share": (("train.global_batch_size=9", "train.micro_batch_size=1"), "train.global_batch_size"),
    "a layout for other numbers of processes": (("parallel.tensor_parallel=3",), "parallel.tensor_parallel"),
    "no such partition": (("cluster.partition=closed",), "cluster.partition"),
    "no such corpus": (("data.root=nowhere",), "nowhere/tiny"),
    "a vocabulary smaller than the tokenizer's": (("model.vocab_size=16",), "model.vocab_size"),
    "no such run to start from": (("init_from=nothing",), "init_from=nothing"),
    "more than a device holds": (
        (*LARGE, "run.device=auto", "cluster.device_name=NVIDIA H100 80GB HBM3"), "parallel.tensor_parallel",
    ),
    "checkpoints larger than the disk": (LARGE, "checkpoint.location"),
    "a time limit that is none": (("cluster.time=tomorrow",), "cluster.time=24:00:00"),
    "told to save before it begins": (("cluster.time=00:02:00",), "cluster.signal_seconds=30"),
    "an image that is not there": (("cluster.container.runtime=apptainer", "cluster.container.image=/no/image.sif"), "cluster.container.image"),
    "a partition with a space": (("cluster.partition=a b",), "cluster.partition=ab"),
    "an option of the launcher's own": (("+cluster.sbatch.output=x",), "cluster.sbatch.output"),
    "a variable that is none": (("+cluster.environment.a-b=x",), "cluster.environment.a_b"),
    "a cluster without a scheduler": (("cluster=local",), "cluster=slurm"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_refused_before_submission(name, capsys):
    overrides, named = MISTAKES[name]
    assert main(["launch", "slurm", "--dry-run", *SETTINGS, *overrides]) == 2
    assert named in capsys.readouterr().err
    assert main(["launch", "slurm", *SETTINGS, *overrides]) == 2
    assert submitted() == []
    assert not Path("runs").exists()


def test_time_and_cost_are_foretold_where_the_device_is_known():
    """A device without a peak is said to have none; a known one has hours, and dollars where a price is given."""
    words = [*SETTINGS, "cluster.nodes=1", "accounting.price=2.35"]

    def finding(*more: str):
        config = compose_train([*words, *more], world_size=lambda config: config.cluster.world_size)
        return next(found for found in check_job(config, spec_for(config, [*words, *more]), "") if found.check == "time and cost")

    unknown = finding("run.device=cuda")
    assert unknown.verdict == "unknown"
    assert "cluster.peak_tflops" in unknown.text
    known = finding("run.device=cuda", "cluster.device_name='NVIDIA H100 80GB HBM3'", "train.precision=bf16")
    assert known.verdict == "ok", known
    assert "tokens/s a device" in known.text
    assert "$" in known.text


def test_a_dry_run_prints_the_script_and_writes_nothing(capsys):
    assert main(["launch", "slurm", "--dry-run", *SETTINGS]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("#!/usr/bin/env bash\n")
    named = ["layout:", "memory:", "time", "data:", "checkpoint:", "disk:", "container:", "other", "slurm:"]
    assert [line.split()[1] for line in captured.err.splitlines()] == named
    assert not Path("runs").exists()
    assert submitted() == []


def test_a_job_is_submitted_with_its_script_and_recorded(capsys):
    assert main(["launch", "slurm", *SETTINGS]) == 0
    assert "job 12" in capsys.readouterr().out
    launch = Path("runs/first/launch")
    assert submitted()[0].endswith(f"-- {launch.absolute()}/job-001.sbatch")
    assert json.loads((launch / "job-001.json").read_text())["overrides"] == list(SETTINGS)
    (event,) = [json.loads(line) for line in (launch / "attempts.jsonl").read_text().splitlines()]
    assert (event["event"], event["job_id"], event["nodes"]) == ("submitted", "12", 2)


def test_a_second_job_of_a_run_says_so_and_leaves(capsys):
    values = {"JobID": "12", "State": "RUNNING"}
    Path("queue").write_text("".join(f"{values.get(field, '-')}|" for field in slurm.FIELDS) + "\n")
    assert main(["launch", "slurm", *SETTINGS]) == 2
    assert "has a job already: 12 (running)" in capsys.readouterr().err
    assert submitted() == []


def test_an_estimate_may_be_overruled_but_a_mistake_may_not():
    assert main(["launch", "slurm", "--force", *SETTINGS, *LARGE, "data.root=nowhere"]) == 2
    assert main(["launch", "slurm", "--force", *SETTINGS, *LARGE]) == 0
    assert len(submitted()) == 1


def test_memory_is_that_of_the_fullest_rank():
    words = [*SETTINGS, "cluster.nodes=4", "parallel.pipeline_parallel=4", "parallel.stage_layers=[1,1,1,1]", "run.device=auto", "train.precision=fp32"]
    config = compose_train(words, [], lambda config: config.cluster.world_size)
    (memory,) = [finding for finding in check_job(config, spec_for(config, words), "") if finding.check == "memory"]
    assert memory.verdict == "unknown"  # no device is named
    assert memory.text.startswith(("pipeline stage 0 ", "pipeline stage 3 "))  # the ends have the embedding and the head
