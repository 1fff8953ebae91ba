"""Saving: every rank writes what it owns, and the checkpoint appears when the last file is on disk, or not at all."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kan_train.checkpoint.boxes import Fragment
from kan_train.checkpoint.errors import CheckpointError
from kan_train.checkpoint.files import FileRecord
from kan_train.checkpoint.manifest import Manifest, code_version, require_json
from kan_train.checkpoint.places import place
from kan_train.checkpoint.ranks import Ranks, joint_error
from kan_train.checkpoint.retention import step_folder

logger = logging.getLogger(__name__)



def save(
    directory: Path,
    *,
    step: int,
    fragments: Iterable[Fragment],
    state: dict[str, Any],
    rank_tensors: Mapping[str, Tensor] | None = None,
    config: str = "",
    tokens: int = 0,
    layout: dict[str, Any] | None = None,
    data_index: str = "",
    ledger: dict[str, float] | None = None,
    group: dist.ProcessGroup | None = None,
    max_file_bytes: int | None = None,
) -> Path:
    """Save a checkpoint of `step` below `directory` (a folder, or the URL of one in an object store) and return its folder. Collective over `group`;
    alone without torch.distributed.

    fragments: what this rank owns of the global tensors; together the written ones must tile every tensor exactly.
    state: JSON, the same on every rank; rank 0's is kept. rank_tensors: this rank's own tensors, such as random states.
    config: the run's effective configuration, as text. tokens, layout, data_index, ledger: see `Manifest`; JSON, and rank 0's are kept too.
    max_file_bytes: a rank's tensors go into files of at most so much (a larger tensor alone); unset: into about 16, none needlessly small.
    Raises CheckpointError on every rank, naming the failure of the first rank that failed; the checkpoints before are then untouched, and
    nothing is left of this one. A checkpoint of the same step is replaced in one rename. Fragments are read while this runs: a caller that
    trains on meanwhile, and calls this in a thread, passes copies, and a group of its own (gloo): no other group is used, nor any device but
    those that the fragments are on.
    """
    # torch.distributed.checkpoint takes more than a second to import: paid at the first save, not before the first step.
    import torch.distributed.checkpoint as dcp

    from kan_train.checkpoint.planner import FragmentSavePlanner
    from kan_train.checkpoint.storage import SafetensorsWriter

    ranks = Ranks(group)
    folder = step_folder(place(directory), step)
    about: dict[str, Any] = {"tokens": tokens, "layout": layout or {}, "data_index": data_index, "ledger": ledger or {}}

    def manifest(table: str, files: dict[str, FileRecord]) -> Manifest:
        return Manifest(
            step=step,
            world_size=ranks.size,
            code_version=code_version(),
            torch_version=str(torch.__version__),
            config=config,
            state=state,
            tensors=table,
            files=files,
            **about,
        )

    owned = chain(_checked(fragments, {"state": state, **about}), _rank_fragments(ranks.rank, rank_tensors or {}))
    writer = SafetensorsWriter(folder, ranks.rank, manifest, max_file_bytes)
    with together(f"saving {folder}", ranks, on_failure=writer.discard):
        dcp.save({}, storage_writer=writer, planner=FragmentSavePlanner(owned), process_group=group, no_dist=not ranks.distributed)
    return folder


@contextlib.contextmanager
def together(task: str, ranks: Ranks, on_failure: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Around a collective of torch.distributed.checkpoint: what fails on one rank raises CheckpointError on all.

    `on_failure` runs first, and only after a failure that all ranks know of; never when a collective broke (a rank died): another rank may
    yet succeed then.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    # Added, never taken back: `catch_warnings` in a thread would put the filters of its beginning over those that another thread set meanwhile.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    try:
        yield
    except CheckpointException as error:
        on_failure()
        failures = {rank: failure for rank, (failure, _) in error.failures.items()}
        own = failures.get(ranks.rank)
        if own is not None and not isinstance(own, Exception):
            raise own from None  # An interrupt stays an interrupt.
        raise joint_error(task, failures, ranks.size) from own


def _checked(fragments: Iterable[Fragment], described: dict[str, Any]) -> Iterator[Fragment]:
    """The caller's fragments; checks run here because the planner draws from it where an error reaches every rank."""
    for name, value in described.items():
        require_json(value, name)
    for fragment in fragments:
        if fragment.name.startswith("rank/"):
            raise CheckpointError(f"the fragment {fragment.name} has a name kept for the ranks' own tensors; pass it in rank_tensors")
        yield fragment


def _rank_fragments(rank: int, tensors: Mapping[str, Tensor]) -> Iterator[Fragment]:
    for name, tensor in tensors.items():
        yield Fragment.whole(f"rank/{rank:05d}/{name}", tensor.detach().contiguous())
