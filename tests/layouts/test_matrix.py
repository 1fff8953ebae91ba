"""Every layout trains the same model as one process (docs/layouts.md), the fast rows of it; planted mistakes are found.

The whole matrix: python benchmarks/layouts.py. What a row does is in layout_matrix/; the reference is one process of plain PyTorch in float64.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from layout_matrix.compare import NEAR_TIE, Comparison, compare
from layout_matrix.faults import FAULTS
from layout_matrix.member import Replay
from layout_matrix.pool import Pool
from layout_matrix.reference import Reference, train
from layout_matrix.rows import BALANCE_RATE, LENGTH, ROWS, SEQUENCES, SIZES, Row, Seat, batches, find, learning_rate, micro_batches, routed_positions

from kan_train.config.layout import layout_of
from kan_train.engine import build_engine
from kan_train.parallel.runtime import single_process_runtime

# One worker has the server of processes, and runs one row at a time.
pytestmark = pytest.mark.xdist_group("layouts")

FAST = [row for row in ROWS if row.fast]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool() as started:
        yield started


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory):
    """Folder of the reference of a row; rows of one kind share it."""
    folder = tmp_path_factory.mktemp("references")

    def trained(row: Row) -> Path:
        path = folder / row.model_key
        if not path.exists():
            train(row).save(path)
        return path

    return trained


@pytest.fixture
def run(pool, reference, tmp_path):
    def compared(row: Row, **more) -> Comparison:
        kept = reference(row)
        seen = pool.run(row, tmp_path / "row", choices=kept / "tensors.safetensors", **more)
        return compare(row, seen, Reference.load(kept))

    return compared


@pytest.mark.slow
@pytest.mark.parametrize("row", FAST, ids=lambda row: row.name)
def test_a_layout_trains_the_same_model(row, run):
    """20 steps: losses and gradient norms to 1e-5, first gradients, last weights and buffers, every choice of groves but near-ties."""
    assert run(row).failures == []


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name, run):
    """It breaks the bound that it is said to break, within three steps; the losses of some of them would not show it."""
    fault = FAULTS[name]
    (row,) = find([fault.row])
    broken = [failure.partition(":")[0] for failure in run(row, fault=name, steps=3).failures]
    assert fault.broken in broken, broken


@pytest.mark.slow
def test_an_error_in_a_process_is_told_and_the_next_row_runs(pool, tmp_path):
    (row,) = find(["reuse-dp2-zero1-acc1"])
    failed = pool.run(row, tmp_path / "failed", fault="unheard of")
    assert "exit codes [1, 1]" in failed.error
    assert "KeyError: 'unheard of'" in failed.error
    assert compare(row, failed, Reference([], [], {}, {}, {}, {}, torch.empty(0), torch.empty(0))).failures[0].startswith("error: exit codes")
    assert pool.run(row, tmp_path / "next", steps=1).error == ""


def test_the_matrix_has_what_it_should():
    """Every pair of tensor, pipeline, context and expert parallelism under ZeRO 1 and 2; ZeRO-3 with three of them; names of their own."""
    assert len(ROWS) >= 24
    assert len({row.name for row in ROWS}) == len(ROWS)
    split = {(row.zero, short, other) for row in ROWS for short, other in itertools.combinations([s for s, key in SIZES.items() if row.size(key) > 1], 2)}
    for zero, (short, other) in itertools.product((1, 2), itertools.combinations(("tp", "cp", "pp", "ep"), 2)):
        assert (zero, short, other) in split
    assert {short for row in ROWS if row.zero == 3 for short, key in SIZES.items() if row.size(key) > 1} == {"tp", "cp", "ep"}
    assert {row.sequence_parallel for row in ROWS if row.size("tensor_parallel") > 1} == {True, False}
    assert {row.kind for row in ROWS} == {"kan", "hybrid", "dense", "reuse", "edge"}
    assert max(row.world for row in FAST) == 4


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_can_be_built_and_shards_what_it_claims(row):
    """A ZeRO stage says nothing where one rank alone holds a parameter."""
    config = row.config()
    config.validate(row.world)
    layout = layout_of(config, row.world)
    assert (layout.data_parallel, layout.sequence_parallel) == (row.data_parallel, row.sequence_parallel)
    if row.zero:
        assert row.dense_copies >= 2
        assert row.kind == "dense" or (row.grove_copies == layout.expert_data_parallel and row.grove_copies >= 2)
    for rank in range(row.world):
        seat, place = Seat.of(row, rank), layout.coordinates(rank)
        assert (seat.tensor, seat.context, seat.data, seat.pipeline) == (place.tensor, place.context, place.data, place.pipeline)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_ranks_of_a_stage_route_every_token_once(row):
    """Or as often as there are ranks that split the groves' hidden units."""
    count = torch.zeros(SEQUENCES, LENGTH)
    for rank in range(row.world):
        if Seat.of(row, rank).pipeline == 0:
            for sequences in micro_batches(row, rank):
                count[sequences, routed_positions(row, rank)] += 1
    assert (count == row.size("expert_tensor_parallel")).all()


def test_a_choice_that_falls_the_other_way_is_counted_and_replaced(reference):
    """The reference is told to have chosen otherwise for one token, once: the run goes on with that choice, and nothing else differs there."""
    row = Row(world=1, zero=0, micro_batch=2)
    kept = Reference.load(reference(row))
    altered, where = kept.choices.clone(), (0, 1, 5, 17)
    altered[where] = torch.tensor(sorted({0, 1, 2, 3} - set(kept.choices[where].tolist()))[:2])

    def first_loss_and_flips(choices) -> tuple[float, list]:
        config = row.config()
        config.parallel.zero_stage = None
        engine = build_engine(config, single_process_runtime(config))
        replay = Replay(row, 0, choices)
        replay.install(engine)
        replay.begin(0)
        result = engine.train_step(batches(row, 0, 0), learning_rate(0), BALANCE_RATE)
        return result.loss, replay.differ

    loss, flips = first_loss_and_flips(kept.choices)
    assert (flips, loss) == ([], pytest.approx(kept.losses[0], rel=1e-6))
    other_loss, other_flips = first_loss_and_flips(altered)
    assert other_flips[0] == where
    # A token that went elsewhere moves the later layers' choices of itself and of those that follow it in its sequence, and no others.
    assert {(step, sequence) for step, _, sequence, _ in other_flips} == {(0, 5)}
    assert min(position for _, layer, _, position in other_flips if layer > 0) >= 17
    assert abs(other_loss / loss - 1) > 1e-6


def test_the_reference_tells_near_ties_from_clear_choices(reference):
    """Margins are of the scores in float64: most are far above the bound, so that a flip there is a mistake."""
    margins = Reference.load(reference(Row(world=1, zero=0))).margins
    assert (margins >= 0).all()
    assert (margins < NEAR_TIE).double().mean() < 1e-3
    assert margins.median() > 100 * NEAR_TIE
