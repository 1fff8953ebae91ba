"""Stubs of Slurm's commands, and runs whose files are written by hand."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kan_train.launch.spec import JobSpec

sys.path.insert(0, str(Path(__file__).parent))  # stubs.py is imported by name


@pytest.fixture
def slurm_stub(tmp_path, monkeypatch):
    """Slurm's commands in PATH, which record their words."""
    from stubs import Slurm

    return Slurm(tmp_path, monkeypatch)


@pytest.fixture
def make_spec(tmp_path: Path) -> Callable[..., JobSpec]:
    """A job of two nodes with one process each; words change it."""

    def make(**changes: object) -> JobSpec:
        spec = JobSpec(
            job=1,
            scheduler="slurm",
            run_name="first",
            run_dir=str(tmp_path / "runs" / "first"),
            checkpoints=str(tmp_path / "runs" / "first" / "checkpoints"),
            steps=100,
            working_directory=str(tmp_path),
            python="/usr/bin/python3",
            nodes=2,
            processes_per_node=1,
            device="cpu",
        )
        return replace(spec, **changes)

    return make
