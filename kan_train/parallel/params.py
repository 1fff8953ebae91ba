"""The one owner of what a parameter is: global shape, sharded axes, grove or dense, initial values, decay group.

A module declares its parameters where it uses them; the table of a model is what its modules declared. Initialisation, sharding,
optimizer groups, checkpoint boxes, planner and export all read it. Parameters are declared on the meta device, each the shard that the
current place holds, and filled by `kan_train.model.init.materialise`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kan_train.parallel.place import current_place


@dataclass(frozen=True)
class Normal:
    """Independent normals of standard deviation `std`."""

    std: float


@dataclass(frozen=True)
class Constant:
    """Every element is `value`."""

    value: float


@dataclass(frozen=True)
class PerIndex:
    """Elements depend on their index along `axis` alone: element i there is values[i]."""

    axis: int
    values: tuple[float, ...]


Initialiser = Normal | Constant | PerIndex


@dataclass(frozen=True)
class ParamSpec:
    """Facts of one parameter; axes name the global dimensions that a layout may split ("vocab", "heads", "grove", "hidden")."""

    shape: tuple[int, ...]
    """Global shape."""
    axes: tuple[str | None, ...]
    """For each dimension the name of the axis that may be sharded, or None."""
    init: Initialiser
    """Initial values, a function of (seed, name, global element index)."""
    decay: bool
    """Whether weight decay acts on it."""
    grove: bool
    """Whether it belongs to a grove (one of N, run for K of N tokens) rather than to every token."""
    matrix: bool
    """Whether its last two dimensions are one projection (or a stack of them) that may be orthogonalised."""

    @property
    def numel(self) -> int:
        """Elements of the global tensor."""
        return torch.Size(self.shape).numel()


class Box(NamedTuple):
    """A rectangle of a global tensor: offsets and sizes, one for each dimension."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of the box."""
        return math.prod(self.size)


def declare(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    *,
    init: Initialiser,
    axes: tuple[str | None, ...] | None = None,
    decay: bool = False,
    grove: bool = False,
    matrix: bool = False,
) -> nn.Parameter:
    """Register on `module` parameter `name` of global `shape`: the shard of the current place, on the meta device.

    Its facts are at `parameter.spec`, the box of the global tensor that it holds at `parameter.shard`. ValueError where an axis does not divide.
    """
    axes = axes if axes is not None else (None,) * len(shape)
    if len(axes) != len(shape):
        raise ValueError(f"{name}: {len(axes)} axes for {len(shape)} dimensions")
    spec = ParamSpec(tuple(shape), tuple(axes), init, decay, grove, matrix)
    shard = _shard(name, spec)
    parameter = describe(nn.Parameter(torch.empty(shard.size, device="meta")), spec, shard)
    module.register_parameter(name, parameter)
    return parameter


def describe(parameter: nn.Parameter, spec: ParamSpec, shard: Box) -> nn.Parameter:
    """Give `parameter` its facts, and the box of the global tensor that it holds."""
    parameter.spec, parameter.shard = spec, shard  # type: ignore[attr-defined]
    return parameter


def _shard(name: str, spec: ParamSpec) -> Box:
    offset, size = [], []
    for length, axis_name in zip(spec.shape, spec.axes, strict=True):
        axis = current_place().axis_of(axis_name, grove=spec.grove)
        if length % axis.size:
            raise ValueError(f"{name}: {axis.size} ranks cannot split the {length} of its axis {axis_name} evenly")
        size.append(length // axis.size)
        offset.append(axis.rank * size[-1])
    return Box(tuple(offset), tuple(size))


def declare_buffer(module: nn.Module, name: str, shape: tuple[int, ...], value: float, dtype: torch.dtype = torch.float32) -> None:
    """Register a buffer that is part of the model's state, keeps its dtype whatever the model computes in, and starts at `value`."""
    module.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
    initial = module.__dict__.setdefault("_initial_buffers", {})
    initial[name] = value


def initial_buffers(module: nn.Module) -> dict[str, float]:
    """Start values of the buffers that `module` itself (not its children) declared."""
    return module.__dict__.get("_initial_buffers", {})


def named_specs(model: nn.Module) -> Iterator[tuple[str, ParamSpec]]:
    """Yield (canonical name, facts) of every parameter of `model`; KeyError names one that was not declared."""
    for name, parameter in model.named_parameters():
        yield name, spec_of(name, parameter)


def spec_of(name: str, parameter: Tensor) -> ParamSpec:
    """The facts of `parameter`."""
    spec = getattr(parameter, "spec", None)
    if spec is None:
        raise KeyError(f"parameter {name} was not declared: use kan_train.parallel.params.declare")
    return spec


def shard_of(name: str, parameter: Tensor) -> Box:
    """The box of the global tensor that `parameter` holds."""
    spec_of(name, parameter)
    return parameter.shard  # type: ignore[attr-defined]


def is_split(parameter: Tensor) -> bool:
    """Whether this process holds a part of the global tensor."""
    return parameter.shard.size != parameter.spec.shape  # type: ignore[attr-defined]
