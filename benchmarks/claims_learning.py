"""What the arms of benchmarks/claims.py learn: from equal tokens, half of them, with equal FLOPs, and in equal time at equal price, which is equal dollars.

FLOPs and dollars are what the KAN needs for its steps. Every arm gets a run of its own length for each budget, so that its learning rate has come down when
it ends, with the same sweep of learning rates and the same seeds. An arm is judged by the mean over the seeds at its best rate; every loss is in the result.
"""

import itertools
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claims_arms import Arm, Scale, arms_of, composed
from training_runs import best_rate, code_version, finished_run, mean_and_interval, validation_curve

from kan_train.accounting.flops import executed_flops_share, flops_per_token, parameter_counts

BUDGETS = {"tokens": "equal tokens", "half": "half the tokens", "flops": "equal FLOPs", "dollars": "equal dollars"}
VALIDATIONS = 4
"""How often a run validates: the points of its curve."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    arm: Arm
    steps: int
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.name}-steps{self.steps}-lr{self.learning_rate:g}-seed{self.seed}"

    def settings(self, scale: Scale) -> list[str]:
        return [
            *self.arm.settings, f"model.sequence_length={scale.sequence_length}", f"train.global_batch_size={scale.sequences}", *scale.settings,
            f"train.validate_every={max(1, self.steps // VALIDATIONS)}", "train.validation_sequences=64", f"optimizer.learning_rate={self.learning_rate}",
            f"optimizer.schedule.warmup_steps={max(1, self.steps // 20)}", f"run.seed={self.seed}",
            # A rate that is too high for an arm is a result: steps that are not finite change nothing, and the run goes on to its end.
            f"recovery.max_bad_steps={self.steps + 1}",
        ]  # fmt: skip


def learning_rows(
    scale: Scale, budgets: list[str], speeds: dict[str, float], *, folder: Path, corpora: Path, jobs: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each arm and budget, and the versions of the code that trained the runs. speeds: tokens a second of the main arms, which equal dollars need."""
    arms = arms_of(scale)
    wanted_arms = [(budget, arm) for budget in budgets for arm in arms.values() if arm.main or budget == "tokens"]
    steps = {(budget, arm.name): _steps(scale, arm, arms["kan"], budget, speeds) for budget, arm in wanted_arms}
    cells = {key: list(_cells(scale, arms[key[1]], count)) for key, count in steps.items()}
    # An arm may have as many steps in two budgets: those are the same runs.
    wanted = list({cell.name: cell for group in cells.values() for cell in group}.values())
    curves: dict[str, list[tuple[int, float]]] = {}
    loads: dict[str, float | None] = {}
    with ThreadPoolExecutor(jobs) as pool:
        rows_of = pool.map(lambda cell: finished_run(folder, cell.name, cell.steps, cell.settings(scale), corpora=corpora), wanted)
        for done, (cell, rows) in enumerate(zip(wanted, rows_of, strict=True), 1):
            curves[cell.name], loads[cell.name] = validation_curve(rows), _load(rows)
            assert curves[cell.name][-1][0] == cell.steps * scale.tokens_a_step, f"{cell.name} is of another batch"
            print(f"{done}/{len(wanted)} {cell.name}: {curves[cell.name][-1][1]:.4f}", flush=True)
    found = [_row(scale, budget, arms[name], group, curves, loads) for (budget, name), group in cells.items()]
    _compare(found)
    return found, sorted({code_version(folder, cell.name) for cell in wanted})


def _steps(scale: Scale, arm: Arm, kan: Arm, budget: str, speeds: dict[str, float]) -> int:
    """Steps with which `arm` spends what the KAN spends."""
    if budget in ("tokens", "half"):
        return scale.steps // (2 if budget == "half" else 1)
    share = _flops(scale, kan) / _flops(scale, arm) if budget == "flops" else speeds[arm.name] / speeds[kan.name]
    return max(1, round(scale.steps * share))


def _flops(scale: Scale, arm: Arm) -> float:
    """A token's, in training: of softmax attention only those that a causal mask leaves, which is what the arms compute."""
    return flops_per_token(composed(scale, arm.settings).model, counting="causal").training


def _cells(scale: Scale, arm: Arm, steps: int) -> Iterator[Cell]:
    for rate, seed in itertools.product(scale.learning_rates, scale.seeds):
        yield Cell(arm, steps, rate, seed)


def _load(rows: list[dict[str, Any]]) -> float | None:
    """Coefficient of variation of the groves' load over the last tenth of the steps, mean over the layers; None without groves."""
    last = [value for row in rows[-max(1, len(rows) // 10) :] for name, value in row.items() if name.startswith("load/cv/")]
    return statistics.fmean(last) if last else None


def _row(
    scale: Scale, budget: str, arm: Arm, cells: list[Cell], curves: dict[str, list[tuple[int, float]]], loads: dict[str, float | None]
) -> dict[str, Any]:
    losses = {rate: [curves[cell.name][-1][1] for cell in cells if cell.learning_rate == rate] for rate in scale.learning_rates}
    rate = best_rate(losses)
    best = [cell.name for cell in cells if cell.learning_rate == rate]
    mean, interval = mean_and_interval(losses[rate])
    model = composed(scale, arm.settings).model
    total, active = parameter_counts(model)
    told_loads = [load for name in best if (load := loads[name]) is not None]
    return {
        "name": f"{arm.name}, {BUDGETS[budget]}",
        "arm": arm.name,
        "title": arm.title,
        "budget": budget,
        "settings": list(arm.settings),
        "parameters_total": total,
        "parameters_active": active,
        "steps": cells[0].steps,
        "tokens": cells[0].steps * scale.tokens_a_step,
        "training_flops_per_token": _flops(scale, arm),
        "executed_flops_share": executed_flops_share(model),
        "learning_rate": rate,
        "rate_at_the_edge": rate in (min(scale.learning_rates), max(scale.learning_rates)),
        "mean": mean,
        "interval_95": interval,
        "losses": {f"{rate:g}": values for rate, values in losses.items()},
        "load_cv": statistics.fmean(told_loads) if told_loads else None,
        "curve": [[point[0][0], statistics.fmean(loss for _, loss in point)] for point in zip(*(curves[name] for name in best), strict=True)],
    }


def _compare(rows: list[dict[str, Any]]) -> None:
    """Put beside every arm its difference from the KAN in the same budget, seed by seed at each one's best rate."""
    of = {(row["budget"], row["arm"]): row["losses"][f"{row['learning_rate']:g}"] for row in rows}
    for row in rows:
        own, kan = of[row["budget"], row["arm"]], of[row["budget"], "kan"]
        row["difference_from_kan"], row["difference_interval_95"] = mean_and_interval([a - b for a, b in zip(own, kan, strict=True)])
