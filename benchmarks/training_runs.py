"""Runs of `kan train` as cells of a study: kept in a folder, done once, read back from their metrics.jsonl; and the statistics of an arm."""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from scipy import stats

from kan_train.checkpoint import newest
from kan_train.config import Config
from kan_train.config.compose import compose_train, from_yaml

QUIET = ("data.verify=false", "checkpoint.every=0", "logging.progress=false")


def finished_run(folder: Path, name: str, steps: int, settings: list[str], *, corpora: Path, threads: int = 1) -> list[dict[str, Any]]:
    """Rows of run `name` of `steps` steps in `folder`, trained first where it has not ended. Raises RuntimeError where `kan train` fails.

    A run that was cut off, or that was trained with other settings, is trained anew: none of these saves checkpoints on the way.
    """
    rows = _rows(folder / name)
    settings = [*settings, f"train.steps={steps}", f"run.name={name}", f"run.root={folder}", f"data.root={corpora}"]
    if not _ended(rows, steps) or not _same_training(folder / name, compose_train(settings, [], world_size=1)):
        shutil.rmtree(folder / name, ignore_errors=True)
        command = [sys.executable, "-m", "kan_train", "train", *settings, *QUIET]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run([*command, f"run.threads={threads}"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr[-2000:]}")
        rows = _rows(folder / name)
    assert _ended(rows, steps), f"{folder / name} holds no validation loss of step {steps}"
    return rows


def code_version(folder: Path, name: str) -> str:
    """Version and commit of the code that trained a finished run, from its last checkpoint."""
    checkpoint = newest(folder / name / "checkpoints")
    assert checkpoint is not None, f"{folder / name} has no checkpoint"
    return json.loads((checkpoint / "manifest.json").read_text())["code_version"]


def validation_curve(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(tokens seen, held-out loss in nats a token) of every validation; a loss that is not finite is infinite."""
    found = {row["tokens"]: row["validation/loss"] for row in rows if row.get("validation/loss") is not None}
    return [(tokens, loss if math.isfinite(loss) else math.inf) for tokens, loss in sorted(found.items())]


def best_rate(losses: dict[float, list[float]]) -> float:
    """The learning rate whose losses have the least mean over the seeds."""
    return min(losses, key=lambda rate: statistics.fmean(losses[rate]))


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval by Student's t; NaN for the latter with fewer than two values, infinite with one that is not finite."""
    if not all(map(math.isfinite, values)):
        return statistics.fmean(values), math.inf
    if len(values) < 2:
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), float(stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5)


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _same_training(run_dir: Path, wanted: Config) -> bool:
    kept = from_yaml((run_dir / "config.yaml").read_text())
    return (kept.model, kept.optimizer, kept.train, kept.run.seed) == (wanted.model, wanted.optimizer, wanted.train, wanted.run.seed)


def _ended(rows: list[dict[str, Any]], steps: int) -> bool:
    return bool(rows) and rows[-1]["step"] == steps and rows[-1].get("validation/loss") is not None
