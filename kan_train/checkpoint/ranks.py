"""Errors that reach every rank alike: a rank that raised alone would leave the others waiting in a collective."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from kan_train.checkpoint.errors import CheckpointError

T = TypeVar("T")


class Ranks:
    """The ranks that save or load together: those of `group`, or of the default group, or this process alone."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self.distributed else 0
        self.size = dist.get_world_size(group) if self.distributed else 1

    def each(self, task: str, work: Callable[[], T]) -> list[T]:
        """Do `work` on every rank and return all results, in rank order; CheckpointError on every rank if it failed on one."""
        result: T | Exception
        try:
            result = work()
        except Exception as error:
            result = error
        results: list[T | Exception] = [result]
        if self.distributed:
            sent = CheckpointError(described(result)) if isinstance(result, Exception) else result
            results = [None] * self.size  # type: ignore[list-item]
            dist.all_gather_object(results, sent, group=self.group)
        failures = {rank: error for rank, error in enumerate(results) if isinstance(error, Exception)}
        if failures:
            raise joint_error(task, dict(failures), self.size) from (result if isinstance(result, Exception) else None)
        return results  # type: ignore[return-value]


def joint_error(task: str, failures: dict[int, BaseException], size: int) -> CheckpointError:
    """One error for what failed on the ranks in `failures`, of `size`: the first failure in full."""
    rank, error = min(failures.items())
    if size == 1:
        return error if isinstance(error, CheckpointError) else CheckpointError(f"{task} failed: {described(error)}")
    others = f" (and on {len(failures) - 1} other ranks)" if len(failures) > 1 else ""
    return CheckpointError(f"{task} failed on rank {rank}{others}: {described(error)}")


def described(error: BaseException) -> str:
    """The message of `error`, with its type where it is not the message of a CheckpointError."""
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
