"""Loading: files are verified first, shared out among the ranks; then every rank fills its fragments, whatever split they were saved in."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kan_train.checkpoint.boxes import Fragment
from kan_train.checkpoint.errors import CheckpointError
from kan_train.checkpoint.files import check_hashes, open_tensors
from kan_train.checkpoint.manifest import Manifest, StoredBox, StoredTensor, check_complete, read_table
from kan_train.checkpoint.places import place
from kan_train.checkpoint.ranks import Ranks
from kan_train.checkpoint.save import together
from kan_train.checkpoint.valid import digest_of, verify_share


def load(
    path: Path, fragments: Iterable[Fragment], *, group: dist.ProcessGroup | None = None, verify: bool = True, strict: bool = True
) -> dict[str, Any]:
    """Fill every fragment's `flat` in place from the checkpoint at `path`, and return its JSON state. Collective over `group`.

    The split may differ from the saved one. verify: compare the SHA-256 of every file (each is read by one rank) before anything is filled;
    sizes, manifest and tensor table are always checked. strict: refuse a checkpoint with tensors that no rank's fragments name.
    Raises CheckpointError on every rank alike, naming the file or tensor: a missing, truncated or altered file, another model's tensors or
    another dtype.
    """
    import torch.distributed.checkpoint as dcp

    from kan_train.checkpoint.planner import FragmentLoadPlanner
    from kan_train.checkpoint.storage import SafetensorsReader

    path, ranks = place(path), Ranks(group)
    manifest, table = _opened(path, ranks)
    if verify:
        ranks.each(f"verifying {path}", functools.partial(verify_share, path, manifest, ranks))
    planner = FragmentLoadPlanner(fragments, str(path), strict)
    with together(f"loading {path}", ranks):
        dcp.load({}, storage_reader=SafetensorsReader(path, table), planner=planner, process_group=group, no_dist=not ranks.distributed)
    return manifest.state


def load_tensors(path: Path, prefix: str | tuple[str, ...] = "param/", *, verify: bool = True) -> dict[str, Tensor]:
    """Whole global tensors, on CPU, whose names begin with `prefix` (or one of them), keyed by the rest. For one process: no collectives.

    verify: compare the SHA-256 of the files that hold them. Raises CheckpointError as `load` does; a prefix without tensors gives {}.
    """
    path = place(path)
    manifest = check_complete(path)
    table = {name: tensor for name, tensor in read_table(path, manifest).items() if name.startswith(prefix)}
    if verify:
        needed = {stored.file for tensor in table.values() for stored in tensor.boxes}
        check_hashes(path, {name: record for name, record in manifest.files.items() if name in needed})
    tensors = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in table.items()}
    _fill(path, table, tensors)
    prefixes = (prefix,) if isinstance(prefix, str) else prefix
    return {name.removeprefix(next(p for p in prefixes if name.startswith(p))): tensor for name, tensor in tensors.items()}


def load_rank_tensors(path: Path, rank: int, *, verify: bool = True) -> dict[str, Tensor]:
    """The `rank_tensors` that `rank` saved, such as its random states; {} if it saved none. After `load`, verify=False is enough."""
    return load_tensors(path, f"rank/{rank:05d}/", verify=verify)


def _opened(path: Path, ranks: Ranks) -> tuple[Manifest, dict[str, StoredTensor]]:
    """Manifest and tensor table, read by every rank, and the same on all."""

    opened: list[tuple[Manifest, dict[str, StoredTensor]]] = []

    def identity() -> str:
        manifest = check_complete(path)
        opened.append((manifest, read_table(path, manifest)))
        return digest_of(manifest)

    if len(set(ranks.each(f"opening {path}", identity))) > 1:
        raise CheckpointError(f"{path} is not the same checkpoint on every rank; set run.root (or checkpoint.location) to a folder that all nodes share")
    return opened[0]


def _fill(path: Path, table: dict[str, StoredTensor], tensors: dict[str, Tensor]) -> None:
    by_file: dict[str, list[tuple[str, StoredBox]]] = {}
    for name, tensor in table.items():
        for stored in tensor.boxes:
            by_file.setdefault(stored.file, []).append((name, stored))
    for file, boxes in sorted(by_file.items()):
        with open_tensors(path / file) as read:
            for name, stored in boxes:
                where = tuple(slice(start, start + size) for start, size in zip(stored.box.offset, stored.box.size, strict=True))
                tensors[name][where] = read(stored.key, table[name].dtype, stored.box.size)
