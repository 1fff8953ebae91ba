"""Where a process stands in the layout: along each dimension how many ranks there are, which of them it is, and their process group.

Modules read the current place when they are built, and keep the axes that they need. Alone, every axis has one rank and no group.
"""

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from kan_train.config.layout import Layout


@dataclass(frozen=True)
class Axis:
    """The ranks along one dimension of the layout."""

    size: int = 1
    """How many they are."""
    rank: int = 0
    """Which of them this process is."""
    group: ProcessGroup | None = None
    """Their process group; None where there is one rank, or where nothing is computed (a layout looked at on the meta device)."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all ranks of the axis hold alike."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of `tensor` over the ranks, in place; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor


@dataclass(frozen=True, kw_only=True)
class Place:
    """One process in a layout."""

    tensor: Axis = Axis()
    """Ranks that split heads, hidden units and vocabulary."""
    context: Axis = Axis()
    """Ranks that split every sequence in chunks of tokens."""
    data: Axis = Axis()
    """Ranks that read different sequences."""
    pipeline: Axis = Axis()
    """Ranks that hold different layers."""
    expert: Axis = Axis()
    """Ranks that hold different groves."""
    expert_tensor: Axis = Axis()
    """Ranks that split the hidden units of groves."""
    expert_data: Axis = Axis()
    """Ranks that hold the same groves: their gradients are summed over it."""
    replicas: Axis = Axis()
    """Data times context: dense gradients are averaged over it."""
    stage: Axis = Axis()
    """Tensor times context times data: the ranks that hold the same layers."""
    sequence_parallel: bool = False
    """Whether the tokens of the residual stream are split over the tensor axis."""
    same_tokens: bool = False
    """Whether all ranks hold the same tokens, as in decoding: each runs its own part of the groves for all of them, and the parts are summed."""

    @property
    def groves_split_tokens(self) -> bool:
        """Whether each tensor rank routes its own tokens: tensor parallelism outside groves, none inside."""
        return self.tensor.size > 1 and self.expert_tensor.size == 1 and not self.same_tokens

    @property
    def groves_are_experts(self) -> bool:
        """Whether the ranks that hold a grove's parameters are others than those that hold a dense parameter."""
        return self.expert.size > 1 or self.expert_tensor.size != self.tensor.size

    def axis_of(self, name: str | None, *, grove: bool) -> Axis:
        """The axis that splits a parameter's dimension called `name`, of a grove or of a dense layer; None is never split."""
        match name:
            case None:
                return Axis()
            case "grove":
                return self.expert
            case "hidden":
                return self.expert_tensor if grove else self.tensor
            case "heads" | "vocab":
                return self.tensor
        raise KeyError(f"no layout splits an axis named {name!r}; use one of: vocab, heads, hidden, grove")


ALONE = Place()
"""One process."""

def place_of(layout: Layout, rank: int, group_of: Callable[[str], ProcessGroup] | None = None) -> Place:
    """Where global `rank` stands. group_of: process group by name in `layout.GROUPS`; None for a look at the layout without processes."""

    def axis(dimension: str) -> Axis:
        ranks = layout.ranks_of(rank, dimension)
        group = group_of(dimension) if group_of is not None and len(ranks) > 1 else None
        return Axis(len(ranks), ranks.index(rank), group)

    return Place(
        tensor=axis("tensor"),
        context=axis("context"),
        data=axis("data"),
        pipeline=axis("pipeline"),
        expert=axis("expert"),
        expert_tensor=axis("expert_tensor"),
        expert_data=axis("expert_data"),
        replicas=axis("data_and_context"),
        stage=axis("tensor_and_data"),
        sequence_parallel=layout.sequence_parallel,
    )


_CURRENT: contextvars.ContextVar[Place] = contextvars.ContextVar("place", default=ALONE)


def current_place() -> Place:
    """The place that modules built now are for."""
    return _CURRENT.get()


@contextmanager
def at(place: Place) -> Iterator[None]:
    """Modules built inside are for `place`."""
    token = _CURRENT.set(place)
    try:
        yield
    finally:
        _CURRENT.reset(token)
