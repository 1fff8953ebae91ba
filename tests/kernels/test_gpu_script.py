"""benchmarks/gpu.py without a GPU: its dry run goes through everything, and what breaks in one room stays there."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NOT_NEEDED = ("hydra", "omegaconf", "deepspeed", "megatron", "psutil", "scipy", "webdataset", "sentencepiece", "safetensors", "wandb", "rich", "pyarrow")

ROOM = """
import os
import torch

def cases(device, dry):
    def case(name, kernel, reference=torch.exp, **more):
        make = lambda seed: (torch.randn(50, generator=torch.Generator().manual_seed(seed)),)
        return {"name": name, "make": make, "kernel": kernel, "reference": reference, "bytes": 400, "flops": 50, **more}
    def raises(x):
        raise RuntimeError("no such instruction")
    def unwritten(x):
        out = torch.empty_like(x)
        out[1:] = x[1:].exp()
        return out
    def dies(x):
        os._exit(3)
"""
GOOD = ROOM + """
    return [case("good", torch.exp, rivals={"float64": lambda x: x.double().exp(), "absent": raises}, tokens=50)]
"""
BAD = ROOM + """
    return [case("wrong", torch.sin), case("unwritten", unwritten), case("raises", raises), case("right", torch.exp)]
"""
DEAD = ROOM + """
    return [case("before", torch.exp), case("dies", dies), case("never", torch.exp)]
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def run(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> tuple[int, dict]:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry", "--output", str(folder / "out"), "--folder", str(folder), *options])
    status = gpu.main()
    (path,) = (folder / "out").glob("*.json")
    return status, json.loads(path.read_text(), parse_constant=pytest.fail)


def test_a_broken_room_takes_no_other_with_it(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, text in (("dead", DEAD), ("unloadable", "import no_such_module"), ("bad", BAD), ("good", GOOD)):
        (tmp_path / f"{name}.py").write_text(text)
    status, record = run(gpu, monkeypatch, tmp_path, "--only", "dead", "unloadable", "bad", "good")
    assert status == 1
    assert {name: section["status"] for name, section in record["sections"].items()} == {
        "dead": "failed",
        "unloadable": "failed",
        "bad": "done",
        "good": "done",
    }
    assert "exit status 3" in record["sections"]["dead"]["message"]
    assert "no_such_module" in record["sections"]["unloadable"]["message"]
    # Each case comes twice, compared alone and timed; what was known before the process died is kept.
    rows = [(row["room"], row["name"], row.get("passed")) for row in record["rows"]]
    bad = [("bad", "wrong", False), ("bad", "unwritten", False), ("bad", "raises", None), ("bad", "right", True)]
    assert rows == [("dead", "before", True), *bad, *bad, ("good", "good", True), ("good", "good", True)]
    assert "no such instruction" in next(row["failed"] for row in record["rows"] if row["name"] == "raises")
    compared, timed = (row for row in record["rows"] if row["name"] == "good")
    assert "median_ms" not in compared
    low, high = timed["quartiles_ms"]
    assert 0 < low <= timed["median_ms"] <= high
    floor = max(400 / record["ceilings_measured"]["copy_bytes_per_second"], 50 / record["ceilings_measured"]["matmul_flops"])
    assert timed["floor_ms"] == pytest.approx(1e3 * floor)
    assert timed["share"] == pytest.approx(timed["floor_ms"] / timed["median_ms"])
    assert timed["tokens_per_second"] == pytest.approx(50e3 / timed["median_ms"])
    assert timed["rivals"]["float64"]["ratio"] == pytest.approx(timed["rivals"]["float64"]["median_ms"] / timed["median_ms"])
    assert "no such instruction" in timed["rivals"]["absent"]["failed"]
    printed = capsys.readouterr().out
    assert "FAILED: wrong" in printed
    assert "good: right" in printed


def test_what_hangs_is_ended_and_what_it_knew_is_kept(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The stand-in for a child leaves a whole row and half of one, and never ends."""
    child = tmp_path / "child.py"
    child.write_text(
        "import sys, time\n"
        "with open(sys.argv[sys.argv.index('--rows') + 1], 'a') as rows:\n"
        "    print('{\"name\": \"first\"}\\n{\"name\": \"sec', end='', file=rows, flush=True)\n"
        "    time.sleep(600)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(child))
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 1)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry"])
    record = {"rows": [{"room": "other", "name": "kept"}], "sections": {}, "ceilings_measured": {}}
    section = gpu.supervise("stuck", 3, gpu.arguments(), record, tmp_path / "record.json")
    assert section["status"] == "failed"
    assert "did not end" in section["message"]
    assert record["rows"] == [{"room": "other", "name": "kept"}, {"room": "stuck", "name": "first"}]
    # While the child was running, its row was on disk already.
    assert json.loads((tmp_path / "record.json").read_text())["rows"] == record["rows"]


def test_what_does_not_fit_in_the_time_is_left_out(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, record = run(gpu, monkeypatch, tmp_path, "--only", "one", "two", "--seconds", "0")
    assert status == 0
    assert [section["status"] for section in record["sections"].values()] == ["out of time", "out of time"]
    assert record["ceilings_measured"]["matmul_flops"] > 0
    assert record["versions"]["torch"]
    assert record["versions"]["numpy"]
    assert record["kernels_sha256"]


def test_differences_are_found(gpu: ModuleType) -> None:
    """The two outputs are compared one by one, whole numbers to the last, and a NaN is no agreement."""
    compare = importlib.import_module("gpu_timing").compare
    x, index = torch.arange(1.0, 9.0), torch.arange(8)

    def verdict(*found: torch.Tensor, **more: float) -> bool:
        return compare({"kernel": lambda: found, "reference": lambda: (x, index), **more}, ())["passed"]

    assert verdict(x * (1 + 1e-6), index)
    assert not verdict(x * (1 + 1e-3), index)
    assert verdict(x * (1 + 1e-3), index, tolerance=1e-2)
    assert not verdict(x, index.flip(0))
    assert not verdict(torch.where(index == 3, torch.nan, x), index)
    assert not verdict(x[:-1], index)


def test_calls_are_timed_between_events_with_the_cache_overwritten_before_each(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order on a device, played by a recorder: the overwriting stays outside of the time, inputs take turns, and nothing waits before the end."""
    done: list[object] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("event")

        def elapsed_time(self, _: object) -> float:
            assert done[-1] == "wait"
            return 2.5

    class Cache:
        def fill_(self, _: int) -> None:
            done.append("overwrite")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    timing = importlib.import_module("gpu_timing")
    assert timing._times(done.append, [(1,), (2,)], 3, Cache()) == [0.0025] * 3
    assert done == [step for turn in (1, 2, 1) for step in ("overwrite", "event", turn, "event")] + ["wait"]


def test_dry_run_of_every_room(tmp_path: Path) -> None:
    """As a user would start it, from elsewhere, where nothing but torch, triton and numpy can be imported."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {NOT_NEEDED}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert set(record["sections"]) == {room.stem for room in (BENCHMARKS / "kernels").glob("*.py")}
    assert {section["status"] for section in record["sections"].values()} == {"done"}
    for room in record["sections"]:
        rows = [row for row in record["rows"] if row["room"] == room]
        assert any(row.get("passed") for row in rows), room
        assert any("median_ms" in row for row in rows), room
