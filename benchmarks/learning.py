"""Does kan_tiny learn better than its dense twins from the same tokens?

Every arm sees the same tokens in the same order; every arm gets the same sweep of learning rates and the same seeds, fixed beforehand. An arm is judged
by the mean over the seeds at its best learning rate, and every loss is published. Runs that finished are kept in --folder: called again, the study
continues.

    python benchmarks/learning.py                      # 4 arms x 4 learning rates x 3 seeds, two runs at a time
    python benchmarks/learning.py --arms kan_tiny dense_tiny_active --steps 200
"""

import argparse
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import write_result
from training_runs import best_rate, finished_run, mean_and_interval, validation_curve

ARMS = ("kan_tiny", "dense_tiny_active", "dense_tiny_total", "moe_tiny")
LEARNING_RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
SEEDS = (11, 22, 33)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="models of conf/model")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=list(LEARNING_RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=250, help="optimizer steps of 8 sequences of 256 tokens")
    parser.add_argument("--folder", type=Path, default=Path("runs/learning"), help="where the runs are kept")
    parser.add_argument("--corpora", type=Path, default=Path("corpora"), help="folder of prepared corpora")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--claim", default="kan_tiny learns better than a dense model of equal active parameters from the same tokens")
    arguments = parser.parse_args()

    cells = list(itertools.product(arguments.arms, arguments.learning_rates, arguments.seeds))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        losses = dict(zip(cells, pool.map(lambda cell: _validation_loss(arguments, *cell), cells), strict=True))
    rows = [_arm(arm, arguments, losses) for arm in arguments.arms]
    for row in rows:
        print(f"{row['name']:24s} best lr {row['learning_rate']:g}: {row['mean']:.4f} +- {row['interval_95']:.4f} nats")
    config = {"steps": arguments.steps, "tokens": arguments.steps * 8 * 256, "learning_rates": arguments.learning_rates, "seeds": arguments.seeds}
    write_result("learning", claim=arguments.claim, config=config, rows=rows)


def _validation_loss(arguments: argparse.Namespace, arm: str, learning_rate: float, seed: int) -> float:
    """Held-out loss in nats a token after the last step; infinite where the run diverged."""
    name = f"{arm}-lr{learning_rate:g}-seed{seed}-steps{arguments.steps}"
    settings = [
        f"model={arm}", "model.sequence_length=256", "train.global_batch_size=8", "train.micro_batch_size=8", f"train.validate_every={arguments.steps}",
        "train.validation_sequences=256", f"optimizer.learning_rate={learning_rate}", f"optimizer.schedule.warmup_steps={max(1, arguments.steps // 20)}",
        f"run.seed={seed}",
    ]  # fmt: skip
    loss = validation_curve(finished_run(arguments.folder, name, arguments.steps, settings, corpora=arguments.corpora))[-1][1]
    print(f"{name}: {loss:.4f}", flush=True)
    return loss


def _arm(arm: str, arguments: argparse.Namespace, losses: dict[tuple[str, float, int], float]) -> dict:
    """Mean and 95% interval over the seeds at the arm's best learning rate, and every loss."""
    by_rate = {rate: [losses[arm, rate, seed] for seed in arguments.seeds] for rate in arguments.learning_rates}
    best = best_rate(by_rate)
    mean, interval = mean_and_interval(by_rate[best])
    return {"name": arm, "learning_rate": best, "mean": mean, "interval_95": interval, "losses": {f"{rate:g}": values for rate, values in by_rate.items()}}


if __name__ == "__main__":
    main()
