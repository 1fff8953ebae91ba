"""Counting messages, by hand. tests/layouts/test_collectives.py holds every message of real steps against the planner."""

import itertools

import pytest

from kan_train.config.compose import compose_train
from kan_train.config.layout import layout_of
from kan_train.planner.message import Message, merged
from kan_train.planner.share import share_of
from kan_train.planner.traffic import Routed, expected_destinations, traffic_of


def messages(*overrides: str, world: int, rank: int = 0, routed: Routed | None = None) -> list[Message]:
    config = compose_train(["run.dry_run=true", f"run.world_size={world}", *overrides], world_size=1)
    return merged(traffic_of(share_of(config, layout_of(config, world), rank), routed))


@pytest.mark.parametrize(("groves", "active", "ranks"), [(8, 2, 4), (8, 3, 2), (6, 6, 3), (4, 1, 4)])
def test_expected_destinations_are_the_mean_over_all_choices(groves: int, active: int, ranks: int):
    held = groves // ranks
    counts = [len({grove // held for grove in choice}) for choice in itertools.combinations(range(groves), active)]
    assert expected_destinations(groves, active, ranks) == pytest.approx(sum(counts) / len(counts))


@pytest.mark.parametrize(
    ("operation", "sent"), [("all-gather", 300), ("reduce-scatter", 300), ("all-reduce", 600), ("all-to-all", 300), ("send", 400), ("receive", 0)]
)
def test_what_a_ring_of_four_sends(operation: str, sent: int):
    """Three quarters of what is gathered; a sum is scattered and gathered; a message is itself."""
    assert Message("tensor", "x", operation, 2, 400, 4).sent == sent


def test_one_process_sends_nothing():
    assert messages(world=1) == []


def test_data_parallel_ranks_send_gradients_and_weights():
    """ZeRO-1 once a step, whatever the micro-batches; ZeRO-2 reduces at every one."""
    settings = ["train.global_batch_size=32", "train.micro_batch_size=2", "model=dense_tiny_total"]
    once = {one.purpose: one for one in messages(*settings, "parallel.zero_stage=1", world=4)}
    each = {one.purpose: one for one in messages(*settings, "parallel.zero_stage=2", world=4)}
    config = compose_train(settings, world_size=1)
    elements = share_of(config, layout_of(config, 1), 0).elements
    assert once["gradients"].total == 4 * elements
    assert each["gradients"].total == 4 * once["gradients"].total
    assert once["weights"].total == pytest.approx(4 * elements, rel=1e-4)


def test_the_vocabulary_is_exchanged_slice_by_slice():
    """3 x 400 tokens are two slices of 512 rows and a rest of 176; every rank gives three fp32 numbers a row."""
    settings = ["model=dense_tiny_total", "model.ffn_width=256", "model.sequence_length=400", "train.micro_batch_size=3", "train.global_batch_size=3"]
    (exchange,) = [one for one in messages(*settings, "parallel.tensor_parallel=2", world=2) if one.purpose == "head: vocabulary"]
    assert (exchange.calls, exchange.total) == (3, 2 * 1200 * 3 * 4)


def test_rows_that_are_known_take_the_place_of_the_expected():
    settings = ["parallel.expert_parallel=2", "parallel.zero_stage=1", "train.micro_batch_size=4"]
    routed = {one.purpose: one for one in messages(*settings, world=2, routed=Routed(10, 20, 30)) if one.group == "expert"}
    width = 4 * compose_train([]).model.width
    assert routed["tokens to groves"].total == routed["gradients of outputs"].total == 10 * width
    assert routed["outputs of groves"].total == routed["gradients of tokens"].total == 20 * width
    assert routed["gradients of choices"].total == 30 * 4


def test_zero_3_gathers_a_large_model_twice_a_micro_batch():
    """For its forward and its backward pass, but for what lies within 1e9 elements of its next use: the end of the model."""
    settings = ["train.global_batch_size=2", "train.micro_batch_size=1", "parallel.zero_stage=3"]
    small = {one.purpose: one.total for one in messages("model=dense_tiny_total", *settings, world=2)}
    large = {one.purpose: one.total for one in messages("model=dense_340b_active", *settings, world=2)}
    assert 0.9 < small["weights"] / small["gradients"] <= 1
    assert 1.9 < large["weights"] / large["gradients"] < 2


def test_stages_send_the_stream_on_and_its_gradient_back():
    settings = ["train.global_batch_size=8", "train.micro_batch_size=2", "parallel.pipeline_parallel=2", "parallel.zero_stage=2"]
    width, length = (getattr(compose_train([]).model, name) for name in ("width", "sequence_length"))
    first = {one.purpose: one for one in messages(*settings, world=2) if one.operation in ("send", "receive")}
    last = {one.purpose: one for one in messages(*settings, world=2, rank=1) if one.operation in ("send", "receive")}
    assert {purpose: one.operation for purpose, one in first.items()} == {"stream to the next stage": "send", "gradient from the next stage": "receive"}
    assert {purpose: one.operation for purpose, one in last.items()} == {"stream from the stage before": "receive", "gradient to the stage before": "send"}
    assert all((one.calls, one.each) == (4, 2 * length * width * 4) for one in (*first.values(), *last.values()))
