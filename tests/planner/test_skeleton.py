"""A skeleton says of every layout what the whole share says, which is built of all its blocks."""

import pytest

from kan_train.config.compose import compose_train
from kan_train.config.layout import layout_of
from kan_train.engine.pipeline import stage_parts
from kan_train.planner.links import ranks_on_a_node
from kan_train.planner.memory import memory_of
from kan_train.planner.message import merged
from kan_train.planner.share import share_of
from kan_train.planner.skeleton import Skeletons
from kan_train.planner.traffic import traffic_of

LAYOUTS = [
    ("kan_125m", ["tensor_parallel=4", "expert_parallel=2", "zero_stage=1"]),
    ("kan_125m", ["expert_parallel=4", "zero_stage=3"]),
    ("moe_tiny", ["expert_parallel=2", "context_parallel=2", "zero_stage=2"]),
    ("dense_125m_total", ["tensor_parallel=2", "pipeline_parallel=2", "virtual_pipeline=2", "zero_stage=2"]),
    ("kan_tiny", ["tensor_parallel=2", "expert_tensor_parallel=2", "zero_stage=0"]),
    ("kan_literal", ["expert_parallel=4", "zero_stage=2"]),
]


@pytest.mark.parametrize(("model", "sizes"), LAYOUTS, ids=[f"{model}-{'-'.join(sizes)}" for model, sizes in LAYOUTS])
def test_it_sends_and_holds_what_the_share_does(model: str, sizes: list[str]):
    settings = ["train.global_batch_size=32", "train.micro_batch_size=1", *(f"parallel.{size}" for size in sizes)]
    config = compose_train([f"model={model}", *settings], world_size=8)
    layout = layout_of(config, 8)
    parts, skeletons = stage_parts(config, layout), Skeletons(config)
    for rank in range(0, 8, 8 // layout.pipeline_parallel):  # one of every stage
        share = share_of(config, layout, rank)
        skeleton = skeletons.share(config, layout, [parts[stage] for stage in share.stages], share.stages)
        assert skeleton.elements == share.elements
        assert list(dict(skeleton.named_parameters())) == list(dict(share.named_parameters()))
        assert memory_of(skeleton) == memory_of(share)
        if rank == 0 or layout.virtual_pipeline == 1:  # interleaved over two ranks, the second sends by the other of two groups
            assert merged(traffic_of(skeleton)) == merged(traffic_of(share))


@pytest.mark.parametrize("devices", [1, 4, 8, 16])
@pytest.mark.parametrize(
    "sizes", [["tensor_parallel=2"], ["tensor_parallel=4", "pipeline_parallel=2", "zero_stage=2"], ["expert_parallel=8", "context_parallel=2"]]
)
def test_ranks_of_a_machine_are_counted(sizes: list[str], devices: int):
    config = compose_train(["train.global_batch_size=64", "train.micro_batch_size=1", *(f"parallel.{size}" for size in sizes)], world_size=32)
    layout = layout_of(config, 32)
    for group in ("tensor", "context", "data", "pipeline", "expert", "expert_data", "data_and_context", "tensor_and_data", "model"):
        assert ranks_on_a_node(layout, group, devices) == sum(rank < devices for rank in layout.ranks_of(0, group)), group
