"""Planned step times beside measured ones: layouts of small models on this machine's cores, with gloo between them.

First the machine is calibrated, on models and messages that are none of the layouts below: single processes, as many at a time as a layout has, give
FLOP/s, the seconds of a block and of the optimizer; all-reduces give latency and bandwidth. Then every layout is trained, in alternating order, and its
step is planned from these numbers alone. Where there are more processes than cores, a process that waits leaves its core to another: the planner does not
know that.

    python benchmarks/planner_measured.py                  # about 6 minutes
    python benchmarks/planner_measured.py --rounds 1 --steps 3
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "layouts"))

from kan_train.accounting.flops import flops_per_token
from kan_train.config import AdaConfig, AttentionConfig, Config, DataConfig, EdgeConfig, GroveConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from kan_train.config.layout import layout_of
from kan_train.data import Batch
from kan_train.engine import build_engine
from kan_train.model.lm import count_parameters
from kan_train.parallel.runtime import runtime
from kan_train.planner.efficiency import Efficiency
from kan_train.planner.links import Link, Network
from kan_train.planner.quantity import Quantity
from kan_train.planner.step import StepTime
from kan_train.planner.time import Clock

SIZES = (1 << 12, 1 << 22)
"""Bytes of the messages that latency and bandwidth are taken from."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout and what it trains; without ZeRO every process trains by itself."""

    world: int
    layout: dict[str, Any] = field(default_factory=dict)
    kind: str = "kan"
    """kan, hybrid or dense."""
    micro_batch: int = 2
    recompute: bool = False
    width: int = 128
    layers: int = 4
    length: int = 128
    vocabulary: int = 512
    batch: int = 16

    @property
    def dense(self) -> bool:
        """Whether a block is a handful of operators, not the many of groves."""
        return self.kind == "dense"

    @property
    def name(self) -> str:
        """kan tp2sp-dp2-zero1, mb 2."""
        return f"{self.kind} {layout_of(self.config(), self.world)} mb {self.micro_batch}" + (" recompute" if self.recompute else "")

    def config(self) -> Config:
        """The run's settings."""
        common: dict[str, Any] = {"width": self.width, "num_layers": self.layers, "vocab_size": self.vocabulary, "sequence_length": self.length}
        common |= {"attention": AttentionConfig(num_heads=4, num_kv_heads=4)}
        if self.kind == "dense":
            model = ModelConfig(ffn="swiglu", ffn_width=4 * self.width, attention_pattern=1, **common)
        else:
            grove = GroveConfig(num_groves=16, active_groves=2, width=64, shared_width=64, edge=EdgeConfig(group_size=8))
            model = ModelConfig(attention_pattern=2 if self.kind == "hybrid" else 0, ada=AdaConfig(num_heads=4), grove=grove, **common)
        train = TrainConfig(
            steps=100, global_batch_size=self.batch, micro_batch_size=self.micro_batch, activation_checkpointing=self.recompute, validate_every=0
        )
        parallel = ParallelConfig(**self.layout)
        run = RunConfig(seed=3, threads=1, device="cpu", name="case")
        return Config(model=model, data=DataConfig(blend={"synthetic": 1.0}), train=train, parallel=parallel, run=run)


TP, PP, CP, EP = ({f"{name}_parallel": 2} for name in ("tensor", "pipeline", "context", "expert"))
CASES = [
    *(Case(world=2, layout={"zero_stage": stage}) for stage in (0, 1, 2, 3)),
    Case(world=2, layout={"zero_stage": 2}, micro_batch=8),
    Case(world=2, layout={"zero_stage": 1}, recompute=True),
    Case(world=2, layout=TP | {"zero_stage": 1}),
    Case(world=2, layout=EP | {"zero_stage": 1}),
    Case(world=2, layout=CP | {"zero_stage": 1}, kind="hybrid"),
    Case(world=2, layout=PP | {"zero_stage": 1}),
    Case(world=2, layout=PP | {"virtual_pipeline": 2, "zero_stage": 1}),
    Case(world=2, layout={"zero_stage": 1}, kind="dense"),
    Case(world=4, layout={"zero_stage": 1}),
    Case(world=4, layout=TP | {"zero_stage": 1}),
    Case(world=4, layout=EP | {"zero_stage": 2}),
    Case(world=4, layout=CP | {"zero_stage": 1}),
    Case(world=4, layout=PP | {"zero_stage": 2}),
    Case(world=4, layout=TP | PP | {"zero_stage": 1}),
]
ALONE = [
    Case(world=1, width=96, layers=2, length=96, micro_batch=4, batch=8),
    Case(world=1, width=256, layers=2, length=192, micro_batch=4, batch=8),
    Case(world=1, width=96, layers=6, length=64, micro_batch=1, batch=4),
    Case(world=1, width=96, layers=2, length=64, micro_batch=1, batch=1, vocabulary=16384),
    Case(world=1, kind="dense", width=384, layers=2, length=192, micro_batch=4, batch=8),
    Case(world=1, kind="dense", width=96, layers=6, length=64, micro_batch=1, batch=4),
    Case(world=1, kind="hybrid", width=160, layers=4, length=96, micro_batch=4, batch=8),
]
"""What calibrates: none of CASES, in width, length and batch. Some are all products, some all blocks, one all optimizer."""


def main() -> None:
    from layout_matrix.pool import Pool

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="times that every layout is trained, in alternating order")
    parser.add_argument("--steps", type=int, default=8, help="steps of a round, of which the first two warm up")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, Pool("planner_measured") as pool:
        machine = {world: calibrated(pool, Path(folder), world) for world in sorted({case.world for case in CASES})}
        seconds: dict[str, list[float]] = {case.name + f" of {case.world}": [] for case in CASES}
        for turn in range(arguments.rounds):
            for case in CASES if turn % 2 == 0 else CASES[::-1]:
                own = Path(folder) / f"{turn}-{CASES.index(case)}"
                run = pool.call("planner_measured:train_case", case, own, {"case": vars(case), "steps": arguments.steps})  # type: ignore[arg-type]
                if run.error:
                    raise SystemExit(f"{case.name}: {run.error}")
                seconds[case.name + f" of {case.world}"] += run.ranks[0]["seconds"][2:]
    rows = [_row(case, seconds[case.name + f" of {case.world}"], machine[case.world][0][case.dense], machine[case.world][1]) for case in CASES]
    for row in sorted(rows, key=lambda row: row["measured_seconds"]):
        print(f"{row['name']:44s} measured {1000 * row['measured_seconds']:7.1f} ms  planned {1000 * row['planned_seconds']:7.1f} ms  ratio {row['ratio']:.2f}")
    found = {f"{world} processes": spearman([row for row in rows if row["world"] == world]) for world in machine} | {"all": spearman(rows)}
    print("Spearman:", ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    calibration = {
        world: {
            "efficiency": efficiencies[False].as_json(), "dense_block_seconds": efficiencies[True].block_seconds.as_json(),
            "bandwidth": network.inside.bandwidth.as_json(), "latency": network.inside.latency.as_json(),
        }
        for world, (efficiencies, network) in machine.items()
    }
    claim = "the planner ranks layouts by their measured step time: Spearman 0.8 or more"
    write_result("planner-measured", claim=claim, config=vars(arguments), rows=rows, spearman=found, holds=found["all"] >= 0.8, calibration=calibration)


def _row(case: Case, seconds: list[float], efficiency: Efficiency, network: Network) -> dict[str, Any]:
    config = case.config()
    config.validate(case.world)
    step: StepTime = Clock(config, network, efficiency).step(layout_of(config, case.world), case.micro_batch, recompute=case.recompute)
    measured, quartiles = statistics.median(seconds), statistics.quantiles(seconds, n=4)
    return {
        "name": f"{case.name} of {case.world}", "world": case.world, "measured_seconds": measured, "measured_quartiles": quartiles,
        "planned_seconds": step.total, "ratio": step.total / measured, "planned": dict(vars(step)),
    }  # fmt: skip


def spearman(rows: list[dict[str, Any]]) -> float:
    """Rank correlation of planned and measured seconds, equal values at their mean rank."""
    planned, measured = (_ranks([row[key] for row in rows]) for key in ("planned_seconds", "measured_seconds"))
    return statistics.correlation(planned, measured)


def _ranks(values: list[float]) -> list[float]:
    return [sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values]


# --- calibration --------------------------------------------------------------------------------------------------------------------------------------------


def calibrated(pool: Any, folder: Path, world: int) -> tuple[dict[bool, Efficiency], Network]:
    """Speeds of one of `world` processes that compute at a time, of dense blocks (True) and of those with groves, and of the messages between them."""
    lines = []
    for number, case in enumerate(ALONE):
        wide, own = replace(case, world=world), folder / f"alone-{world}-{number}"
        run = pool.call("planner_measured:train_alone", wide, own, {"case": vars(wide), "steps": 8})
        if run.error:
            raise SystemExit(f"calibration: {run.error}")
        config, micro_batches = case.config(), case.batch // case.micro_batch
        flops, elements = case.batch * case.length * flops_per_token(config.model).executed(), count_parameters(config.model)[0]
        seconds = statistics.median(rank for ranks in run.ranks for rank in ranks["seconds"][2:])
        blocks = micro_batches * case.layers
        lines.append((flops, 0 if case.dense else blocks, blocks if case.dense else 0, (36 + 4 * micro_batches) * elements, seconds))
    of_flops, of_block, of_dense_block, of_byte = _fitted(lines)
    links = pool.call("planner_measured:time_links", Case(world=world), folder / f"links-{world}", {})
    if links.error:
        raise SystemExit(f"links: {links.error}")
    latency, bandwidth = (statistics.median(rank[name] for rank in links.ranks) for name in ("latency", "bandwidth"))
    source = f"benchmarks/planner_measured.py, {world} processes at a time"

    def measured(value: float) -> Quantity:
        return Quantity(value=value, low=value, high=value, status="measured", source=source)

    efficiencies = {
        dense: Efficiency(device="cpu", products=measured(1 / of_flops), block_seconds=measured(block), memory=measured(1 / of_byte), overlaps=False)
        for dense, block in ((False, of_block), (True, of_dense_block))
    }
    link = Link(name="gloo", bandwidth=measured(bandwidth), latency=measured(latency))
    speeds = f"{1e-9 / of_flops:.1f} GFLOP/s, {1e3 * of_block:.2f} ms a block, {1e3 * of_dense_block:.2f} ms a dense block, {1e-9 / of_byte:.2f} GB/s"
    print(f"{world} processes: {speeds}; {1e6 * latency:.0f} us, {1e-9 * bandwidth:.2f} GB/s")
    return efficiencies, Network(devices_per_node=world, inside=link, between=link)


def _fitted(lines: list[tuple[float, ...]]) -> list[float]:
    """Seconds of a FLOP, a block and a byte, none below a thousandth of what would explain a line alone: least squares of relative errors."""
    from scipy.optimize import nnls

    weights, _ = nnls([[one / line[-1] for one in line[:-1]] for line in lines], [1.0] * len(lines))
    return [max(float(weight), 1e-3 * min(line[-1] / line[place] for line in lines if line[place])) for place, weight in enumerate(weights)]


# --- in the processes ---------------------------------------------------------------------------------------------------------------------------------------


def train_case(folder: Path, case: dict[str, Any], steps: int) -> None:
    """Train a layout and leave the seconds of its steps."""
    chosen = Case(**case)
    config = chosen.config()
    config.validate(chosen.world)
    with runtime(config) as process:
        place = layout_of(config, chosen.world)
        share = chosen.batch // place.data_parallel
        engine = build_engine(config, process)
        seconds = _timed(engine, _batches(chosen, place.coordinates(process.rank).data * share, share), steps, process.barrier)
        (folder / f"rank-{process.rank}.json").write_text(json.dumps({"seconds": seconds}))
        engine.close()


def train_alone(folder: Path, case: dict[str, Any], steps: int) -> None:
    """Train without the others, while they do the same."""
    import os

    from kan_train.parallel.runtime import single_process_runtime

    rank = os.environ["RANK"]
    chosen = replace(Case(**case), world=1)
    config = chosen.config()
    config.validate(1)
    engine = build_engine(config, single_process_runtime(config))
    seconds = _timed(engine, _batches(chosen, 0, chosen.batch), steps, lambda: None)
    (folder / f"rank-{rank}.json").write_text(json.dumps({"seconds": seconds}))


def _timed(engine: Any, batches: list[Batch], steps: int, barrier: Any) -> list[float]:
    seconds = []
    for _ in range(steps):
        barrier()
        started = time.perf_counter()
        engine.train_step(batches, 1e-3, 1e-2)
        seconds.append(time.perf_counter() - started)
    return seconds


def _batches(case: Case, start: int, share: int) -> list[Batch]:
    tokens = torch.randint(0, case.vocabulary, (case.batch, case.length + 1), generator=torch.Generator().manual_seed(5))
    parts = [slice(first, first + case.micro_batch) for first in range(start, start + share, case.micro_batch)]
    resets = torch.zeros(case.batch, case.length, dtype=torch.bool)
    return [Batch(tokens[part, :-1].contiguous(), tokens[part, 1:].contiguous(), resets[part].contiguous()) for part in parts]


def time_links(folder: Path) -> None:
    """Latency and bandwidth that the planner's formula for an all-reduce of all processes gives, from a small and a large one."""
    import math

    with runtime(Case(world=2).config()) as process:
        ranks = process.world_size
        small, large = (_all_reduce_seconds(size) for size in SIZES)
        bandwidth = 2 * (ranks - 1) / ranks * (SIZES[1] - SIZES[0]) / max(large - small, 1e-9)
        latency = max(0.0, small - 2 * (ranks - 1) / ranks * SIZES[0] / bandwidth) / 2 / math.ceil(math.log2(ranks))
        (folder / f"rank-{process.rank}.json").write_text(json.dumps({"latency": latency, "bandwidth": bandwidth}))


def _all_reduce_seconds(size: int) -> float:
    tensor, seconds = torch.ones(size // 4), []
    for _ in range(30):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[5:])


if __name__ == "__main__":
    main()
