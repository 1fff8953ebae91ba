"""The search: what it returns is sound and fits, nothing better was left out, and every other layout has a reason."""

import argparse
import io
import itertools
import json
import re
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from kan_train.cli import main
from kan_train.commands.cost_plan import add_plan_command, plan_of
from kan_train.config import ConfigError
from kan_train.config.compose import compose_train
from kan_train.config.layout import Layout
from kan_train.config.soundness import broken_rule
from kan_train.planner.efficiency import Efficiency
from kan_train.planner.footprint import footprint_of
from kan_train.planner.links import INSIDE, NETWORK, Network
from kan_train.planner.plan_table import print_plan
from kan_train.planner.quantity import assumed
from kan_train.planner.search import SLACK, USABLE, Result, Space, search
from kan_train.planner.time import Clock

H100 = "NVIDIA H100 80GB HBM3"
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
PLAN = ["cost", "plan", "cluster=h100_slurm", "tokens=100B", "--efficiency", "0.5", "--results", str(RESULTS)]


def clock(*overrides: str) -> Clock:
    config = compose_train(["train.precision=bf16", *overrides], world_size=1)
    efficiency = Efficiency(device=H100, products=assumed(5e14, 4e14, 6e14, "test"), memory=assumed(2.7e12, 2e12, 3e12, "test"))
    return Clock(config, Network(devices_per_node=8, inside=INSIDE[H100], between=NETWORK), efficiency)


def found(*overrides: str, world: int = 16, memory: float = 8e9, pinned: dict[str, int | bool] | None = None) -> Result:
    return search(clock(*overrides), Space(world_size=world, devices_per_node=8, pinned=pinned or {}), round(memory))


@pytest.fixture(scope="module")
def result() -> Result:
    return found("model=kan_125m", "train.global_batch_size=64")


def test_what_is_taken_is_sound_and_fits(result: Result):
    times = clock("model=kan_125m", "train.global_batch_size=64")
    for one in result.fitting:
        candidate = one.candidate
        config = times.configured(candidate.layout, candidate.micro_batch_size, recompute=candidate.recompute, offload=candidate.offload)
        assert broken_rule(config, 16) is None
        assert footprint_of(config, candidate.layout, candidate.micro_batch_size, recompute=candidate.recompute).total == one.memory.total <= USABLE * 8e9
    steps = [one.step.total for one in result.fitting]
    assert steps == sorted(steps)
    assert steps[-1] <= SLACK * steps[0]


def test_nothing_faster_was_left_out(result: Result):
    """By brute force over the dense layouts of the same space: none that is sound and fits is faster than the one found."""
    times, best = clock("model=kan_125m", "train.global_batch_size=64"), result.fitting[0].step.total
    sizes = (1, 2, 4, 8)
    tried = 0
    for tensor, pipeline, expert, stage, micro in itertools.product(sizes, (1, 2), sizes, (1, 2, 3), (1, 4)):
        if 16 % (tensor * pipeline) or 16 % (pipeline * expert):
            continue
        layout = Layout(
            world_size=16, tensor_parallel=tensor, sequence_parallel=tensor > 1, pipeline_parallel=pipeline, expert_parallel=expert, zero_stage=stage
        )
        config = times.configured(layout, micro)
        if broken_rule(config, 16) is None and times.step(layout, micro).total < best:
            assert footprint_of(config, layout, micro, recompute=False).total > USABLE * 8e9
        tried += 1
    assert tried > 100


def test_every_layout_has_its_place(result: Result):
    """Taken, or rejected for a reason that is counted, with an example."""
    assert sum(result.rejected.counts.values()) + len(result.fitting) == result.looked_at
    assert set(result.rejected.counts) == set(result.rejected.examples)
    assert any("virtual_pipeline" in name for name in result.rejected.counts)


def test_the_front_trades_speed_for_memory(result: Result):
    front = result.front()
    assert front[0] is result.fitting[0]
    for faster, slower in itertools.pairwise(front):
        assert faster.tokens_per_second >= slower.tokens_per_second
        assert faster.headroom < slower.headroom
    for one in result.fitting:
        assert any(best.tokens_per_second >= one.tokens_per_second and best.headroom >= one.headroom for best in front)


def test_less_memory_is_met_with_recomputation_and_sharding():
    """A device that holds a quarter takes other layouts, slower ones."""
    small = found("model=kan_125m", "train.global_batch_size=64", memory=1.2e9)
    large = found("model=kan_125m", "train.global_batch_size=64", memory=80e9)
    assert small.fitting
    assert small.fitting[0].step.total >= large.fitting[0].step.total
    assert all(one.memory.total <= USABLE * 1.2e9 for one in small.fitting)
    assert any("not fit" in name for name in small.rejected.counts)


def test_what_the_user_gives_stays():
    pinned = {"parallel.tensor_parallel": 4, "parallel.zero_stage": 2, "train.micro_batch_size": 2}
    result = found("model=kan_125m", "train.global_batch_size=64", pinned=pinned)
    assert {(one.candidate.layout.tensor_parallel, one.candidate.layout.zero_stage, one.candidate.micro_batch_size) for one in result.fitting} == {(4, 2, 2)}
    with pytest.raises(ConfigError, match="no layout of kan_125m on 16 devices is left"):
        found("model=kan_125m", "train.global_batch_size=64", pinned={"parallel.pipeline_parallel": 3})


def test_340b_on_1024_devices_takes_little_work():
    """Under 10 s on a core (benchmarks/planner_speed.py): here the work that takes them."""
    result = found("model=kan_340b", "train.global_batch_size=1024", world=1024, memory=80e9)
    assert result.looked_at > 400_000
    assert result.timed < 15_000
    assert result.weighed < 1_500
    assert result.fitting


# --- the command ------------------------------------------------------------------------------------------------------------------------------------------


def test_the_best_layout_is_one_that_kan_train_accepts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert main([*PLAN, "model=kan_1b", "--devices", "64", "--price", "2.35", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    words = tree["best"]["overrides"]
    monkeypatch.setenv("WORLD_SIZE", "64")
    assert main(["train", *words, "--cfg", "job"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["name"] == "kan_1b"
    assert config["train"]["micro_batch_size"] == tree["best"]["micro_batch_size"]
    batch = config["train"]["global_batch_size"] * config["model"]["sequence_length"]
    assert 100e9 <= config["train"]["steps"] * batch < 100e9 + batch
    assert config["cluster"]["nodes"] == 8


def test_the_page_says_all(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    picture = tmp_path / "front.svg"
    assert main([*PLAN, "model=kan_125m", "--devices", "8,16", "--price", "on_demand", "--plot", str(picture), "--top", "3", "--network", "40"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    said = ("--efficiency 0.5", "--network 40", "layouts not taken on 16 devices", "to run it: kan train", "not modelled:", "$2.95 a device-hour", "Llama 3")
    for words in said:
        assert words in text, words
    assert picture.read_text(encoding="utf-8").startswith("<?xml")


@pytest.mark.parametrize(("words", "message"), [
    (["tokens=many"], "use tokens=2T"),
    (["parallel=tensor"], r"parallel\.tensor_parallel=8"),
    (["--devices", "0"], "--devices 1024"),
    (["parallel.tensor_parallel=true"], r"use parallel\.tensor_parallel=2"),
    (["--efficiency", "45"], "0.45,groves=0.3"),
    (["cluster.device_name=Abacus"], r"cluster\.peak_tflops"),
    (["cluster.device_name=Abacus", "cluster.peak_tflops=100"], "--link 300"),
    (["--price", "cheap"], "--price"),
    (["--failures", "1e7"], "--restart"),
])  # fmt: skip
def test_what_is_wrong_is_named_with_what_works(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main([*PLAN, "model=kan_125m", "--devices", "8", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_plan_that_fits_nothing_says_so(capsys: pytest.CaptureFixture[str]):
    assert main([*PLAN, "model=kan_125m", "--devices", "1", "--memory", "0.01"]) in (1, 2)
    out, err = capsys.readouterr()
    assert "not fit" in out + err or "nothing fits" in out + err


def test_a_terminal_that_is_narrow_gets_everything(capsys: pytest.CaptureFixture[str]):
    parser = argparse.ArgumentParser()
    group = parser.add_subparsers()

    def add(group, name, help_line, text, run):
        return group.add_parser(name)

    add_plan_command(group, add)
    plan = plan_of(parser.parse_args(["plan", "model=kan_125m", *PLAN[2:], "--devices", "8"]))
    out = io.StringIO()
    print_plan(plan, 3, console=Console(file=out, width=100))
    assert "parallel.zero_stage=" in out.getvalue()
