"""Mistakes that a layout can hide, planted in the libraries inside the processes of a row: the matrix must find every one.

Adam hides most of them from the loss for a while: it divides by the size of the gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Fault:
    """A mistake, and where it must show."""

    plant: Callable[[], AbstractContextManager[None]]
    """Makes it, in the calling process, before the engine is built."""
    row: str
    """The row to plant it in."""
    broken: str
    """A bound of `compare.Bounds` that it must break (it may break others too)."""


@contextmanager
def gradients_not_reduced() -> Iterator[None]:
    """Every rank divides its gradients by the number of ranks, and none are added."""
    import deepspeed.comm
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    average = DeepSpeedZeroOptimizer.average_tensor

    def alone(self: Any, *arguments: Any) -> Any:
        with mock.patch.object(deepspeed.comm, "all_reduce", _nothing), mock.patch.object(deepspeed.comm, "reduce", _nothing):
            return average(self, *arguments)

    with mock.patch.object(DeepSpeedZeroOptimizer, "average_tensor", alone):
        yield


@contextmanager
def micro_batches_not_averaged() -> Iterator[None]:
    """The gradients of a step's micro-batches are summed: the division by their number is missing."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    backward = DeepSpeedEngine.backward
    with mock.patch.object(DeepSpeedEngine, "backward", lambda self, loss, **more: backward(self, loss, scale_wrt_gas=False, **more)):
        yield


@contextmanager
def half_the_data_group() -> Iterator[None]:
    """DeepSpeed averages gradients over every second rank of those that read different sequences."""

    def halve(arguments: dict[str, Any]) -> None:
        mine, half = dist.get_rank() % 2, None
        for parity in range(2):
            group = dist.new_group(list(range(parity, dist.get_world_size(), 2)))
            half = group if parity == mine else half
        arguments["mpu"] = _Answers(arguments["mpu"], half)

    with _before_initialise(halve):
        yield


@contextmanager
def groves_over_the_data_group() -> Iterator[None]:
    """Gradients of groves are summed over all ranks that read different sequences, whichever groves they hold."""

    def confuse(arguments: dict[str, Any]) -> None:
        from deepspeed.utils import groups

        for name in groups._EXPERT_DATA_PARALLEL_GROUP:
            groups._EXPERT_DATA_PARALLEL_GROUP[name] = arguments["mpu"].get_data_parallel_group()
            if name in groups._EXPERT_DATA_PARALLEL_GROUP_RANKS:
                groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(groups._EXPERT_DATA_PARALLEL_GROUP[name])

    with _before_initialise(confuse):
        yield


@contextmanager
def tensor_gradients_not_summed() -> Iterator[None]:
    """Where all tensor ranks read the same input, each keeps its own part of the input's gradient."""
    from megatron.core.tensor_parallel.mappings import _CopyToModelParallelRegion

    with mock.patch.object(_CopyToModelParallelRegion, "backward", staticmethod(lambda context, gradient: (gradient, None))):
        yield


@contextmanager
def a_weight_without_its_mark() -> Iterator[None]:
    """One tensor-parallel weight is not marked as such: DeepSpeed counts it once in the gradient norm, with the first tensor rank's part."""

    def unmark(arguments: dict[str, Any]) -> None:
        marked = [parameter for parameter in arguments["model"].parameters() if getattr(parameter, "tensor_model_parallel", False)]
        del marked[0].tensor_model_parallel

    with _before_initialise(unmark):
        yield


FAULTS: dict[str, Fault] = {
    "gradients_not_reduced": Fault(gradients_not_reduced, "kan-dp4-zero1-acc2", "norm"),
    "micro_batches_not_averaged": Fault(micro_batches_not_averaged, "kan-dp4-zero3-acc2", "norm"),
    "half_the_data_group": Fault(half_the_data_group, "hybrid-dp4-zero2-noclip-acc1", "norm"),
    "tensor_gradients_not_summed": Fault(tensor_gradients_not_summed, "hybrid-tp2-dp2-zero2-nosp-acc4", "gradient"),
    "groves_over_the_data_group": Fault(groves_over_the_data_group, "kan-ep2-dp4-zero1-acc2", "norm"),
    "a_weight_without_its_mark": Fault(a_weight_without_its_mark, "kan-tp2-dp2-zero1-acc4", "norm"),
}


class _Answers:
    """An mpu that answers with another data-parallel group."""

    def __init__(self, true: Any, data: ProcessGroup | None) -> None:
        self.true, self.data = true, data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.true, name)

    def get_data_parallel_group(self, *_: Any, **__: Any) -> ProcessGroup | None:
        return self.data

    def get_data_parallel_world_size(self, *_: Any, **__: Any) -> int:
        return dist.get_world_size(self.data)

    def get_data_parallel_rank(self, *_: Any, **__: Any) -> int:
        return dist.get_rank(self.data)

    def get_data_parallel_group_ranks(self) -> list[int]:
        assert self.data is not None
        return dist.get_process_group_ranks(self.data)


@contextmanager
def _before_initialise(change: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """`change` sees, and may replace, the arguments of deepspeed.initialize."""
    import deepspeed

    initialise = deepspeed.initialize

    def changed(**arguments: Any) -> Any:
        change(arguments)
        return initialise(**arguments)

    with mock.patch.object(deepspeed, "initialize", changed):
        yield


def _nothing(*_: Any, **__: Any) -> None:
    """A collective that does not take place."""
