"""Damaged checkpoints: each kind refused with a message that names the file, before a single weight is touched."""

import hashlib
import json
import logging
import re
import shutil

import pytest

from kan_train.checkpoint import CheckpointError, load, load_tensors, newest, save


def data_file(path):
    return sorted(path.glob("*.safetensors"))[1]


def table(path):
    return next(path.glob("tensors-*.json"))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-5])
    return file


def flip(file, position=-3):
    raw = bytearray(file.read_bytes())
    raw[position] ^= 4
    file.write_bytes(raw)
    return file


def remove(file):
    file.unlink()
    return file


def append(file, raw):
    with open(file, "ab") as stream:
        stream.write(raw)
    return file


def rewrite(file, change):
    body = json.loads(file.read_text())
    change(body)
    file.write_text(json.dumps(body, indent=1) + "\n")
    return file


# name: (what is done, returning the file to be named; words of the message; whether a look at sizes finds it)
DAMAGE = {
    "truncated data": (lambda p: truncate(data_file(p)), "truncated or altered", True),
    "empty data": (lambda p: append(remove(data_file(p)), b""), "has 0 bytes", True),
    "flipped bit in data": (lambda p: flip(data_file(p)), "does not have the SHA-256", False),
    "flipped bit in a header": (lambda p: flip(data_file(p), 20), "does not have the SHA-256", False),
    "missing data": (lambda p: remove(data_file(p)), "is missing", True),
    "missing table": (lambda p: remove(table(p)), "is missing", True),
    "altered table": (lambda p: flip(table(p), 200), "does not have the SHA-256", False),
    "truncated manifest": (lambda p: truncate(p / "manifest.json"), "not as it was written", True),
    "another step in the manifest": (lambda p: rewrite(p / "manifest.json", lambda m: m.update(step=8)), "not as it was written", True),
    "another hash in the manifest": (
        lambda p: rewrite(p / "manifest.json", lambda m: m["files"][data_file(p).name].update(sha256="0" * 64)),
        "not as it was written",
        True,
    ),
    "a space in the manifest": (lambda p: append(p / "manifest.json", b" "), "not as it was written", True),
    "no JSON in the manifest": (lambda p: append(remove(p / "manifest.json"), b"hello"), "not as it was written", True),
    "a newer format": (lambda p: rewrite(p / "manifest.json", lambda m: m.update(format_version=99)), "format 99, .* up to 2", True),
    "no manifest": (lambda p: remove(p / "manifest.json").parent, "not a complete checkpoint: it has no manifest.json", True),
    "no folder": (lambda p: (shutil.rmtree(p), p)[1], "there is no checkpoint", True),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name(kit, saved, case):
    damage, words, _ = DAMAGE[case]
    path, state = saved
    culprit = damage(path)
    target = kit.zeros(state)
    with pytest.raises(CheckpointError, match=words) as error:
        load(path, kit.whole(target))
    assert str(culprit) in str(error.value)
    assert all(not tensor.any() for tensor in target.values())
    with pytest.raises(CheckpointError):
        load_tensors(path, "")


@pytest.mark.parametrize("case", [case for case, (_, _, seen) in DAMAGE.items() if seen])
def test_the_newest_whole_checkpoint_is_chosen_and_the_reason_said(kit, saved, case, caplog):
    damage, words, _ = DAMAGE[case]
    path, state = saved
    later = save(path.parent, step=9, fragments=kit.whole(state), state={}, max_file_bytes=1200)
    damage(later)
    with caplog.at_level(logging.WARNING):
        assert newest(path.parent) == path
    if case != "no folder":
        assert "step-00000009 is skipped" in caplog.text
        assert re.search(words, caplog.text)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(saved):
    """None would mean a new run over an old one; a save that was never finished is no reason to stop."""
    path, _ = saved
    manifest = (path / "manifest.json").read_bytes()
    truncate(data_file(path))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used.*truncated.*choose another run.name"):
        newest(path.parent)
    (path / "manifest.json").unlink()
    assert newest(path.parent) is None
    (path / "manifest.json").write_bytes(manifest)


def test_verification_can_be_left_out(kit, saved):
    """verify=False reads the flipped bit as it is; sizes and tables are still checked."""
    path, state = saved
    flip(data_file(path))
    target = kit.zeros(state)
    load(path, kit.whole(target), verify=False)
    assert not kit.equal(target, state)
    truncate(data_file(path))
    with pytest.raises(CheckpointError, match="truncated"):
        load(path, kit.whole(target), verify=False)


def test_a_file_that_is_no_safetensors_is_named_even_without_verification(kit, saved):
    path, state = saved
    file = data_file(path)
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(CheckpointError, match=f"{file.name} is not the safetensors file"):
        load(path, kit.whole(kit.zeros(state)), verify=False)


def test_a_strangers_table_cannot_reach_outside_the_folder(saved):
    """A file name with a path in it is refused, although its hashes are right."""
    path, _ = saved
    file = table(path)
    text = file.read_text().replace(data_file(path).name, "../" + data_file(path).name[3:])
    file.write_text(text)
    body = json.loads((path / "manifest.json").read_text())
    body.pop("sha256")
    body["files"][file.name] = {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    digest = hashlib.sha256(json.dumps(body, indent=1).encode() + b"\n").hexdigest()
    (path / "manifest.json").write_text(json.dumps({**body, "sha256": digest}, indent=1) + "\n")
    with pytest.raises(CheckpointError, match=f"{file.name} is not a tensor table"):
        load_tensors(path, "")


@pytest.mark.parametrize("what", ["folder", "manifest", "data"])
def test_what_an_ordinary_user_may_not_read_is_named(kit, saved, what, tmp_path):
    """As an ordinary user (a forked process that gave up root): a CheckpointError about permission, never a traceback of the system."""
    path, state = saved
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    locked = {"folder": path, "manifest": path / "manifest.json", "data": data_file(path)}[what]
    locked.chmod(0)

    def attempt():
        with pytest.raises(CheckpointError, match="no permission to read") as error:
            load(path, kit.whole(kit.zeros(state)))
        assert str(locked) in str(error.value)
        if what == "data":
            assert newest(path.parent) == path
        else:
            with pytest.raises(CheckpointError, match="no permission to read"):
                newest(path.parent)

    try:
        assert kit.in_child(attempt, ordinary_user=True) == 0
    finally:
        locked.chmod(0o755)


def test_a_folder_that_an_ordinary_user_may_not_write_is_named(kit, saved, tmp_path):
    path, state = saved
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)

    def attempt():
        with pytest.raises(CheckpointError, match=r"no permission to write .*step-00000009.*set run.root"):
            save(path.parent, step=9, fragments=kit.whole(state), state={})

    path.parent.chmod(0o555)
    try:
        assert kit.in_child(attempt, ordinary_user=True) == 0
    finally:
        path.parent.chmod(0o755)
    load(path, kit.whole(kit.zeros(state)))
