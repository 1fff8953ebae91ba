"""Any layout goes on with what any other saved (docs/reliability.md): weights, optimizer, buffers, samples, random states, counters.

All pairs of all layouts: python benchmarks/reshard.py. What the processes do is in recovery_proofs/.
"""

from pathlib import Path

import pytest
from layout_matrix.pool import Pool
from recovery_proofs.faults import FAULTS
from recovery_proofs.layouts import LAYOUTS, PAIRS, Pair, features
from recovery_proofs.pairs import Pairs

# One worker has the server of processes, and runs one layout at a time.
pytestmark = pytest.mark.xdist_group("layouts")


@pytest.fixture(scope="module")
def pairs(pool: Pool, corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return Pairs(pool, corpora, tmp_path_factory.mktemp("pairs"))


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_layout_goes_on_with_what_another_saved(pair, pairs):
    """Saved again at once, every tensor is bit for bit what was loaded; the next two steps are those of one process that was never stopped."""
    found = pairs.judge(pair)
    assert found.failures == []
    kinds = 3 * len(pairs.whole(LAYOUTS[pair.loading].kind).reference.weights)
    assert found.tensors >= kinds  # a weight and two moments each, and buffers


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_load_forgets_is_found(fault, pairs):
    """The figure that should show it does."""
    found = pairs.judge(Pair("plain", FAULTS[fault].layout), fault)
    assert FAULTS[fault].shows in {failure.partition(":")[0] for failure in found.failures}, found.failures


def test_the_pairs_have_what_they_should():
    """At least 12 pairs of different layouts, a pair of the same layout for each kind of engine, and everything a layout can have on both sides."""
    others = [pair for pair in PAIRS if not pair.alike]
    assert len(others) >= 12
    assert {LAYOUTS[pair.saving].kind for pair in others} == {"kan", "dense"}
    alike = {LAYOUTS[pair.saving].zero for pair in PAIRS if pair.alike}
    assert alike == {None, 0, 1, 2, 3}
    wanted = {"tp", "cp", "pp", "vpp", "ep", "etp", "sequence parallel True", "sequence parallel False"}
    wanted |= {f"zero {stage}" for stage in (None, 0, 1, 2, 3)} | {f"world {size}" for size in (1, 2, 4)}
    for side in ("saving", "loading"):
        assert set().union(*(features(LAYOUTS[getattr(pair, side)]) for pair in others)) == wanted, side
    assert all(LAYOUTS[pair.saving].kind == LAYOUTS[pair.loading].kind for pair in PAIRS)
