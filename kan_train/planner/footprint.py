"""Bytes of device memory that the fullest rank of a layout needs at the peak of a training step, by part, from formulas that follow the code.

What the engine holds between steps comes from `kan_train.planner.memory`; what a block keeps for its backward pass and needs beside it, operator by operator,
from `kan_train.planner.kept`; DeepSpeed's buffers from `kan_train.planner.buffers`. Here they are put together along a step: how many micro-batches a stage has
under way, which blocks still keep theirs, whether gradients of an earlier micro-batch are there already. The peak is the largest of the moments looked at.

The formulas are those of the plain-torch path on a CPU, and are held against a tally of all live tensors in real runs (tests/planner/test_footprint.py, within
5%). On a GPU the kernels' path keeps other tensors: its formulas follow the kernels' code and were not measured. See NOT_COUNTED.
"""

import functools
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kan_train.config import Config
from kan_train.engine.pipeline import stage_parts
from kan_train.model.lm import Part
from kan_train.parallel.layers import head_rows
from kan_train.parallel.layout import Layout, layout_of
from kan_train.planner.buffers import Buffers, buffers_of
from kan_train.planner.devices import device_memory
from kan_train.planner.kept import WIDE, Block, Cut, ada, attention, norm, summed, swiglu
from kan_train.planner.kept_groves import kalmagrove
from kan_train.planner.memory import Memory, memory_of
from kan_train.planner.schedule import in_flight
from kan_train.planner.share import Share
from kan_train.planner.skeleton import Skeletons

BATCH_BYTES = 8 + 8 + 1
"""Of a token: itself, its target, and whether a document starts there."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on the fullest rank at the peak of a step."""

    parts: dict[str, int]
    """Bytes by part; parts that are empty are left out."""
    moment: str
    """When in a step the peak is."""
    stage: int
    """Pipeline rank of the fullest rank."""
    host: int = 0
    """Bytes in the host's memory: optimizer state that is offloaded."""
    path: str = "plain torch"
    """Whose tensors are counted: plain torch's, as measured on a CPU, or the kernels'."""

    @property
    def total(self) -> int:
        """Peak live tensor bytes on the device."""
        return sum(self.parts.values())


def footprint_of(
    config: Config, layout: Layout | None = None, micro_batch_size: int | None = None, *, recompute: bool | None = None, kernels: bool | None = None
) -> Footprint:
    """Of the fullest rank of `layout` (default: what config says for run.world_size processes). micro_batch_size and recompute: instead of
    train.micro_batch_size and train.activation_checkpointing. kernels: whether Triton kernels run; default: on a GPU, unless model.kernels=torch.
    Checks nothing: `Config.validate` does.
    """
    layout = layout or layout_of(config, config.run.world_size or 1)
    size = micro_batch_size or config.train.micro_batch_size
    if size != config.train.micro_batch_size:
        config = replace(config, train=replace(config.train, micro_batch_size=size))
    parts = _stage_parts(f"{config.model!r} {config.parallel.stage_layers}", layout.pipeline_parallel, layout.virtual_pipeline, Beside((config, layout)))
    skeletons = _skeletons(f"{config.model!r} {config.optimizer!r}", Beside(config))
    found: dict[tuple, Footprint] = {}
    for stage in range(layout.pipeline_parallel):
        numbers = range(stage, len(parts), layout.pipeline_parallel)
        own = [parts[number] for number in numbers]
        # Of stages with the same layers the first one has the most micro-batches under way.
        alike = (stage > 0, *((tuple(sorted(skeletons.counts(part.layers).items())), part.is_first, part.is_last) for part in own))
        if alike not in found:
            found[alike] = rank_footprint(skeletons.share(config, layout, own, numbers), recompute=recompute, kernels=kernels, stage=stage)
    return max(found.values(), key=lambda one: one.total)


def rank_footprint(share: Share, *, recompute: bool | None = None, kernels: bool | None = None, stage: int | None = None) -> Footprint:
    """Of one rank, the share's; stage: its pipeline rank, if the share does not know. Otherwise as `footprint_of`."""
    config = share.config
    checkpointing = config.train.activation_checkpointing if recompute is None else recompute
    fused = on_gpu(config) and config.model.kernels != "torch" if kernels is None else kernels
    where = share.layout.coordinates(share.rank).pipeline if stage is None else stage
    return _Step(share, where, recompute=checkpointing, kernels=fused).peak()


def on_gpu(config: Config) -> bool:
    """Whether the run that is planned is one of GPUs: it says so, names a GPU of the cluster, or finds one here."""
    if config.run.device == "auto":
        return device_memory(config.cluster.device_name) is not None or torch.cuda.is_available()
    return config.run.device == "cuda"


@dataclass(frozen=True)
class Beside:
    """What a cached function needs beside the key that stands for it: equal to every other."""

    value: Any = field(compare=False)


@functools.lru_cache(maxsize=1024)
def _stage_parts(key: str, pipeline: int, virtual: int, of: Beside) -> list[Part]:
    config, layout = of.value
    return stage_parts(config, layout)


@functools.lru_cache(maxsize=4)
def _skeletons(key: str, of: Beside) -> Skeletons:
    return Skeletons(of.value)


@functools.lru_cache(maxsize=4096)
def _block(key: str, softmax: bool, sizes: tuple[int | bool, ...], of: Beside) -> Block:
    own: Cut = of.value
    ops = attention(own) if softmax else ada(own)
    ops += kalmagrove(own) if own.model.ffn == "kalmagrove" else swiglu(own)
    return summed(ops, own.stream_bytes)


class _Step:
    """A step of one rank."""

    def __init__(self, share: Share, stage: int, *, recompute: bool, kernels: bool) -> None:
        config, layout = share.config, share.layout
        self.share, self.stage, self.layout, self.recompute, self.kernels = share, stage, layout, recompute, kernels
        self.model, self.micro_batches = config.model, share.micro_batches
        self.pipeline = layout.pipeline_parallel > 1
        self.memory: Memory = memory_of(share)
        self.buffers: Buffers = buffers_of(share, self.memory, cuda=on_gpu(config))
        self.cuts = [self._cut(number, kernels=kernels) for number in share.stages]
        self.key = repr(config.model)

    def _cut(self, number: int, *, kernels: bool) -> Cut:
        config, layout = self.share.config, self.layout
        split, sequences = layout.sequence_parallel and layout.tensor_parallel > 1, config.train.micro_batch_size
        return Cut(
            model=config.model,
            sequences=sequences,
            chunk=config.model.sequence_length // layout.context_parallel,
            element=self.share.element_size,
            tensor=layout.tensor_parallel,
            split=split,
            strided=sequences > 1 and (split or number > 0),
            context=layout.context_parallel,
            expert=layout.expert_parallel,
            expert_tensor=layout.expert_tensor_parallel,
            resets=config.data.reset_at_documents,
            kernels=kernels,
        )

    def peak(self) -> Footprint:
        """The fullest moment."""
        moments = [*self._passes(), self._reduction()]
        name, parts = max(moments, key=lambda moment: sum(moment[1].values()))
        host = self.memory.optimizer if self.memory.offloaded else 0
        return Footprint({part: size for part, size in parts.items() if size}, name, self.stage, host, "kernels" if self.kernels else "plain torch")

    # --- what is always there ---------------------------------------------------------------------------------------------------------------------------

    def _base(self, gradients: int) -> "Counter[str]":
        memory, offloaded = self.memory, self.memory.offloaded
        tokens = self.cuts[0].sequences * self.model.sequence_length * self.micro_batches
        return Counter(
            {
                "weights": memory.weights,
                "gradients": gradients,
                "masters": 0 if offloaded else memory.masters,
                "moments": 0 if offloaded else memory.moments,
                "engine buckets": self.buffers.always,
                "batches": BATCH_BYTES * tokens,
            }
        )

    # --- forward and backward ---------------------------------------------------------------------------------------------------------------------------

    def _blocks(self, chunk: int) -> list[Block]:
        cut, model = self.cuts[chunk], self.share.models[chunk]
        sizes = (
            cut.sequences, cut.chunk, cut.element, cut.tensor, cut.split, cut.strided, cut.context, cut.expert, cut.expert_tensor, cut.resets, cut.kernels
        )  # fmt: skip
        return [_block(self.key, self.model.is_softmax_layer(layer), sizes, Beside(cut)) for layer in model.part.layers]

    def _kept(self, chunk: int) -> "Counter[str]":
        """What one micro-batch of a chunk of layers keeps until its backward pass."""
        cut, part, blocks = self.cuts[chunk], self.share.models[chunk].part, self._blocks(chunk)
        kept: Counter[str] = Counter()
        if self.recompute:
            kept["stream"] = len(blocks) * cut.stream_bytes
            if self.model.has_groves:
                routed = cut.tokens // (cut.tensor if self.layout.splits_grove_tokens else 1)
                kept["dispatch"] = len(blocks) * 8 * routed * self.model.grove.active_groves
        else:
            for block, number in Counter(map(id, blocks)).items():
                one = next(own for own in blocks if id(own) == block)
                for name, size in one.kept.items():
                    kept[name] += number * size
        kept["stream"] += cut.stream_bytes  # what the first block reads
        if self.pipeline and not part.is_last:
            kept["stream"] += cut.stream_bytes  # what is sent on, in the other order of dimensions
        return kept

    def _passes(self) -> "list[tuple[str, Counter[str]]]":
        """The moments of forward and backward passes, micro-batches and gradients of earlier ones being there where they can be."""
        found = []
        layout, chunks = self.layout, range(len(self.cuts))
        kept = [self._kept(chunk) for chunk in chunks]
        for last, counts, accumulated in in_flight(layout, self.stage, self.micro_batches):
            others: Counter[str] = Counter()
            for chunk in chunks:
                number = counts[chunk] - (chunk == last)
                for name, size in kept[chunk].items():
                    others[name] += number * size
            found += self._pass(last, others, accumulated=accumulated)
        return found

    def _pass(self, chunk: int, others: "Counter[str]", *, accumulated: bool) -> "list[tuple[str, Counter[str]]]":
        """A micro-batch through a chunk of layers, while `others` are under way."""
        cut, part, blocks, buffers = self.cuts[chunk], self.share.models[chunk].part, self._blocks(chunk), self.buffers
        kept, found = self._kept(chunk), []
        gradients = buffers.gradients if accumulated else buffers.gradients_before
        base = self._base(gradients) + others
        total = sum(kept.values())
        extra: Counter[str] = Counter({"gathered parameters": buffers.gathered})
        head_weights = 0
        if part.is_last:
            head, head_weights = self._head(cut)
            found.append(("head", base + kept + Counter({"head": head.forward, "gathered parameters": buffers.gathered + buffers.gathering})))
            backward = Counter({"head": head.backward, "engine buckets": buffers.backward})
            found.append(("backward pass of the head", base + kept + backward + extra))
        if blocks:
            last = blocks[-1]
            forward = Counter({"workspace": max(last.forward - last.bytes, 0), "gathered parameters": buffers.gathered + buffers.gathering})
            found.append(("forward pass", base + kept + forward))
        grown = 0 if accumulated else (head_weights if buffers.grows else 0)
        best: tuple[int, Counter[str]] | None = None
        remaining = total
        for block in reversed(blocks):
            own = block.backward if self.recompute else block.backward - block.bytes
            if best is None or remaining + own + grown > best[0]:
                best = (remaining + own + grown, Counter({"workspace": own, "gradients": grown}) + self._without(kept, total - remaining))
            remaining -= cut.stream_bytes if self.recompute else block.bytes
            grown += block.weights if buffers.grows and not accumulated else 0
        if best is not None:
            found.append(("backward pass", base + best[1] + Counter({"engine buckets": buffers.backward}) + extra))
        return found

    @staticmethod
    def _without(kept: "Counter[str]", freed: int) -> "Counter[str]":
        """What is kept, less what the blocks whose backward pass is done have freed: in proportion, the sum exact."""
        total = sum(kept.values())
        if not freed or not total:
            return kept
        left = Counter({name: size * (total - freed) // total for name, size in kept.items()})
        left["stream"] += total - freed - sum(left.values())
        return left

    def _head(self, cut: Cut) -> tuple[Block, int]:
        """Final norm, logits slice by slice, and their gradients, which are taken at once."""
        vocabulary, e = self.model.vocab_size // cut.tensor, cut.element
        matrix = vocabulary * self.model.width
        rows = min(cut.tokens, head_rows(vocabulary, "cuda" if cut.kernels else "cpu"))
        before = cut.tokens > rows  # the slice before is alive until the next one is made
        slices = rows * vocabulary * (WIDE * (1 + before) + (0 if e == WIDE else e * (1 + before))) + (0 if e == WIDE else e * matrix)
        inner = cut.inner_bytes
        scale = norm("head", cut, cut.stream, self.model.width)
        read = inner * (2 if cut.strided else 1) + (cut.stream_bytes if cut.split else 0)
        forward = scale.own + read + inner + WIDE * matrix + slices
        backward = scale.own + max(2 * inner + 2 * WIDE * matrix + (0 if e == WIDE else e * matrix), scale.backward)
        return Block(Counter(), forward, backward, e * matrix), e * matrix

    def _reduction(self) -> "tuple[str, Counter[str]]":
        """After the last backward pass: gradients are all there, and on their way."""
        return "reduction of gradients", self._base(self.buffers.gradients_reduced) + Counter({"engine buckets": self.buffers.reduction})
