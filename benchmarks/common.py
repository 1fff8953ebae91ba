"""The record that every benchmark leaves in benchmarks/results: what was claimed, where and how it was measured, and the figures."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "deepspeed", "megatron-core", "sentencepiece", "webdataset")


def write_result(name: str, *, claim: str, config: dict[str, Any], rows: list[dict[str, Any]], **more: Any) -> Path:
    """Write results/<date>-<device>-<name>.json and return its path. rows: one dictionary of figures a measurement; more: further fields."""
    device = device_facts()
    record = {
        "claim": claim,
        "command": " ".join(["python", os.path.relpath(sys.argv[0], RESULTS.parent.parent), *sys.argv[1:]]),
        "commit": _commit(),
        "device": device,
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": config,
        **more,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{record['date'][:10]}-{_slug(device.get('gpu', 'cpu'))}-{name}.json"
    path.write_text(json.dumps(record, indent=1, default=str) + "\n")
    print(f"written: {os.path.relpath(path)}")
    return path


def device_facts() -> dict[str, Any]:
    """Processor, cores, memory and, where there is one, the GPU."""
    import psutil
    import torch

    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "os": platform.platform(),
    }
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(0), "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda}
    return facts


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit that was measured, marked where the working tree differs from it."""
    git = ["git", "-C", str(RESULTS.parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit} and changes" if changed else commit


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
