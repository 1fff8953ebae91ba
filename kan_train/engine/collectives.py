"""Seconds that a process waits in collectives, taken where torch itself waits: no call of ours, Megatron's or DeepSpeed's knows of it.

On the CPU every collective is waited for in `Work.wait`, and a clock around it tells. On CUDA the device waits: events on the stream that the collective
was asked on, before and after, are read once the step's work is done, so that nothing is synchronised for them. What of a collective runs beside
computing on a stream of its own (DeepSpeed's reductions) counts as waiting too, on all ranks alike.
"""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "allgather", "_allgather_base", "all_gather_single", "allgather_coalesced", "allgather_into_tensor_coalesced",
    "all_gather_single_coalesced", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_tensor_coalesced",
    "reduce_scatter_single_coalesced", "alltoall", "alltoall_base", "all_to_all_single", "broadcast", "reduce", "gather", "scatter", "send", "recv",
    "recv_anysource", "barrier", "_end_coalescing",
)  # fmt: skip
"""Methods of ProcessGroup that let the current stream wait, in one release of torch or another."""


class CollectiveClock:
    """A context in which this process's waiting in collectives is counted; entered again and again, one at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = 0.0
        self._thread = 0
        self._replaced: list[tuple[type, str, Any]] = []
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._spare: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> "CollectiveClock":
        self._thread = threading.get_ident()
        self._replace(dist.Work, "wait")
        # On the CPU these only start what is waited for later.
        for name in COLLECTIVES if self.device.type == "cuda" else ():
            if hasattr(dist.ProcessGroup, name):
                self._replace(dist.ProcessGroup, name)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        while self._replaced:
            setattr(*self._replaced.pop())

    def taken(self) -> float:
        """Seconds since this was last asked. On CUDA the device must have done its work; what it has not is left out."""
        for first, last in self._spans:
            if last.query():
                self._seconds += first.elapsed_time(last) / 1000
        self._spare += self._spans
        self._spans = []
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _replace(self, owner: type, name: str) -> None:
        method = getattr(owner, name)
        self._replaced.append((owner, name, method))
        setattr(owner, name, self._between_events(method) if self.device.type == "cuda" else self._by_the_clock(method))

    def _by_the_clock(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:  # a checkpoint is being written
                return method(*args, **kwargs)
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self._seconds += time.perf_counter() - started

        return timed

    def _between_events(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._trains():
                return method(*args, **kwargs)
            span = self._spare.pop() if self._spare else (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            span[0].record()
            try:
                return method(*args, **kwargs)
            finally:
                span[1].record()
                self._spans.append(span)

        return timed

    def _trains(self) -> bool:
        """Whether the calling thread is the one that trains or one of autograd's, which C++ started, and not one that writes a checkpoint."""
        ident = threading.get_ident()
        return ident == self._thread or ident not in {thread.ident for thread in threading.enumerate() if type(thread) is threading.Thread}
