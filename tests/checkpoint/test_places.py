"""Checkpoints in an object store (fsspec's own memory:// stands for one) and in folders named by URL: what holds on a disk holds there."""

import json
import random
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from kan_train.checkpoint import (
    CheckpointError,
    Fragment,
    Policy,
    checkpoint_directory,
    find_checkpoint,
    folders,
    load,
    load_rank_tensors,
    load_tensors,
    newest,
    newest_valid,
    prune,
    read_manifest,
    save,
)
from kan_train.checkpoint import files as checkpoint_files
from kan_train.checkpoint.files import open_tensors
from kan_train.checkpoint.places import place
from kan_train.config import ConfigError

URL = "memory://bucket/run"


@pytest.fixture(autouse=True)
def empty_store():
    store = fsspec.filesystem("memory")
    for path in store.ls("/", detail=False):
        store.rm(path, recursive=True)


def objects() -> dict[str, bytes]:
    """Everything in the store."""
    store = fsspec.filesystem("memory")
    return {path: store.cat_file(path) for path in store.find("/")}


def save_value(step: int, value: float | None = None, **more) -> Path:
    value = float(step if value is None else value)
    return save(URL, step=step, fragments=[Fragment.whole("w", torch.full((300,), value))], state={"value": value}, **more)


def loaded_value(path: Path) -> float:
    """The value of a checkpoint, after a verified load whose every element agrees with it."""
    target = torch.zeros(300)
    state = load(path, [Fragment.whole("w", target)])
    assert (target == state["value"]).all()
    return state["value"]


def test_a_state_comes_back_bit_for_bit_from_an_object_store(kit):
    """Types, shapes, odd bits, several files and a split other than the saved one; the URL itself and its text name the same place."""
    state = kit.make_state()
    path = save(URL, step=7, fragments=kit.whole(state), state={"step": 7}, rank_tensors={"rng": torch.arange(5)}, max_file_bytes=1200)
    assert str(path) == f"{URL}/step-00000007"
    assert sum(name.endswith(".safetensors") for name in objects()) >= 3
    assert {name.rpartition("/")[2] for name in objects()} == {"manifest.json", *read_manifest(path).files}
    target = kit.zeros(state)
    assert load(str(path), kit.whole(target)) == {"step": 7}
    assert kit.equal(target, state)
    parts = [f for name, t in kit.zeros(state).items() for f in kit.cut(name, t, [3, 8], parts=2)]
    load(path, parts)
    expected = [f for name, t in state.items() for f in kit.cut(name, t, [3, 8], parts=2)]
    assert all(kit.same_bits(a.flat, b.flat) for a, b in zip(parts, expected, strict=True))
    assert kit.equal(load_tensors(path, "buffer/"), {name[7:]: t for name, t in state.items() if name.startswith("buffer/")})
    assert torch.equal(load_rank_tensors(path, 0)["rng"], torch.arange(5))


def test_checkpoints_of_an_object_store_are_found_kept_and_replaced():
    assert newest(URL) is None
    assert newest_valid(URL) is None
    for step in (1, 2, 3, 4):
        save_value(step)
    assert [path.name for path in prune(place(URL), Policy(keep=1, every=2, best=1), metric=lambda m: m.state["value"])] == ["step-00000003"]
    assert [path.name for path in folders(URL)] == ["step-00000004", "step-00000002", "step-00000001"]
    save_value(4, 9.0)
    assert loaded_value(newest_valid(URL)) == 9.0
    assert len([name for name in objects() if "step-00000004" in name]) == 3, "nothing is left of what was replaced"
    for value in (URL, f"{URL}/step-00000004"):
        assert str(find_checkpoint("run", value, "runs")) == f"{URL}/step-00000004"
    with pytest.raises(ConfigError, match=r"run=memory://bucket/other is neither a run nor a checkpoint"):
        find_checkpoint("run", "memory://bucket/other", "runs")


def lose_connection(patch, moment: int) -> None:
    """At the `moment`-th request of a save that writes: an upload in one request, the beginning of one in parts, or its end."""
    calls = 0

    def counted(real, writes):
        def request(*args, **kwargs):
            nonlocal calls
            calls += writes(kwargs)
            if calls == moment and writes(kwargs):
                raise ConnectionResetError("the network went away")
            return real(*args, **kwargs)

        return request

    patch.setattr(MemoryFileSystem, "pipe_file", counted(MemoryFileSystem.pipe_file, lambda _: True))
    patch.setattr(MemoryFileSystem, "_open", counted(MemoryFileSystem._open, lambda kwargs: kwargs.get("mode") == "wb"))
    patch.setattr(checkpoint_files, "_write_hashed", counted(checkpoint_files._write_hashed, lambda _: True))


@pytest.mark.parametrize("portion", [8 << 20, 256], ids=["in one request", "in parts"])
@pytest.mark.parametrize("step", [1, 2], ids=["replacing", "new"])
def test_an_upload_that_fails_at_any_moment_leaves_what_was_there(monkeypatch, portion, step):
    """The connection is lost at each request of a save in turn: an error that names the place, and the store as it was before."""
    monkeypatch.setattr(checkpoint_files, "_REQUEST", portion)
    save_value(1)
    before = objects()
    for moment in range(1, 7):
        with monkeypatch.context() as patch:
            lose_connection(patch, moment)
            with pytest.raises(CheckpointError, match=r"cannot write memory://bucket/run/step-.*the network went away"):
                save_value(step, 5.0)
        assert objects() == before
        assert loaded_value(newest_valid(URL)) == 1.0
    lose_connection(monkeypatch, 7)
    save_value(step, 5.0)
    assert loaded_value(newest_valid(URL)) == 5.0


def test_a_store_that_cannot_be_reached_does_not_pass_for_an_empty_one(monkeypatch):
    """None would start the run over."""
    save_value(1)

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    for method, words in (("ls", "cannot read memory://bucket/run: ConnectionError: no route"), ("info", "no checkpoint in .* can be used.*no route")):
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, method, unreachable)
            # As every store of fsspec answers then.
            patch.setattr(MemoryFileSystem, "isdir", lambda self, path: False)
            for find in (newest, newest_valid):
                with pytest.raises(CheckpointError, match=words):
                    find(URL)
    assert loaded_value(newest(URL)) == 1.0


def test_only_the_rows_that_are_asked_for_are_fetched(monkeypatch):
    """Of a tensor of 4 MB two rows are loaded: the header's first read (64 KB) and 2 KB."""
    whole = torch.randn(4096, 256)
    path = save(URL, step=1, fragments=[Fragment.whole("w", whole)], state={})
    fetched, real = [], MemoryFileSystem.cat_file

    def counted(self, name, start=None, end=None, **kwargs):
        raw = real(self, name, start=start, end=end, **kwargs)
        if name.endswith(".safetensors"):
            fetched.append(len(raw))
        return raw

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    rows = torch.zeros(2 * 256)
    load(path, [Fragment(name="w", global_shape=(4096, 256), local_offset=(1000, 0), local_shape=(2, 256), start=0, flat=rows)], verify=False)
    assert torch.equal(rows.view(2, 256), whole[1000:1002])
    assert sum(fetched) <= (64 << 10) + 2048


def test_a_part_of_a_tensor_is_the_same_read_from_a_disk_and_from_a_store(kit, tmp_path):
    """The format's own parser on one side, ours on the other: every tensor, whole and by slices, of every type and of no elements too."""
    state = {"none": torch.empty(3, 0), **kit.make_state(4)}
    local, remote = (save(where, step=1, fragments=kit.whole(state), state={}) for where in (tmp_path, URL))
    (here,), (there,) = ([path / name for name in read_manifest(path).files if name.endswith(".safetensors")] for path in (local, remote))
    with open_tensors(here) as ours, open_tensors(there) as theirs:
        for name, tensor in state.items():
            if tensor.numel():
                shape = tuple(tensor.shape)
                for part in ((), (slice(1, 3),), (slice(2, 4), slice(1, 5))):
                    if len(part) <= len(shape):
                        assert kit.same_bits(theirs(name, tensor.dtype, shape, part), tensor[part])
                        assert kit.same_bits(ours(name, tensor.dtype, shape, part), tensor[part])


def test_a_damaged_header_in_a_store_is_refused_or_read_right(kit):
    """300 random changes of the header or the length before it: an error that names the file, or tensors of the sizes that were asked for."""
    state = {"a": torch.randn(6, 5), "b": torch.arange(9)}
    path = save(URL, step=1, fragments=kit.whole(state), state={})
    file = next(path / name for name in read_manifest(path).files if name.endswith(".safetensors"))
    original, chance, refused, read_right = file.read_bytes(), random.Random(3), 0, 0
    for _ in range(300):
        raw = bytearray(original)
        raw[chance.randrange(8 + int.from_bytes(raw[:8], "little"))] = chance.randrange(256)
        file.write_bytes(bytes(raw))
        try:
            with open_tensors(file) as read:
                for name, tensor in state.items():
                    assert read(name, tensor.dtype, tuple(tensor.shape)).shape == tensor.shape
        except CheckpointError as error:
            refused += str(file) in str(error)
        else:
            read_right += 1
    assert refused + read_right == 300
    assert refused > 150
    header = {"a": {"dtype": "F32", "shape": [6, 5], "data_offsets": [0, 120 << 40]}}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match="do not hold F32"), open_tensors(file):
        pass


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("s3://bucket/run", r"checkpoint.location=s3://bucket/run needs the package s3fs.*`pip install s3fs`"),
        ("gs://bucket/run", r"checkpoint.location=gs://bucket/run needs the package gcsfs.*`pip install gcsfs`"),
        ("nosuch://bucket", r"checkpoint.location=nosuch://bucket: nosuch:// is no object store.*checkpoint.location=s3://bucket/run"),
        ("https://host/run", r"https:// is no object store.*checkpoint.location=/mnt/run"),
    ],
)
def test_a_location_that_cannot_be_used_is_refused_with_one_that_can(monkeypatch, location, words):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=words):
        checkpoint_directory(Path("runs/a"), location)


def test_the_folder_of_a_runs_checkpoints(tmp_path):
    """In the run directory; in a folder or at a file:// URL, which is that folder; at a URL. A run's saved configuration leads there."""
    assert checkpoint_directory(tmp_path, "") == tmp_path / "checkpoints"
    assert checkpoint_directory(tmp_path, "/mnt/a") == checkpoint_directory(tmp_path, "file:///mnt/a") == Path("/mnt/a")
    assert str(checkpoint_directory(tmp_path, URL)) == URL
    elsewhere = tmp_path / "elsewhere"
    for name, location in (("first", URL), ("second", str(elsewhere)), ("third", "")):
        run_dir = tmp_path / "runs" / name
        run_dir.mkdir(parents=True)
        (run_dir / "config.yaml").write_text(f"checkpoint:\n  location: '{location}'\n")
        with pytest.raises(ConfigError, match=f"the run .*{name} has no complete checkpoint yet"):
            find_checkpoint("run", name, str(tmp_path / "runs"))
        directory = checkpoint_directory(run_dir, location)
        saved = save(directory, step=3, fragments=[Fragment.whole("w", torch.ones(2))], state={})
        for value in (name, str(run_dir), str(directory), str(saved)):
            assert find_checkpoint("run", value, str(tmp_path / "runs")) == saved
