"""Our storage under torch.distributed.checkpoint: safetensors for tensors, JSON for what describes them. (Its default pickles metadata.)

A save writes new files beside whatever is in the folder, every rank its own, and becomes visible in one rename: that of the manifest, by
rank 0 (in an object store: its upload). File names carry the save's random id, so that a replaced checkpoint of the same step stays whole until
then, and a writer that outlived its run spoils nothing.
"""

import contextlib
import dataclasses
import logging
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from kan_train.checkpoint.boxes import Box
from kan_train.checkpoint.errors import CheckpointError, writing
from kan_train.checkpoint.files import FILES_AT_A_TIME, FileRecord, check_size, open_tensors, sync_directory, write_file, write_tensors
from kan_train.checkpoint.manifest import MANIFEST, Manifest, StoredBox, StoredTensor, read_manifest, table_json, write_manifest
from kan_train.checkpoint.places import is_local, present
from kan_train.checkpoint.retention import clean_folder, clean_leftovers

logger = logging.getLogger(__name__)

# Files are hashed and read in parallel, which wants several of a rank; a checkpoint of many ranks must not have too many.
_SMALLEST_FILE = 64 << 20
_FILES_A_RANK = 16


class Written(NamedTuple):
    """Where a box was written, and what its file is."""

    file: str
    key: str
    record: FileRecord


class SafetensorsWriter(StorageWriter):
    """Writes one rank's boxes into safetensors files, and on rank 0 the tensor table and the manifest."""

    def __init__(self, folder: Path, rank: int, manifest: Callable[[str, dict[str, FileRecord]], Manifest], max_file_bytes: int | None) -> None:
        """`manifest(table, files)` makes the manifest once the name of the tensor table and all files are known."""
        self.folder = folder
        self.rank = rank
        self.manifest = manifest
        self.max_file_bytes = max_file_bytes
        self.written: list[Path] = []

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing: a writer is made for one save."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Any path will do."""
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing before the plan is agreed on."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Rank 0, before anyone writes: clear away what interrupted saves left, make the folder, and give the save its id."""
        clean_leftovers(self.folder.parent)
        if is_local(self.folder):
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
        sync_directory(self.folder.parent)
        sync_directory(self.folder.parent.parent)
        save_id = secrets.token_hex(4)
        return [dataclasses.replace(plan, storage_data=save_id) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's boxes; they are on disk under their final names when this returns."""
        limit = self.max_file_bytes or max(_SMALLEST_FILE, sum(map(_item_bytes, plan.items)) // _FILES_A_RANK)
        portions = list(_portions(plan.items, limit))
        paths = [self.folder / f"rank-{self.rank:05d}-{number:03d}-{plan.storage_data}.safetensors" for number in range(len(portions))]
        self.written += paths

        def write(path: Path, items: list[WriteItem]) -> list[WriteResult]:
            record = write_tensors(path, [(_key(item), _resolved(planner, item)) for item in items])
            return [WriteResult(item.index, _item_bytes(item), Written(path.name, _key(item), record)) for item in items]

        with ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
            results = [result for written in pool.map(write, paths, portions) for result in written]
        if results:
            sync_directory(self.folder)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Rank 0, after every rank has written: the tensor table, then the manifest; then what a replaced checkpoint leaves behind."""
        placed = {result.index: result.storage_data for rank_results in results for result in rank_results}
        files = {written.file: written.record for written in placed.values()}
        for name, record in files.items():
            self._check_visible(name, record)
        table = self.folder / f"tensors-{secrets.token_hex(4)}.json"
        self.written.append(table)
        text = table_json(_stored_tensors(metadata, placed))
        files[table.name] = write_file(table, [text], len(text))
        sync_directory(self.folder)
        write_manifest(self.folder, self.manifest(table.name, files))
        # The checkpoint is complete: nothing after this may fail the save, or the ranks would remove files that the manifest lists.
        try:
            sync_directory(self.folder)
        except CheckpointError as error:
            logger.warning("checkpoint %s is complete, but may not survive a power failure: %s", self.folder, error)
        clean_folder(self.folder)

    def discard(self) -> None:
        """Remove what this rank wrote in a save that failed on some rank."""
        try:
            # An interrupt, or a lost answer of the store, may come just after the manifest appeared: then the save failed in name only.
            listed = read_manifest(self.folder).files if present(self.folder / MANIFEST) else {}
        except Exception as error:
            # Which files are listed is not known: they stay, and the next save that can read the manifest deletes what is not.
            logger.warning("the files of the failed save of %s are left there: %s", self.folder, error)
            return
        for path in self.written:
            if path.name not in listed:
                with contextlib.suppress(Exception):
                    path.unlink(missing_ok=True)
        if is_local(self.folder):
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def _check_visible(self, name: str, record: FileRecord) -> None:
        try:
            check_size(self.folder / name, record)
        except CheckpointError as error:
            raise CheckpointError(
                f"rank 0 does not see the file that another rank has just written ({error}); set run.root (or checkpoint.location) to a folder that "
                f"all nodes share"
            ) from error


class SafetensorsReader(StorageReader):
    """Reads boxes of a checkpoint whose tensor table is already read."""

    def __init__(self, folder: Path, table: dict[str, StoredTensor]) -> None:
        self.folder = folder
        self.table = table
        self.places: dict[MetadataIndex, tuple[StoredBox, torch.dtype]] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing: a reader is made for one load."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Any path will do."""
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The tensor table in the planner's terms."""
        described: dict[str, Any] = {}
        for name, tensor in self.table.items():
            chunks = []
            for stored in tensor.boxes:
                chunks.append(ChunkStorageMetadata(torch.Size(stored.box.offset), torch.Size(stored.box.size)))
                self.places[MetadataIndex(name, stored.box.offset)] = (stored, tensor.dtype)
            described[name] = TensorStorageMetadata(TensorProperties(tensor.dtype), torch.Size(tensor.shape), chunks)
        return Metadata(described)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every item into its fragment, file by file."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.places[item.storage_index][0].file, []).append(item)

        def fill(file: str) -> None:
            with open_tensors(self.folder / file) as read, torch.no_grad():
                for item in by_file[file]:
                    stored, dtype = self.places[item.storage_index]
                    part = tuple(slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True))
                    target = planner.resolve_tensor(item)
                    target.copy_(read(stored.key, dtype, stored.box.size, part))
                    planner.commit_tensor(item, target)

        with ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
            for _ in pool.map(fill, sorted(by_file)):
                pass
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _stored_tensors(metadata: Metadata, placed: dict[MetadataIndex, Written]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for name, described in sorted(metadata.state_dict_metadata.items()):
        assert isinstance(described, TensorStorageMetadata)
        boxes = []
        for chunk in described.chunks:
            written = placed[MetadataIndex(name, chunk.offsets)]
            boxes.append(StoredBox(Box(tuple(chunk.offsets), tuple(chunk.sizes)), written.file, written.key))
        tensors[name] = StoredTensor(described.properties.dtype, tuple(described.size), tuple(boxes))
    return tensors


def _portions(items: list[WriteItem], max_bytes: int) -> Iterator[list[WriteItem]]:
    """Items of one file each: at most `max_bytes` together, or one larger item alone."""
    portion: list[WriteItem] = []
    total = 0
    for item in items:
        size = _item_bytes(item)
        if portion and total + size > max_bytes:
            yield portion
            portion, total = [], 0
        portion.append(item)
        total += size
    if portion:
        yield portion


def _item_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def _key(item: WriteItem) -> str:
    """The tensor's name, with the slice where the box is not the whole tensor: "param/head[0:64,0:128]"."""
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    if chunk.sizes == item.tensor_data.size:
        return item.index.fqn
    return f"{item.index.fqn}[{','.join(f'{start}:{start + size}' for start, size in zip(chunk.offsets, chunk.sizes, strict=True))}]"


def _resolved(planner: SavePlanner, item: WriteItem) -> Tensor:
    data = planner.resolve_data(item)
    assert isinstance(data, Tensor)
    return data
