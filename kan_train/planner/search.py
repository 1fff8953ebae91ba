"""Every sound layout of a model on so many devices: how fast it is, whether it fits, and for those that are not taken the reason.

Soundness is `kan_train.config.soundness`'s, memory `kan_train.planner.footprint`'s, time `kan_train.planner.time`'s. The fastest layouts are looked at
first; once one fits, the search ends at those that take SLACK times as long, so that the memory of the slow ones is never computed. Searched is what
`Space` lists.
"""

import heapq
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache

from kan_train.config import Config, ConfigError
from kan_train.config.layout import Layout
from kan_train.config.soundness import broken_rule
from kan_train.planner.candidate import Candidate
from kan_train.planner.footprint import Footprint, footprint_of
from kan_train.planner.memory import memory_of
from kan_train.planner.step import StepTime
from kan_train.planner.time import Clock

SLACK = 1.25
"""Layouts that take longer than so many times the fastest that fits are left out."""
USABLE = 0.92
"""Share of a device's memory that a plan fills at most: the rest is for the driver, the communication library and what the allocator cannot use."""
LEAST_CHUNK = 512
"""Tokens of a sequence that a context-parallel rank has, at least."""
CHUNKS = (1, 2, 3, 4, 6, 8, 12)
"""Chunks of layers a pipeline rank holds that are tried."""
MICRO_BATCHES = (1, 2, 4, 8, 16)
"""Sequences of a micro-batch that are tried."""
NOT_SEARCHED = (
    f"tensor parallelism beyond a machine, context chunks below {LEAST_CHUNK} tokens, virtual pipelines other than {', '.join(map(str, CHUNKS))}, "
    f"micro-batches other than {', '.join(map(str, MICRO_BATCHES))}, sequence parallelism off unless it is given so, layers of the stages by hand",
    "recomputation and offloading where a layout fits without them: they only slow it down",
)
"""What a better layout may be among."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A layout that fits."""

    candidate: Candidate
    step: StepTime
    memory: Footprint
    tokens_per_second: float
    """Of one device."""
    headroom: int
    """Bytes of the device's memory that nothing counted needs."""


@dataclass(kw_only=True)
class Rejections:
    """How many layouts were not taken, by reason, with an example of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """reason: numbers in it are left out of its name, so that rules are counted together."""
        name = re.sub(r"\d[\d,.]*", "N", reason)
        self.counts[name] = self.counts.get(name, 0) + count
        self.examples.setdefault(name, f"{example}: {reason}")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a search found."""

    world_size: int
    fitting: list[Planned]
    """Layouts that fit, the fastest first."""
    rejected: Rejections
    looked_at: int
    """Layouts, rejected ones included."""
    timed: int
    """Layouts whose step was timed."""
    weighed: int
    """Layouts whose memory was computed."""

    def front(self) -> list[Planned]:
        """Those that no other beats in speed and in memory left: the fastest first."""
        found: list[Planned] = []
        for one in self.fitting:
            if not found or one.headroom > found[-1].headroom:
                found.append(one)
        return found


@dataclass(frozen=True, kw_only=True)
class Space:
    """The values that are tried. pinned: settings that the user gave, by their dotted names."""

    world_size: int
    devices_per_node: int
    pinned: dict[str, int | bool] = field(default_factory=dict)

    def values(self, config: Config, setting: str) -> list[int]:
        """What `setting` may be."""
        if setting in self.pinned:
            return [int(self.pinned[setting])]
        divisors, model = _divisors(self.world_size), config.model
        match setting:
            case "parallel.tensor_parallel":
                return [size for size in divisors if size <= self.devices_per_node]
            case "parallel.context_parallel":
                return [size for size in divisors if size == 1 or model.sequence_length // size >= LEAST_CHUNK]
            case "parallel.pipeline_parallel":
                return [size for size in divisors if size <= model.num_layers]
            case "parallel.virtual_pipeline":
                return list(CHUNKS)
            case "parallel.expert_parallel":
                return [size for size in divisors if size <= model.grove.num_groves] if model.has_groves else [1]
            case "parallel.zero_stage":
                return [1, 2, 3] if config.train.precision == "bf16" else [0, 1, 2, 3]
            case "train.micro_batch_size":
                return list(MICRO_BATCHES)
            case _:
                return [0, 1]

    def geometries(self, config: Config) -> Iterator[Layout]:
        """Sizes of tensor, context, pipeline, expert parallelism and of tensors inside groves; sound or not."""
        names = ("tensor", "context", "pipeline", "expert")
        pinned, sequence = self.pinned.get("parallel.expert_tensor_parallel"), self.pinned.get("parallel.sequence_parallel")
        for tensor, context, pipeline, expert in itertools.product(*(self.values(config, f"parallel.{name}_parallel") for name in names)):
            if self.world_size % (tensor * context * pipeline):
                continue  # no layout at all
            inside = [int(pinned)] if pinned is not None else sorted({1, tensor}) if config.model.has_groves else [tensor]
            for expert_tensor in inside:
                if self.world_size % (pipeline * expert * expert_tensor) == 0:
                    yield Layout(
                        world_size=self.world_size, tensor_parallel=tensor, sequence_parallel=tensor > 1 if sequence is None else bool(sequence),
                        pipeline_parallel=pipeline, context_parallel=context, expert_parallel=expert, expert_tensor_parallel=expert_tensor,
                        zero_stage=2 if pipeline > 1 else 1,
                    )  # fmt: skip


def search(clock: Clock, space: Space, memory: int | None) -> Result:
    """The layouts of clock.config on space.world_size devices. memory: bytes of a device, None: not looked at. ConfigError where none is sound."""
    return _Search(clock, space, None if memory is None else int(USABLE * memory)).run()


class _Search:
    def __init__(self, clock: Clock, space: Space, budget: int | None) -> None:
        self.clock, self.space, self.config, self.budget = clock, space, clock.config, budget
        self.rejected, self.looked_at, self.timed, self.weighed, self.sound = Rejections(), 0, 0, 0, False
        self._heap: list[tuple[float, int, Candidate, StepTime]] = []
        self._pushed: set[Candidate] = set()
        self._laws: dict[tuple[object, ...], str | None] = {}
        self._states: dict[tuple[object, ...], int] = {}
        self._too_large: dict[tuple[object, ...], int] = {}

    def run(self) -> Result:
        for geometry in self.space.geometries(self.config):
            self._geometry(geometry)
        if not self.sound:
            examples = "; ".join(list(self.rejected.examples.values())[:3])
            left = f"no layout of {self.config.model.name} on {self.space.world_size} devices is left"
            raise ConfigError(f"{left}: {examples}; use other --devices, or fewer settings")
        fitting = self._fitting()
        return Result(
            world_size=self.space.world_size, fitting=fitting, rejected=self.rejected, looked_at=self.looked_at, timed=self.timed, weighed=self.weighed
        )

    def _values(self, setting: str) -> list[int]:
        return self.space.values(self.config, setting)

    def _geometry(self, geometry: Layout) -> None:
        micro, offloads = self._values("train.micro_batch_size"), self._values("parallel.offload_optimizer")
        below = len(micro) * len(offloads) * len(self._values("train.activation_checkpointing"))
        stages, chunks = self._values("parallel.zero_stage"), self._values("parallel.virtual_pipeline")
        law = self._law(geometry, 1, ("geometry", geometry))
        if law is not None:
            self._reject(law, geometry, below * len(stages) * len(chunks))
            return
        for virtual, stage in itertools.product(chunks, stages):
            layout = _changed(geometry, virtual_pipeline=virtual, zero_stage=stage)
            shape = (layout.pipeline_parallel, virtual, stage, layout.groves_are_experts, layout.expert_tensor_parallel > 1)
            if (law := self._law(layout, 1, shape)) is not None:
                self._reject(law, layout, below)
                continue
            # What is held whatever the micro-batch: exact, and cheap. Where this fits, offloading is looked at only once the activations do not.
            for offload in offloads:
                if offload and not stage:
                    self._reject("parallel.offload_optimizer=true needs a sharded optimizer", layout, below // len(offloads))
                    continue
                held = self._held(layout, bool(offload))
                if self.budget is None or held <= self.budget:
                    self._portions(layout, bool(offload), micro, below // len(offloads) // len(micro))
                    break
                self.sound = True
                part = "weights and gradients do not fit" if offload else "weights, gradients and optimizer do not fit"
                self._reject(f"{part}: {held / 1e9:.0f} GB", layout, below // len(offloads))

    def _held(self, layout: Layout, offload: bool) -> int:
        copies = layout.data_parallel * layout.context_parallel  # all of it depends on their product alone
        sizes = (layout.tensor_parallel, layout.pipeline_parallel, layout.virtual_pipeline, layout.expert_parallel, layout.expert_tensor_parallel)
        key = (*sizes, layout.zero_stage, copies, offload)
        if key not in self._states:
            self._states[key] = memory_of(self.clock.share(layout, offload=offload)).device
        return self._states[key]

    def _portions(self, layout: Layout, offload: bool, micro: list[int], below: int) -> None:
        recompute = bool(self.space.pinned.get("train.activation_checkpointing", False))
        for size in micro:
            shape = ("portion", layout.data_parallel, layout.pipeline_parallel, layout.virtual_pipeline, size)
            if (law := self._law(layout, size, shape, portions=True)) is not None:
                self._reject(law, layout, below)
            else:
                self.sound = True
                self._push(Candidate(layout=layout, micro_batch_size=size, recompute=recompute, offload=offload))

    def _push(self, candidate: Candidate) -> None:
        if candidate in self._pushed:  # recomputation and offloading together are met from either
            return
        self._pushed.add(candidate)
        self.looked_at, self.timed = self.looked_at + 1, self.timed + 1
        step = self.clock.step(candidate.layout, candidate.micro_batch_size, recompute=candidate.recompute, offload=candidate.offload)
        heapq.heappush(self._heap, (step.total, self.timed, candidate, step))

    def _fitting(self) -> list[Planned]:
        found: list[Planned] = []
        tokens = self.config.train.global_batch_size * self.config.model.sequence_length
        while self._heap:
            seconds, _, candidate, step = heapq.heappop(self._heap)
            if found and seconds > SLACK * found[0].step.total:
                self.rejected.add(f"more than {SLACK} times as slow as the fastest that fits", str(candidate), 1 + len(self._heap))
                break
            memory = self._weigh(candidate)
            if memory is not None:
                headroom = 0 if self.budget is None else self.budget - memory.total
                speed = tokens / seconds / self.space.world_size
                found.append(Planned(candidate=candidate, step=step, memory=memory, tokens_per_second=speed, headroom=headroom))
        return sorted(found, key=lambda one: one.step.total)  # where the host's memory is the faster one, offloading comes too late

    def _weigh(self, candidate: Candidate) -> Footprint | None:
        """The memory of a candidate that fits; else its reason is noted, and recomputation and offloading are tried."""
        key = (candidate.layout, candidate.recompute, candidate.offload)
        if candidate.micro_batch_size >= self._too_large.get(key, math.inf):  # a smaller micro-batch did not fit
            self.rejected.add("a smaller micro-batch does not fit", str(candidate))
        else:
            config = self.clock.configured(candidate.layout, candidate.micro_batch_size, recompute=candidate.recompute, offload=candidate.offload)
            memory = footprint_of(config, candidate.layout, candidate.micro_batch_size, recompute=candidate.recompute)
            self.weighed += 1
            if self.budget is None or memory.total <= self.budget:
                return memory
            self._too_large[key] = candidate.micro_batch_size
            if not candidate.offload and memory.total - memory.parts.get("masters", 0) - memory.parts.get("moments", 0) > self.budget:
                self._too_large[candidate.layout, candidate.recompute, True] = candidate.micro_batch_size
            largest = max(memory.parts, key=lambda part: memory.parts[part])
            self.rejected.add(f"does not fit, {'with' if candidate.recompute else 'without'} recomputation: most of it is {largest}", str(candidate))
        if not candidate.recompute and "train.activation_checkpointing" not in self.space.pinned:
            self._push(replace(candidate, recompute=True))
        may_fit = candidate.micro_batch_size < self._too_large.get((candidate.layout, candidate.recompute, True), math.inf)
        if not candidate.offload and may_fit and candidate.layout.zero_stage and "parallel.offload_optimizer" not in self.space.pinned:
            self._push(replace(candidate, offload=True))
        return None

    def _law(self, layout: Layout, micro_batch_size: int, key: tuple[object, ...], *, portions: bool = False) -> str | None:
        """The rule that is broken, looked up once a key; those of the batch only where `portions`."""
        if key not in self._laws:
            law = broken_rule(self.clock.configured(layout, micro_batch_size), self.space.world_size)
            self._laws[key] = None if law is not None and not portions and "train.micro_batch_size" in law else law
        return self._laws[key]

    def _reject(self, reason: str, layout: Layout, count: int) -> None:
        self.looked_at += count
        self.rejected.add(reason, str(layout), count)


@cache
def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _changed(layout: Layout, **changes: int) -> Layout:
    return Layout(**{**vars(layout), **changes})
