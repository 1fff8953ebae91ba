"""Step times by hand: on a device of round speeds every term is arithmetic."""

import math

import pytest

from kan_train.accounting.flops import flops_per_token
from kan_train.config.compose import compose_train
from kan_train.config.layout import layout_of
from kan_train.planner.efficiency import Efficiency
from kan_train.planner.links import Link, Network
from kan_train.planner.message import Message
from kan_train.planner.quantity import assumed, given
from kan_train.planner.share import share_of
from kan_train.planner.step import StepTime
from kan_train.planner.time import Clock
from kan_train.planner.traffic import traffic_of

FREE = given(1e30, "no time at all")
NOTHING = given(0.0, "no time at all")


def network(*, bandwidth: float = 1e30, latency: float = 0.0, devices: int = 64) -> Network:
    link = Link(name="test", bandwidth=given(bandwidth, "test"), latency=given(latency, "test"))
    return Network(devices_per_node=devices, inside=link, between=link)


def speeds(*, products: float = 1e30, memory: float = 1e30, overlaps: bool = False) -> Efficiency:
    return Efficiency(device="cpu", products=given(products, "test"), memory=given(memory, "test"), block_seconds=NOTHING, overlaps=overlaps)


def timed(*overrides: str, world: int, links: Network, efficiency: Efficiency, recompute: bool = False) -> StepTime:
    config = compose_train(list(overrides), world_size=world)
    return Clock(config, links, efficiency).step(layout_of(config, world), config.train.micro_batch_size, recompute=recompute)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("model", ["kan_tiny", "moe_tiny", "dense_tiny_total"])
def test_computation_is_the_executed_flops_over_the_speed(model: str, recompute: bool):
    overrides = [f"model={model}", "train.global_batch_size=8", "train.micro_batch_size=2"]
    step = timed(*overrides, world=1, links=network(), efficiency=speeds(products=1e9), recompute=recompute)
    config = compose_train(overrides, world_size=1)
    flops = 8 * config.model.sequence_length * flops_per_token(config.model).executed(activation_checkpointing=recompute)
    assert step.compute == pytest.approx(flops / 1e9)
    assert step.total == pytest.approx(step.compute)
    assert (step.recompute > 0) is recompute


@pytest.mark.parametrize("sizes", [["tensor_parallel=4"], ["context_parallel=4"], ["tensor_parallel=2", "context_parallel=2"], []], ids=str)
def test_a_quarter_of_a_dense_model_takes_a_quarter(sizes: list[str]):
    """Tensor, context and data parallelism cut the same computation in equal parts."""
    model = ["model=dense_tiny_total", "model.ffn_width=6288", "train.global_batch_size=16"]
    overrides = [*model, "train.micro_batch_size=1", *(f"parallel.{size}" for size in sizes)]
    whole = timed(*model, world=1, links=network(), efficiency=speeds(products=1e9))
    assert timed(*overrides, world=4, links=network(), efficiency=speeds(products=1e9)).compute == pytest.approx(whole.compute / 4)


@pytest.mark.parametrize(("virtual", "share"), [(1, 1 / 8), (2, 1 / 16)])
def test_the_bubble_is_that_of_the_schedule(virtual: int, share: float):
    """(p - 1) / (v m), with equal stages: four blocks of a model whose head takes nothing."""
    overrides = ["model=kan_tiny", "train.global_batch_size=8", "train.micro_batch_size=1", "parallel.pipeline_parallel=2", "parallel.zero_stage=2"]
    overrides += [f"parallel.virtual_pipeline={virtual}", "parallel.stage_layers=" + ("[2,2]" if virtual == 1 else "[1,1,1,1]")]
    efficiency = speeds(products=1e9)
    efficiency.parts["head"] = FREE
    step = timed(*overrides, world=2, links=network(), efficiency=efficiency)
    assert step.bubble / step.compute == pytest.approx(share)


@pytest.mark.parametrize("sizes", [
    ["tensor_parallel=2", "zero_stage=1"], ["expert_parallel=4", "zero_stage=2"], ["context_parallel=2", "zero_stage=3"],
    ["pipeline_parallel=2", "zero_stage=2"], ["tensor_parallel=2", "expert_tensor_parallel=2", "zero_stage=0"],
], ids=str)  # fmt: skip
@pytest.mark.parametrize("model", ["kan_tiny", "moe_tiny"])
def test_what_is_sent_takes_as_long_as_all_messages_of_the_whole_share(model: str, sizes: list[str]):
    """The clock adds up pieces of one block each; the planner's traffic of the built share, message by message, is the sum it must come to."""
    overrides = [f"model={model}", "train.global_batch_size=16", "train.micro_batch_size=2", *(f"parallel.{size}" for size in sizes)]
    config, links = compose_train(overrides, world_size=4), network(bandwidth=1e9, latency=1e-5)
    layout = layout_of(config, 4)
    clock = Clock(config, links, speeds())
    factor = clock._fullest(layout, 2 * config.model.sequence_length / layout.context_parallel, "expected")
    routed = ("tokens to groves", "choices to groves", "outputs of groves", "gradients of tokens", "gradients of choices", "gradients of outputs")

    def seconds(one: Message) -> float:
        return links.message_seconds(one, layout) * (factor if one.purpose in routed else 1)

    ranks = range(0, 4, 4 // layout.pipeline_parallel)
    left_out = ("losses", "routing statistics")
    sums = [sum(seconds(one) for one in traffic_of(share_of(config, layout, rank)) if one.purpose not in left_out) for rank in ranks]
    step = clock.step(layout, 2)
    # A stage that waits for the other is in the bubble; with no computation the slowest is the one that sends most.
    assert step.communication + step.reduction == pytest.approx(max(sums), rel=1e-2 if layout.pipeline_parallel > 1 else 1e-9)


def test_messages_take_their_links():
    """Eight ranks on machines of four: a ring leaves a machine by the adapters of its four ranks, an all-to-all sends half of its bytes by one."""
    config = compose_train(["train.global_batch_size=8", "train.micro_batch_size=1"], world_size=8)
    layout = layout_of(config, 8)
    inside = Link(name="in", bandwidth=given(100.0, "test"), latency=given(0.0, "test"))
    between = Link(name="out", bandwidth=given(10.0, "test"), latency=given(1.0, "test"))
    links = Network(devices_per_node=4, inside=inside, between=between)

    def seconds(operation: str, group: str = "data", ranks: int = 8) -> float:
        return links.message_seconds(Message(group, "x", operation, 2, 800, ranks), layout)

    hops = 2 * 1.0 * math.log2(8)
    assert seconds("all-reduce") == pytest.approx(2 * (hops + 7 / 8 * 800 / 40))
    assert seconds("all-gather") == pytest.approx(hops + 7 / 8 * 800 / 40)
    assert seconds("all-to-all") == pytest.approx(hops + 4 / 8 * 800 / 10)
    assert seconds("receive") == 0


def test_only_what_the_engine_starts_early_is_hidden():
    """ZeRO-2 behind the backward pass on an accelerator, ZeRO-1 never, and nothing on a CPU."""
    overrides = ["model=dense_tiny_total", "train.global_batch_size=16", "train.micro_batch_size=2"]
    links = network(bandwidth=1e9)

    def step(stage: int, overlaps: bool) -> StepTime:
        return timed(*overrides, f"parallel.zero_stage={stage}", world=4, links=links, efficiency=speeds(products=1e11, overlaps=overlaps))

    assert step(1, True).hidden == step(2, False).hidden == step(1, False).hidden == 0
    hidden = step(2, True)
    assert 0 < hidden.hidden <= 2 / 3 * hidden.compute
    assert hidden.total == pytest.approx(step(2, False).total - hidden.hidden)


def test_the_fullest_expert_rank_waits_less_where_more_choices_are_drawn():
    """Against a simulation: the mean of the largest load of eight ranks, over even draws."""
    import torch

    config = compose_train(["model=kan_tiny", "train.global_batch_size=8", "train.micro_batch_size=1", "parallel.expert_parallel=8"], world_size=8)
    clock = Clock(config, network(), speeds(), skew=assumed(1.0, 1.0, 1.0, "test"))
    tokens = config.model.sequence_length
    draws = torch.randint(0, 8, (400, tokens * 8 * config.model.grove.active_groves), generator=torch.Generator().manual_seed(0))
    loads = torch.stack([(draws == rank).sum(1) for rank in range(8)], 1).max(1).values.double().mean() / (draws.shape[1] / 8)
    planned = clock._fullest(layout_of(config, 8), tokens, "expected")
    assert 1 + 0.6 * (planned - 1) < float(loads) < planned


def test_slow_is_slower_and_fast_is_faster():
    efficiency = Efficiency(device="x", products=assumed(2e12, 1e12, 3e12, "x"), memory=assumed(2e9, 1e9, 3e9, "x"))
    config = compose_train(["train.global_batch_size=16", "train.micro_batch_size=2", "parallel.expert_parallel=2"], world_size=4)
    clock = Clock(config, network(bandwidth=1e9), efficiency)
    slow, expected, fast = (clock.step(layout_of(config, 4), 2, end=end).total for end in ("slow", "expected", "fast"))
    assert slow > expected > fast
