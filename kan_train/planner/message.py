"""One kind of message of a step, and what a rank sends of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """Calls of one operation of a group, for one purpose."""

    group: str
    """Name in `kan_train.parallel.layout.GROUPS`, or "default": all ranks of the run."""
    purpose: str
    """What is sent."""
    operation: str
    """all-gather, all-reduce, reduce-scatter, all-to-all, send or receive."""
    calls: int
    """A step, on this rank."""
    total: float
    """Bytes of all calls: of the tensor that is gathered, reduced or scattered, of all that an all-to-all takes from this rank, of what is sent or received."""
    ranks: int
    """Of the group."""

    @property
    def each(self) -> float:
        """Bytes of a call."""
        return self.total / self.calls

    @property
    def sent(self) -> float:
        """Bytes that leave this rank in a step: on a ring, and for an all-to-all what is for other ranks if all get as much."""
        around = (self.ranks - 1) / self.ranks
        return self.total * {"all-reduce": 2 * around, "send": 1.0, "receive": 0.0}.get(self.operation, around)


def merged(messages: "list[Message]") -> "list[Message]":
    """Messages of one group, purpose and operation together, in the order of their first."""
    found: dict[tuple[str, str, str], Message] = {}
    for one in messages:
        key = (one.group, one.purpose, one.operation)
        before = found.get(key)
        found[key] = one if before is None else Message(*key, before.calls + one.calls, before.total + one.total, one.ranks)
    return list(found.values())
