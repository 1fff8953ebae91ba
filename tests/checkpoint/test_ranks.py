"""Two processes over gloo: any split loads any other, and an error of one rank is the error of all (nobody waits for a rank that left).

The scenarios are in two_ranks.py; one pair of processes runs them all, and each test judges what both ranks saw.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from free_ports import free_port

from kan_train.checkpoint import load_rank_tensors, load_tensors, newest, save
from kan_train.checkpoint.boxes import Fragment

SCRIPT = Path(__file__).with_name("two_ranks.py")


def global_tensors() -> dict[str, torch.Tensor]:
    """The state of two_ranks.py, drawn again here."""
    generator = torch.Generator().manual_seed(5)
    return {
        "param/w": torch.randn(9, 8, generator=generator),
        "moment/w": torch.randn(9, 8, generator=generator).double(),
        "param/half": torch.randn(101, generator=generator).bfloat16(),
        "buffer/n": torch.randint(-(2**60), 2**60, (6,), generator=generator),
        "param/scalar": torch.randn((), generator=generator),
    }


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[list[dict], Path]:
    """What the ranks saw, and the folder they worked in."""
    root = tmp_path_factory.mktemp("ranks")
    save(root / "single", step=1, fragments=[Fragment.whole(name, tensor) for name, tensor in global_tensors().items()], state={})
    port = free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    commands = [[sys.executable, str(SCRIPT), str(rank), str(port), str(root)] for rank in range(2)]
    ranks = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    return [json.loads((root / f"rank-{rank}.json").read_text()) for rank in range(2)], root


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        ("saved_flat_loads_by_columns", [{"cursor": 9}, True, True, "step-00000003"]),
        ("saved_by_columns_loads_flat", [{"rank": 0}, True]),
        ("saved_by_one_process_loads_in_two", True),
        ("a_rank_with_everything", True),
        ("a_tensor_that_one_rank_asks_for", True),
    ],
)
def test_any_split_loads_any_other_bit_for_bit(both, scenario, expected):
    seen, _ = both
    assert [rank[scenario] for rank in seen] == [expected, expected]


def test_what_two_ranks_saved_one_process_loads(both):
    _, root = both
    path = newest(root / "flat")
    found, expected = load_tensors(path, ""), global_tensors()
    assert {name: found[name] for name in expected}.keys() == {name for name in found if not name.startswith("rank/")}
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
    for rank in range(2):
        torch.manual_seed(100 + rank)
        assert torch.equal(load_rank_tensors(path, rank)["rng"], torch.get_rng_state())


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("a_bad_fragment_on_rank_1", ["failed on rank 1", "bad: shard [4]", "outside the global shape [3]"]),
        ("a_failing_generator_on_rank_1", ["failed on rank 1", "KeyError", "optimizer state of layer 3"]),
        ("written_by_both", ["failed on rank 0", "cannot be saved", "overlap"]),
        ("written_by_none", ["failed on rank 0", "cannot be saved", "elements are covered"]),
        ("another_shape_on_rank_1", ["failed on rank 1", "param/w has the shape [9, 8]", "[8, 8] in this run"]),
        ("a_tensor_that_no_rank_asks_for", ["also holds param/half, which this run lacks"]),
        ("a_flipped_bit", [".safetensors does not have the SHA-256"]),
    ],
)
def test_an_error_of_one_rank_is_the_error_of_all(both, scenario, words):
    seen, _ = both
    messages = [rank[scenario] for rank in seen]
    assert messages[0] == messages[1]
    assert all(word in messages[0] for word in words), messages[0]


def test_a_save_in_a_thread_does_not_disturb_the_collectives_of_training(both):
    """Five saves on a group of their own while the main thread sums over the default group: no sum is wrong, every save loads exactly."""
    seen, _ = both
    for rank in seen:
        wrong, saved, found = rank["a_save_in_a_thread_beside_other_collectives"]
        assert wrong == 0
        assert saved == [f"step-{step:08d}" for step in range(1, 6)]
        assert found == "step-00000005"


def test_all_ranks_go_on_from_the_same_valid_checkpoint(both):
    """Whichever rank hashes the damaged file; rank 0 alone says why, naming the file; and where none is left both raise."""
    seen, _ = both
    (files, found, said, nothing, early), others = (rank["the_newest_valid"] for rank in seen)
    assert files >= 4
    assert found == ["step-00000002"] + ["step-00000001"] * files == others[1]
    assert others[2] == [[]] * files
    ranks = set()
    for (line,) in said:
        assert "step-00000002 is skipped" in line
        assert "does not have the SHA-256" in line
        ranks.add(line[-len("(on rank 0)") :])
    assert ranks == {"(on rank 0)", "(on rank 1)"}, "each hashed a share"
    assert "no checkpoint in" in nothing
    assert nothing == others[3]
    assert early == others[4] == "step-00000001"


def test_a_folder_that_the_ranks_do_not_share_is_said(both):
    """Rank 0 has steps 1 and 2, rank 1 another step 1: nothing that both have is chosen, and both raise."""
    seen, _ = both
    messages = [rank["a_checkpoint_that_one_rank_does_not_see"][0].replace("own-1", "own-0") for rank in seen]
    assert messages[0] == messages[1]
    assert "no checkpoint in" in messages[0]
    assert "(on rank 1)" in messages[0]


def test_a_save_that_failed_on_one_rank_leaves_nothing_on_any(both):
    seen, _ = both
    for rank in seen:
        message, left, chosen = rank["a_full_disk_on_rank_1"]
        assert "failed on rank 1" in message
        assert "no space left to write" in message
        assert "rank-00001" in message
        assert left == ["step-00000003"]
        assert chosen.endswith("step-00000003")
        message, left = rank["no_manifest_because_rank_0_fails"]
        assert "failed on rank 0: the disk is full now" in message
        assert left == ["step-00000003"]
