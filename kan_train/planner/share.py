"""One rank's share of a run: its stages of the model on the meta device, and how DeepSpeed groups their parameters. Megatron and DeepSpeed are not needed."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from kan_train.config import Config
from kan_train.engine.optimizer import parameter_groups
from kan_train.engine.pipeline import stage_parts
from kan_train.model.lm import LanguageModel
from kan_train.parallel.layout import Layout
from kan_train.parallel.params import spec_of
from kan_train.parallel.place import at, place_of

ALIGNMENT = 2
"""Elements to which DeepSpeed's ZeRO 1 and 2 align each rank's range of a flat buffer."""

PARTS = (
    (r"embedding\.", "embedding"),
    (r"layers\.\d+\.mixer\.", "mixers"),
    (r"layers\.\d+\.ffn\.router\.", "routers"),
    (r"layers\.\d+\.ffn\.groves\.", "groves"),
    (r"layers\.\d+\.ffn\.shared\.", "shared groves"),
    (r"layers\.\d+\.ffn\.", "feed-forward"),
    (r"layers\.\d+\.(mixer|ffn)_norm\.|final_norm\.", "norms"),
    (r"head\.", "head"),
)
"""Beginning of a parameter's name -> the part of the model that it is counted with."""


@dataclass(frozen=True)
class Copies:
    """Parameters whose optimizer state ZeRO lays in one flat tensor, and the ranks that it cuts it for."""

    group: str
    """Name of these ranks in `kan_train.parallel.layout.GROUPS`."""
    ranks: int
    """How many they are: all hold the same parameters."""
    sizes: tuple[int, ...]
    """Elements of each parameter."""

    @property
    def expert(self) -> bool:
        """Whether they are groves' parameters that other ranks than the dense ones' hold."""
        return self.group == "expert_data"

    @property
    def flat(self) -> int:
        """Elements of ZeRO 1 and 2's flat tensor, padded so that every rank's range is aligned."""
        step = ALIGNMENT * self.ranks
        return math.ceil(sum(self.sizes) / step) * step

    def touched(self, rank: int) -> int:
        """Elements of the parameters that have any in the range of that flat tensor which the rank with this place in the group holds."""
        length, start, found = self.flat // self.ranks, 0, 0
        for size in self.sizes:
            if start < (rank + 1) * length and start + size > rank * length:
                found += size
            start += size
        return found

    @property
    def partitioned(self) -> int:
        """Elements that one rank holds under ZeRO-3, which cuts every parameter by itself in equal ranges, the last ones padded."""
        return sum(math.ceil(size / self.ranks) for size in self.sizes)


@dataclass(frozen=True)
class Share:
    """What one rank of a layout holds of a model."""

    config: Config
    layout: Layout
    rank: int
    stages: tuple[int, ...]
    """Numbers of its chunks of layers, of all pipeline_parallel * virtual_pipeline."""
    models: tuple[LanguageModel, ...]
    """The chunks, on the meta device."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All of them, under their names in the whole model."""
        for model in self.models:
            yield from model.named_parameters()

    def by_part(self) -> dict[str, int]:
        """Elements of each part of the model; parts that this rank has nothing of are left out."""
        found: dict[str, int] = {}
        for name, parameter in self.named_parameters():
            part = next(part for pattern, part in PARTS if re.match(pattern, name))
            found[part] = found.get(part, 0) + parameter.numel()
        order = [part for _, part in PARTS]
        return dict(sorted(found.items(), key=lambda pair: order.index(pair[0])))

    @property
    def elements(self) -> int:
        """Parameters on this rank."""
        return sum(parameter.numel() for _, parameter in self.named_parameters())

    @property
    def element_size(self) -> int:
        """Bytes of a weight and of an activation."""
        return 2 if self.config.train.precision == "bf16" else 4

    @property
    def micro_batches(self) -> int:
        """Of a step, on this rank."""
        train = self.config.train
        return train.global_batch_size // (train.micro_batch_size * self.layout.data_parallel)

    def ranks(self, group: str) -> list[int]:
        """Global ranks of this rank's group of that name; "default": all."""
        return list(range(self.layout.world_size)) if group == "default" else self.layout.ranks_of(self.rank, group)

    def copies(self) -> list[Copies]:
        """The optimizer's groups, each with the ranks that hold the same parameters."""
        layout = self.layout
        for name, parameter in self.named_parameters():
            if layout.groves_are_experts and spec_of(name, parameter).grove:
                parameter.allreduce, parameter.group_name = False, "groves"  # type: ignore[attr-defined]
        found = []
        for group in parameter_groups(self.config.optimizer, self.named_parameters()):
            name = "expert_data" if group.get("moe") else "data_and_context"
            found.append(Copies(name, layout.size(name), tuple(parameter.numel() for parameter in group["params"])))
        return found


def share_of(config: Config, layout: Layout, rank: int) -> Share:
    """What global `rank` holds; ValueError unless it is below layout.world_size."""
    place = place_of(layout, rank)
    stages = tuple(chunk * layout.pipeline_parallel + place.pipeline.rank for chunk in range(layout.virtual_pipeline))
    parts = stage_parts(config, layout)
    with at(place):
        models = tuple(LanguageModel(config.model, parts[stage]) for stage in stages)
    for model in models:
        model.activation_checkpointing = config.train.activation_checkpointing
    return Share(config, layout, rank, stages, models)
