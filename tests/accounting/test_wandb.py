"""W&B shows the rows of metrics.jsonl, and never costs a run. The offline files are read here byte by byte, without W&B's own reader."""

import json
import struct
import sys
import types
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import wandb

from kan_train.accounting.sinks.jsonl import JsonlSink
from kan_train.accounting.sinks.wandb import LOGGED, RUN_ID, WandbSink
from kan_train.config import Config

BLOCK = 32768
HEADER = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: a log of blocks, in which a record may be cut into a first, middle and last part."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, record = 7, b""
    while position + HEADER.size <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER.size:
            position += left
            continue
        checksum, length, kind = HEADER.unpack_from(data, position)
        body = data[position + HEADER.size : position + HEADER.size + length]
        assert zlib.crc32(bytes([kind]) + body) == checksum
        position += HEADER.size + length
        record = body if kind in (FULL, FIRST) else record + body
        if kind in (FULL, LAST):
            yield record


@dataclass
class Offline:
    """What an offline folder holds."""

    id: str = ""
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


def read_offline(run_dir: Path) -> list[Offline]:
    """One for each segment, in their order."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in run_dir.glob("wandb/offline-run-*/run-*.wandb"):
        offline = Offline()
        for data in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                offline.id, offline.name = record.run.run_id, record.run.display_name
                offline.config |= {update.key: json.loads(update.value_json) for update in record.run.config.update}
            elif record.WhichOneof("record_type") == "metric":
                offline.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
            elif record.WhichOneof("record_type") == "history":
                row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                offline.steps.append(row["_step"])
                offline.rows.append({name: value for name, value in row.items() if not name.startswith("_")})
        found.append(offline)
    return sorted(found, key=lambda one: one.steps)


def config(mode: str) -> Config:
    made = Config()
    made.run.name, made.logging.wandb = "first", mode
    return made


def segment(run_dir: Path, number: int, resumed_from: int, last: int, *, with_wandb: bool = True) -> list[dict[str, Any]]:
    """A segment of steps resumed_from + 1 to last, as the watch feeds its sinks; returns its rows."""
    sinks: list[Any] = [JsonlSink(run_dir / "metrics.jsonl"), *([WandbSink(config("offline"), run_dir)] if with_wandb else [])]
    lineage = {"segment": number, "resumed_from": resumed_from}
    rows = [{"step": step, "tokens": 100 * step, "loss": 9.0 / step, "load/cv/0": 0.5} | lineage for step in range(resumed_from + 1, last + 1)]
    for sink in sinks:
        sink.start({"step": resumed_from, "steps": 9, "tokens": 0, "origin": "new"} | lineage)
    for row in rows:
        for sink in sinks:
            sink.write(row)
    for sink in sinks:
        sink.close({"status": "finished", "step": last, "tokens": 0})
    return rows


def test_segments_replay_their_rows_under_one_id_without_overlap(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """The first segment ran without W&B, the third resumed from before the end of the second."""
    # W&B has advice for processes that import this.
    monkeypatch.setitem(sys.modules, "openai", types.ModuleType("openai"))
    rows = [segment(tmp_path, 1, 0, 3, with_wandb=False), segment(tmp_path, 2, 2, 5), segment(tmp_path, 3, 3, 6)]
    wandb.teardown()  # on a busy machine the last rows reach the disk after the end of their run
    second, third = read_offline(tmp_path)
    said = capsys.readouterr()
    folders = [str(folder) for folder in tmp_path.glob("wandb/offline-run-*")]
    assert sorted(said.out.splitlines()) == sorted(f"W&B: offline; to upload it: wandb sync {folder}" for folder in folders)
    assert said.err == "", "W&B's own messages would break the live progress"
    assert second.rows == rows[0] + rows[1]
    assert third.rows == rows[2]
    assert second.steps == [0, 1, 2, 3, 4, 5]
    assert third.steps == [6, 7, 8]
    assert second.id == third.id == (tmp_path / RUN_ID).read_text().strip()
    assert second.name == "first"
    assert second.config["model"]["num_layers"] == Config().model.num_layers
    assert second.metrics["*"] == "tokens"
    assert wandb.run is None, "a run of the caller's own would be left alone"


class Failing:
    """A W&B run that fails in the method named."""

    dir = "wandb/offline-run/files"
    url = "https://wandb.test/run"

    def __init__(self, method: str) -> None:
        self.method = method

    def __getattr__(self, name: str) -> Any:
        def call(*positional: Any, **named: Any) -> None:
            if name == self.method:
                raise RuntimeError(f"{name} is down")

        return call


@pytest.mark.parametrize("method", ["init", "define_metric", "log", "finish"])
def test_a_failure_of_wandb_is_said_once_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str
):
    def init(**named: Any) -> Failing:
        if method == "init":
            raise TimeoutError("init is down")
        return Failing(method)

    monkeypatch.setattr(wandb, "init", init)
    rows = segment(tmp_path, 1, 0, 3)
    assert capsys.readouterr().err == f"kan: W&B failed ({method} is down); the run goes on, metrics.jsonl has everything\n"
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == rows


class Recording(Failing):
    """A W&B run that keeps the numbers of the lines it is given; it fails in the one after `last`."""

    def __init__(self, lines: list[int], last: float = float("inf")) -> None:
        super().__init__("nothing")
        self.lines, self.last = lines, last

    def log(self, row: dict[str, Any], step: int, commit: bool) -> None:
        if step > self.last:
            raise ConnectionError("the line is cut")
        self.lines.append(step)


def test_rows_that_wandb_was_not_given_are_sent_by_the_next_start_that_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A server that is down, one that goes away, a start with W&B disabled; and a run of an older version, whose rows are there."""
    ids: list[str] = []
    found: list[int] = []

    def reached(last: float = float("inf")) -> Any:
        return lambda **named: ids.append(named["id"]) or Recording(found, last)

    def down(**named: Any) -> Any:
        raise TimeoutError("init is down")

    monkeypatch.setattr(wandb, "init", down)
    segment(tmp_path, 1, 0, 2)
    assert [path.name for path in tmp_path.glob("wandb_*")] == [], "nothing there belongs to this run yet"
    monkeypatch.setattr(wandb, "init", reached(last=3))
    segment(tmp_path, 2, 2, 6)
    assert found == [0, 1, 2, 3]
    segment(tmp_path, 3, 6, 8, with_wandb=False)
    monkeypatch.setattr(wandb, "init", reached())
    segment(tmp_path, 4, 8, 9)
    segment(tmp_path, 5, 9, 10)
    assert found == list(range(10))
    assert len(set(ids)) == 1
    (tmp_path / LOGGED).unlink()
    segment(tmp_path, 6, 10, 11)
    assert found == list(range(11))


@pytest.mark.parametrize(("mode", "resume"), [("online", "allow"), ("offline", None)])
def test_the_mode_is_explicit_whatever_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, resume: str | None):
    seen: dict[str, Any] = {}
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(wandb, "init", lambda **named: seen.update(named) or Failing("nothing"))
    WandbSink(config(mode), tmp_path).start({"step": 0})
    assert (seen["mode"], seen["resume"], seen["dir"]) == (mode, resume, str(tmp_path))
