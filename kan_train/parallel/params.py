"""The one owner of what a parameter is: global shape, sharded axes, grove or dense, initial values, decay group.

A module declares its parameters where it uses them; the table of a model is what its modules declared. Initialisation, sharding,
optimizer groups, checkpoint boxes, planner and export all read it. Parameters are declared on the meta device, and filled by
`kan_train.model.init.materialise`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
    """Register parameter `name` of global `shape` on `module`, on the meta device, with its facts at `parameter.spec`."""
    axes = axes if axes is not None else (None,) * len(shape)
    if len(axes) != len(shape):
        raise ValueError(f"{name}: {len(axes)} axes for {len(shape)} dimensions")
    parameter = nn.Parameter(torch.empty(shape, device="meta"))
    parameter.spec = ParamSpec(tuple(shape), tuple(axes), init, decay, grove, matrix)  # type: ignore[attr-defined]
    module.register_parameter(name, parameter)
    return parameter


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
