"""Where checkpoints are: runs/<name>/checkpoints/step-00000100. The one owner of that layout."""

from pathlib import Path

from kan_train.checkpoint.manifest import MANIFEST
from kan_train.checkpoint.retention import newest
from kan_train.config import ConfigError

CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints, below its run directory."""


def find_checkpoint(setting: str, value: str, root: str) -> Path:
    """The checkpoint that `setting=value` names: a checkpoint's folder, or the newest whole one of a run (its path, or name below `root`).

    Raises ConfigError where there is no such run, with those there are, or where the run has none complete yet.
    """
    if not value:
        raise ConfigError(f"{setting} is empty; use {_choices(setting, root)}")
    places = (Path(value), Path(root) / value)
    for path in places:
        if (path / MANIFEST).is_file():
            return path
    for path in places:
        if (path / CHECKPOINTS).is_dir() and (found := newest(path / CHECKPOINTS)) is not None:
            return found
    for path in places:
        if (path / CHECKPOINTS).is_dir() or (path / "config.yaml").is_file():
            raise ConfigError(
                f"{setting}={value}: the run {path} has no complete checkpoint yet; wait for the first save (checkpoint.every), or go on "
                f"with `kan train run.name={path.name}`"
            )
    raise ConfigError(f"{setting}={value} is neither a run nor a checkpoint; use {_choices(setting, root)}")


def _choices(setting: str, root: str) -> str:
    found = sorted(path.parent.name for path in Path(root).glob(f"*/{CHECKPOINTS}"))
    if found:
        return f"one of the runs in {root}: {', '.join(found)}"
    return f"{setting}=PATH of a run directory: {root} holds no run (`kan train` makes one)"
