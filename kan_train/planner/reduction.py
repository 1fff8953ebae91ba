"""What DeepSpeed sends in a step: gradients, weights, and the few numbers that it decides by.

    ZeRO    gradients                                       weights                                      of groups
    0       all-reduced once a step                         -                                            data x context
    1       all-reduced once a step                         gathered once a step                         data x context; groves: expert data
    2       all-reduced every micro-batch (pipeline: once)  gathered once a step                         the same
    3       scattered every micro-batch                     gathered for every pass of a micro-batch     the same

ZeRO 1 and 2 all-reduce, where a reduce-scatter would send half: so does DeepSpeed 0.19, which reduces a bucket whole and keeps its own range of it.
"""

import math
from collections.abc import Iterator

from kan_train.engine.sharded import BUCKET_ELEMENTS, PERSISTENT_ELEMENTS
from kan_train.parallel.params import spec_of
from kan_train.planner.message import Message
from kan_train.planner.share import Copies, Share

REPLICATED_BUCKET = 500_000_000
"""Elements that DeepSpeed's stage 0 reduces in a call."""
REUSE_DISTANCE = 1_000_000_000
"""Elements: ZeRO-3 keeps a gathered parameter that is used again before as many have been."""


def reductions(share: Share) -> Iterator[Message]:
    """DeepSpeed's messages of one step."""
    stage = share.layout.zero_stage
    if stage == 0:
        yield from _replicated(share)
    elif stage in (1, 2):
        yield from _gradients(share, stage)
        for copies in share.copies():
            yield Message(copies.group, _of("weights", copies), "all-gather", 1, copies.flat * share.element_size, copies.ranks)
        yield from _decisions(share, stage)
    elif stage == 3:
        yield from _partitioned(share)


def _of(what: str, copies: Copies) -> str:
    return f"{what} of groves" if copies.expert else what


def _replicated(share: Share) -> Iterator[Message]:
    size = share.elements * share.element_size
    calls = _buckets([p.numel() for _, p in share.named_parameters()], REPLICATED_BUCKET)
    yield Message("data_and_context", "gradients", "all-reduce", calls, size, len(share.ranks("data_and_context")))
    yield Message("tensor", "gradient norm", "all-reduce", 1, 8, share.layout.tensor_parallel)


def _gradients(share: Share, stage: int) -> Iterator[Message]:
    times = share.micro_batches if stage == 2 and share.layout.pipeline_parallel == 1 else 1
    bucket = max(1, min(share.elements, BUCKET_ELEMENTS))
    experts = {name for name, parameter in share.named_parameters() if share.layout.groves_are_experts and spec_of(name, parameter).grove}
    for expert in (False, True):
        sizes = [parameter.numel() for name, parameter in share.named_parameters() if (name in experts) is expert]
        if sizes:
            group = "expert_data" if expert else "data_and_context"
            purpose = "gradients of groves" if expert else "gradients"
            total = times * sum(sizes) * share.element_size
            yield Message(group, purpose, "all-reduce", times * _buckets(sizes, bucket), total, len(share.ranks(group)))


def _buckets(sizes: list[int], elements: int) -> int:
    """Calls for tensors that are put together until `elements` would be passed; one that is larger alone goes by itself."""
    calls, filled = 0, elements + 1
    for size in reversed(sizes):
        if filled + size > elements:
            calls, filled = calls + 1, 0
        filled += size
    return calls


def _decisions(share: Share, stage: int) -> Iterator[Message]:
    """The gradient norm, group by group, and whether all gradients are finite."""
    model, data = len(share.ranks("model")), len(share.ranks("data_and_context"))
    copies, bf16 = share.copies(), share.config.train.precision == "bf16"
    if bf16 and stage == 1 and not share.config.parallel.offload_optimizer:  # an optimizer of its own, whose norm is one number
        yield Message("model", "gradient norm", "all-reduce", 1, 4, model)
        if any(group.expert for group in copies):
            yield Message("expert", "gradient norm", "all-reduce", 1, 4, share.layout.expert_parallel)
        return
    for group in copies:
        yield Message("data_and_context", "gradient norm", "all-reduce", 1, 4, data)
        yield Message("model", "gradient norm", "all-reduce", 1, 4, model)
        if group.expert:
            yield Message("expert_data", "gradient norm", "all-reduce", 1, 4, group.ranks)
    if bf16:
        yield Message("data_and_context", "finite or not", "all-reduce", 1, 1, data)
        yield Message("model", "finite or not", "all-reduce", 1, 1, model)


def _partitioned(share: Share) -> Iterator[Message]:
    size, times, layout = share.element_size, share.micro_batches, share.layout
    gathers = _gathers(share)
    for expert in (False, True):
        group = "expert_data" if expert else "data_and_context"
        ranks, suffix = len(share.ranks(group)), " of groves" if expert else ""
        held = {
            name: math.ceil(parameter.numel() / ranks) * ranks * size
            for name, parameter in share.named_parameters()
            if (layout.groves_are_experts and spec_of(name, parameter).grove) is expert
        }
        whole = [held[name] for name in held if name not in gathers]
        passing = [gathers[name] for name in held if name in gathers]
        if whole:
            yield Message(group, f"small weights{suffix}", "all-gather", len(whole), sum(whole), ranks)
        if passing:
            total = sum(held[name] * gathers[name] for name in held if name in gathers)
            yield Message(group, f"weights{suffix}", "all-gather", times * sum(passing), times * total, ranks)
        if held:
            calls = times * _buckets([bytes_ // size for bytes_ in held.values()], max(1, min(share.elements, BUCKET_ELEMENTS)))
            yield Message(group, f"gradients{suffix}", "reduce-scatter", calls, times * sum(held.values()), ranks)
    for copies in share.copies():
        yield Message(copies.group, "gradient norm", "all-reduce", 1, 8, copies.ranks)
        others = "expert" if copies.expert else "model"
        yield Message(others, "gradient norm", "all-reduce", 1, 8, len(share.ranks(others)))


def _gathers(share: Share) -> dict[str, int]:
    """How often a micro-batch gathers each parameter that is not held whole: for its forward and its backward pass, or once for both."""
    (model,) = share.models
    parts = [(name, part) for name, part in model.named_children() if name != "layers"]
    layers = [(f"layers.{number}.{name}", part) for number, layer in model.layers.named_children() for name, part in layer.named_children()]
    order = [pair for pair in parts if pair[0] == "embedding"] + layers + [pair for pair in parts if pair[0] != "embedding"]
    found, after = {}, 0
    for prefix, part in reversed(order):
        for name, parameter in part.named_parameters():
            if parameter.numel() > PERSISTENT_ELEMENTS:
                found[f"{prefix}.{name}"] = 1 if 2 * after < REUSE_DISTANCE else 2
        after += sum(parameter.numel() for parameter in part.parameters())
    return found
