"""Saving in the background: what is written is the copy, one at a time; failures are told, tried again, and never end a healthy run."""

import threading
import time
from pathlib import Path

import pytest
import torch

from kan_train.checkpoint import CheckpointError, Fragment, folders, load, newest
from kan_train.config import CheckpointConfig
from kan_train.engine import saving
from kan_train.engine.saving import Saver, Snapshot
from kan_train.parallel.runtime import Runtime

from .test_trainer import make, run, weights  # noqa: F401  (make is a fixture)


def snapshot(step: int, **state) -> Snapshot:
    return Snapshot(step=step, state=state, rank_tensors={"random/cpu": torch.get_rng_state()}, about={"config": "", "tokens": 10 * step})


def saver(directory: Path, **settings) -> Saver:
    return Saver(CheckpointConfig(**settings), directory, Runtime(), metric=lambda manifest: manifest.state.get("loss"))


def fragments(tensors: dict[str, torch.Tensor]) -> list[Fragment]:
    return [Fragment.whole(f"param/{name}", tensor) for name, tensor in tensors.items()]


def loaded(path: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    load(path, fragments(found))
    return found


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.randn(64, 33), "b": torch.randn(7), "empty": torch.empty(0, 4), "c": torch.arange(5)}


@pytest.fixture
def slow(monkeypatch) -> threading.Event:
    """Background writes begin when the event is set."""
    gate, real = threading.Event(), saving.save

    def held_up(*arguments, **more):
        assert gate.wait(20)
        return real(*arguments, **more)

    monkeypatch.setattr(saving, "save", held_up)
    return gate


def test_what_is_written_is_what_was_there_when_save_returned(tmp_path: Path, tensors, slow):
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    own = saver(tmp_path)
    seconds = own.save(snapshot(3), fragments(tensors))
    assert seconds["seconds"] < 5
    for tensor in tensors.values():
        tensor.mul_(2).add_(1)  # training goes on
    assert folders(tmp_path) == []
    slow.set()
    own.wait()
    found = loaded(newest(tmp_path), tensors)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ((kind, fields),) = own.events()
    assert (kind, fields["saved_step"], fields["path"]) == ("saved", 3, str(tmp_path / "step-00000003"))
    assert own.events() == []


def test_at_most_one_save_is_in_flight_and_its_memory_is_used_again(tmp_path: Path, tensors, slow):
    own = saver(tmp_path, keep=0)
    own.save(snapshot(1), fragments(tensors))
    held = {key: buffer.data_ptr() for key, buffer in own._buffers.items()}
    assert sum(buffer.nbytes for buffer in own._buffers.values()) == sum(tensor.nbytes for tensor in tensors.values())
    threading.Timer(0.5, slow.set).start()
    tensors["a"].fill_(5.0)
    seconds = own.save(snapshot(2), fragments(tensors))
    assert seconds["seconds"] >= seconds["seconds_waiting"] > 0.2
    assert [path.name for path in folders(tmp_path)][-1] == "step-00000001"  # on disk before the second copy was taken
    own.wait()
    assert {key: buffer.data_ptr() for key, buffer in own._buffers.items()} == held
    assert (loaded(tmp_path / "step-00000001", tensors)["a"] != 5.0).any()
    assert (loaded(tmp_path / "step-00000002", tensors)["a"] == 5.0).all()


def test_a_failed_write_is_told_at_once_and_tried_again(tmp_path: Path, tensors, capsys):
    """A file lies where the folder of checkpoints should be; it is gone by the second try."""
    directory = tmp_path / "checkpoints"
    directory.write_text("in the way")
    own = saver(directory, retries=2)
    own.save(snapshot(4), fragments(tensors))
    deadline = time.monotonic() + 10
    while not (told := own.events()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [(kind, fields["saved_step"], fields["attempt"]) for kind, fields in told] == [("save_failed", 4, 1)]
    assert "the checkpoint of step 4 could not be written" in capsys.readouterr().err
    directory.unlink()
    own.wait()
    assert [kind for kind, _ in own.events()] == ["saved"]
    assert torch.equal(loaded(newest(directory), tensors)["a"], tensors["a"])


def test_a_write_that_keeps_failing_is_no_error_until_nothing_comes_after_it(tmp_path: Path, tensors, capsys):
    directory = tmp_path / "checkpoints"
    directory.write_text("in the way")
    for settings in ({"asynchronous": True}, {"asynchronous": False}):
        own = saver(directory, retries=0, **settings)
        own.save(snapshot(4), fragments(tensors))
        own.wait()
        assert [(kind, fields["attempt"]) for kind, fields in own.events()] == [("save_failed", 1)]
        assert "training goes on without this checkpoint" in capsys.readouterr().err
        with pytest.raises(CheckpointError, match="checkpoints"):
            own.save_now(snapshot(5), fragments(tensors))


def test_replicas_are_not_copied(tmp_path: Path):
    tensor = torch.randn(1000)
    own = saver(tmp_path)
    halves = [
        Fragment(name="param/x", global_shape=(1000,), local_offset=(0,), local_shape=(1000,), start=0, flat=tensor),
        Fragment(name="param/x", global_shape=(1000,), local_offset=(0,), local_shape=(1000,), start=0, flat=tensor, write=False),
    ]
    own.save(snapshot(1), halves)
    own.wait()
    assert sum(buffer.nbytes for buffer in own._buffers.values()) == 4000
    assert torch.equal(loaded(newest(tmp_path), {"x": tensor})["x"], tensor)


def test_old_checkpoints_go_by_the_policy(tmp_path: Path, tensors):
    own = saver(tmp_path, keep=1, keep_every=4, keep_best=1)
    for step, loss in enumerate([5.0, 2.0, 3.0, 4.0, 6.0, 5.5], start=1):
        own.save(snapshot(step, loss=loss), fragments(tensors))
    own.wait()
    assert [path.name for path in folders(tmp_path)] == ["step-00000006", "step-00000004", "step-00000002"]


@pytest.mark.parametrize("setting", ["checkpoint.asynchronous=true", "checkpoint.asynchronous=false"])
def test_a_run_survives_a_disk_that_fails_for_a_while(make, setting, capsys):  # noqa: F811
    """The folder of checkpoints is a file until step 5: the run loses those saves and nothing else."""
    config = make(setting, "checkpoint.retries=0", "run.name=unlucky", "checkpoint.every=1", "train.validate_every=0")
    whole, _ = run(make("checkpoint.every=0", "run.name=lucky", "train.validate_every=0"))
    directory = whole.run_dir.parent / "unlucky" / "checkpoints"

    def act(row) -> None:
        if row["step"] == 1:
            directory.write_text("in the way")
        elif row["step"] == 5:
            directory.unlink()

    directory.parent.mkdir()
    result, watch = run(config, after_step=act)
    assert (result.finished, result.exit_code) == (True, 0)
    failed = [fields["saved_step"] for kind, fields in watch.events if kind == "save_failed"]
    assert set(failed) >= {1, 2, 3}
    assert newest(directory).name == "step-00000006"
    expected = weights(make("run.name=lucky"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(config).items())
    assert "could not be written" in capsys.readouterr().err
