"""`kan train run.dry_run=true` as a user calls it."""

import io
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from kan_train.cli import main
from kan_train.config import ConfigError
from kan_train.config.compose import compose_train
from kan_train.planner.devices import DEVICE_MEMORY
from kan_train.planner.dry_run import dry_run
from kan_train.planner.memory import NOT_COUNTED
from kan_train.planner.traffic import NOT_MODELLED

LARGE = [
    "model=kan_340b", "train.precision=bf16", "train.global_batch_size=1024", "train.micro_batch_size=1", "parallel.tensor_parallel=8",
    "parallel.pipeline_parallel=8", "parallel.expert_parallel=16", "parallel.zero_stage=2", "run.dry_run=true", "run.world_size=1024",
]  # fmt: skip

ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("deepspeed", "megatron"):
            raise ImportError(f"a dry run must not import {name}")

sys.meta_path.insert(0, Refuse())
from kan_train.cli import main
raise SystemExit(main(["train", *sys.argv[1:]]))
"""


def printed(*overrides: str, world: int = 1) -> str:
    out = io.StringIO()
    dry_run(compose_train([*overrides, "run.dry_run=true"], world_size=world), world, Console(file=out, width=160))
    return out.getvalue()


def test_kan_340b_on_1024_ranks(tmp_path: Path):
    """Under 60 s of processor time and 4 GiB, without DeepSpeed, Megatron, a corpus, or a trace on the disk."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", ALONE, *LARGE, "run.rank=37", "cluster.device_name='NVIDIA H100 80GB HBM3'"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 60
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 4 * 2**30
    text = done.stdout
    assert "rank 37 of 1024 in tp8sp-pp8-dp16-ep16-zero2" in text
    assert re.search(r"pipeline +8 +0 +37 165 293 421 549 677 805 933", text)
    # A ninth of 72 layers, an eighth of the vocabulary, a sixteenth of the groves.
    assert re.search(rf"embedding +{131072 // 8 * 6144:,}", text)
    assert "layers 0 to 8 of 72" in text
    for name, passes in (("mixers +all-gather", 2), ("tokens to groves +all-to-all", 1)):
        assert re.search(rf"{name} +{64 * 9 * passes:,} ", text), name
    last = " ".join(text.strip().splitlines()[-2:])
    assert "of the 74.5 GiB of NVIDIA H100 80GB HBM3" in last


def test_every_rank_of_a_small_layout_prints():
    sizes = [f"parallel.{name}=2" for name in ("tensor_parallel", "pipeline_parallel", "expert_parallel")]
    settings = ["run.world_size=8", "train.micro_batch_size=1", "parallel.zero_stage=1", *sizes]
    texts = {printed(*settings, f"run.rank={rank}") for rank in range(8)}
    assert len(texts) == 8


def test_what_is_left_out_is_said():
    text = " ".join(printed().split())
    for line in (*NOT_COUNTED, *NOT_MODELLED):
        assert line in text
    assert text.endswith("its memory is not known")


def test_a_model_that_is_too_large_is_said_to_be():
    name = "NVIDIA L40S"
    text = " ".join(printed("model=kan_1b", "train.micro_batch_size=1", f"cluster.device_name='{name}'").split())
    assert f"{DEVICE_MEMORY[name] / 2**30:.1f} GiB of {name}, which leaves" in text
    large = " ".join(printed(*LARGE[:-5], "parallel.zero_stage=1", "run.world_size=8", f"cluster.device_name='{name}'").split())
    assert f"more than the {DEVICE_MEMORY[name] / 2**30:.1f} GiB of {name}" in large


def test_only_the_first_of_several_processes_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for rank in (0, 1):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        assert main(["train", "run.dry_run=true", "train.micro_batch_size=4"]) == 0
        assert ("rank 0 of 2" in capsys.readouterr().out) is (rank == 0)


def test_an_unsound_layout_is_refused():
    with pytest.raises(ConfigError, match=r"parallel\.zero_stage=3 with parallel\.pipeline_parallel=2"):
        printed("run.world_size=2", "parallel.pipeline_parallel=2", "parallel.zero_stage=3")


def test_the_help_mentions_it(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    (example,) = re.findall(r"kan (train .*run\.dry_run=true.*)", capsys.readouterr().out)
    assert main(example.split()) == 0
    assert "rank 37 of 64" in capsys.readouterr().out
