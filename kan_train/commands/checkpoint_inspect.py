"""`kan checkpoint inspect`: what a checkpoint holds."""

import fnmatch
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from kan_train.checkpoint import find_checkpoint
from kan_train.checkpoint.manifest import StoredTensor
from kan_train.checkpoint.stream import TensorStream, bytes_of, run_directory_of, validation_loss_of
from kan_train.commands.checkpoint import layout_text
from kan_train.commands.output import columns, size_text
from kan_train.config import ConfigError

_SLICE = 1 << 22  # elements whose statistics are taken at a time, in float64


def run_inspect(source: str, root: Path, *, config: bool = False, tensors: str | None = None) -> int:
    """Print the configuration alone, or statistics of the tensors whose names match `tensors`, or everything else. Returns the exit status."""
    checkpoint = find_checkpoint("run", source, str(root))
    # What is shown must be what was written; facts alone are in the manifest, which has its own hash.
    stream = TensorStream(checkpoint, run_dir=run_directory_of(checkpoint, source, root), verify=tensors is not None)
    if config:
        print(yaml.safe_dump(stream.run_config(), sort_keys=False, width=140), end="")
    elif tensors is not None:
        _print_statistics(stream, tensors)
    else:
        _print_facts(stream)
        _print_differences(stream.run_config())
        _print_tensors(stream.table)
    return 0


def statistics(tensor: Tensor) -> dict[str, float]:
    """Elements, non-finite ones, and of the finite ones least, largest, mean, root mean square and share of zeros (NaN where there are none)."""
    count = finite = zeros = 0
    total = squares = 0.0
    least, largest = math.inf, -math.inf
    for part in tensor.reshape(-1).split(_SLICE):
        good = part.double()
        good = good[good.isfinite()]
        count, finite, zeros = count + part.numel(), finite + good.numel(), zeros + int((good == 0).sum())
        if good.numel():
            total, squares = total + good.sum().item(), squares + (good * good).sum().item()
            least, largest = min(least, good.min().item()), max(largest, good.max().item())
    if not finite:
        nothing = dict.fromkeys(("min", "max", "mean", "rms", "zeros"), math.nan)
        return {"elements": count, "nonfinite": count, **nothing}
    return {
        "elements": count,
        "nonfinite": count - finite,
        "min": least,
        "max": largest,
        "mean": total / finite,
        "rms": math.sqrt(squares / finite),
        "zeros": zeros / finite,
    }


def _print_statistics(stream: TensorStream, pattern: str) -> None:
    names = fnmatch.filter(stream.table, pattern)
    if not names:
        some = ", ".join(list(stream.table)[:3])
        raise ConfigError(f"--tensors {pattern!r} matches no tensor of {stream.path}; use a name or a pattern of those there, such as {some}, or 'param/*'")
    rows = [["tensor", "elements", "non-finite", "min", "max", "mean", "rms", "zeros"]]
    for name in names:
        found = statistics(stream.read(name))
        figures = [f"{found[key]:.6g}" for key in ("min", "max", "mean", "rms")]
        rows.append([name, f"{found['elements']:,}", f"{found['nonfinite']:,}", *figures, f"{found['zeros']:.1%}"])
    print(columns(rows, right=range(1, 8)))


def _print_facts(stream: TensorStream) -> None:
    manifest = stream.manifest
    rows = [["checkpoint", str(stream.path)], ["step", f"{manifest.step:,}"]]
    if stream.tokens is not None:
        rows.append(["tokens", f"{stream.tokens:,}"])
    loss = validation_loss_of(manifest)
    if loss is not None:
        rows.append(["validation loss", f"{loss:.4f}"])
    rows += [["code version", manifest.code_version], ["PyTorch", manifest.torch_version], ["layout", layout_text(manifest)]]
    if manifest.data_index:
        rows.append(["data index", manifest.data_index])
    rows += [[f"ledger {name}", f"{total:,.6g}"] for name, total in manifest.ledger.items()]
    transform = manifest.state.get("transform")
    if transform is not None:
        rows.append(["made by", f"{transform['kind']} of {', '.join(transform['of'])}"])
    size = sum(record.size for record in manifest.files.values())
    rows.append(["files", f"{len(manifest.files)} ({size_text(size)})"])
    print(columns(rows))


def _print_differences(saved: dict[str, Any]) -> None:
    """What of the saved configuration a run without settings would have otherwise."""
    from kan_train.config.compose import compose_train

    defaults = dict(_flat(asdict(compose_train([], world_size=1))))
    found = dict(_flat(saved))
    rows = []
    for name in [*found, *(name for name in defaults if name not in found)]:
        if name not in found or name not in defaults or found[name] != defaults[name]:
            saved_text = f"{name}={_shown(found[name])}" if name in found else f"~{name}"
            rows.append([f"  {saved_text}", f"(default {_shown(defaults[name])})" if name in defaults else "(no default)"])
    print("\nconfiguration, where it is not the default (--config shows the whole)")
    print(columns(rows) if rows else "  nothing differs")


def _print_tensors(table: dict[str, StoredTensor]) -> None:
    rows = [["tensor", "dtype", "shape", "boxes", "bytes"]]
    for name, tensor in table.items():
        rows.append([name, str(tensor.dtype).removeprefix("torch."), str(list(tensor.shape)), str(len(tensor.boxes)), f"{bytes_of(tensor):,}"])
    print()
    print(columns(rows, right=(3, 4)))
    kinds: dict[str, list[StoredTensor]] = {}
    for name, tensor in table.items():
        kinds.setdefault(name.partition("/")[0], []).append(tensor)
    rows = [["kind", "tensors", "elements", "bytes"]]
    for kind, tensors in [*kinds.items(), ("total", list(table.values()))]:
        elements = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
        rows.append([kind, f"{len(tensors):,}", f"{elements:,}", f"{sum(map(bytes_of, tensors)):,}"])
    print()
    print(columns(rows, right=(1, 2, 3)))


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
