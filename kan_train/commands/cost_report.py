"""`kan cost report`, `watch` and `sync`: a run for people to look at, and for W&B."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kan_train.accounting.ledger import LEDGER
from kan_train.commands.cost import run_directory_of
from kan_train.config import Config, ConfigError
from kan_train.report.history import read_history
from kan_train.report.page import PAGE, render, write


def run_report(runs: Sequence[str], *, root: Path, price: str | None, output: str | None) -> int:
    """Write the page of `runs`. Returns the exit status."""
    run_dirs = list({run_directory_of(run, root): None for run in runs})
    page = render([read_history(run_dir, price) for run_dir in run_dirs])
    if output == "-":
        sys.stdout.buffer.write(page.encode("utf-8", "surrogateescape"))
        return 0
    path = Path(output) if output is not None else run_dirs[0] / PAGE if len(run_dirs) == 1 else root / PAGE
    if path.is_dir():
        raise ConfigError(f"-o {path} is a folder; use -o {path / PAGE}")
    write(page, path)
    print(f"{path} ({len(page.encode('utf-8', 'surrogateescape')) / 1e6:.1f} MB): open it in a browser")
    return 0


def run_watch(run: str, *, root: Path, price: str | None, every: float, once: bool) -> int:
    """Show `run` until it is finished. Returns the exit status."""
    from kan_train.report.live import watch

    if not 0.1 <= every <= 86400:
        raise ConfigError(f"--every {every:g} must be between 0.1 and 86400 seconds; use --every 10")
    return watch(_to_be_watched(run, root), price=price, every=every, once=once)


def _to_be_watched(run: str, root: Path) -> Path:
    """The directory of `run`, which may not have begun: a folder of that name that has nothing of a run is not taken for it."""
    path, named = Path(run), root / run
    for file in (LEDGER, "config.yaml"):
        for place in (path, named):
            if (place / file).is_file():
                return place
    return path if path.is_dir() and len(path.parts) > 1 else named


def run_sync(
    runs: Sequence[str], *, root: Path, offline: bool, project: str | None, entity: str | None, workspace: bool, workspace_json: Path | None
) -> int:
    """Replay `runs` into W&B. Returns the exit status: 1 where W&B failed, and the same command goes on from there."""
    from kan_train.report.sync import sync

    run_dirs = list({run_directory_of(run, root): None for run in runs})
    if workspace_json is not None:
        return _write_workspace(workspace_json, run_dirs[0], project, entity)
    if workspace and offline:
        raise ConfigError("--workspace publishes, and --offline sends nothing; use --workspace-json FILE, or leave --offline out")
    for run_dir in run_dirs:
        try:
            print(sync(run_dir, online=not offline, project=project, entity=entity))
            if workspace:
                print(_workspace(run_dir, project, entity).save().url)
        except ConfigError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            hint = "" if offline else "; `--offline` writes it here for `wandb sync`"
            print(f"kan: W&B failed ({reason}); the same command goes on from there{hint}", file=sys.stderr)
            return 1
    return 0


def _write_workspace(path: Path, run_dir: Path, project: str | None, entity: str | None) -> int:
    from kan_train.report.workspace import as_json

    write(as_json(_workspace(run_dir, project, entity)) + "\n", path, "--workspace-json with a file in a folder that you may write")
    print(f"{path}: what --workspace would publish")
    return 0


def _workspace(run_dir: Path, project: str | None, entity: str | None) -> Any:
    from kan_train.report.workspace import workspace

    logging = (read_history(run_dir).config or Config()).logging
    return workspace(project or logging.wandb_project, entity or logging.wandb_entity or "")
