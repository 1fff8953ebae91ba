"""A checkpoint as its tools read it: whole tensors, one at a time, and what belongs to the weights beside them (configuration, tokenizer)."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from kan_train.checkpoint.errors import CheckpointError
from kan_train.checkpoint.files import check_hashes, open_tensors
from kan_train.checkpoint.manifest import Manifest, StoredBox, StoredTensor, check_complete, read_manifest, read_table
from kan_train.checkpoint.places import is_local
from kan_train.config import ModelConfig

WEIGHTS = ("param/", "buffer/")
"""Beginnings of the names of what makes a model: its parameters, and the buffers that belong to them."""

TOKENIZER = "tokenizer.model"
"""Name of the tokenizer in a run directory, and of its tensor in an export."""

CONFIG = "config.yaml"
"""Name of the configuration in a run directory."""

Advance = Callable[[int], None]
"""Called with the bytes that were done since the last call."""


def ignore(_: int) -> None:
    """An `Advance` that nobody watches."""


class TensorStream:
    """The tensors of a checkpoint, read whole and one at a time, in the order of their names."""

    def __init__(
        self, path: Path, prefix: tuple[str, ...] = ("",), *, run_dir: Path | None = None, verify: bool = True, advance: Advance = ignore
    ) -> None:
        """Tensors of the checkpoint in `path` whose names begin with one of `prefix`. run_dir: of its run; unset: the folder it lies in.
        verify: compare the SHA-256 of the files that hold them first; advance: called with the bytes of these files.

        Raises CheckpointError where the checkpoint is not complete, or a file is not as it was written.
        """
        self.path, self.run_dir = path, run_dir or path.parent.parent
        self.manifest: Manifest = check_complete(path)
        self.table = {name: tensor for name, tensor in sorted(read_table(path, self.manifest).items()) if name.startswith(prefix)}
        if verify:
            problem = next(file_problems(path, self.manifest, sorted(_by_file(self.table)), advance), None)
            if problem:
                raise CheckpointError(problem)

    def read(self, name: str) -> Tensor:
        """The whole tensor `name`, on CPU, as it was saved; CheckpointError where it is not what the tensor table says."""
        stored = self.table[name]
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        for box in stored.boxes:
            where = tuple(slice(start, start + size) for start, size in zip(box.box.offset, box.box.size, strict=True))
            with open_tensors(self.path / box.file) as read:
                whole[where] = read(box.key, stored.dtype, box.box.size)
        return whole

    @property
    def tokens(self) -> int | None:
        """Tokens that the weights were trained on; None where the checkpoint does not say."""
        return tokens_of(self.manifest)

    def run_config(self) -> dict[str, Any]:
        """The configuration of the run, as its sections: what the checkpoint has of it, or else the run directory's config.yaml."""
        text, source = self.manifest.config, self.path
        if not text:
            source = self.run_dir / CONFIG
            try:
                text = source.read_text(encoding="utf-8")
            except OSError as error:
                raise CheckpointError(f"{source}: {error.strerror}; restore it: it says what model the run trained") from error
        sections = yaml.safe_load(text)
        if not isinstance(sections, dict) or "model" not in sections:
            raise CheckpointError(f"{source} has no configuration with a section model; use a checkpoint that `kan train` wrote")
        return sections

    def tokenizer(self) -> bytes:
        """The run's tokenizer, a serialised sentencepiece model."""
        path = self.run_dir / TOKENIZER
        try:
            return path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{path} is missing ({error.strerror}); copy it there from the corpus that the run trained on, "
                f"corpora/NAME/tokenizer/tokenizer.model, or name the run where its checkpoints lie elsewhere (checkpoint.location)"
            ) from error


def run_directory_of(checkpoint: Path, value: str, root: Path) -> Path:
    """The directory of the run whose `checkpoint` a user named by `value`: that run's, or else the one that the checkpoint lies in."""
    return next((path for path in (Path(value), root / value) if (path / CONFIG).is_file()), checkpoint.parent.parent)


def model_config(sections: dict[str, Any]) -> ModelConfig:
    """The model of a saved configuration. Only what describes it is read: the rest was valid for the processes that trained, and need not be here."""
    from kan_train.config.compose import from_yaml

    return from_yaml(yaml.safe_dump({name: sections[name] for name in ("model", "data") if name in sections})).model


def tokens_of(manifest: Manifest) -> int | None:
    """Tokens that a checkpoint's weights were trained on, where it says."""
    return manifest.tokens or manifest.state.get("progress", {}).get("tokens")


def validation_loss_of(manifest: Manifest) -> float | None:
    """The run's last validation loss before the checkpoint, in nats a token; None where there was none."""
    return manifest.state.get("progress", {}).get("figures", {}).get("validation_loss")


def bytes_of(tensor: StoredTensor) -> int:
    """Bytes of a stored tensor."""
    return torch.Size(tensor.shape).numel() * tensor.dtype.itemsize


def file_problems(folder: Path, manifest: Manifest, names: list[str], advance: Advance = ignore) -> Iterator[str]:
    """What is wrong with each of the files `names` that is missing, or of another size or SHA-256; a few are read at a time."""

    def problem(name: str) -> str:
        try:
            check_hashes(folder, {name: manifest.files[name]})
        except CheckpointError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for name, found in zip(names, pool.map(problem, names), strict=True):
            advance(manifest.files[name].size)
            if found:
                yield found


def problems(folder: Path, advance: Advance = ignore) -> list[str]:
    """All that is wrong with the checkpoint in `folder`: manifest, every file's size and SHA-256, tensor table, every box. Empty: it is good."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    found = list(file_problems(folder, manifest, list(manifest.files), advance))
    if found:
        return found
    try:
        table = read_table(folder, manifest)
    except CheckpointError as error:
        return [str(error)]
    return list(_box_problems(folder, table))


def bytes_to_verify(folder: Path) -> int:
    """Bytes that `problems` reads in `folder`; 0 where its manifest cannot be read."""
    try:
        return sum(record.size for record in read_manifest(folder).files.values())
    except CheckpointError:
        return 0


def _by_file(table: dict[str, StoredTensor]) -> dict[str, list[tuple[StoredTensor, StoredBox]]]:
    found: dict[str, list[tuple[StoredTensor, StoredBox]]] = {}
    for tensor in table.values():
        for stored in tensor.boxes:
            found.setdefault(stored.file, []).append((tensor, stored))
    return found


def _box_problems(folder: Path, table: dict[str, StoredTensor]) -> Iterator[str]:
    """Boxes that are not in their file as the tensor table says."""
    for file, boxes in sorted(_by_file(table).items()):
        try:
            with open_tensors(folder / file) as read:
                for tensor, stored in boxes:
                    # Of a file in a store the header is enough: its bytes have been compared already.
                    read(stored.key, tensor.dtype, stored.box.size, () if is_local(folder) or not stored.box.size else (slice(0, 0),))
        except CheckpointError as error:
            yield str(error)
