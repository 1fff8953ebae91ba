"""Does kan_tiny learn better than its dense twins from the same tokens?

Every arm sees the same tokens in the same order; every arm gets the same sweep of learning rates and the same seeds, fixed beforehand. An arm is judged
by the mean over the seeds at its best learning rate, and every loss is published. Runs that finished are kept in --folder: called again, the study
continues.

    python benchmarks/learning.py                      # 4 arms x 4 learning rates x 3 seeds, two runs at a time
    python benchmarks/learning.py --arms kan_tiny dense_tiny_active --steps 200
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import write_result
from scipy import stats

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
    """Held-out loss in nats a token after the last step; None where the run diverged."""
    name = f"{arm}-lr{learning_rate:g}-seed{seed}-steps{arguments.steps}"
    metrics = arguments.folder / name / "metrics.jsonl"
    if (loss := _final_loss(metrics)) is None:
        settings = [
            f"model={arm}", "model.sequence_length=256", f"train.steps={arguments.steps}", "train.global_batch_size=8", "train.micro_batch_size=8",
            f"train.validate_every={arguments.steps}", "train.validation_sequences=256", f"optimizer.learning_rate={learning_rate}",
            f"optimizer.schedule.warmup_steps={max(1, arguments.steps // 20)}", f"run.seed={seed}", f"run.name={name}", f"run.root={arguments.folder}",
            f"data.root={arguments.corpora}", "data.verify=false", "run.threads=1", "checkpoint.every=0", "logging.progress=false",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "kan_train", "train", *settings], check=True, env=environment, stdout=subprocess.DEVNULL)
        loss = _final_loss(metrics)
    assert loss is not None, f"{metrics} holds no validation loss"
    print(f"{name}: {loss:.4f}", flush=True)
    return loss


def _final_loss(metrics: Path) -> float | None:
    if not metrics.exists():
        return None
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [row["validation/loss"] for row in rows if row.get("validation/loss") is not None]
    return losses[-1] if losses else None


def _arm(arm: str, arguments: argparse.Namespace, losses: dict[tuple[str, float, int], float]) -> dict:
    """Mean and 95% interval (Student's t) over the seeds at the arm's best learning rate, and every loss."""
    by_rate = {rate: [losses[arm, rate, seed] for seed in arguments.seeds] for rate in arguments.learning_rates}
    best = min(by_rate, key=lambda rate: statistics.fmean(by_rate[rate]))
    values = by_rate[best]
    interval = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return {
        "name": arm,
        "learning_rate": best,
        "mean": statistics.fmean(values),
        "interval_95": interval,
        "losses": {f"{rate:g}": values for rate, values in by_rate.items()},
    }


if __name__ == "__main__":
    main()
