"""How the processes of a run are laid out: sizes along each dimension, who is where, and with whom. Pure arithmetic.

Megatron's order: ranks count through tensor first, then context, data and pipeline. For the parameters of groves the same ranks count
through expert_tensor, expert, expert_data and pipeline, so that both views agree on the pipeline stage of a rank.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kan_train.config.run import Config

DENSE_ORDER = ("tensor", "context", "data", "pipeline")
"""Dimensions of the ranks as dense parameters see them, the fastest first."""
GROVE_ORDER = ("expert_tensor", "expert", "expert_data", "pipeline")
"""Dimensions of the same ranks as the parameters of groves see them."""
GROUPS = {
    **{dimension: (dimension,) for dimension in (*DENSE_ORDER, *GROVE_ORDER)},
    "data_and_context": ("data", "context"),
    "tensor_and_data": ("tensor", "data", "context"),
    "model": ("tensor", "pipeline"),
}
"""Name of a group -> the dimensions along which its ranks differ. data_and_context: ranks that hold the same dense parameters;
tensor_and_data: all ranks of one pipeline stage, which together see every token once; model: the ranks of one copy of the dense model."""


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Where one rank is along every dimension, each from 0."""

    tensor: int
    context: int
    data: int
    pipeline: int
    expert: int
    expert_tensor: int
    expert_data: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of every dimension. Built from a validated configuration by `layout_of`, so that all divisions are exact."""

    world_size: int = 1
    """Processes."""
    tensor_parallel: int = 1
    """Ranks that share every layer's heads, hidden units and vocabulary."""
    sequence_parallel: bool = False
    """Whether those ranks also split the tokens between the layers."""
    pipeline_parallel: int = 1
    """Stages: ranks that each hold some of the layers."""
    virtual_pipeline: int = 1
    """Chunks of layers a stage holds; 1: its layers lie together."""
    context_parallel: int = 1
    """Ranks that split every sequence."""
    expert_parallel: int = 1
    """Ranks that share the groves of a layer."""
    expert_tensor_parallel: int = 1
    """Ranks that split each grove's hidden units."""
    zero_stage: int | None = None
    """DeepSpeed ZeRO stage, or None for plain PyTorch in one process."""

    @property
    def model_parallel(self) -> int:
        """Ranks that hold one copy of the dense parameters."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def data_parallel(self) -> int:
        """Ranks that read different sequences."""
        return self.world_size // (self.model_parallel * self.context_parallel)

    @property
    def expert_data_parallel(self) -> int:
        """Ranks that hold the same part of the groves."""
        return self.world_size // (self.pipeline_parallel * self.expert_parallel * self.expert_tensor_parallel)

    @property
    def groves_are_experts(self) -> bool:
        """Whether gradients of groves are reduced over other ranks than those of dense parameters."""
        return self.expert_parallel > 1 or self.expert_tensor_parallel != self.tensor_parallel

    @property
    def splits_grove_tokens(self) -> bool:
        """Whether each tensor-parallel rank runs the groves on its own share of the tokens."""
        return self.tensor_parallel > 1 and self.expert_tensor_parallel == 1

    def size(self, dimension: str) -> int:
        """Ranks of a group of `GROUPS`; KeyError names one that there is not."""
        return math.prod(self._sizes(_order_of(dimension))[one] for one in GROUPS[dimension])

    def coordinates(self, rank: int) -> Coordinates:
        """Where global `rank` is; ValueError unless 0 <= rank < world_size."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not one of {self.world_size}")
        found: dict[str, int] = {}
        for order in (DENSE_ORDER, GROVE_ORDER):
            rest = rank
            for dimension, size in self._sizes(order).items():
                rest, found[dimension] = divmod(rest, size)
        return Coordinates(**found)

    def ranks_of(self, rank: int, dimension: str) -> list[int]:
        """Global ranks of the group along `dimension` (a name in `GROUPS`) that `rank` is in, ascending: a rank's index is its place in the group."""
        here, order = vars(self.coordinates(rank)), _order_of(dimension)
        ranks, stride = [0], 1
        for name, size in self._sizes(order).items():
            indices = range(size) if name in GROUPS[dimension] else [here[name]]
            ranks = [before + stride * index for index in indices for before in ranks]
            stride *= size
        return ranks

    def _sizes(self, order: tuple[str, ...]) -> dict[str, int]:
        if order is DENSE_ORDER:
            sizes = (self.tensor_parallel, self.context_parallel, self.data_parallel, self.pipeline_parallel)
        else:
            sizes = (self.expert_tensor_parallel, self.expert_parallel, self.expert_data_parallel, self.pipeline_parallel)
        return dict(zip(order, sizes, strict=True))

    def __str__(self) -> str:
        """Short: tp2sp-pp2v2-cp2-dp2-ep2etp2-zero1, sizes of 1 left out."""
        named = (("tp", self.tensor_parallel), ("pp", self.pipeline_parallel), ("cp", self.context_parallel), ("dp", self.data_parallel))
        suffix = {"tp": "sp" if self.sequence_parallel else "", "pp": f"v{self.virtual_pipeline}" if self.virtual_pipeline > 1 else ""}
        parts = [f"{name}{size}{suffix.get(name, '')}" for name, size in named if size > 1]
        if self.expert_parallel > 1 or self.expert_tensor_parallel > 1:
            parts.append(f"ep{self.expert_parallel}" + (f"etp{self.expert_tensor_parallel}" if self.expert_tensor_parallel > 1 else ""))
        return "-".join([*parts, "plain" if self.zero_stage is None else f"zero{self.zero_stage}"])


def layout_of(config: "Config", world_size: int) -> Layout:
    """The layout of `config` over `world_size` processes, with what is unset resolved. Checks nothing: `Config.validate` does."""
    parallel = config.parallel
    tensor, expert_tensor = parallel.tensor_parallel, parallel.expert_tensor_parallel
    if expert_tensor is None:
        # A model without groves has no expert parameters: with the tensor size here, none are set apart for it either.
        expert_tensor = 1 if config.model.has_groves else tensor
    return Layout(
        world_size=world_size,
        tensor_parallel=tensor,
        sequence_parallel=tensor > 1 if parallel.sequence_parallel is None else parallel.sequence_parallel,
        pipeline_parallel=parallel.pipeline_parallel,
        virtual_pipeline=parallel.virtual_pipeline,
        context_parallel=parallel.context_parallel,
        expert_parallel=parallel.expert_parallel,
        expert_tensor_parallel=expert_tensor,
        zero_stage=resolved_zero_stage(config, world_size),
    )


def resolved_zero_stage(config: "Config", world_size: int) -> int | None:
    """The ZeRO stage a run trains with, or None for plain PyTorch: what is set, else none in one fp32 process, else 1."""
    if config.parallel.zero_stage is not None:
        return config.parallel.zero_stage
    return None if world_size == 1 and config.train.precision == "fp32" else 1


def _order_of(dimension: str) -> tuple[str, ...]:
    return DENSE_ORDER if set(GROUPS[dimension]) <= set(DENSE_ORDER) else GROVE_ORDER
