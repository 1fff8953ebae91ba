"""Training speed of a KAN model against its dense twin, beside the ratio of their FLOPs.

Both models train in this one process on the same tokens, a few steps of one and then of the other, over and over, so that the noise of the machine meets
both alike. Printed: tokens a second (median over the rounds), the achieved ratio, the ideal one, and their quotient.

    python benchmarks/training_speed.py                              # kan_tiny against dense_tiny_total, 1 and 2 threads
    python benchmarks/training_speed.py --against dense_tiny_active
"""

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from common import write_result
from contestant import Contestant

from kan_train.config.compose import compose_train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="kan_tiny")
    parser.add_argument("--against", default="dense_tiny_total")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2, help="steps of each model a round")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--processes", type=int, default=5, help="fresh processes a comparison; the median of their quotients is the result")
    parser.add_argument("--corpora", type=Path, default=Path("corpora"), help="folder of prepared corpora")
    parser.add_argument("overrides", nargs="*", help="further settings for both, for example train.global_batch_size=16")
    arguments = parser.parse_args()
    # A process a comparison, as a run has: the heap that another one left behind slows the many small tensors of the groves by a fifth. Several, because
    # where a process's memory happens to lie moves its speed by up to a tenth either way.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh:
        rows = list(fresh.map(partial(_compare, arguments), arguments.threads * arguments.processes))
    quotients = {threads: sorted(row["achieved_over_ideal"] for row in rows if row["threads"] == threads) for threads in arguments.threads}
    for threads, values in quotients.items():
        print(f"{threads} threads: achieved/ideal, median of {len(values)} processes {statistics.median(values):.3f} ({values[0]:.3f} to {values[-1]:.3f})")
    config = {name: getattr(arguments, name) for name in ("model", "against", "rounds", "steps", "processes", "overrides")}
    claim = "kan_tiny trains at least 3 times as fast as its dense twin of equal total parameters, and at 0.6 of the ratio of their FLOPs"
    write_result("training-speed", claim=claim, config=config, rows=rows)


def _compare(arguments: argparse.Namespace, threads: int) -> dict:
    common = [f"data.root={arguments.corpora}", "data.verify=false", "run.name=speed", f"run.threads={threads}"]
    contestants = [Contestant(name, compose_train([f"model={name}", *common, *arguments.overrides], [])) for name in (arguments.model, arguments.against)]
    assert torch.get_num_threads() == threads
    for _ in range(arguments.rounds + 1):
        for contestant in contestants:
            contestant.run(arguments.steps)
    kan, twin = contestants
    achieved, ideal = kan.tokens_per_second() / twin.tokens_per_second(), twin.flops / kan.flops
    print(
        f"{threads} threads: {kan.name} {kan.tokens_per_second():,.0f} tokens/s, {twin.name} {twin.tokens_per_second():,.0f} tokens/s: "
        f"achieved {achieved:.2f}, ideal {ideal:.2f}, achieved/ideal {achieved / ideal:.2f}"
    )
    return {
        "name": f"{kan.name} against {twin.name}, {threads} threads",
        "threads": threads,
        "models": [contestant.row() for contestant in contestants],
        "achieved_ratio": achieved,
        "ideal_flop_ratio": ideal,
        "achieved_over_ideal": achieved / ideal,
    }


if __name__ == "__main__":
    main()
