"""How several processes share a model that decodes: which layouts there are, the nearest to one that there is not, and where a process stands."""

import math
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed import ProcessGroup

from kan_train.config import Config, ConfigError, ModelConfig
from kan_train.config.generate import DecodeParallelConfig
from kan_train.config.layout import Layout
from kan_train.config.soundness import broken_split
from kan_train.parallel.place import Place, place_of

_GROUPS = ("tensor", "expert", "expert_tensor")


def decode_layout(parallel: DecodeParallelConfig, model: ModelConfig, processes: int) -> Layout:
    """The layout of `processes` that decode `model`: every one holds its share, and all the same tokens.

    ConfigError names the setting that does not allow it, and the nearest settings that do.
    """
    problems = []
    for inside in _inside(parallel, model):
        layout = _layout(parallel, inside, processes)
        problem = _problem(parallel, model, layout)
        if problem is None:
            return layout
        problems.append(problem)
    raise ConfigError(f"{problems[0]}; use {_nearest(parallel, model, processes)}")


def require_one_process(command: str, processes: int) -> None:
    """Raise ConfigError where a launcher started several processes for a `command` that decodes in one."""
    if processes > 1:
        raise ConfigError(f"{command} runs in one process, and {processes} were started; start it without torchrun")


def start_groups(layout: Layout) -> Place:
    """Where this process stands, with process groups along the axes that decoding splits; collective over all processes."""
    rank, found = dist.get_rank(), dict[str, ProcessGroup]()
    for dimension in _GROUPS:
        if layout.size(dimension) == 1:
            continue
        members = sorted({tuple(layout.ranks_of(other, dimension)) for other in range(layout.world_size)})
        for ranks in members:
            group = dist.new_group(list(ranks)) if len(members) > 1 else dist.group.WORLD
            if rank in ranks and group is not None:
                found[dimension] = group
    return decode_place(layout, rank, found.get)


def decode_place(layout: Layout, rank: int, group_of: Callable[[str], ProcessGroup | None] | None = None) -> Place:
    """Where `rank` stands. group_of: process group by name; None for a look at the layout without processes."""
    place = place_of(layout, rank, group_of)  # type: ignore[arg-type]
    return Place(tensor=place.tensor, expert=place.expert, expert_tensor=place.expert_tensor, same_tokens=True)


def _inside(parallel: DecodeParallelConfig, model: ModelConfig) -> list[int]:
    """Ranks that split a grove's hidden units, the best first: all that split the rest, or none."""
    tensor = parallel.tensor_parallel
    if parallel.expert_tensor_parallel is not None:
        return [parallel.expert_tensor_parallel]
    return [tensor, 1] if model.has_groves and tensor > 1 else [tensor]


def _layout(parallel: DecodeParallelConfig, inside: int, processes: int) -> Layout:
    return Layout(
        world_size=processes, tensor_parallel=parallel.tensor_parallel, expert_parallel=parallel.expert_parallel, expert_tensor_parallel=inside
    )


def _problem(parallel: DecodeParallelConfig, model: ModelConfig, layout: Layout) -> str | None:
    """The first rule that is broken; None where none is."""
    tensor, expert, inside = layout.tensor_parallel, layout.expert_parallel, layout.expert_tensor_parallel
    if parallel.pipeline_parallel > 1:
        return f"parallel.pipeline_parallel={parallel.pipeline_parallel} would leave all stages but one waiting: decoding has no pipeline"
    if parallel.context_parallel > 1:
        return f"parallel.context_parallel={parallel.context_parallel} splits sequences, of which decoding reads one token at a time"
    if parallel.sequence_parallel:
        return "parallel.sequence_parallel=true splits the tokens between the layers, of which decoding has one at a time"
    if not model.has_groves:
        for name, size in (("expert_parallel", expert), ("expert_tensor_parallel", parallel.expert_tensor_parallel or 1)):
            if size > 1:
                return f"parallel.{name}={size} splits groves, but this model has none"
    if inside not in (1, tensor):
        return f"parallel.expert_tensor_parallel={inside} must be 1 (each grove whole on a rank) or parallel.tensor_parallel={tensor}"
    if law := broken_split(Config(model=model), layout):
        return law
    needed = math.lcm(tensor, expert * inside) if model.has_groves else tensor
    if needed != layout.world_size:
        named, were = _named(parallel), "were" if layout.world_size > 1 else "was"
        return f"{named} {'take' if ' ' in named else 'takes'} {_count(needed)}, and {layout.world_size} {were} started"
    return None


def _nearest(parallel: DecodeParallelConfig, model: ModelConfig, processes: int) -> str:
    """Settings that work: first for the processes there are, the nearest to what was asked for; or else with another number of them."""
    wanted = parallel.tensor_parallel * parallel.pipeline_parallel * parallel.context_parallel, parallel.expert_parallel
    asked = max(processes, parallel.tensor_parallel * parallel.expert_parallel)

    def distance(sizes: tuple[int, int]) -> float:
        return sum(abs(math.log(size / given)) for size, given in zip(sizes, wanted, strict=True))

    def works(sizes: tuple[int, int], count: int) -> bool:
        other = DecodeParallelConfig(tensor_parallel=sizes[0], expert_parallel=sizes[1])
        return any(_problem(other, model, _layout(other, inside, count)) is None for inside in _inside(other, model))

    # As they were asked for, if the right number of processes had been started.
    for count in (processes, *range(asked, 0, -1)) if processes > 1 else range(asked, 0, -1):
        sizes = [(tensor, expert) for tensor in range(1, count + 1) for expert in range(1, count + 1) if works((tensor, expert), count)]
        if sizes:
            tensor, expert = min(sizes, key=lambda pair: (distance(pair), -pair[0]))
            settings = [f"parallel.tensor_parallel={tensor}"] if tensor > 1 or expert == 1 else []
            settings += [f"parallel.expert_parallel={expert}"] if expert > 1 or parallel.expert_parallel > 1 else []
            settings += [f"parallel.{name}=1" for name in ("pipeline_parallel", "context_parallel") if getattr(parallel, name) > 1]
            settings += ["parallel.sequence_parallel=false"] if parallel.sequence_parallel else []
            settings += ["parallel.expert_tensor_parallel=null"] if parallel.expert_tensor_parallel is not None else []
            start = f", started with torchrun --nproc-per-node {count} -m kan_train generate" if count != processes else ""
            return " ".join(settings) + start
    raise AssertionError("unreachable: one process always works")


def _named(parallel: DecodeParallelConfig) -> str:
    sizes = {name: getattr(parallel, name) for name in ("tensor_parallel", "expert_parallel", "expert_tensor_parallel")}
    return " ".join(f"parallel.{name}={size}" for name, size in sizes.items() if (size or 1) > 1) or "parallel.tensor_parallel=1"


def _count(processes: int) -> str:
    return f"{processes} process{'es' if processes > 1 else ''}"
