"""An audit as files: FOLDER/audit.json, which holds every number, and pictures beside it. Reading one needs neither torch nor numpy."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kan_train.config.errors import ConfigError

AUDIT = "audit"
"""Folder of a run's audit."""

RESULT = "audit.json"
FORMAT = 1
DIGITS = 6


def audit_of(run_dir: str | Path) -> dict[str, Any] | None:
    """What `kan audit` has left in RUN/audit; None where the run was never audited. ConfigError where it cannot be read."""
    path = Path(run_dir) / AUDIT / RESULT
    return read_audit(path) if path.is_file() else None


def read_audit(path: Path) -> dict[str, Any]:
    """One audit. ConfigError where the file is not one of this version."""
    try:
        audit = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); make it again with `kan audit RUN`") from error
    if not isinstance(audit, dict) or audit.get("format") != FORMAT:
        raise ConfigError(f"{path} is no audit of this version; make it again with `kan audit RUN`, or delete it")
    return audit


def write_audit(folder: Path, audit: dict[str, Any]) -> Path:
    """Write FOLDER/audit.json at once, numbers to six digits; pictures of the audit before that this one does not have are deleted."""
    before = _pictures(folder / RESULT)
    text = json.dumps(rounded({"format": FORMAT} | audit), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path = folder / RESULT
    in_place(path, lambda draft: draft.write_text(text, encoding="utf-8"))
    for name in before - {*audit.get("pictures", ())}:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    return path


def _pictures(path: Path) -> set[str]:
    """The pictures beside an audit, by name; none where it is none of ours."""
    try:
        named = read_audit(path).get("pictures", [])
    except ConfigError:
        return set()
    return {name for name in named if isinstance(name, str) and name.endswith(".png") and Path(name).name == name}


def in_place(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` write a draft, and put it in the place of `path`. ConfigError where that cannot be."""
    draft = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(draft)
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise ConfigError(f"{path} cannot be written ({error.strerror}); use -o with a folder that you may write") from error


def rounded(value: Any) -> Any:
    """The same with every float to six significant digits: what was measured has no more, and the file stays small."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value
