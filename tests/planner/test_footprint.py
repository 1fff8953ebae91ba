"""Peak memory of a step: what the planner says, against the live tensor bytes of real training on the same layout.

The tally (live_bytes.py) counts storages and knows no formula; every layout of the campaign is in benchmarks/planner_memory.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
LAYOUTS = HERE.parent / "layouts"
for folder in (HERE, LAYOUTS):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # the processes import these modules by the same names

from footprint_rows import FAST, Case  # noqa: E402
from layout_matrix.rows import PP, TP, Row  # noqa: E402
from live_bytes import LiveBytes  # noqa: E402

from kan_train.config.compose import compose_train  # noqa: E402
from kan_train.parallel.layout import layout_of  # noqa: E402
from kan_train.planner import footprint, kept  # noqa: E402
from kan_train.planner.buffers import Buffers  # noqa: E402
from kan_train.planner.footprint import footprint_of, rank_footprint  # noqa: E402
from kan_train.planner.schedule import in_flight  # noqa: E402
from kan_train.planner.share import share_of  # noqa: E402

pytestmark = pytest.mark.xdist_group("layouts")
TOLERANCE = 0.05


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Peak live tensor bytes of the fullest rank, by case."""
    folder = tmp_path_factory.mktemp("footprint")
    paths = [str(HERE), str(LAYOUTS), *(path for path in sys.path if path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(HERE / "footprint_ranks.py"), str(folder), "cpu", *(case.name for case in FAST)]
    with (folder / "output").open("w+") as output:
        code = subprocess.run(command, env=environment, stdout=output, stderr=output, timeout=900).returncode
        output.seek(0)
        assert code == 0, output.read()[-4000:]
    return {case.name: max(json.loads((folder / f"{case.name}-rank-{rank}.json").read_text())["peak"] for rank in range(case.row.world)) for case in FAST}


def planned(case: Case) -> int:
    config = case.config()
    return footprint_of(config, layout_of(config, case.row.world)).total


@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_the_planner_is_within_five_percent_of_the_fullest_rank(case: Case, measured: dict[str, int]):
    assert planned(case) == pytest.approx(measured[case.name], rel=TOLERANCE)


def one_under_way(layout, stage, micro_batches):
    yield 0, [1] * layout.virtual_pipeline, micro_batches > 1


def without(name: str):
    """Operators of a part keep nothing."""
    return lambda ops, beside=0: kept.summed([op for op in ops if op.part != name], beside)


FAULTS = {
    "a stage has one micro-batch under way": (3, lambda patch: patch.setattr(footprint, "in_flight", one_under_way)),
    "the feed-forward layer keeps nothing": (0, lambda patch: patch.setattr(footprint, "summed", without("feed-forward"))),
    "convolutions keep nothing": (3, lambda patch: patch.setattr(footprint, "summed", without("conv"))),
    "ZeRO-3 gathers nothing": (4, lambda patch: patch.setattr(footprint, "buffers_of", lambda *_, **__: Buffers(grows=False))),
    "sequence parallelism copies nothing": (1, lambda patch: patch.setattr(footprint, "Cut", lambda **own: kept.Cut(**own | {"strided": False}))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_formula_is_seen(fault: str, measured: dict[str, int], monkeypatch: pytest.MonkeyPatch):
    number, plant = FAULTS[fault]
    footprint._block.cache_clear()
    plant(monkeypatch)
    try:
        wrong = planned(FAST[number])
    finally:
        footprint._block.cache_clear()
    assert abs(wrong / measured[FAST[number].name] - 1) > TOLERANCE


def test_a_tally_counts_every_storage_once_and_until_it_is_gone():
    with LiveBytes() as tally:
        before = tally.now
        x = torch.zeros(1000, requires_grad=True)
        views = [x.detach()[:10], x.detach().view(10, 100)]
        assert tally.now - before == 4000
        y = x.exp()  # autograd keeps it
        total = y.sum()
        del y
        assert tally.now - before == 8004
        total.backward()
        assert tally.now - before == 4000 + 4 + 4000
        del total, views
        x.grad = None
        assert tally.now - before == 4000
        assert tally.peak - before >= 4000 + 4000 + 4000
        del x
        assert tally.now == before


def test_micro_batches_under_way():
    """1F1B: as many as there are stages from this one on. Interleaved, two stages of two chunks: the first has 2 + 2 forward passes ahead and one more."""
    pipeline = Case(Row(world=4, zero=1, layout={"pipeline_parallel": 4}))
    layout = layout_of(pipeline.config(), 4)
    assert [[counts for _, counts, _ in in_flight(layout, stage, 8)] for stage in range(4)] == [[[4]], [[3]], [[2]], [[1]]]
    assert list(in_flight(layout, 0, 4)) == [(0, [4], False), (0, [3], True)]
    assert list(in_flight(layout, 3, 1)) == [(0, [1], False)]
    chunked = layout_of(Case(Row(world=2, zero=1, layout=PP | {"virtual_pipeline": 2})).config(), 2)
    assert max(sum(counts) for _, counts, _ in in_flight(chunked, 0, 8)) == 5
    assert max(sum(counts) for _, counts, _ in in_flight(chunked, 1, 8)) == 3
    assert {chunk for chunk, _, _ in in_flight(chunked, 0, 8)} == {0, 1}


def test_a_dense_block_by_hand():
    """SwiGLU keeps what it read, silu's input and output, the value and their product; the norm one number a token."""
    case = Case(Row(world=1, zero=None, kind="dense", micro_batch=4))
    model = case.config().model
    cut = kept.Cut(model=model, sequences=4, chunk=256, element=4)
    tokens, block = 4 * 256, kept.summed(kept.swiglu(cut))
    assert block.kept["feed-forward"] == 4 * tokens * (model.width + 4 * model.ffn_width)
    assert block.kept["norms"] == 4 * tokens
    assert block.kept["stream"] == 4 * tokens * model.width
    assert block.weights == 4 * 3 * model.width * model.ffn_width + 4 * model.width


def test_settings_that_move_memory():
    """Recomputation and smaller micro-batches save activations, whatever the configuration says; offloaded state is the host's."""
    config = Case(Row(world=4, zero=2, layout=TP, micro_batch=4)).config()
    layout = layout_of(config, 4)
    full = footprint_of(config, layout)
    assert footprint_of(config, layout, recompute=True).total < full.total
    assert footprint_of(config, layout, 1).total < footprint_of(config, layout, 2).total < full.total
    assert config.train.micro_batch_size == 4
    config.parallel.offload_optimizer = True
    off = footprint_of(config, layout)
    assert full.total - off.total == off.host == full.parts["masters"] + full.parts["moments"]


LARGE = [
    "model=kan_340b", "train.precision=bf16", "train.global_batch_size=1024", "train.micro_batch_size=1", "parallel.tensor_parallel=8",
    "parallel.pipeline_parallel=8", "parallel.expert_parallel=16", "parallel.zero_stage=2", "run.dry_run=true", "run.world_size=1024",
]  # fmt: skip


def test_a_rank_of_a_large_run_and_the_fullest_one_agree():
    """Whole blocks on the meta device and one block of each kind say the same; later stages hold less."""
    config = compose_train(LARGE, world_size=1)
    layout = layout_of(config, 1024)
    fullest = footprint_of(config, layout)
    first, last = (rank_footprint(share_of(config, layout, rank)) for rank in (0, 1023))
    assert first == fullest
    assert (first.stage, last.stage) == (0, 7)
    assert last.total < first.total
    assert sum(first.parts.values()) == first.total


def test_many_layouts_cost_one_model(monkeypatch: pytest.MonkeyPatch):
    """A search asks for hundreds of layouts: blocks are built once for each way to cut them, never the whole model."""
    config = compose_train(LARGE, world_size=1)
    footprint_of(config, layout_of(config, 1024))
    built = []
    monkeypatch.setattr("kan_train.planner.skeleton.Block", lambda *_: built.append(1))
    for micro_batch in (1, 2, 4, 8):
        for recompute in (False, True):
            assert footprint_of(config, layout_of(config, 1024), micro_batch, recompute=recompute).total > 0
    assert built == []
