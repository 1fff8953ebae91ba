"""Planners of torch.distributed.checkpoint over fragments: each rank offers boxes, the coordinator checks that they tile every tensor.

The fragments are listed inside `create_local_plan`, where an error of one rank is collected and raised on all of them, never before.
"""

import io
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from kan_train.checkpoint.boxes import Box, Fragment, coverage_problem, fragment_boxes
from kan_train.checkpoint.errors import CheckpointError
from kan_train.checkpoint.files import DTYPE_NAMES

Facts = tuple[tuple[int, ...], torch.dtype]  # global shape and type of a tensor

RANK_PREFIX = "rank/"
"""Names of the ranks' own tensors: "rank/00003/..." is rank 3's."""


class FragmentSavePlanner(SavePlanner):
    """Plans to write the boxes of the fragments that a rank owns."""

    def __init__(self, fragments: Iterable[Fragment]) -> None:
        self.fragments = fragments
        self.views: dict[tuple[str, torch.Size], Tensor] = {}

    def set_up_planner(self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False) -> None:
        """Nothing: what is saved are the fragments."""

    def create_local_plan(self) -> SavePlan:
        """This rank's boxes; the plan also carries shape and type of every tensor that it knows, written by it or not."""
        items: list[WriteItem] = []
        facts: dict[str, Facts] = {}
        for fragment in self.fragments:
            _note_facts(facts, fragment.name, (tuple(fragment.global_shape), fragment.flat.dtype))
            for box, view in _checked_boxes(fragment):
                if fragment.write:
                    items.append(_write_item(fragment, box, view))
                    self.views[fragment.name, torch.Size(box.offset)] = view
        return SavePlan(items, planner_data=facts)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Coordinator: the plans as they are, after the proof that their boxes tile every tensor exactly."""
        facts: dict[str, Facts] = {}
        for plan in all_plans:
            for name, fact in plan.planner_data.items():
                _note_facts(facts, name, fact)
        plans, metadata = create_default_global_save_plan(all_plans)
        for name, (shape, dtype) in facts.items():
            stored = metadata.state_dict_metadata.setdefault(name, TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), []))
            assert isinstance(stored, TensorStorageMetadata)
            problem = coverage_problem(shape, [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stored.chunks])
            if problem:
                raise CheckpointError(f"tensor {name} cannot be saved: {problem}; every element must be written by exactly one rank")
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The view of the fragment that `write_item` writes."""
        offset = write_item.index.offset
        assert offset is not None
        return self.views[write_item.index.fqn, offset]


class FragmentLoadPlanner(LoadPlanner):
    """Plans to fill fragments, of whatever split, from the boxes of a checkpoint."""

    def __init__(self, fragments: Iterable[Fragment], where: str, strict: bool) -> None:
        self.fragments = fragments
        self.where = where
        self.strict = strict
        self.metadata: Metadata | None = None
        self.views: dict[str, list[Tensor]] = {}

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Take what the checkpoint holds."""
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """Reads that fill this rank's fragments; CheckpointError where name, shape or type is not the saved one."""
        assert self.metadata is not None
        saved = self.metadata.state_dict_metadata
        wanted: dict[str, list[ChunkStorageMetadata]] = {}
        missing: list[str] = []
        for fragment in self.fragments:
            stored = saved.get(fragment.name)
            if not isinstance(stored, TensorStorageMetadata):
                missing.append(fragment.name)
                continue
            self._compare(fragment, stored)
            chunks, views = wanted.setdefault(fragment.name, []), self.views.setdefault(fragment.name, [])
            for box, view in _checked_boxes(fragment):
                chunks.append(ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.size)))
                views.append(view)
        if missing:
            raise CheckpointError(f"{self.where} does not hold {_some(missing)}: it is of another model or optimizer; {_ADVICE}")
        items: list[ReadItem] = []
        for name, chunks in wanted.items():
            items += create_read_items_for_chunk_list(name, saved[name], chunks)  # type: ignore[arg-type]
        return LoadPlan(items, planner_data=sorted(wanted))

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Coordinator: the plans as they are, after a look that nothing of the checkpoint is left behind."""
        assert self.metadata is not None
        asked = {name for plan in global_plan for name in plan.planner_data}
        left = [name for name in self.metadata.state_dict_metadata if name not in asked and not name.startswith(RANK_PREFIX)]
        if left and self.strict:
            raise CheckpointError(f"{self.where} also holds {_some(left)}, which this run lacks: it is of another model; {_ADVICE}")
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Never called: a checkpoint holds tensors and JSON alone."""
        raise CheckpointError(f"{self.where} holds {read_item.dest_index.fqn} as bytes, and only tensors are loaded")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of a fragment that `read_item` fills."""
        # Two fragments may begin at the same place: the position in the request, not the offset, tells them apart.
        index = read_item.dest_index.index
        assert index is not None
        view = self.views[read_item.dest_index.fqn][index]
        return view[tuple(slice(start, start + length) for start, length in zip(read_item.dest_offsets, read_item.lengths, strict=True))]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: `resolve_tensor` gave a view of the fragment itself."""

    def _compare(self, fragment: Fragment, stored: TensorStorageMetadata) -> None:
        if tuple(stored.size) != tuple(fragment.global_shape):
            raise CheckpointError(
                f"{fragment.name} has the shape {list(stored.size)} in {self.where} and {list(fragment.global_shape)} in this run: "
                f"the model's configuration changed; {_ADVICE}"
            )
        if stored.properties.dtype != fragment.flat.dtype:
            raise CheckpointError(
                f"{fragment.name} is {stored.properties.dtype} in {self.where} and {fragment.flat.dtype} in this run; use the "
                f"train.precision it was saved with, or start a new run from its weights with init_from"
            )


_ADVICE = "resume with the configuration it was saved with, choose another run.name, or start a new run from its weights with init_from"


def _checked_boxes(fragment: Fragment) -> list[tuple[Box, Tensor]]:
    if fragment.flat.dtype not in DTYPE_NAMES:
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES)
        raise CheckpointError(f"{fragment.name} is {fragment.flat.dtype}, which a checkpoint cannot hold; use one of: {supported}")
    try:
        return fragment_boxes(fragment)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _write_item(fragment: Fragment, box: Box, view: Tensor) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.size))
    data = TensorWriteData(chunk, TensorProperties(view.dtype), torch.Size(fragment.global_shape))
    return WriteItem(MetadataIndex(fragment.name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def _note_facts(facts: dict[str, Facts], name: str, fact: Facts) -> None:
    if facts.setdefault(name, fact) != fact:
        (shape, dtype), (other_shape, other_dtype) = facts[name], fact
        raise CheckpointError(f"tensor {name} is {dtype} {list(shape)} in one fragment and {other_dtype} {list(other_shape)} in another")


def _some(names: list[str]) -> str:
    unique = sorted(set(names))
    return ", ".join(unique[:3]) + (f" and {len(unique) - 3} other tensors" if len(unique) > 3 else "")
