"""One rank's share of a model: the shares of all ranks are the model, as often as the layout keeps copies of it."""

from collections import Counter

import pytest

from kan_train.config.compose import compose_train
from kan_train.config.layout import Layout, layout_of
from kan_train.model.lm import count_parameters, parameter_table
from kan_train.planner.share import Copies, share_of

SMALL = ["model.num_layers=4", "model.grove.num_groves=8", "model.grove.active_groves=2", "model.grove.shared_width=64", "train.global_batch_size=64"]
LAYOUTS = {
    "tensor, pipeline, context": ["parallel.tensor_parallel=2", "parallel.pipeline_parallel=2", "parallel.context_parallel=2", "parallel.zero_stage=2"],
    "groves over eight": ["parallel.tensor_parallel=2", "parallel.expert_parallel=8", "parallel.zero_stage=1"],
    "groves split inside": [*(f"parallel.{name}=2" for name in ("tensor_parallel", "expert_tensor_parallel", "expert_parallel")), "parallel.zero_stage=1"],
    "interleaved": ["parallel.pipeline_parallel=2", "parallel.virtual_pipeline=2", "parallel.zero_stage=1"],
}
WORLD = 16


def described(overrides: list[str], world: int = WORLD):
    config = compose_train([*SMALL, "train.micro_batch_size=1", "run.dry_run=true", f"run.world_size={world}", *overrides], world_size=1)
    return config, layout_of(config, world)


@pytest.mark.parametrize("overrides", LAYOUTS.values(), ids=LAYOUTS)
def test_the_shares_of_all_ranks_are_the_model(overrides: list[str]):
    """Elements of every parameter, summed over the ranks: its global number times the ranks that hold it alike."""
    config, layout = described(overrides)
    held: Counter[str] = Counter()
    for rank in range(WORLD):
        held.update({name: parameter.numel() for name, parameter in share_of(config, layout, rank).named_parameters()})
    table = parameter_table(config.model)
    assert held.keys() == table.keys()
    stage = WORLD // layout.pipeline_parallel
    for name, spec in table.items():
        split = 1
        for axis in spec.axes:
            if axis == "grove":
                split *= layout.expert_parallel
            elif axis == "hidden" and spec.grove:
                split *= layout.expert_tensor_parallel
            elif axis is not None:
                split *= layout.tensor_parallel
        assert held[name] == spec.numel * stage // split, name


def test_parts_are_counted_apart_and_together_are_all():
    config, layout = described([], 1)
    share = share_of(config, layout, 0)
    parts = share.by_part()
    assert list(parts) == ["embedding", "mixers", "routers", "groves", "shared groves", "norms", "head"]
    assert sum(parts.values()) == share.elements == count_parameters(config.model)[0]
    model = config.model
    assert parts["embedding"] == parts["head"] == model.vocab_size * model.width
    assert parts["norms"] == (2 * model.num_layers + 1) * model.width
    assert parts["groves"] == sum(spec.numel for spec in parameter_table(model).values() if spec.grove)


def test_a_dense_model_has_a_feed_forward_part():
    config, layout = described(["model=dense_tiny_total", "model.num_layers=2"], 1)
    parts = share_of(config, layout, 0).by_part()
    assert parts["feed-forward"] == 2 * 3 * config.model.width * config.model.ffn_width
    assert "groves" not in parts


def test_the_chunks_of_an_interleaved_stage_are_far_apart():
    config, layout = described([*LAYOUTS["interleaved"], "parallel.stage_layers=[1,1,1,1]"])
    first, second = share_of(config, layout, 0), share_of(config, layout, WORLD - 1)
    assert [model.part.layers for model in first.models] == [range(0, 1), range(2, 3)]
    assert [model.part.layers for model in second.models] == [range(1, 2), range(3, 4)]
    assert "embedding" in first.by_part()
    assert "head" not in first.by_part()
    assert "head" in second.by_part()


def test_groves_that_others_hold_are_set_apart():
    config, layout = described(LAYOUTS["groves over eight"])
    share = share_of(config, layout, 5)
    expert = [copies for copies in share.copies() if copies.expert]
    dense = [copies for copies in share.copies() if not copies.expert]
    assert {copies.ranks for copies in expert} == {2}
    assert {copies.ranks for copies in dense} == {8}
    assert sum(sum(copies.sizes) for copies in expert) == share.by_part()["groves"]
    assert sum(sum(copies.sizes) for copies in share.copies()) == share.elements


def test_padding():
    """Ranges of a flat tensor are equal and aligned to two elements; under ZeRO-3 every parameter is cut by itself."""
    copies = Copies("data_and_context", 4, (10, 7, 1))
    assert copies.flat == 24
    assert copies.partitioned == 3 + 2 + 1
    assert Copies("data_and_context", 4, (8, 8)).flat == 16


def test_parameters_that_a_range_touches():
    """Three ranges of 8: elements 0 to 8 have a and a part of b, 8 to 16 the middle of b, 16 to 24 its end and c."""
    copies = Copies("data_and_context", 3, (5, 13, 6))
    assert [copies.touched(rank) for rank in range(3)] == [18, 13, 19]
    assert Copies("data_and_context", 2, (8, 8)).touched(1) == 8


def test_a_rank_outside_the_layout_is_refused():
    config, _ = described([])
    with pytest.raises(ValueError, match="rank 4 is not one of 4"):
        share_of(config, Layout(world_size=4, zero_stage=1), 4)
