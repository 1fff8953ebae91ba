"""Where checkpoints are: runs/<name>/checkpoints/step-00000100, or below checkpoint.location. The one owner of that layout."""

from pathlib import Path

from kan_train.checkpoint.errors import reading
from kan_train.checkpoint.manifest import MANIFEST
from kan_train.checkpoint.places import is_local, place, present
from kan_train.checkpoint.retention import folders, newest
from kan_train.config import ConfigError

CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints, below its run directory."""

_CONFIG = "config.yaml"


def checkpoint_directory(run_dir: Path, location: str) -> Path:
    """The folder of a run's checkpoints: `run_dir`/checkpoints, or where checkpoint.location says (a folder, or a URL such as s3://bucket/run).

    ConfigError names checkpoint.location where its scheme is not known or the package for it is missing.
    """
    return place(location) if location else place(run_dir) / CHECKPOINTS


def find_checkpoint(setting: str, value: str, root: str) -> Path:
    """The checkpoint that `setting=value` names: a checkpoint's folder, or the newest whole one of a run (its path, or name below `root`), or of
    a folder of checkpoints. Folders may be URLs. A run's checkpoints are looked for where its saved configuration says that they are.

    Raises ConfigError where there is no such run, with those there are, or where the run has none complete yet.
    """
    if not value:
        raise ConfigError(f"{setting} is empty; use {_choices(setting, root)}")
    given = place(value, setting)
    places = (given, Path(root) / value) if is_local(given) else (given,)
    for path in places:
        with reading(path):
            if present(path / MANIFEST):
                return path
    for path in places:
        for directory in (directory_of_run(path), path):
            if found := newest(directory):
                return found
    for path in places:
        if is_local(path) and ((path / CHECKPOINTS).is_dir() or (path / _CONFIG).is_file()):
            raise ConfigError(
                f"{setting}={value}: the run {path} has no complete checkpoint yet; wait for the first save (checkpoint.every), or go on "
                f"with `kan train run.name={path.name}`"
            )
        if folders(path) or folders(path / CHECKPOINTS):
            raise ConfigError(f"{setting}={value} has no complete checkpoint yet; wait for the first save (checkpoint.every)")
    raise ConfigError(f"{setting}={value} is neither a run nor a checkpoint; use {_choices(setting, root)}")


def directory_of_run(run_dir: Path) -> Path:
    """Where the saved configuration of the run in `run_dir` says that its checkpoints are."""
    location = ""
    if is_local(run_dir) and (run_dir / _CONFIG).is_file():
        import yaml

        try:
            settings = yaml.safe_load((run_dir / _CONFIG).read_text(encoding="utf-8"))
            location = str(settings["checkpoint"]["location"] or "")
        except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError):
            location = ""  # A run of before there was that setting, or a damaged file, which says no more.
    return checkpoint_directory(run_dir, location)


def _choices(setting: str, root: str) -> str:
    found = sorted({path.parent.name for name in (CHECKPOINTS, _CONFIG) for path in Path(root).glob(f"*/{name}")})
    if found:
        return f"one of the runs in {root}: {', '.join(found)}"
    return f"{setting}=PATH of a run directory: {root} holds no run (`kan train` makes one)"
