"""Which checkpoints are kept; and that a death at any moment of a save or a deletion leaves a whole checkpoint and no litter."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from kan_train.checkpoint import CheckpointError, Fragment, Manifest, Policy, load, newest, newest_valid, prune, read_manifest, save
from kan_train.checkpoint.retention import folders


def save_value(directory: Path, step: int) -> Path:
    fragments = [Fragment.whole("w", torch.full((300,), float(step)))]
    return save(directory, step=step, fragments=fragments, state={"step": step}, max_file_bytes=400)


def loaded_step(path: Path) -> int:
    """The step of a checkpoint, after a full load whose every value agrees with it."""
    target = torch.zeros(300)
    state = load(path, [Fragment.whole("w", target)])
    assert (target == state["step"]).all()
    return state["step"]


def test_the_newest_are_kept_in_order_of_steps(tmp_path):
    """By step, not by time or by name: 100000000 is after 99999999, and a checkpoint saved later with a smaller step is older."""
    for step in (99_999_999, 100_000_000, 5, 20):
        save_value(tmp_path, step)
    assert newest(tmp_path) == tmp_path / "step-100000000"
    assert [path.name for path in prune(tmp_path, Policy(keep=2))] == ["step-00000020", "step-00000005"]
    assert [path.name for path in folders(tmp_path)] == ["step-100000000", "step-99999999"]
    assert prune(tmp_path, Policy(keep=0)) == []
    assert prune(tmp_path, Policy(keep=2)) == []


def test_nothing_saved_yet_is_none(tmp_path):
    assert newest(tmp_path) is None
    assert newest(tmp_path / "absent") is None
    assert prune(tmp_path / "absent", Policy(keep=1)) == []


def test_a_damaged_checkpoint_does_not_count_among_the_kept(tmp_path):
    """keep=1 with a damaged newest one: the last good one must not be deleted."""
    for step in (1, 2, 3):
        save_value(tmp_path, step)
    next((tmp_path / "step-00000003").glob("*.safetensors")).unlink()
    assert [path.name for path in prune(tmp_path, Policy(keep=1))] == ["step-00000001"]
    assert loaded_step(newest(tmp_path)) == 2


def losses_of(manifest: Manifest) -> float | None:
    """Losses of the steps 1 to 8: the best are 5, 2 (of two equal ones the newer) and 1; three say nothing."""
    return {1: 2.0, 2: 2.0, 3: None, 4: 3.0, 5: 1.5, 6: float("nan"), 7: 9.0, 8: float("-inf")}[manifest.step]


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (Policy(), [1, 2, 3, 4, 5, 6, 7, 8]),
        (Policy(keep=2), [7, 8]),
        (Policy(keep=20), [1, 2, 3, 4, 5, 6, 7, 8]),
        (Policy(keep=1, every=3), [3, 6, 8]),
        (Policy(keep=1, best=1), [5, 8]),
        (Policy(keep=1, best=2), [2, 5, 8]),
        (Policy(keep=1, best=3), [1, 2, 5, 8]),
        (Policy(keep=3, every=4, best=2), [2, 4, 5, 6, 7, 8]),
        (Policy(keep=0, every=4, best=2), [1, 2, 3, 4, 5, 6, 7, 8]),
        (Policy(keep=1, best=50), [1, 2, 4, 5, 7, 8]),
    ],
    ids=str,
)
def test_the_policy_keeps_the_newest_every_so_many_and_the_best(tmp_path, policy, kept):
    for step in range(1, 9):
        save_value(tmp_path, step)
    deleted = prune(tmp_path, policy, metric=losses_of)
    assert sorted(int(path.name[5:]) for path in folders(tmp_path)) == kept
    assert sorted(int(path.name[5:]) for path in deleted) == [step for step in range(1, 9) if step not in kept]
    assert [loaded_step(path) for path in folders(tmp_path)] == sorted(kept, reverse=True)


def test_what_was_the_best_goes_when_it_is_no_more(tmp_path):
    """As a run calls it, after every save: a checkpoint stays while it is among the newest, the milestones or the best."""
    losses, left = [3.0, 5.0, 4.0, 2.0, 6.0, 7.0], []
    for step, _ in enumerate(losses, 1):
        save_value(tmp_path, step)
        prune(tmp_path, Policy(keep=1, best=1), metric=lambda manifest: losses[manifest.step - 1])
        left.append(sorted(int(path.name[5:]) for path in folders(tmp_path)))
    assert left == [[1], [1, 2], [1, 3], [4], [4, 5], [4, 6]]


def test_a_file_of_the_users_is_not_deleted(tmp_path):
    note = save_value(tmp_path, 1) / "note.txt"
    note.write_text("keep me")
    save_value(tmp_path, 2)
    prune(tmp_path, Policy(keep=1))
    assert note.read_text() == "keep me"
    assert [path.name for path in note.parent.iterdir()] == ["note.txt"]
    save_value(tmp_path, 3)
    assert newest(tmp_path) == tmp_path / "step-00000003"


def test_everything_is_on_disk_before_the_manifest_appears(tmp_path, monkeypatch):
    """The order that survives a power failure: each file is forced to disk before it is renamed, the folder before and after the manifest is."""
    events: list[tuple[str, str]] = []
    rename = Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name)))
    monkeypatch.setattr(Path, "replace", lambda self, target: (events.append(("rename", target.name)), rename(self, target))[1])
    path = save_value(tmp_path, 7)
    names = [name for kind, name in events if kind == "rename"]
    assert sorted(names) == sorted(file.name for file in path.iterdir())
    for name in names:
        assert events.index(("fsync", f".{name}.tmp")) < events.index(("rename", name))
    published = events.index(("rename", "manifest.json"))
    assert names[-1] == "manifest.json"
    last_data = max(events.index(("rename", name)) for name in names[:-1])
    assert ("fsync", path.name) in events[last_data:published]
    assert ("fsync", path.name) in events[published:]
    assert ("fsync", tmp_path.name) in events[:published], "the name of the new folder itself"


def die_at(monkeypatch, moment: int) -> None:
    """Kill this process, as by kill -9, just before its `moment`-th call that changes what is on disk."""
    calls = 0

    def deadly(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir"), (Path, "rmdir")):
        monkeypatch.setattr(owner, name, deadly(getattr(owner, name)))


@pytest.mark.parametrize("task", ["save", "replace", "prune"])
def test_death_at_any_moment_leaves_a_whole_checkpoint_and_no_litter(kit, tmp_path, monkeypatch, task):
    """Killed before each change of the disk in turn: the newest checkpoint is the old or the new one, whole; the next save cleans up."""
    with monkeypatch.context() as patch:
        moment, died = 0, True
        while died:
            moment += 1
            directory = tmp_path / f"{task}-{moment}"
            for step in (1, 2):
                save_value(directory, step)

            def work(directory=directory, moment=moment):
                die_at(patch, moment)
                if task == "prune":
                    prune(directory, Policy(keep=1))
                else:
                    save_value(directory, 3 if task == "save" else 2)

            status = kit.in_child(work)
            died = status == -signal.SIGKILL
            assert died or status == 0
            allowed = {"save": (2, 3), "replace": (2,), "prune": (2,)}[task]
            assert loaded_step(newest(directory)) in allowed
            save_value(directory, 4)
            assert loaded_step(newest(directory)) == 4
            for path in folders(directory):
                assert loaded_step(path) in (1, 2, 3, 4), "every folder that is left is whole"
            assert not list(directory.rglob(".*")), "no temporary files"
    assert moment > 5, "the task changed the disk several times, and was killed before each"


def test_a_full_disk_is_said_and_leaves_the_previous_checkpoint(tmp_path):
    """A tmpfs of 1 MB: the second checkpoint does not fit, new or in the place of the first; the first stays whole, temporary files go, and a smaller
    save works again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"only root may mount a tmpfs: {mounted.stderr.strip()}")
    try:
        value = torch.arange(100_000, dtype=torch.float32)
        first = save(disk, step=1, fragments=[Fragment.whole("w", value)], state={})
        with pytest.raises(CheckpointError, match=r"no space left .*step-00000002.*0.4 MB were to be written.*are free.*checkpoint.keep"):
            save(disk, step=2, fragments=[Fragment.whole("w", value), Fragment.whole("v", value + 1)], state={}, max_file_bytes=400_000)
        with pytest.raises(CheckpointError, match=r"no space left .*step-00000001"):
            save(disk, step=1, fragments=[Fragment.whole("w", value + 1), Fragment.whole("v", value)], state={}, max_file_bytes=400_000)
        assert newest_valid(disk) == newest(disk) == first
        assert [path.name for path in disk.iterdir()] == ["step-00000001"]
        assert {path.name for path in first.iterdir()} == {"manifest.json", *read_manifest(first).files}, "no temporary files, no others"
        target = torch.zeros(100_000)
        load(first, [Fragment.whole("w", target)])
        assert torch.equal(target, value)
        save_value(disk, 3)
        assert loaded_step(newest(disk)) == 3
    finally:
        subprocess.run(["umount", str(disk)], check=True)
