"""Every message that a process gives to a process group, whoever sends it.

Methods of torch's ProcessGroup itself are wrapped, below torch.distributed, DeepSpeed and Megatron, so that no reference to a function taken earlier escapes.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

OPERATIONS = {
    "allreduce": "all-reduce",
    "allreduce_coalesced": "all-reduce",
    "allgather": "all-gather",
    "_allgather_base": "all-gather",
    "all_gather_single": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
    "reduce_scatter_single": "reduce-scatter",
    "alltoall": "all-to-all",
    "alltoall_base": "all-to-all",
    "all_to_all_single": "all-to-all",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "barrier": "barrier",
    "send": "send",
    "recv": "receive",
    "recv_anysource": "receive",
}
"""Method of a process group -> operation."""

OTHERS = (
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "all_gather_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "reduce_scatter_single_coalesced",
)
"""Methods that send too, and that nothing here is known to call: met, they are an error of the recorder."""


@dataclass(frozen=True)
class Message:
    """One call."""

    group: ProcessGroup
    operation: str
    bytes: int
    """Of the tensor that the collective forms: gathered, reduced, or before it is scattered; all that an all-to-all takes from this rank; a message's own."""
    to_others: int
    """all-to-all: what of it leaves this rank; else the same as bytes."""
    caller: str
    """Innermost function outside torch, "file:function"."""


class Recorder:
    """Messages of this process since `clear`."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def clear(self) -> None:
        self.messages.clear()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record what is sent inside."""
        patches = [mock.patch.object(ProcessGroup, name, self._wrapped(name)) for name in OPERATIONS if hasattr(ProcessGroup, name)]
        patches += [mock.patch.object(ProcessGroup, name, _unknown(name)) for name in OTHERS if hasattr(ProcessGroup, name)]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in reversed(patches):
                patch.stop()

    def _wrapped(self, name: str) -> Callable[..., Any]:
        original, operation = getattr(ProcessGroup, name), OPERATIONS[name]

        def call(group: ProcessGroup, *arguments: Any, **more: Any) -> Any:
            size, to_others = _sizes(operation, group, arguments)
            self.messages.append(Message(group, operation, size, to_others, _caller()))
            return original(group, *arguments, **more)

        return call


def _sizes(operation: str, group: ProcessGroup, arguments: tuple[Any, ...]) -> tuple[int, int]:
    if operation == "barrier":
        return 0, 0
    first, second = arguments[0], arguments[1] if len(arguments) > 1 else None
    formed = _bytes(second) if operation in ("reduce-scatter", "all-to-all") else _bytes(first)
    if operation != "all-to-all":
        return formed, formed
    # (output, input, sizes of the parts received, sizes of the parts sent): no sizes are equal parts.
    sent = arguments[3] if len(arguments) > 3 and arguments[3] else None
    own = formed // group.size() if sent is None else _bytes(second) // max(1, len(second)) * sent[group.rank()]
    return formed, formed - own


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(one) for one in tensors)


def _unknown(name: str) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise LookupError(f"the recorder does not know ProcessGroup.{name}: count it in recorder.py")

    return call


PASSED_ON = (str(Path(torch.__file__).parent), __file__, "typing_extensions.py", "/deepspeed/comm/", "/deepspeed/utils/", "/parallel/cpu.py")
"""Files whose functions only pass a call on."""


def _caller() -> str:
    for frame in reversed(traceback.extract_stack(limit=40)):
        if not any(part in frame.filename for part in PASSED_ON):
            return f"{Path(frame.filename).name}:{frame.name}"
    return "?"
