"""Ranks are where Megatron puts them, what is unset is resolved, and pipeline stages are balanced as well as they can be."""

import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kan_train.config import Config
from kan_train.config.layout import DENSE_ORDER, GROVE_ORDER, resolved_zero_stage
from kan_train.parallel.layout import GROUPS, Layout, given_stages, layout_of, split_stages
from kan_train.parallel.runtime import zero_stage

# What Megatron calls the dimensions of its two generators of ranks.
DENSE = {"tensor": "tp", "context": "cp", "data": "dp", "pipeline": "pp"}
DENSE |= {"data_and_context": "dp-cp", "tensor_and_data": "tp-dp-cp", "model": "tp-pp"}
GROVE = {"expert_tensor": "tp", "expert": "ep", "expert_data": "dp", "pipeline": "pp"}


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def layouts(world_size: int) -> Iterator[Layout]:
    """Every combination of sizes over `world_size` ranks."""
    for tensor, pipeline, context, expert in itertools.product(divisors(world_size), repeat=4):
        for expert_tensor in {1, tensor}:
            if world_size % (tensor * pipeline * context) == 0 and world_size % (expert * expert_tensor * pipeline) == 0:
                yield Layout(
                    world_size=world_size,
                    tensor_parallel=tensor,
                    pipeline_parallel=pipeline,
                    context_parallel=context,
                    expert_parallel=expert,
                    expert_tensor_parallel=expert_tensor,
                )


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12, 16])
def test_ranks_are_where_megatron_puts_them(world_size: int):
    from megatron.core.parallel_state import RankGenerator

    count = 0
    for layout in layouts(world_size):
        count += 1
        pipeline, order = layout.pipeline_parallel, "tp-cp-ep-dp-pp"
        dense = RankGenerator(tp=layout.tensor_parallel, ep=1, dp=layout.data_parallel, pp=pipeline, cp=layout.context_parallel, order=order)
        grove = RankGenerator(
            tp=layout.expert_tensor_parallel, ep=layout.expert_parallel, dp=layout.expert_data_parallel, pp=pipeline, cp=1, order=order
        )
        for generator, names in ((dense, DENSE), (grove, GROVE)):
            for dimension, token in names.items():
                for ranks in generator.get_ranks(token):
                    assert len(ranks) == layout.size(dimension), (layout, dimension)
                    for place, rank in enumerate(ranks):
                        assert layout.ranks_of(rank, dimension) == ranks, (layout, dimension, rank)
                        if GROUPS[dimension] == (dimension,):
                            assert vars(layout.coordinates(rank))[dimension] == place
    assert count >= world_size


def test_every_group_is_compared_with_megatrons():
    assert {*DENSE, *GROVE} == {*GROUPS}


@pytest.mark.parametrize("world_size", [12, 1024])
def test_coordinates_count_up_in_megatrons_order(world_size: int):
    """By the definition alone: tensor changes fastest and pipeline slowest, in both views."""
    layout = Layout(world_size=world_size, tensor_parallel=2, pipeline_parallel=2, context_parallel=3 if world_size == 12 else 4, expert_parallel=2)
    for order in (DENSE_ORDER, GROVE_ORDER):
        slowest_first = [range(layout.size(dimension)) for dimension in reversed(order)]
        counted = list(itertools.product(*slowest_first))
        seen = [tuple(getattr(layout.coordinates(rank), dimension) for dimension in reversed(order)) for rank in range(world_size)]
        assert seen == counted


def test_a_rank_outside_is_refused():
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=f"rank {rank} is not one of 4"):
            Layout(world_size=4).coordinates(rank)
    with pytest.raises(KeyError):
        Layout().ranks_of(0, "sequence")


def test_sizes_that_follow_from_the_others():
    layout = Layout(world_size=48, tensor_parallel=2, pipeline_parallel=3, context_parallel=4, expert_parallel=8)
    assert (layout.model_parallel, layout.data_parallel, layout.expert_data_parallel) == (6, 2, 2)
    assert (layout.size("tensor_and_data"), layout.size("data_and_context"), layout.size("model")) == (16, 8, 6)
    assert str(layout) == "tp2-pp3-cp4-dp2-ep8-plain"
    detailed = Layout(tensor_parallel=2, sequence_parallel=True, world_size=8, pipeline_parallel=4, virtual_pipeline=2, expert_tensor_parallel=2, zero_stage=2)
    assert str(detailed) == "tp2sp-pp4v2-ep1etp2-zero2"


@pytest.mark.parametrize(
    ("tensor", "expert", "expert_tensor", "experts", "splits"),
    [(1, 1, 1, False, False), (1, 2, 1, True, False), (2, 1, 2, False, False), (2, 1, 1, True, True), (2, 2, 2, True, False)],
)
def test_when_groves_are_reduced_apart_and_tokens_split(tensor: int, expert: int, expert_tensor: int, experts: bool, splits: bool):
    layout = Layout(world_size=4, tensor_parallel=tensor, expert_parallel=expert, expert_tensor_parallel=expert_tensor)
    assert (layout.groves_are_experts, layout.splits_grove_tokens) == (experts, splits)


def test_what_is_unset_is_resolved():
    config = Config()
    assert layout_of(config, 1) == Layout(zero_stage=None)
    config.parallel.tensor_parallel, config.parallel.expert_parallel = 2, 4
    layout = layout_of(config, 8)
    assert (layout.sequence_parallel, layout.expert_tensor_parallel, layout.zero_stage, layout.data_parallel) == (True, 1, 1, 4)
    config.parallel.sequence_parallel, config.parallel.expert_tensor_parallel, config.parallel.zero_stage = False, 2, 3
    layout = layout_of(config, 8)
    assert (layout.sequence_parallel, layout.expert_tensor_parallel, layout.zero_stage) == (False, 2, 3)


def test_a_model_without_groves_has_no_experts():
    config = Config()
    config.model.ffn, config.parallel.tensor_parallel = "swiglu", 2
    assert not layout_of(config, 4).groves_are_experts


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [None, 0, 2])
def test_the_stage_is_the_one_that_the_run_trains_with(world_size: int, precision: str, stage: int | None):
    config = Config()
    config.train.precision, config.parallel.zero_stage = precision, stage
    expected = stage if stage is not None else None if (world_size, precision) == (1, "fp32") else 1
    assert resolved_zero_stage(config, world_size) == zero_stage(config, world_size) == layout_of(config, world_size).zero_stage == expected


# --- pipeline stages


def by_trying_all(costs: list[float], stages: int) -> list[tuple[float, int, list[int]]]:
    """(largest stage, sum of squared layer counts, layer counts) of every split."""
    splits = []
    for cuts in itertools.combinations(range(1, len(costs)), stages - 1):
        ends = [*cuts, len(costs)]
        starts = [0, *cuts]
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        splits.append((max(math.fsum(costs[start:end]) for start, end in zip(starts, ends, strict=True)), sum(n * n for n in counts), counts))
    return splits


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.data())
def test_the_split_is_the_best_of_all(costs: list[int], data: st.DataObject):
    """Whole numbers, so that equal splits are exactly equal."""
    stages = data.draw(st.integers(1, len(costs)))
    found = split_stages(costs, stages)
    assert [layer for stage in found for layer in stage] == list(range(len(costs)))
    assert [len(stage) for stage in found] == min(by_trying_all([float(cost) for cost in costs], stages))[2]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=8), st.data())
def test_the_largest_stage_is_the_least_possible(costs: list[float], data: st.DataObject):
    stages = data.draw(st.integers(1, len(costs)))
    largest = max(math.fsum(costs[layer] for layer in stage) for stage in split_stages(costs, stages))
    assert largest == pytest.approx(min(by_trying_all(costs, stages))[0], rel=1e-6)


def test_equal_layers_are_split_evenly_the_first_stages_less():
    assert [len(stage) for stage in split_stages([0.1] * 10, 4)] == [2, 2, 3, 3]


def test_embedding_and_head_count():
    """A head as costly as two layers leaves its stage two layers fewer."""
    assert [len(stage) for stage in split_stages([1.0] * 7 + [3.0], 2)] == [5, 3]
    assert [len(stage) for stage in split_stages([3.0] + [1.0] * 7, 2)] == [3, 5]


def test_stages_by_hand():
    assert given_stages([1, 3, 2], 6, 3) == [range(1), range(1, 4), range(4, 6)]
    for wrong in ([3, 3], [1, 2, 2], [0, 3, 3], []):
        with pytest.raises(ValueError, match="does not split 6 layers in 3 stages"):
            given_stages(wrong, 6, 3)
    with pytest.raises(ValueError, match="2 layers cannot make 3 stages"):
        split_stages([1.0, 1.0], 3)
