"""A rank's share of a model without the model: one block of each kind on the meta device stands for all of its kind.

A plan looks at hundreds of layouts, and building 72 blocks for each would take minutes. Blocks of a kind hold parameters of the same shapes and send the same
messages, so that one is built for each way to cut it, and listed as often as the rank has it. What `kan_train.planner.traffic` and `reduction` say of a
skeleton is what they say of the whole share (tests/planner/test_skeleton.py).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from torch import nn

from kan_train.config import Config
from kan_train.config.layout import Layout
from kan_train.engine.optimizer import parameter_groups
from kan_train.model.block import Block
from kan_train.model.lm import LanguageModel, Part
from kan_train.parallel.params import spec_of
from kan_train.parallel.place import Axis, Place, at
from kan_train.planner.share import Copies, Share


class Blocks(list[Block]):
    """Blocks under their numbers, the same one as often as it stands for."""

    def __init__(self, numbers: range, blocks: Sequence[Block]) -> None:
        super().__init__(blocks)
        self.numbers = numbers

    def named_children(self) -> Iterator[tuple[str, Block]]:
        """As a module list has them, but repeated."""
        yield from zip(map(str, self.numbers), self, strict=True)


@dataclass(frozen=True, eq=False)
class Chunk:
    """What stands for a `LanguageModel`."""

    part: Part
    layers: Blocks
    ends: dict[str, nn.Module]
    """embedding, final_norm and head, those of them that the part has."""

    def grove_layers(self) -> list[nn.Module]:
        """As a model's."""
        return [block.ffn for block in self.layers if hasattr(block.ffn, "router")]

    def named_children(self) -> Iterator[tuple[str, Any]]:
        """As a model's, in its order."""
        yield from [(name, module) for name, module in self.ends.items() if name == "embedding"]
        yield "layers", self.layers
        yield from [(name, module) for name, module in self.ends.items() if name != "embedding"]

    def modules(self) -> Iterator[nn.Module]:
        """What holds the parameters, repeated blocks as often as they stand for one."""
        for _, module in self.named_children():
            yield from module if isinstance(module, Blocks) else [module]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As a model's, repeated blocks under the names of those they stand for."""
        for prefix, module in self.named_children():
            if prefix == "layers":
                for number, block in self.layers.named_children():
                    yield from ((f"layers.{number}.{name}", parameter) for name, parameter in _parameters(block))
            else:
                yield from ((f"{prefix}.{name}", parameter) for name, parameter in _parameters(module))


# Kept with their modules, so that no other module can have the id.
_ELEMENTS: dict[int, tuple[nn.Module, int]] = {}
_PARAMETERS: dict[int, tuple[nn.Module, list[tuple[str, nn.Parameter]]]] = {}


def _parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    found = _PARAMETERS.get(id(module))
    if found is None or found[0] is not module:
        found = _PARAMETERS[id(module)] = (module, list(module.named_parameters()))
    return found[1]


def _elements(module: nn.Module) -> int:
    found = _ELEMENTS.get(id(module))
    if found is None or found[0] is not module:
        found = _ELEMENTS[id(module)] = (module, sum(parameter.numel() for _, parameter in _parameters(module)))
    return found[1]


class Skeleton(Share):
    """A share whose models are chunks; the optimizer's groups and the sizes of ranks are found without going through every block."""

    def ranks(self, group: str) -> list[int]:
        return cast(list[int], range(self.layout.world_size if group == "default" else self.layout.size(group)))

    @cached_property
    def elements(self) -> int:  # type: ignore[override]
        return sum(_elements(module) for model in self.models for module in cast(Chunk, model).modules())

    def copies(self) -> list[Copies]:
        layout, sizes = self.layout, dict[tuple[str, Any], list[int]]()
        for model in self.models:
            for module in cast(Chunk, model).modules():
                for key, own in self._groups(module):
                    sizes.setdefault(key, []).extend(own)
        return [Copies(name, layout.size(name), tuple(own)) for (name, _), own in sizes.items()]

    def _groups(self, module: nn.Module) -> list[tuple[tuple[str, Any], list[int]]]:
        """The optimizer's groups of one module: (name of the ranks that hold the same, rule) and sizes."""
        kept = self.__dict__.setdefault("_kept", {})
        if id(module) not in kept:
            named = _parameters(module)
            for name, parameter in named:
                if self.layout.groves_are_experts and spec_of(name, parameter).grove:
                    parameter.allreduce, parameter.group_name = False, "groves"  # type: ignore[attr-defined]
            kept[id(module)] = found = []
            for group in parameter_groups(self.config.optimizer, named):
                rule = (group["weight_decay"], group["multiple"], group.get("muon"))
                found.append((("expert_data" if group.get("moe") else "data_and_context", rule), [parameter.numel() for parameter in group["params"]]))
        return kept[id(module)]


class Skeletons:
    """Skeletons of the ranks of every layout of one model; blocks are built once for each way to cut them."""

    def __init__(self, config: Config) -> None:
        self.config = config
        model = config.model
        self.kinds = [model.is_softmax_layer(layer) for layer in range(model.num_layers)]
        """Of each block: whether its mixer is softmax attention."""
        self._built: dict[tuple[Any, ...], tuple[dict[bool, Block], dict[str, nn.Module]]] = {}

    def counts(self, layers: range) -> dict[bool, int]:
        """Blocks of each kind among `layers`."""
        own = self.kinds[layers.start : layers.stop]
        return {kind: own.count(kind) for kind in set(own)}

    def share(self, config: Config, layout: Layout, parts: Sequence[Part], stages: Sequence[int]) -> Skeleton:
        """The share that holds `parts`, which are the `stages` of all pipeline stages. config: of this layout."""
        blocks, ends = self._cut(layout)
        models = []
        for part in parts:
            names = (["embedding"] if part.is_first else []) + (["final_norm", "head"] if part.is_last else [])
            own = Blocks(part.layers, [blocks[self.kinds[layer]] for layer in part.layers])
            models.append(Chunk(part, own, {name: ends[name] for name in names}))
        return Skeleton(config, layout, 0, tuple(stages), cast(tuple[LanguageModel, ...], tuple(models)))

    def probe(self, config: Config, layout: Layout, kind: bool | None) -> Skeleton:
        """One block of a kind, neither first nor last; None: embedding, final norm and head, without a block. Alone in its pipeline, and without ZeRO."""
        alone = replace(layout, pipeline_parallel=1, virtual_pipeline=1, world_size=layout.world_size // layout.pipeline_parallel, zero_stage=None)
        if kind is None:
            return self.share(config, alone, [Part(range(0), is_first=True, is_last=True)], [0])
        layer = self.kinds.index(kind)
        return self.share(config, alone, [Part(range(layer, layer + 1), is_first=False, is_last=False)], [0])

    def _cut(self, layout: Layout) -> tuple[dict[bool, Block], dict[str, nn.Module]]:
        sizes = (layout.tensor_parallel, layout.sequence_parallel, layout.context_parallel, layout.expert_parallel, layout.expert_tensor_parallel)
        if sizes not in self._built:
            tensor, sequence, context, expert, expert_tensor = sizes
            place = Place(
                tensor=Axis(tensor), context=Axis(context), expert=Axis(expert), expert_tensor=Axis(expert_tensor), sequence_parallel=bool(sequence),
                stage=Axis(math.prod((tensor, context))),
            )  # fmt: skip
            with at(place):
                blocks = {kind: Block(self.config.model, self.kinds.index(kind)) for kind in set(self.kinds)}
                whole = LanguageModel(self.config.model, Part(range(0), is_first=True, is_last=True))
            self._built[sizes] = (blocks, {name: module for name, module in whole.named_children() if name != "layers"})
        return self._built[sizes]
