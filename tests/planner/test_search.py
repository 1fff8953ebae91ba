"""The search: what it returns is sound and fits, nothing better was left out, and every other layout has a reason."""

import argparse
import io
import itertools
import json
import re
import shutil
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
from kan_train.planner.candidate import Candidate
from kan_train.planner.cost import reliability_of
from kan_train.planner.efficiency import Efficiency
from kan_train.planner.footprint import footprint_of
from kan_train.planner.links import INSIDE, NETWORK, Network
from kan_train.planner.memory import memory_of
from kan_train.planner.plan import dump, make_plan
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


@pytest.mark.parametrize("recompute", [None, True], ids=str)
def test_offloading_is_tried_where_only_the_activations_do_not_fit(recompute: bool | None):
    """A device that holds weights, gradients and optimizer and 1% more gets what it gets where offloading is asked for."""
    held = memory_of(clock("model=kan_125m").share(Layout(world_size=1, zero_stage=2))).device
    pinned: dict[str, int | bool] = {"parallel.zero_stage": 2, "train.micro_batch_size": 1}
    pinned |= {} if recompute is None else {"train.activation_checkpointing": recompute}
    asked = found("model=kan_125m", world=1, memory=1.01 * held / USABLE, pinned={**pinned, "parallel.offload_optimizer": True})
    free = found("model=kan_125m", world=1, memory=1.01 * held / USABLE, pinned=pinned)
    assert free.fitting[0].candidate == asked.fitting[0].candidate
    assert free.fitting[0].candidate.offload
    assert sum(free.rejected.counts.values()) + len(free.fitting) == free.looked_at


def test_an_optimizer_that_is_not_sharded_is_never_offloaded():
    asked = found("model=kan_125m", "train.precision=fp32", world=1, pinned={"parallel.offload_optimizer": True})
    assert {one.candidate.layout.zero_stage for one in asked.fitting} == {1, 2, 3}


def test_sequence_parallelism_stays_as_it_is_given():
    """Without it tensor parallelism goes on; with it there is no layout without tensor parallelism."""
    rest: dict[str, int | bool] = {"parallel.pipeline_parallel": 1, "parallel.zero_stage": 1, "train.micro_batch_size": 1}
    for pinned in ({"parallel.sequence_parallel": False, "parallel.tensor_parallel": 2}, {"parallel.sequence_parallel": True}):
        taken = [one.candidate.layout for one in found("model=kan_125m", "train.global_batch_size=64", pinned={**rest, **pinned}).fitting]
        assert {layout.sequence_parallel for layout in taken} == {pinned["parallel.sequence_parallel"]}
        assert all(layout.tensor_parallel > 1 for layout in taken)


def test_the_best_number_of_devices_needs_the_fewest_device_hours():
    """Eight devices that need no offloading are faster, a device, than one that does; they also fail eight times as often."""
    pinned: dict[str, int | bool] = {"parallel.tensor_parallel": 1, "parallel.pipeline_parallel": 1, "parallel.context_parallel": 1}
    times = clock("model=kan_125m", "train.global_batch_size=1024", "cluster=h100_slurm")
    for failures, best in ((0.02, 8), (100.0, 1)):
        plan = make_plan(
            times.config, devices=[1, 8], tokens=1e11, price=None, efficiency=times.efficiency, pinned=pinned, memory_gb=2.2,
            reliability=reliability_of(RESULTS / "none", failures=failures),
        )  # fmt: skip
        one, eight = (result.fitting[0] for result in plan.results)
        assert eight.tokens_per_second > one.tokens_per_second
        assert plan.best is not None
        assert plan.best.candidate.layout.world_size == best


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


def test_the_run_is_the_one_that_was_planned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """With a folder of one's own, a part of a machine, and tokens that are not split between the layers."""
    (tmp_path / "model").mkdir()
    shutil.copy(RESULTS.parents[1] / "conf" / "model" / "kan_125m.yaml", tmp_path / "model" / "mine.yaml")
    settings = ["model=mine", "parallel.tensor_parallel=2", "parallel.sequence_parallel=false", "parallel.zero_stage=1", "--config-dir", str(tmp_path)]
    assert main([*PLAN, *settings, "--devices", "4", "--json", "--top", "1"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert "tp2-" in tree["best"]["layout"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", *tree["best"]["overrides"], "--cfg", "job"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["parallel"]["sequence_parallel"] is False
    assert (config["cluster"]["nodes"], config["cluster"]["devices_per_node"]) == (1, 4)


def test_what_a_configuration_sets_otherwise_is_written_out():
    config = compose_train(["train.activation_checkpointing=true", "parallel.sequence_parallel=false"], world_size=1)
    words = Candidate(layout=Layout(world_size=2, tensor_parallel=2, sequence_parallel=True), micro_batch_size=1).overrides(config)
    assert {"train.activation_checkpointing=false", "parallel.sequence_parallel=true"} <= set(words)


def test_a_slow_end_without_an_end_is_told():
    """Half a year to start again: less than the hours between failures as expected, more than those at the slow end."""
    times = clock("model=kan_125m", "train.global_batch_size=64", "cluster=h100_slurm")
    plan = make_plan(
        times.config, devices=[8], tokens=1e11, price=None, efficiency=times.efficiency, memory_gb=80,
        reliability=reliability_of(RESULTS / "none", restart_minutes=250_000), pinned={"parallel.tensor_parallel": 1, "train.micro_batch_size": 4},
    )  # fmt: skip
    ends = json.loads(dump(plan, 1), parse_constant=pytest.fail)["best"]["money"]
    assert (ends["slow"]["hours"], ends["slow"]["device_hours"], ends["slow"]["goodput"]) == (None, None, 0)
    assert ends["fast"]["hours"] < ends["expected"]["hours"]
    print_plan(plan, 1, console=Console(file=(out := io.StringIO()), width=160))
    assert re.search(r"days[ │]+[\d.]+[ │]+never[ │]+[\d.]+", out.getvalue())
    assert not re.search(r"\binf\b", out.getvalue())


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
    (["--failures", "-1"], "of 0 or more; use --failures 0.02"),
    (["--devices", "12"], r"cluster\.devices_per_node=8.*--devices 16"),
    (["--network", "-40"], "--network 40"),
    (["--link", "0"], "--link 300"),
    (["--memory", "nan"], "--memory 80"),
    (["--plot", "front.txt"], "--plot front.png"),
    (["--plot", "nowhere/front.png"], "nowhere is not a folder; use --plot front.png"),
    (["--top", "-1"], "--top 10"),
    (["parallel.sequence_parallel=2"], r"use parallel\.sequence_parallel=true"),
])  # fmt: skip
def test_what_is_wrong_is_named_with_what_works(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main([*PLAN, "model=kan_125m", "--devices", "8", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_plan_that_fits_nothing_says_so(capsys: pytest.CaptureFixture[str]):
    assert main([*PLAN, "model=kan_125m", "--devices", "1", "--memory", "0.01"]) == 1
    assert "nothing fits" in capsys.readouterr().out


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
