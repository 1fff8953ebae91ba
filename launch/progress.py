"""How far a run is, read from its directory alone: what `kan launch status` and `kan launch cancel` say of it. Nothing here waits for the trainers."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from kan_train.accounting.ledger import LEDGER
from kan_train.accounting.lines import Row, decode
from kan_train.accounting.sinks.jsonl import METRICS
from kan_train.checkpoint import CheckpointError, directory_of_run, folders, step_of
from kan_train.checkpoint.retention import has_manifest
from kan_train.checkpoint.stream import CONFIG

TAIL_BYTES = 1 << 16
"""Read from the end of a file of rows: some tens of steps."""

STANDS_STILL_SECONDS = 120.0
"""A run of which nothing has been heard for so long, and for STANDS_STILL_STEPS of its usual steps, is marked. A save or a validation takes less."""

STANDS_STILL_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """A run as its files show it. None where they do not say yet."""

    step: int | None = None
    """Last step whose row is written."""
    steps: int | None = None
    """Steps that the run is to take (train.steps)."""
    tokens: int | None = None
    """Tokens trained on up to that step."""
    loss: float | None = None
    """Loss of that step."""
    tokens_per_second: float | None = None
    """Median of the last steps, all devices together."""
    seconds_a_step: float | None = None
    """Median of the last steps."""
    checkpoint: int | None = None
    """Step of the newest finished checkpoint."""
    last_sign: float | None = None
    """When a row or an event was written last, seconds since 1970."""
    ended: str | None = None
    """How its last segment ended: finished, interrupted, failed or hung; None while one goes on, or where it was killed."""

    def stands_still(self, started: float | None = None) -> bool:
        """Whether nothing has been heard of the run for suspiciously long. started: when the trainers were last started, if that is known."""
        signs = [sign for sign in (self.last_sign, started) if sign is not None]
        return bool(signs) and time.time() - max(signs) > max(STANDS_STILL_SECONDS, STANDS_STILL_STEPS * (self.seconds_a_step or 0.0))


def progress_of_run(run_dir: Path) -> RunProgress:
    """What the files in `run_dir` say; all None for a run that has not begun."""
    rows = last_rows(run_dir / METRICS)
    row = rows[-1] if rows else {}
    return RunProgress(
        step=row.get("step"),
        steps=_steps(run_dir / CONFIG),
        tokens=row.get("tokens"),
        loss=row.get("loss"),
        tokens_per_second=_median(rows, "tokens_per_second"),
        seconds_a_step=_median(rows, "time/step"),
        checkpoint=newest_checkpoint_step(run_dir),
        last_sign=max((path.stat().st_mtime for path in (run_dir / METRICS, run_dir / LEDGER) if path.exists()), default=None),
        # The ledger's lock would say more, but asking for it could keep a trainer that starts at this moment from getting it.
        ended=_ended(last_rows(run_dir / LEDGER)),
    )


def last_rows(path: Path) -> list[Row]:
    """The last rows of a file of JSON lines, whole ones of the last TAIL_BYTES; none where there is no file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    whole = lines[:-1] if size <= TAIL_BYTES else lines[1:-1]  # the first of a tail may have lost its beginning, the last is being written
    return [decode(line) for line in whole if line]


def newest_checkpoint_step(run_dir: Path) -> int | None:
    """Step of the newest checkpoint whose save was finished; None where there is none, or where its place cannot be read from here."""
    try:
        return next((step_of(folder) for folder in folders(directory_of_run(run_dir)) if has_manifest(folder)), None)
    except CheckpointError:
        return None


def _ended(events: list[Row]) -> str | None:
    if not events:
        return None
    return str(events[-1]["status"]) if events[-1]["event"] == "segment_end" else "hung" if events[-1]["event"] == "hang" else None


def _steps(config: Path) -> int | None:
    try:
        return int(yaml.safe_load(config.read_text(encoding="utf-8"))["train"]["steps"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None


def _median(rows: list[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.median(values) if values else None
