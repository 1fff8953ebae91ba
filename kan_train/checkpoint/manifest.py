"""The manifest: a checkpoint exists when manifest.json has been renamed into its folder, and consists of what the manifest lists.

`manifest.json` holds the step, every file with its size and SHA-256, the program's version, the run's configuration and its JSON state, what the
run had done and spent until then, and a SHA-256 of itself. The tensor table, `tensors-*.json`, says where each global tensor's boxes are; it is one
of the listed files.
"""

import functools
import hashlib
import json
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import kan_train
from kan_train.checkpoint.boxes import Box, coverage_problem
from kan_train.checkpoint.errors import CheckpointError, otherwise, reading
from kan_train.checkpoint.files import FileRecord, check_size, read_bytes, render_json, write_file
from kan_train.checkpoint.places import children, present
from kan_train.checkpoint.ranges import DTYPES

FORMAT_VERSION = 2  # 1 had no tokens, layout, data_index and ledger; it is read as if they were not known
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint is."""

    format_version: int = FORMAT_VERSION
    """Layout of the files; a reader refuses a newer one."""
    step: int
    """Optimizer steps done."""
    world_size: int
    """Ranks that wrote it."""
    code_version: str
    """Version of kan-train, with the commit where it runs from a clone."""
    torch_version: str
    """Version of PyTorch."""
    config: str
    """The run's effective configuration, as YAML text."""
    state: dict[str, Any]
    """JSON state of schedule, loader and everything else that is no tensor."""
    tensors: str
    """Name of the file with the tensor table."""
    files: dict[str, FileRecord]
    """Every other file of the checkpoint."""
    tokens: int = 0
    """Training tokens that the weights have seen."""
    layout: dict[str, Any] = field(default_factory=dict)
    """How the run that wrote it was spread over its ranks; a load may be spread otherwise."""
    data_index: str = ""
    """Hash of the index of the training data."""
    ledger: dict[str, float] = field(default_factory=dict)
    """Totals of what the run had spent, over all its starts."""


@dataclass(frozen=True)
class StoredBox:
    """One box of a global tensor and where it lies."""

    box: Box
    """The box."""
    file: str
    """The safetensors file."""
    key: str
    """Its key there."""


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor of a checkpoint."""

    dtype: torch.dtype
    """Type of its elements."""
    shape: tuple[int, ...]
    """Global shape."""
    boxes: tuple[StoredBox, ...]
    """Boxes that tile it."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Rename the manifest into `folder`: from here on the checkpoint is complete. CheckpointError leaves the folder as it was."""
    body = asdict(manifest)
    text = render_json({**body, "sha256": hashlib.sha256(render_json(body)).hexdigest()})
    write_file(folder / MANIFEST, [text], len(text))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`; CheckpointError where there is none, or it was altered, or is of a newer format."""
    path = folder / MANIFEST
    with reading(path):
        try:
            text = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(_no_manifest(folder)) from None
    try:
        body = json.loads(text)
    except ValueError:
        raise _altered(path) from None
    if isinstance(body, dict) and isinstance(body.get("format_version"), int) and body["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {body['format_version']}, and this kan-train reads up to {FORMAT_VERSION}; use the version that wrote it "
            f"({body.get('code_version')}), or a newer one"
        )
    # The rendering is compared byte for byte, so that not even a changed space passes for the file that was written.
    if not isinstance(body, dict) or render_json(body) != text or body.pop("sha256", None) != hashlib.sha256(render_json(body)).hexdigest():
        raise _altered(path)
    try:
        files = {_plain_name(name): FileRecord(**record) for name, record in body.pop("files").items()}
        manifest = Manifest(files=files, **body)
    except (TypeError, AttributeError, KeyError, ValueError):
        raise _altered(path) from None
    if manifest.tensors not in files:
        raise _altered(path)
    return manifest


def check_complete(folder: Path) -> Manifest:
    """The manifest, after a look at the presence and size of every file it lists; CheckpointError names the first that is wrong."""
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        check_size(folder / name, record)
    return manifest


def table_json(tensors: dict[str, StoredTensor]) -> bytes:
    """The tensor table as it is written."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    table = {
        name: {
            "dtype": names[tensor.dtype],
            "shape": tensor.shape,
            "boxes": [{"file": b.file, "key": b.key, "offset": b.box.offset, "size": b.box.size} for b in tensor.boxes],
        }
        for name, tensor in tensors.items()
    }
    return render_json({"format_version": FORMAT_VERSION, "tensors": table})


def read_table(folder: Path, manifest: Manifest) -> dict[str, StoredTensor]:
    """The tensor table of the checkpoint in `folder`, its hash checked, and every tensor tiled by its boxes; else CheckpointError."""
    path = folder / manifest.tensors
    check_size(path, manifest.files[manifest.tensors])
    text = read_bytes(path)
    if hashlib.sha256(text).hexdigest() != manifest.files[manifest.tensors].sha256:
        raise CheckpointError(f"{path} does not have the SHA-256 of its manifest: it was altered; {otherwise(path)}")
    try:
        table = {name: _stored_tensor(entry) for name, entry in json.loads(text)["tensors"].items()}
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a tensor table ({error!r}); {otherwise(path)}") from None
    for name, tensor in table.items():
        problem = coverage_problem(tensor.shape, [stored.box for stored in tensor.boxes])
        unlisted = next((f"{stored.file} is not in the manifest" for stored in tensor.boxes if stored.file not in manifest.files), None)
        if problem or unlisted:
            raise CheckpointError(f"tensor {name} of {folder} is not whole: {problem or unlisted}; use another checkpoint")
    return table


def require_json(value: Any, where: str = "state") -> None:
    """Raise CheckpointError unless `value` comes back from JSON as it is (tuples as lists)."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}, and JSON keys are strings; use {str(key)!r}")
            require_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            require_json(item, f"{where}[{index}]")
    elif isinstance(value, float) and not -float("inf") < value < float("inf"):
        raise CheckpointError(f"{where}={value} is not finite, and JSON has no such number; save it as a tensor, or as None")
    elif value is not None and not isinstance(value, str | int | float):
        kind = type(value).__name__
        raise CheckpointError(f"{where} is a {kind}, which JSON cannot hold; save it as a number, a string, or a tensor of rank_tensors")


@functools.cache
def code_version() -> str:
    """The package's version, and "+<commit>" where it runs from a clone."""
    root = Path(kan_train.__file__).parents[1]
    if not (root / ".git").exists():
        return kan_train.__version__
    try:
        found = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return kan_train.__version__
    commit = found.stdout.strip()
    return f"{kan_train.__version__}+{commit}" if found.returncode == 0 and commit else kan_train.__version__


def _stored_tensor(entry: dict[str, Any]) -> StoredTensor:
    boxes = (StoredBox(Box(_sizes(b["offset"]), _sizes(b["size"])), _plain_name(b["file"]), str(b["key"])) for b in entry["boxes"])
    return StoredTensor(DTYPES[entry["dtype"]], _sizes(entry["shape"]), tuple(boxes))


def _sizes(values: list[Any]) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values} are no sizes")
    return tuple(values)


def _plain_name(name: str) -> str:
    """`name`, if it is the name of a file in the checkpoint's own folder: a stranger's manifest must not reach outside."""
    if not name or Path(name).name != name:
        raise ValueError(f"{name!r} is no file name")
    return name


def _altered(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is not as it was written: it was altered or damaged; {otherwise(path)}")


def _no_manifest(folder: Path) -> str:
    if not children(folder):
        beside = sorted(path.name for path in children(folder.parent) if present(path / MANIFEST))
        return f"there is no checkpoint {folder}; " + (f"use one of: {', '.join(beside)}" if beside else f"{folder.parent} holds none")
    return f"{folder} is not a complete checkpoint: it has no {MANIFEST}, so its save did not finish; use an earlier one"
