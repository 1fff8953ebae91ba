"""What a run left in its directory, read file by file: rows, starts, checkpoints, leftovers. What should be there is told by a run never killed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kan_train.accounting.ledger import LEDGER, read_ledger
from kan_train.accounting.lines import read_lines
from kan_train.accounting.sinks.jsonl import METRICS, read_metrics
from kan_train.checkpoint import CHECKPOINTS, CheckpointError, load_tensors, read_manifest
from kan_train.checkpoint.manifest import MANIFEST
from recovery_proofs.entry import SAMPLES
from recovery_proofs.verdict import differing, global_tensors

FIGURES = ("step", "tokens", "loss", "cross_entropy", "grad_norm", "learning_rate", "skipped_steps", "validation/loss", "validation/bits_per_byte")
"""Of a row of metrics.jsonl: what a run that was killed must have to the last bit."""


@dataclass
class Evidence:
    """A run directory, and the folder with what its ranks read."""

    run_dir: Path
    samples: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.run_dir / CHECKPOINTS

    def rows(self) -> list[dict[str, Any]]:
        """Every row of metrics.jsonl, those of steps done again included."""
        return list(read_lines(self.run_dir / METRICS))

    def row_count(self) -> int:
        """How many there are, read fast."""
        try:
            return (self.run_dir / METRICS).read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def last_step(self) -> int:
        """The last step that was finished and told, by any start of the run."""
        return max((row["step"] for row in self.rows()), default=0)

    def starts(self) -> list[dict[str, Any]]:
        """The ledger's segment_start events."""
        return [event for event in read_ledger(self.run_dir / LEDGER) if event["event"] == "segment_start"]

    def reads(self) -> dict[str, list[int]]:
        """By rank's file: the cursor of every global batch that was handed out, in order; nothing where the launcher does not note it.

        A start that was killed may have been handed one batch more than it finished steps.
        """
        return {path.name: [cursor for cursor, _ in _read_samples(path)] for path in self.samples.iterdir()}

    def unfinished(self) -> set[str]:
        """Files of saves and deletions that are not done: temporary ones, and all in a folder without manifest."""
        found = set()
        for folder in self._folders():
            names = _names(folder)
            found |= {f"{folder.name}/{name}" for name in names if MANIFEST not in names or name.endswith(".tmp")}
        return found

    def newest_valid(self) -> tuple[Path | None, list[str]]:
        """(newest checkpoint of which every byte is what its manifest says, or None; what is wrong with newer ones that have a manifest)."""
        wrong = []
        for folder in sorted(self._folders(), reverse=True):
            if not (folder / MANIFEST).exists():
                continue
            try:
                load_tensors(folder, "")
            except CheckpointError as error:
                wrong.append(f"checkpoint: {error}")
                continue
            return folder, wrong
        return None, wrong

    def leftovers(self) -> set[str]:
        """Files of the run directory that neither a run keeps nor a manifest lists."""
        found = {name for name in _names(self.run_dir) if name.startswith(".") or name.endswith(".tmp")}
        for folder in self._folders():
            names = _names(folder)
            listed = {MANIFEST, *read_manifest(folder).files} if MANIFEST in names else set()
            found |= {f"{folder.name}/{name}" for name in names - listed} or (set() if listed else {f"{folder.name}/"})
        return found | {name for name in _names(self.checkpoints) if not (self.checkpoints / name).is_dir()}

    def differences(self, whole: "Evidence") -> list[str]:
        """Where a finished run is not the run that was never killed, on the same layout: one line each, beginning with what is wrong."""
        found = [f"leftovers: {name}" for name in sorted(self.leftovers())]
        found += [f"files: {name} is in one run alone" for name in sorted(_names(self.run_dir) ^ _names(whole.run_dir))]
        own, others = ([folder.name for folder in sorted(evidence._folders())] for evidence in (self, whole))
        found += [] if own == others else [f"files: checkpoints {own}, not {others}"]
        found += self._differing_rows(whole) + self._differing_samples(whole)
        for name in set(own) & set(others):
            found += _differing_checkpoints(self.checkpoints / name, whole.checkpoints / name)
        return found

    def _differing_rows(self, whole: "Evidence") -> list[str]:
        expected = {row["step"]: _figures(row) for row in read_metrics(whole.run_dir / METRICS)}
        counting = [row["step"] for row in read_metrics(self.run_dir / METRICS)]
        found = [] if counting == sorted(expected) else [f"steps: {counting}"]
        # Rows that do not count any more, because their step was done again, were the same too.
        wrong = sorted({row["step"] for row in self.rows() if _figures(row) != expected.get(row["step"])})
        return found + ([f"rows: other figures in steps {wrong}"] if wrong else [])

    def _differing_samples(self, whole: "Evidence") -> list[str]:
        found = []
        for path in sorted(whole.samples.glob(SAMPLES.format(rank="*"))):
            expected, seen = (_read_samples(folder / path.name) for folder in (whole.samples, self.samples))
            if set(seen) != set(expected):
                found.append(f"samples: {path.name} has other ones in the batches at {sorted({cursor for cursor, _ in set(seen) ^ set(expected)})}")
        return found

    def _folders(self) -> list[Path]:
        return [path for path in self.checkpoints.iterdir() if path.is_dir()] if self.checkpoints.is_dir() else []


def _names(folder: Path) -> set[str]:
    # A folder may vanish while a run is looked at.
    try:
        return {path.name for path in folder.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _figures(row: dict[str, Any]) -> list[Any]:
    return [row.get(name) for name in FIGURES]


def _read_samples(path: Path) -> list[tuple[int, str]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [(line["cursor"], line["digest"]) for line in map(json.loads, lines)]


def _differing_checkpoints(own: Path, other: Path) -> list[str]:
    """Tensors, counters and cursor; not what tells of times and starts.

    Nor the ranks' random states: PyTorch seeds each process anew, so that two starts from the beginning differ there. Training draws nothing from them,
    and that they go on is proved by the pairs of layouts.
    """
    found = [f"tensors of {own.name}: {text}" for text in differing(global_tensors(own), global_tensors(other))]
    states = []
    for folder in (own, other):
        state = dict(read_manifest(folder).state)
        progress = dict(state.pop("progress"))
        figures = progress.pop("figures")
        progress.pop("segment")
        states.append((state, progress, figures.get("validation_loss")))
    return found + ([] if states[0] == states[1] else [f"state of {own.name}: {states[0]}, not {states[1]}"])
