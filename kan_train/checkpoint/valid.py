"""The checkpoint to go on from: the newest whose every byte is as it was written, found by all ranks together."""

import functools
import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from kan_train.checkpoint.errors import CheckpointError
from kan_train.checkpoint.files import check_hashes
from kan_train.checkpoint.manifest import Manifest, check_complete, read_table
from kan_train.checkpoint.places import place
from kan_train.checkpoint.ranks import Ranks, described
from kan_train.checkpoint.retention import folders, has_manifest, none_usable, step_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Verdict:
    """What one rank found of a checkpoint."""

    manifest: str
    """Digest of the manifest that it read; empty if it found something wrong."""
    problem: str = ""
    """What is wrong."""
    finished: bool = True
    """Whether it saw a manifest, or may have: its save was finished."""


def newest_valid(directory: Path, ranks: Ranks | None = None, *, at_most: int | None = None) -> Path | None:
    """The newest checkpoint below `directory` (of step `at_most` or before) that is whole: manifest, tensor table, size and SHA-256 of every file.

    Collective over `ranks`, every rank of which gets the same answer; each hashes a share of the files. None where no save was finished. Rank 0
    logs (as a warning) why a newer one was skipped. Raises CheckpointError, on every rank, where saves were finished and none is usable: to start
    over silently would lose a run. A `load` of the answer needs no verification.
    """
    ranks, directory = ranks or Ranks(), place(directory)
    # Rank 0's list is everybody's: another rank may see a folder come or go a moment earlier or later.
    names = ranks.each(f"listing {directory}", lambda: [path.name for path in folders(directory)])[0]
    refused: list[str] = []
    for path in (directory / name for name in names):
        if at_most is not None and step_of(path) > at_most:
            continue
        verdicts = ranks.each(f"verifying {path}", functools.partial(_verdict, path, ranks))
        problem = _joint_problem(path, verdicts)
        if problem is None:
            return path
        if ranks.rank == 0:
            logger.warning("checkpoint %s is skipped: %s", path.name, problem)
        if any(verdict.finished for verdict in verdicts):
            refused.append(problem)
    if refused:
        raise none_usable(directory, refused[0])
    return None


def verify_share(path: Path, manifest: Manifest, ranks: Ranks) -> None:
    """Hash this rank's share of the files of the checkpoint at `path`: CheckpointError on the first that is not as it was written."""
    check_hashes(path, dict(list(manifest.files.items())[ranks.rank :: ranks.size]))


def digest_of(manifest: Manifest) -> str:
    """The same on two ranks exactly if they read the same manifest."""
    return hashlib.sha256(json.dumps(asdict(manifest)).encode()).hexdigest()


def _verdict(path: Path, ranks: Ranks) -> _Verdict:
    try:
        manifest = check_complete(path)
        if manifest.step != step_of(path):
            raise CheckpointError(f"{path} holds the checkpoint of step {manifest.step}: the folder was renamed; give it back its name")
        if ranks.rank == 0:
            read_table(path, manifest)
        verify_share(path, manifest, ranks)
    except Exception as error:
        # Whatever it is, the ranks go on together to the checkpoint before.
        return _Verdict("", described(error), has_manifest(path))
    return _Verdict(digest_of(manifest))


def _joint_problem(path: Path, verdicts: list[_Verdict]) -> str | None:
    for rank, verdict in enumerate(verdicts):
        if verdict.problem:
            return verdict.problem + (f" (on rank {rank})" if len(verdicts) > 1 else "")
    if len({verdict.manifest for verdict in verdicts}) > 1:
        return f"{path} is not the same checkpoint on every rank; set run.root (or checkpoint.location) to a folder that all nodes share"
    return None
