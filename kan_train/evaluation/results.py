"""Results as files: RUN/evaluations/TASK.json, what was measured with everything that it depends on. Nothing heavy is imported."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kan_train.config import ConfigError
from kan_train.evaluation.statistics import mcnemar

EVALUATIONS = "evaluations"
"""Folder of a run's results."""

Result = dict[str, Any]


def require_folder(folder: Path, setting: str) -> None:
    """ConfigError where `folder`, which `setting` names, can be none: told before anything is measured."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "cannot be written to" if there.is_dir() else "is no folder"
        raise ConfigError(f"{setting}={folder}: {there} {why}; use {setting}=FOLDER, one that you may write to")


def write_result(folder: Path, result: Result) -> Path:
    """Write it to FOLDER/TASK.json, at once; a result of the task that is there is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['task']}.json"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def read_result(path: Path) -> Result:
    """One result. ConfigError where the file is not one."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); measure it again with `kan evaluate`") from error
    if not isinstance(result, dict) or not isinstance(result.get("task"), str) or not isinstance(result.get("metric"), str):
        raise ConfigError(f"{path} is no result of `kan evaluate`; measure it again, or delete it")
    return result


def evaluations_of(run_dir: str | Path) -> list[Result]:
    """The results of a run, by task: what `kan evaluate` has left in RUN/evaluations; [] where it was never evaluated."""
    return [read_result(path) for path in sorted((Path(run_dir) / EVALUATIONS).glob("[!.]*.json"))]


def digest_of(things: Sequence[Any]) -> str:
    """SHA-256 of questions, so that two results can be known to be of the same; or of results."""
    return hashlib.sha256("\x1e".join(map(repr, things)).encode()).hexdigest()


def compared(result: Result, other: Result) -> Result:
    """`result` against `other` on the same questions, by the main metric: {"only_here", "only_there", "difference", "p_value"} (McNemar's exact test).

    ConfigError where they are not of the same questions, or the task has none.
    """
    require_comparable(result["task"], result.get("questions_sha256"), other)
    pairs = list(zip(result["right"], other["right"], strict=True))
    here, there = pairs.count(("1", "0")), pairs.count(("0", "1"))
    return {"only_here": here, "only_there": there, "difference": (here - there) / len(pairs), "p_value": mcnemar(here, there)}


def require_comparable(task: str, questions_sha256: str | None, other: Result) -> None:
    """ConfigError unless `other` is of the questions of `task` whose digest that is; None: it has none."""
    if questions_sha256 is None or "right" not in other:
        raise ConfigError(f"against: {task} has no questions to compare one by one; leave against out for it")
    if questions_sha256 != other["questions_sha256"]:
        raise ConfigError(
            f"against: the other run's {task} was measured on other questions; measure it again with the same shots, limit and questions, "
            "recall with the same lengths, recall_questions and seed"
        )


def shown(result: Result) -> dict[str, float]:
    """The main figures under the names that W&B shows: evaluation/TASK, and with the metric and the category behind it."""
    name, metric = f"evaluation/{result['task']}", result["metric"]
    row = {name: result[metric]["value"]}
    for other in ("acc", "acc_norm", "loss", "perplexity", "bits_per_byte"):
        if other in result and result[other]["value"] is not None:
            row[f"{name}/{other}"] = result[other]["value"]
    for category, each in result.get("categories", {}).items():
        row[f"{name}/{category}"] = each[metric]["value"]
    return row
