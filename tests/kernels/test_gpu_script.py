"""benchmarks/gpu.py without a GPU: its dry run goes through everything, and what breaks in one room stays there."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kan_train.kernels import ada_scan
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NOT_NEEDED = (
    "triton", "hydra", "omegaconf", "yaml", "deepspeed", "megatron", "psutil",
    "scipy", "webdataset", "sentencepiece", "safetensors", "wandb", "rich", "pyarrow",
)  # fmt: skip

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


@pytest.fixture
def room(gpu: ModuleType) -> ModuleType:
    """benchmarks/kernels/model.py, as gpu.py loads it."""
    spec = importlib.util.spec_from_file_location("benchmark_model", BENCHMARKS / "kernels" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def models(gpu: ModuleType) -> ModuleType:
    """benchmarks/whole_models.py."""
    return importlib.import_module("whole_models")


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


def test_calls_of_seconds_are_repeated_a_few_times(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = importlib.import_module("gpu_timing")
    for seconds, repeats in ((1.0, 3), (0.1, 5), (1e-3, 11)):
        monkeypatch.setattr(timing, "_times", lambda call, copies, count, flush, seconds=seconds: [seconds] * count)
        assert timing.measure(lambda: None, [()], torch.device("cpu"))["repeats"] == repeats


def test_a_step_of_many_launches_is_timed_as_a_graph_too(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel and rivals of 5 ms by the host and 1 ms by a graph, of which only the case that asks for it hears; what concludes sees both."""
    timing = importlib.import_module("gpu_timing")
    monkeypatch.setattr(timing, "_captured", lambda call, inputs: "graph")
    monkeypatch.setattr(timing, "measure", lambda call, copies, device: {"median_ms": 1.0 if call == "graph" else 5.0})
    made: list[int] = []
    case = {"make": lambda seed: (made.append(seed),), "kernel": print, "rivals": {"other": print}}
    device: Any = SimpleNamespace(type="cuda")
    assert "graph" not in (row := timing.run_case(case, device, {}, timed=True))
    assert "graph" not in row["rivals"]["other"]
    assert made == [0, 1]

    def conclude(row: dict, inputs: tuple, ceilings: dict) -> dict:
        return {"gain": row["median_ms"] / row["graph"]["median_ms"], "rival's": row["rivals"]["other"]["graph"]["median_ms"], "inputs": len(inputs)}

    row = timing.run_case(case | {"graph": True, "copies": 1, "conclude": conclude}, device, {}, timed=True)
    assert (row["gain"], row["rival's"], row["inputs"]) == (5.0, 1.0, 1)
    assert made == [0, 1, 0]
    row = timing.run_case(case | {"conclude": conclude}, device, {}, timed=True)
    assert "KeyError" in row["failed"]
    assert row["median_ms"] == 5.0


# --- whole models ---------------------------------------------------------------------------------------------------------------------------------------------


def test_shipped_models_are_read_without_a_yaml_parser(models: ModuleType) -> None:
    if torch.cuda.is_available():  # a machine with a GPU need not have what the trainer has besides its kernels
        pytest.importorskip("hydra", reason="what the files say is asked of Hydra")
    from kan_train.config.compose import compose_train

    for name in (models.KAN, models.TWIN, "kan_tiny", "kan_literal", "kan_340b"):
        assert models.shipped(name) == compose_train([f"model={name}", "run.name=read"]).model
    with pytest.raises((TypeError, AttributeError)):
        models.overlaid(models.shipped(models.KAN), {"no_such_setting": 1})


def test_a_model_trains_in_the_largest_micro_batches_that_fit(room: ModuleType) -> None:
    """Memory for so many sequences with their activations, and for so many without: halves come first, recomputation last, and every token once a call."""

    class Model:
        def __init__(self, room_for: dict[bool, int]) -> None:
            self.room_for, self.seen, self.activation_checkpointing = room_for, [], False
            self.weight, self.gradient = torch.nn.Parameter(torch.zeros(())), None

        def __call__(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, None]:
            if len(tokens) > self.room_for[self.activation_checkpointing]:
                raise torch.cuda.OutOfMemoryError("for a test")
            self.seen += tokens[:, 0].tolist()
            return self.weight * targets.float().mean(), None

        def zero_grad(self, set_to_none: bool) -> None:
            self.gradient, self.weight.grad = self.weight.grad, None

        def train(self) -> None: ...

        def discard_statistics(self) -> None: ...

    tokens = torch.arange(8)[:, None] * torch.ones(1, 5, dtype=torch.int64)
    for room_for, way in (({False: 3, True: 8}, (2, False)), ({False: 0, True: 5}, (4, True)), ({False: 8, True: 8}, (8, False))):
        model = Model(room_for)
        trainer = room.Trainer(lambda model=model: model)
        for _ in range(2):
            model.seen.clear()
            trainer(tokens)
            assert trainer.way == way
            assert model.seen == list(range(8))
        assert model.gradient == pytest.approx(3.5)  # that of the mean over all tokens
        assert f"{way[0]} x 4 tokens" in trainer.how()
    with pytest.raises(MemoryError, match="does not fit"):
        room.Trainer(lambda: Model({False: 0, True: 0}))(tokens)


def test_goals_go_by_the_ratio_of_flops(room: ModuleType) -> None:
    """A goal of speed stands where both countings allow it; the share of the twin's MFU is the achieved over the ideal ratio."""

    def verdict(achieved: float | None, full: float, causal: float) -> dict:
        return room.training_verdict(achieved, {"full": 2.0, "causal": 2.0}, {"full": 2 * full, "causal": 2 * causal})

    allowed = verdict(6.3, 7.6, 6.3)
    assert allowed["ideal_flop_ratio"] == {"full": 7.6, "causal": 6.3}
    assert allowed["goals"] == {
        "MFU over the twin's": {"value": pytest.approx(6.3 / 7.6), "goal": 0.7, "reached": True},
        "tokens a second over the twin's": {"value": 6.3, "goal": 6.2, "reached": True},
    }
    slow = verdict(3.0, 7.6, 6.1)
    assert {name: goal["reached"] for name, goal in slow["goals"].items()} == {"MFU over the twin's": False}
    assert verdict(None, 7.6, 6.3)["goals"] == {}


def test_bytes_of_a_decode_step_are_those_of_what_it_reads(room: ModuleType, models: ModuleType) -> None:
    """Counted tensor by tensor: of the embedding a row a token, of a layer's groves those that run; the state of ADA is read and written."""
    config = models.config_of(models.KAN, True)
    model = materialise(LanguageModel(config), seed=0, dtype=torch.bfloat16)
    expected = 0.0
    for name, weight in model.named_parameters():
        match name.split("."):
            case ["embedding", _]:
                share = 5 / len(weight)
            case ["layers", layer, "ffn", "groves", *_]:
                share = {"0": 3, "1": 1}[layer] / config.grove.num_groves
            case _:
                share = 1
        expected += 2 * weight.numel() * share
    assert room.weight_bytes(model, 5, [3, 1]) == pytest.approx(expected)
    heads, width = config.ada.num_heads, config.head_width
    assert room.state_bytes(model.init_state(5)) == 5 * config.num_layers * heads * (4 * width**2 + 2 * (config.ada.conv_width - 1) * width)


def test_groves_that_run_are_counted_by_layer(room: ModuleType, models: ModuleType) -> None:
    model = materialise(LanguageModel(models.config_of(models.KAN, True)), seed=0).eval()
    one = torch.tensor([7])
    assert room.groves_run(model, one, model.init_state(1)) == [2, 2]
    assert room.groves_run(model, one.expand(6), model.init_state(6)) == [2, 2]
    counts = room.groves_run(model, torch.arange(128), model.init_state(128))
    assert counts == [4, 4]
    assert all(layer.router.selector is None for layer in model.grove_layers())


def test_a_cache_without_room_leaves_the_models_own_row(room: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    timing, cpu = importlib.import_module("gpu_timing"), torch.device("cpu")
    assert room.has_room(10**15, cpu)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=85 * 10**9))
    assert [room.has_room(size * 10**9, torch.device("cuda")) for size in (69, 80)] == [True, False]
    monkeypatch.setattr(room, "has_room", lambda *_: False)
    row = timing.run_case(room._decoding(2, 8, cpu, True), cpu, {"copy_bytes_per_second": 1e9, "matmul_flops": 1e12}, timed=True)
    assert "does not fit" in row["rivals"][room.TWIN]["failed"]
    assert [model["name"] for model in row["models"]] == [room.KAN]
    assert row["share"] == pytest.approx(1e3 * row["bytes"] / 1e9 / row["median_ms"])
    assert list(row["goals"]) == ["share of the byte roofline"]


def test_decoding_goes_by_the_graphs_time_where_there_is_one(room: ModuleType) -> None:
    ceilings = {"copy_bytes_per_second": 1e9}
    graph = room._decoder("kan", {"median_ms": 8.0, "graph": {"median_ms": 2.0}}, 4, 1e6, ceilings)
    host = room._decoder("twin", {"median_ms": 8.0, "graph": {"failed": "capture"}}, 4, 5e6, ceilings)
    assert (graph["tokens_per_second"], graph["share"], graph["how"]) == (2000, 0.5, "as a CUDA graph")
    assert (host["tokens_per_second"], host["share"], host["how"]) == (500, 0.625, "launched by the host")
    assert room._decoder("absent", {"failed": "no memory"}, 4, 1e6, ceilings) is None
    batched, single = (room.decoding_verdict(batch, [graph, host]) for batch in (4, 1))
    assert batched["achieved_ratio"] == 4
    assert batched["ideal_byte_ratio"] == 5
    assert batched["goals"] == {"share of the byte roofline": {"value": 0.5, "goal": 0.7, "reached": False}}
    assert single["goals"] == {"tokens a second over the twin's": {"value": 4, "goal": 2.86, "reached": True}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script itself runs them")
def test_checks_of_the_model_run_its_kernels_and_notice_a_wrong_one(room: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = importlib.import_module("gpu_timing")
    cases = {case["name"].partition(",")[0]: case for case in room.checks(torch.device("cpu"), True) if "fp32" in case["name"]}
    found = {name: timing.compare(case, case["make"](0)) for name, case in cases.items()}
    assert set(found) == {"loss", "logits of three decode steps", "the twin's cache in place"}
    assert all(result["passed"] for result in found.values()), found
    assert all(result["error"] > 0 for result in found.values()), "the same code on both sides"
    norm = ada_scan.gated_norm
    monkeypatch.setattr(ada_scan, "gated_norm", lambda *arguments: 1.01 * norm(*arguments))
    step = cases["logits of three decode steps"]
    assert not timing.compare(step, step["make"](0))["passed"]


def test_the_twins_step_is_noticed_where_it_rotates_wrongly(room: ModuleType, models: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    timing, cpu = importlib.import_module("gpu_timing"), torch.device("cpu")
    (case,) = (case for case in room.checks(cpu, True) if case["name"].startswith("the twin's cache in place") and "fp32" in case["name"])
    assert timing.compare(case, case["make"](0))["passed"]
    tables = models.rotary_tables
    monkeypatch.setattr(models, "rotary_tables", lambda positions, *rest: tables(positions - 1, *rest))
    assert not timing.compare(case, case["make"](0))["passed"]


def test_dry_run_of_every_room(tmp_path: Path) -> None:
    """As a user would start it, from elsewhere, where of all that kan_train may use only torch and numpy are installed."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Without(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        f"        return None if name.partition('.')[0] in {NOT_NEEDED} else super().find_spec(name, path, target)\n"
        "sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]\n"
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
    models = [row for row in record["rows"] if "models" in row]
    assert len(models) == len([row for row in record["rows"] if row["room"] == "model" and "median_ms" in row])
    for row in models:
        kan, twin = row["models"][:2]
        assert (kan["name"], twin["name"]) == ("kan_1b", "dense_1b_total")
        assert row["achieved_ratio"] == pytest.approx(kan["tokens_per_second"] / twin["tokens_per_second"])
        if row["name"].startswith("training"):
            # The least that must be multiplied is the counting "causal"; the goal goes by the other.
            assert kan["mfu"]["causal"] == pytest.approx(row["share"])
            assert row["goals"]["MFU over the twin's"]["value"] == pytest.approx(kan["mfu"]["full"] / twin["mfu"]["full"])
        else:
            assert row["share"] == kan["share"] > 0
    assert {row["name"].partition(",")[0] for row in models} == {"training", "decode step"}
    assert "goal: MFU over the twin's" in done.stdout
