"""Bytes that a rank holds, by hand. tests/layouts/test_collectives.py holds them against real engines."""

import dataclasses

import pytest

from kan_train.config.compose import compose_train
from kan_train.config.layout import layout_of
from kan_train.planner.memory import Memory, memory_of
from kan_train.planner.share import share_of

SETTINGS = ["train.global_batch_size=64", "train.micro_batch_size=1", "run.dry_run=true"]


def held(*overrides: str, world: int = 4) -> tuple[Memory, int]:
    """Memory of rank 0, and its parameters."""
    config = compose_train([*SETTINGS, f"run.world_size={world}", *overrides], world_size=1)
    share = share_of(config, layout_of(config, world), 0)
    return memory_of(share), share.elements


def test_plain_training_keeps_sixteen_bytes_a_parameter():
    memory, elements = held(world=1)
    assert (memory.weights, memory.gradients, memory.masters, memory.moments) == (4 * elements, 4 * elements, 0, 8 * elements)
    assert memory.device == 16 * elements


# Bytes a parameter: weights, gradients, masters, moments; over four ranks that hold the same.
STAGES = {
    ("fp32", 0): (4, 4, 0, 8),
    ("fp32", 1): (4, 4, 1, 2),
    ("fp32", 2): (4, 1, 1, 2),
    ("fp32", 3): (1, 1, 1, 2),
    ("bf16", 1): (2, 6, 1, 2),
    ("bf16", 2): (2, 1, 1, 2),
    ("bf16", 3): (0.5, 1, 1, 2),
}


@pytest.mark.parametrize(("precision", "stage"), STAGES)
def test_bytes_a_parameter_of_every_stage(precision: str, stage: int):
    memory, elements = held(f"train.precision={precision}", f"parallel.zero_stage={stage}")
    if (precision, stage) == ("fp32", 2):  # whole parameters at both ends of the range
        assert memory.gradients >= elements
        memory = dataclasses.replace(memory, gradients=elements)
    found = [size / elements for size in (memory.weights, memory.gradients, memory.masters, memory.moments)]
    assert found == pytest.approx(STAGES[precision, stage], rel=1e-4)  # padding


@pytest.mark.parametrize(("precision", "gradients"), [("fp32", 4), ("bf16", 6)])
def test_a_pipeline_keeps_all_gradients_of_its_stage_and_in_bf16_their_sums(precision: str, gradients: int):
    memory, elements = held(f"train.precision={precision}", "parallel.zero_stage=2", "parallel.pipeline_parallel=2")
    assert memory.gradients == gradients * elements
    assert memory.masters == pytest.approx(4 * elements / 2, rel=1e-4)


def test_groves_are_cut_for_those_that_hold_them():
    """Of eight ranks all hold the same dense parameters, and two the same groves."""
    config = compose_train([*SETTINGS, "run.world_size=8", "parallel.expert_parallel=4", "parallel.zero_stage=1"], world_size=1)
    share = share_of(config, layout_of(config, 8), 0)
    groves = share.by_part()["groves"]
    assert memory_of(share).masters == pytest.approx(4 * (groves / 2 + (share.elements - groves) / 8), rel=1e-4)


def test_offloaded_state_is_not_on_the_device():
    on, _ = held("parallel.zero_stage=2")
    off, _ = held("parallel.zero_stage=2", "parallel.offload_optimizer=true")
    assert (off.masters, off.moments) == (on.masters, on.moments)
    assert on.device - off.device == on.masters + on.moments == on.optimizer


def test_muon_keeps_one_momentum_for_matrices():
    adamw, _ = held("optimizer=adamw", world=1)
    muon, _ = held("optimizer=muon", world=1)
    config = compose_train([*SETTINGS, "run.world_size=1"], world_size=1)
    share = share_of(config, layout_of(config, 1), 0)
    matrices = sum(p.numel() for _, p in share.named_parameters() if p.spec.matrix)  # type: ignore[attr-defined]
    assert matrices
    assert adamw.moments - muon.moments == 4 * matrices
