"""Processes that decode the same requests: the first one decides what is decoded and draws every token, the others do as it says.

They cannot part: what a process does in a step follows from the requests, and from the tokens given before, and both are the first one's. Each step begins
with a message of where the first process is, with which the others compare where they are.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kan_train.config import ConfigError

T = TypeVar("T")

_BEGIN, _TOKENS, _END = range(3)
_FACTS = 3  # numbers that a message begins with, before the tokens


class Ended(Exception):
    """The first process has ended early: nobody reads what it writes."""


class Lockstep:
    """One process among those that decode together. Alone it decides for itself, and needs no process group."""

    def __init__(self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None, max_rows: int = 0) -> None:
        """group: of all processes, for messages in host memory. max_rows: tokens of a message at most."""
        self.rank, self.size, self.group, self.max_rows = rank, size, group, max_rows
        self._message, self._ended = torch.zeros(2 + max(_FACTS, max_rows), dtype=torch.int64), False
        self._number = 0

    @property
    def is_first(self) -> bool:
        """Whether this process decides, reads and writes."""
        return self.rank == 0

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process, in all of them; a ConfigError that it raises there likewise. Collective."""
        if self.size == 1:
            return work()
        found: list[Any] = [None, ""]
        if self.is_first:
            try:
                found[0] = work()
            except ConfigError as error:
                found[1] = str(error)
        dist.broadcast_object_list(found, group_src=0, group=self.group)
        if found[1]:
            raise ConfigError(found[1])
        return found[0]

    def begin(self, *facts: int) -> None:
        """Begin a step, all in the same state: `facts` (up to three numbers) are those of the first process, or RuntimeError. Ended where it has left."""
        if self.size > 1:
            told = self._tell(_BEGIN, facts)
            if told[: len(facts)] != list(facts):
                raise RuntimeError(f"rank {self.rank} is at {facts} where rank 0 is at {told[: len(facts)]}: the processes have parted, which is a bug")

    def tokens(self, choose: Callable[[], Tensor], rows: int) -> Tensor:
        """The tokens [rows] (int64, CPU) that `choose` gives in the first process; only there is it called."""
        if self.size == 1:
            return choose()
        return torch.tensor(self._tell(_TOKENS, choose().tolist() if self.is_first else ())[:rows])

    def end(self) -> None:
        """Nothing comes any more: the others may go, wherever they wait."""
        if self.size > 1 and not self._ended:
            try:
                self._tell(_END, ())
            except Ended:
                return

    def _tell(self, kind: int, numbers: tuple[int, ...] | list[int]) -> list[int]:
        """One message of the first process, the next in order; what it holds."""
        self._number += 1
        if self.is_first:
            self._message[:2] = torch.tensor([kind, self._number])
            self._message[2 : 2 + len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        dist.broadcast(self._message, group_src=0, group=self.group)
        told, number, *rest = self._message.tolist()
        if told == _END:
            self._ended = True
            raise Ended
        if (told, number) != (kind, self._number):
            raise RuntimeError(f"rank {self.rank} waits for message {self._number} of kind {kind}, and {number} of kind {told} came: this is a bug")
        return rest


ALONE = Lockstep()
"""One process."""
