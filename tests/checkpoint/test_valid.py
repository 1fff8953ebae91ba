"""Which checkpoint a run goes on from: the newest whose every byte is as it was written, whatever lies beside it and whatever the clock says."""

import logging
import os
import random
import shutil
import time
from pathlib import Path

import pytest

from kan_train.checkpoint import CheckpointError, Fragment, load, newest, newest_valid, save

EARLIER = 3


@pytest.fixture
def two(kit, saved) -> tuple[Path, Path, dict]:
    """Folders of a checkpoint of step 3 and of the one of step 7, and the state that both hold (of other values in the first)."""
    path, state = saved
    earlier = save(path.parent, step=EARLIER, fragments=kit.whole(kit.make_state(1)), state={"step": EARLIER}, max_file_bytes=1200)
    return earlier, path, state


def loaded_step(kit, path: Path) -> int:
    """The step of a checkpoint whose every tensor is bit for bit that of its step, as a load without verification fills them."""
    state = kit.make_state(1 if path.name.endswith("3") else 0)
    target = kit.zeros(state)
    step = load(path, kit.whole(target), verify=False)["step"]
    assert kit.equal(target, state)
    return step


def damaged(path: Path, kind: str) -> None:
    """One byte, a shard, the manifest, all, or the right to read."""
    file = sorted(path.glob("*.safetensors"))[1]
    match kind:
        case "flipped byte":
            raw = bytearray(file.read_bytes())
            raw[-3] ^= 16
            file.write_bytes(raw)
        case "truncated file":
            os.truncate(file, file.stat().st_size - 1)
        case "missing shard":
            file.unlink()
        case "altered manifest":
            text = (path / "manifest.json").read_text()
            (path / "manifest.json").write_text(text.replace('"step": 7', '"step": 8', 1))
        case "shard of another checkpoint":
            shutil.copyfile(sorted((path.parent / "step-00000003").glob("*.safetensors"))[1], file)
        case "renamed folder":
            path.rename(path.with_name("step-00000009"))


DAMAGE = {
    "flipped byte": "does not have the SHA-256",
    "truncated file": "truncated or altered",
    "missing shard": "is missing",
    "altered manifest": "not as it was written",
    "shard of another checkpoint": "does not have the SHA-256",
    "renamed folder": "holds the checkpoint of step 7: the folder was renamed",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_the_reason_said(kit, two, kind, caplog):
    earlier, path, _ = two
    assert newest_valid(path.parent) == path
    assert loaded_step(kit, path) == 7
    damaged(path, kind)
    with caplog.at_level(logging.WARNING):
        assert newest_valid(path.parent) == earlier
    assert loaded_step(kit, earlier) == EARLIER
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "is skipped: " in warning
    assert DAMAGE[kind] in warning


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(two):
    """None would start a new run over an old one. A save that was never finished is no reason to stop."""
    earlier, path, _ = two
    for folder in (earlier, path):
        damaged(folder, "flipped byte")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used.*step-00000007.*does not have the SHA-256.*choose another run.name"):
        newest_valid(path.parent)
    (earlier / "manifest.json").unlink()
    (path / "manifest.json").unlink()
    assert newest_valid(path.parent) is None
    assert newest_valid(path.parent / "absent") is None


def test_a_later_checkpoint_than_was_asked_for_is_not_looked_at(two):
    earlier, path, _ = two
    assert [newest_valid(path.parent, at_most=step) for step in (2, 3, 6, 7, 100)] == [None, earlier, earlier, path, path]


def test_leftovers_and_strangers_beside_the_checkpoints_change_nothing(kit, two):
    """Half-written files, folders without a manifest (of later steps too), files and folders of other names; the next save sweeps its own."""
    _, path, state = two
    directory = path.parent
    for name in ("step-00000008", "step-00000005", "not-a-step", "step-12"):
        (directory / name).mkdir()
    litter = [
        directory / "step-00000008" / ".manifest.json.tmp",
        directory / "step-00000008" / "rank-00000-000-0123abcd.safetensors",
        path / ".rank-00003-000-0123abcd.safetensors.tmp",
        path / "tensors-0123abcd.json",
    ]
    strangers = [directory / "step-00000099", directory / "notes.txt", path / "notes.txt", directory / "not-a-step" / "manifest.json"]
    for file in litter + strangers:
        file.write_bytes(b"half")
    assert newest_valid(directory) == path
    save(directory, step=10, fragments=kit.whole(state), state={"step": 10})
    assert newest_valid(directory).name == "step-00000010"
    assert not any(file.exists() for file in litter)
    assert all(file.exists() for file in strangers)


@pytest.mark.parametrize("jump", [-400, +400], ids=["back", "ahead"])
def test_a_clock_that_jumped_does_not_matter(kit, two, jump, monkeypatch):
    """The later checkpoint is dated days before, or the earlier one days ahead, of today; and a save under such a clock is as good."""
    earlier, path, state = two
    for folder, days in ((earlier, jump), (path, -jump)):
        for file in (folder, *folder.iterdir()):
            os.utime(file, times=(time.time() + days * 86400,) * 2)
    assert newest_valid(path.parent) == newest(path.parent) == path
    now = time.time() + jump * 86400
    monkeypatch.setattr(time, "time", lambda: now)
    later = save(path.parent, step=8, fragments=kit.whole(state), state={"step": 8})
    assert newest_valid(path.parent) == later
    assert loaded_step(kit, later) == 8


@pytest.mark.parametrize("what", ["folder", "data", "manifest"])
def test_what_an_ordinary_user_may_not_read_is_passed_over(kit, two, tmp_path, what):
    """As an ordinary user (a forked process that gave up root)."""
    earlier, path, _ = two
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    locked = {"folder": path, "data": sorted(path.glob("*.safetensors"))[0], "manifest": path / "manifest.json"}[what]
    locked.chmod(0)

    def attempt():
        assert newest_valid(path.parent) == earlier
        assert loaded_step(kit, earlier) == EARLIER

    try:
        assert kit.in_child(attempt, ordinary_user=True) == 0
    finally:
        locked.chmod(0o755)


def test_a_checkpoint_of_another_model_is_whole_and_refused_by_the_load(kit, two):
    """It is no damage: nothing is skipped, and the load names what does not fit."""
    _, path, state = two
    other = {name: tensor for name, tensor in kit.make_state().items() if name != "param/head.weight"}
    later = save(path.parent, step=9, fragments=[*kit.whole(other), Fragment.whole("param/tail.weight", state["param/head.weight"])], state={})
    assert newest_valid(path.parent) == later
    target = kit.zeros(state)
    with pytest.raises(CheckpointError, match=r"step-00000009 does not hold param/head.weight: it is of another model"):
        load(later, kit.whole(target))
    assert all(not tensor.any() for tensor in target.values())


def corrupted(originals: dict[str, bytes], chance: random.Random) -> dict[str, bytes | None]:
    """What becomes of one or two files of a checkpoint: new contents by name, None for a file that is gone."""
    name, other = chance.sample(sorted(originals), 2)
    raw = bytearray(originals[name])
    place = chance.randrange(len(raw))
    match chance.randrange(7):
        case 0:  # a bit flips
            raw[place] ^= 1 << chance.randrange(8)
        case 1:  # cut off
            del raw[place:]
        case 2:  # something added at the end
            raw += chance.randbytes(chance.randrange(1, 9))
        case 3:  # deleted
            return {name: None}
        case 4:  # swapped with another file
            return {name: originals[other], other: originals[name]}
        case 5:  # a block of zeros, as a disk gives that lost it
            raw[place : place + 512] = bytes(len(raw[place : place + 512]))
        case 6:  # a byte is lost in the middle
            del raw[place]
    return {name: bytes(raw)}


def test_no_random_corruption_of_500_is_loaded_as_good(kit, two):
    """Each of 500 random corruptions of the newest checkpoint: a load refuses it before anything is filled, and a run goes on from the one before.

    The one exception allowed is a corruption that changed no byte (a block of zeros where there were zeros): then the load must be exact.
    """
    earlier, path, state = two
    chance = random.Random(500)
    originals = {file.name: file.read_bytes() for file in path.iterdir()}
    refused, unchanged = 0, 0
    for _ in range(500):
        changed = corrupted(originals, chance)
        for name, raw in changed.items():
            (path / name).unlink() if raw is None else (path / name).write_bytes(raw)
        target = kit.zeros(state)
        if all(originals[name] == raw for name, raw in changed.items()):
            unchanged += 1
            load(path, kit.whole(target))
            assert kit.equal(target, state)
            assert newest_valid(path.parent) == path
        else:
            refused += 1
            with pytest.raises(CheckpointError):
                load(path, kit.whole(target))
            assert all(not tensor.any() for tensor in target.values())
            assert newest_valid(path.parent) == earlier
        for name in changed:
            (path / name).write_bytes(originals[name])
    assert refused + unchanged == 500
    assert refused > 450
    assert newest_valid(path.parent) == path
    assert loaded_step(kit, earlier) == EARLIER
