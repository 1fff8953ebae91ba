"""What a step really sends and holds, message by message, on four processes: every group is Megatron's, and the planner predicts all of it.

recorder.py listens below torch.distributed; recorded_ranks.py takes the steps.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from layout_matrix.rows import Row
from recorded_rows import FAST_ROWS, GROUPS_ROWS, SLOW_ROWS, config

from kan_train.parallel.layout import layout_of
from kan_train.planner.memory import memory_of
from kan_train.planner.share import Share, share_of
from kan_train.planner.traffic import Routed, traffic_of

pytestmark = pytest.mark.xdist_group("layouts")

HERE = Path(__file__).parent
WORLD = 4
BY_HAND = "made by hand"

CONTROL = {
    "runtime.py:largest": "whether any process was told to stop, and the number of optimizer steps of a checkpoint",
    "runtime.py:barrier": "the end of a run, and of a save",
    "p2p_communication.py:_p2p_ops": "Megatron between two interleaved stages: one way over this group, so that it overlaps with the other",
}
"""Callers that may use the group of all ranks, and what for. None of them grows with the model but the last, which is a message between two ranks."""

ZERO_GROUPS = ("data_and_context", "expert_data")
SLOW = [pytest.param(row, marks=pytest.mark.slow, id=row.name) for row in SLOW_ROWS]
ALL = [*(pytest.param(row, id=row.name) for row in FAST_ROWS), *SLOW]


def record(folder: Path, names: list[str]) -> dict[str, list[dict]]:
    """What each rank saw, by row."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *(path for path in sys.path if path)])}
    command = [sys.executable, str(HERE / "recorded_ranks.py"), str(folder), *names]
    with (folder / "output").open("w+") as output:
        code = subprocess.run(command, env=environment, stdout=output, stderr=output, timeout=900).returncode
        output.seek(0)
        assert code == 0, output.read()[-4000:]
    return {name: [json.loads((folder / f"{name}-rank-{rank}.json").read_text()) for rank in range(WORLD)] for name in names}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory):
    """What the four ranks saw on a row; the fast rows are run together, and the slow ones are."""
    fast = [row.name for row in FAST_ROWS] + [BY_HAND]
    kept: dict[bool, dict[str, list[dict]]] = {}

    def of(name: str) -> list[dict]:
        is_fast = name in fast
        if is_fast not in kept:
            kept[is_fast] = record(tmp_path_factory.mktemp("recorded"), fast if is_fast else [row.name for row in SLOW_ROWS])
        return kept[is_fast][name]

    return of


def strangers(ranks: list[dict]) -> list[str]:
    """Messages over groups that are not Megatron's, but for control over all ranks."""
    found = []
    for number, rank in enumerate(ranks):
        for group, operation, size, caller, _ in rank["messages"]:
            if group == "unknown" or (group == "default" and caller not in CONTROL):
                found.append(f"rank {number}: {operation} of {size} bytes by {caller} over {group}")
    return found


@pytest.mark.parametrize("row", ALL)
def test_every_message_goes_over_a_group_of_megatrons(row: Row, recorded):
    assert strangers(recorded(row.name)) == []


@pytest.mark.parametrize(("row", "dimension"), zip(GROUPS_ROWS, ("tensor", "expert", "context", "pipeline"), strict=True))
def test_each_dimension_is_heard(row: Row, dimension: str, recorded):
    """A recorder that hears nothing would find no stranger."""
    for rank in recorded(row.name):
        heard = {message[0] for message in rank["messages"]}
        assert {dimension, "data_and_context", "tensor_and_data", "default"} <= heard


def test_a_group_made_by_hand_is_found(recorded):
    """It has the right ranks, so that training goes as it should: only the recorder sees it."""
    found = strangers(recorded(BY_HAND))
    assert {line.partition(":")[0] for line in found} == {f"rank {rank}" for rank in range(WORLD)}
    assert all(line.endswith("over unknown") for line in found)
    assert any("mappings.py" in line for line in found)


def share(row: Row, rank: int) -> Share:
    return share_of(config(row), layout_of(config(row), WORLD), rank)


def sent(rank: dict, of: Share) -> Counter:
    """(group, operation, bytes) -> calls; without control, and without groups of one rank."""
    found: Counter = Counter()
    for group, operation, size, caller, calls in rank["messages"]:
        control = group == "default" and caller.startswith("runtime.py")
        if not control and len(of.ranks(group)) > 1:
            found[group, operation, size] += calls
    return found


def totals(messages) -> dict[tuple[str, str], tuple[int, float]]:
    """(group, operation) -> calls and bytes."""
    calls: Counter = Counter()
    volume: Counter = Counter()
    for group, operation, number, total in messages:
        calls[group, operation] += number
        volume[group, operation] += total
    return {key: (calls[key], volume[key]) for key in calls}


@pytest.mark.parametrize("row", ALL)
def test_the_planner_predicts_every_message(row: Row, recorded):
    """Calls and bytes of each size, group and operation; of all-to-alls and of ZeRO's flat buffers together; ZeRO-3's calls are DeepSpeed's own affair."""
    for number, rank in enumerate(recorded(row.name)):
        planned = share(row, number)
        heard = sent(rank, planned)
        expected = traffic_of(planned, Routed(*rank["routed"]) if rank["routed"] else None)
        exact = {key: calls for key, calls in heard.items() if key[0] not in ZERO_GROUPS and key[1] != "all-to-all"}
        predicted: Counter = Counter()
        for one in expected:
            if one.group not in ZERO_GROUPS and one.operation != "all-to-all":
                predicted[one.group, one.operation, one.each] += one.calls
        assert predicted == exact
        summed = totals((group, operation, calls, size * calls) for (group, operation, size), calls in heard.items())
        planned_sums = totals((one.group, one.operation, one.calls, one.total) for one in expected)
        if row.zero == 3:
            summed, planned_sums = (
                {key: pair if key[0] not in ZERO_GROUPS else (0, pair[1]) for key, pair in sums.items()} for sums in (summed, planned_sums)
            )
        assert planned_sums == summed


@pytest.mark.parametrize("row", [row for row in FAST_ROWS if row.size("expert_parallel") > 1], ids=lambda row: row.name)
def test_rows_to_groves_are_about_as_many_as_even_routing_sends(row: Row, recorded):
    """The model's choices at the start are neither even nor independent of each other, but not far from it."""
    for number, rank in enumerate(recorded(row.name)):
        even = {one.purpose: one.total for one in traffic_of(share(row, number)) if one.group == "expert"}
        real = {one.purpose: one.total for one in traffic_of(share(row, number), Routed(*rank["routed"])) if one.group == "expert"}
        assert even == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("row", ALL)
def test_the_planner_predicts_weights_gradients_masters_and_moments(row: Row, recorded):
    """Bytes on every rank; DeepSpeed's flat tensors with their padding."""
    for number, rank in enumerate(recorded(row.name)):
        memory, held = memory_of(share(row, number)), rank["held"]
        assert memory.weights == held["weights"]
        assert memory.masters == (rank["flat"] or 0)
        if rank["gradients"] is not None:  # a step of one micro-batch keeps none
            assert memory.gradients == rank["gradients"]
        moments = held["exp_avg"] + held["exp_avg_sq"]
        assert moments <= memory.moments < moments + 2 * 4 * 64 * WORLD  # fragments leave the padding out
        if row.zero == 0:
            assert memory.moments == moments
