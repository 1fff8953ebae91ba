"""One file for everything that decoding needs: weights under their canonical names, the tokenizer, and the configuration, in safetensors.

The header's metadata are strings: `kan_train_export` (version of this format), `config` (JSON), `step`, `tokens`, `dtype`, `code_version`,
and `sha256` of the whole file, its own 64 digits taken as zeros. Nothing in the file depends on when or where it was written.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kan_train.checkpoint.errors import CheckpointError
from kan_train.checkpoint.files import DTYPE_NAMES, sync_directory, write_file
from kan_train.checkpoint.stream import TOKENIZER, WEIGHTS, Advance, TensorStream, ignore
from kan_train.config.errors import require_choice

EXPORT_VERSION = 1
EXPORT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MARK = "kan_train_export"
_NO_HASH = "0" * 64
_MAX_HEADER = 100 << 20  # what the format allows
_PORTION = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export says of itself."""

    step: int
    """Optimizer steps that the weights were trained for."""
    tokens: int | None
    """Tokens they were trained on; None where the checkpoint did not say."""
    dtype: str
    """fp32 or bf16: the type of the parameters. Buffers keep theirs."""
    code_version: str
    """Version of kan-train that trained them."""
    config: dict[str, Any]
    """The run's configuration, as its sections."""


def export(
    checkpoint: Path, file: Path, *, run_dir: Path | None = None, dtype: str = "fp32", overwrite: bool = False, advance: Advance = ignore
) -> Exported:
    """Write the weights of `checkpoint` to `file`, whole or not at all; memory holds one tensor at a time. The same input gives the same bytes.

    run_dir: where the run's tokenizer is; unset: the folder that the checkpoint lies in. advance: called with the bytes that were read or made.
    The checkpoint's files are verified first. Raises CheckpointError where one is damaged, where `file` exists (and not overwrite), or cannot be
    written; ConfigError for a dtype that is not one of EXPORT_DTYPES.
    """
    require_choice("--dtype", dtype, EXPORT_DTYPES)
    _check_target(file, overwrite)
    stream = TensorStream(checkpoint, WEIGHTS, run_dir=run_dir, advance=advance)
    tokenizer = torch.frombuffer(bytearray(stream.tokenizer()), dtype=torch.uint8)
    facts = Exported(
        step=stream.manifest.step,
        tokens=stream.tokens,
        dtype=dtype,
        code_version=stream.manifest.code_version,
        config=stream.run_config(),
    )
    names = {_canonical(name): name for name in stream.table}
    if TOKENIZER in names:
        raise CheckpointError(f"{checkpoint} has a tensor named {TOKENIZER}, the name that an export keeps for the tokenizer; rename it in the model")
    shapes = {name: (_exported_dtype(full, stream, dtype), stream.table[full].shape) for name, full in names.items()}
    shapes[TOKENIZER] = (torch.uint8, tuple(tokenizer.shape))
    # Widest types first keeps every tensor aligned to its own element size, as the format asks.
    order = sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))
    entries = _entries([(name, *shapes[name]) for name in order])

    def data() -> Iterator[memoryview]:
        for name in order:
            tensor = tokenizer if name == TOKENIZER else stream.read(names[name]).to(shapes[name][0])
            yield memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
            advance(tensor.numel() * tensor.element_size())

    # The hash stands before what it is of: the tensors are read once for it, and once to be written.
    digest = hashlib.sha256(_header(facts, entries, _NO_HASH))
    for piece in data():
        digest.update(piece)
    header = _header(facts, entries, digest.hexdigest())
    size = len(header) + max(entry["data_offsets"][1] for entry in entries.values())

    def pieces() -> Iterator[bytes | memoryview]:
        yield header
        yield from data()

    write_file(file, pieces(), size)
    sync_directory(file.absolute().parent)
    return facts


def read_export(file: Path) -> Exported:
    """What the export `file` says of itself, from its header alone. CheckpointError where it is none, is damaged, or is of a newer format."""
    return _opened(file)[0]


def load_export(file: Path, *, verify: bool = True) -> tuple[dict[str, Tensor], bytes]:
    """(parameters and buffers under their canonical names, tokenizer) of an export, on CPU, in the types they were written in.

    verify: compare its SHA-256. CheckpointError where it is none, is damaged, or is of a newer format. Runs none of its contents.
    """
    header = _opened(file)[1]
    if verify:
        check_export(file)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in header if name != "__metadata__"}
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not the safetensors file that was written ({error}); {_ADVICE}") from error
    except OSError as error:
        raise _unreadable(file, error) from error
    tokenizer = tensors.pop(TOKENIZER, None)
    if tokenizer is None or tokenizer.dtype != torch.uint8:
        raise CheckpointError(f"{file} holds no tokenizer; {_ADVICE}")
    return tensors, tokenizer.numpy().tobytes()


def check_export(file: Path, advance: Advance = ignore) -> None:
    """Raise CheckpointError unless the bytes of the export `file` have its SHA-256."""
    facts, header, start = _opened(file)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    digest = hashlib.sha256(_header(facts, entries, _NO_HASH))
    try:
        with file.open("rb") as opened:
            # The header counts as we would write it: what differs from that was altered, even a space.
            same = opened.read(start) == _header(facts, entries, header["__metadata__"]["sha256"])
            while portion := opened.read(_PORTION):
                digest.update(portion)
                advance(len(portion))
    except OSError as error:
        raise _unreadable(file, error) from error
    if not same or digest.hexdigest() != header["__metadata__"]["sha256"]:
        raise CheckpointError(f"{file} does not have its SHA-256: it was altered or damaged; {_ADVICE}")


_ADVICE = "write it again with `kan checkpoint export`"


def _check_target(file: Path, overwrite: bool) -> None:
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file} is not named as what it will be; use {file.with_suffix('.safetensors') if file.name else 'model.safetensors'}")
    if file.is_dir():
        raise CheckpointError(f"{file} is a folder; use {file / 'model.safetensors'}")
    if file.exists() and not overwrite:
        raise CheckpointError(f"{file} exists already; use another name, or --overwrite to replace it")
    if not file.absolute().parent.is_dir():
        raise CheckpointError(f"there is no folder {file.absolute().parent}; make it with `mkdir -p {file.parent}`, or use another one")


def _canonical(name: str) -> str:
    return name.removeprefix("param/").removeprefix("buffer/")


def _exported_dtype(full: str, stream: TensorStream, dtype: str) -> torch.dtype:
    # Buffers (selection biases, score statistics) are fp32 whatever a model computes in.
    stored = stream.table[full].dtype
    return EXPORT_DTYPES[dtype] if full.startswith("param/") and stored.is_floating_point else stored


def _entries(tensors: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> dict[str, Any]:
    entries, position = {}, 0
    for name, dtype, shape in tensors:
        end = position + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return entries


def _header(facts: Exported, entries: dict[str, Any], sha256: str) -> bytes:
    """The first bytes of the file: the length of the header, and the header."""
    metadata = {
        "format": "pt",
        _MARK: str(EXPORT_VERSION),
        "code_version": facts.code_version,
        "step": str(facts.step),
        "tokens": "" if facts.tokens is None else str(facts.tokens),
        "dtype": facts.dtype,
        "config": json.dumps(facts.config, allow_nan=False),
        "sha256": sha256,
    }
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _unreadable(file: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{file} cannot be read ({error.strerror}); use a file that `kan checkpoint export` wrote and that you may read")


def _opened(file: Path) -> tuple[Exported, dict[str, Any], int]:
    """What the file says of itself, its header, and where its tensors begin."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            text = opened.read(length) if length <= _MAX_HEADER else b""
    except OSError as error:
        raise _unreadable(file, error) from error
    try:
        header = json.loads(text)
        metadata = header.get("__metadata__", {})
        version = int(metadata.get(_MARK, 0))
    except (ValueError, AttributeError, TypeError):
        raise CheckpointError(f"{file} is not a safetensors file, or was damaged; {_ADVICE}") from None
    if version < 1:
        raise CheckpointError(f"{file} is not an export of kan-train: its header has no {_MARK}; use a file that `kan checkpoint export` wrote")
    if version > EXPORT_VERSION:
        raise CheckpointError(
            f"{file} has export format {version}, and this kan-train reads up to {EXPORT_VERSION}; use the version that wrote it "
            f"({metadata.get('code_version')}), or a newer one"
        )
    try:
        facts = Exported(
            step=int(metadata["step"]),
            tokens=int(metadata["tokens"]) if metadata["tokens"] else None,
            dtype=str(metadata["dtype"]),
            code_version=str(metadata["code_version"]),
            config=json.loads(metadata["config"]),
        )
        if not (isinstance(facts.config, dict) and isinstance(metadata["sha256"], str)):
            raise ValueError("the configuration is no mapping")
    except (KeyError, ValueError, TypeError):
        raise CheckpointError(f"{file} has a damaged header; {_ADVICE}") from None
    return facts, header, 8 + length
