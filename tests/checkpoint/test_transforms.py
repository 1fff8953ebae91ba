"""Finer splines and averaged weights: against scipy and numpy, and through the model; nothing that exists is lost."""

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy.interpolate import BSpline

from kan_train.checkpoint import CheckpointError, load_tensors, read_manifest, save
from kan_train.checkpoint.export import export
from kan_train.checkpoint.transforms import average, ema_weights, refine
from kan_train.config import AdaConfig, Config, DataConfig, EdgeConfig, GroveConfig, ModelConfig, RunConfig
from kan_train.config.compose import from_yaml, to_yaml
from kan_train.inference.load import load_model
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel

LOW, HIGH = -2.0, 2.5
KINDS = [
    ("gated", "bspline", 3, 5), ("gated", "bspline", 1, 1), ("edge", "bspline", 2, 4), ("gated", "piecewise_poly", 3, 3), ("edge", "piecewise_poly", 1, 2),
]  # fmt: skip


def model_config(kind: str = "gated", edge_kind: str = "bspline", order: int = 3, grid: int = 5, **changes) -> ModelConfig:
    sharing = "per_edge" if kind == "edge" else "grouped"
    edge = EdgeConfig(kind=edge_kind, order=order, grid=grid, low=LOW, high=HIGH, sharing=sharing, group_size=8)
    shared = 0 if kind == "edge" else 16
    grove = GroveConfig(num_groves=4, active_groves=2, width=16, score_rank=4, kind=kind, shared_width=shared, edge=edge)
    return ModelConfig(**{"num_layers": 2, "width": 32, "vocab_size": 128, "sequence_length": 32, "ada": AdaConfig(num_heads=2), "grove": grove, **changes})


def write(kit, run_dir: Path, config: ModelConfig, step: int = 20, seed: int = 0, **settings) -> Path:
    """A checkpoint of drawn weights at `run_dir`; every tensor in two boxes."""
    model = materialise(LanguageModel(config), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    fragments = []
    parameters = dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        value = tensor.detach().clone()
        if name.endswith("coefficients"):
            value = torch.randn(value.shape, generator=generator)
        elif name not in parameters:
            value += torch.rand(value.shape, generator=generator)
        fragments += kit.cut(f"{'param' if name in parameters else 'buffer'}/{name}", value, [5])
    fragments += kit.cut("exp_avg/head.weight", torch.ones(3), [6])
    whole = Config(model=config, data=DataConfig(blend={"stdlib": 1.0}), run=RunConfig(name=run_dir.name))
    whole.checkpoint.location = str(run_dir / "checkpoints")
    progress = {"step": step, "tokens": 64 * step, "figures": {"validation_loss": 3.0}}
    state = {"progress": progress, "model": dataclasses.asdict(config), "engine": {"optimizer_steps": step}, **settings}
    path = save(run_dir / "checkpoints", step=step, fragments=fragments, state=state, config=to_yaml(whole), tokens=64 * step, data_index="abc")
    (run_dir / "tokenizer.model").write_bytes(b"of this run")
    return path


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_tensors(checkpoint, prefix="")


def functions(coefficients: np.ndarray, kind: str, edge_kind: str, order: int, grid: int) -> np.ndarray:
    """One row of coefficients a function. An edge layer has them as [N, inputs * n, outputs]."""
    count = grid + order if edge_kind == "bspline" else grid * (order + 1)
    if kind == "edge":
        groves, rows, outputs = coefficients.shape
        coefficients = np.moveaxis(coefficients.reshape(groves, rows // count, count, outputs), 2, -1)
    return coefficients.reshape(-1, count)


def values(row: np.ndarray, edge_kind: str, order: int, grid: int, x: np.ndarray) -> np.ndarray:
    """The function of these coefficients at x inside the grid, by scipy or numpy."""
    step = (HIGH - LOW) / grid
    if edge_kind == "bspline":
        return BSpline(LOW + step * np.arange(-order, grid + order + 1), row, order)(x)
    cell = np.minimum((x - LOW) // step, grid - 1).astype(int)
    u = (x - LOW) / step - cell
    return sum(row.reshape(grid, order + 1)[cell, power] * u**power for power in range(order + 1))


@pytest.fixture(scope="module", params=KINDS, ids=lambda param: "-".join(map(str, param)))
def refinement(request, kit, tmp_path_factory) -> tuple[tuple, Path, Path]:
    """(kind, edge kind, order, grid), a checkpoint of such a model, and the one that was refined from it."""
    root = tmp_path_factory.mktemp("refined")
    first = write(kit, root / "first", model_config(*request.param))
    return request.param, first, refine(first, root / "fine")


def test_refined_functions_are_the_same_functions(refinement):
    """Every function of every layer, read from the two checkpoints and evaluated without this package."""
    (kind, edge_kind, order, grid), first, made = refinement
    coarse, fine = weights(first), weights(made)
    x = np.random.default_rng(0).uniform(LOW, HIGH, 200)
    compared = 0
    for name, tensor in coarse.items():
        if not name.endswith("coefficients"):
            continue
        before = functions(tensor.double().numpy(), kind, edge_kind, order, grid)
        after = functions(fine[name].double().numpy(), kind, edge_kind, order, 2 * grid)
        assert len(before) == len(after)
        for old, new in zip(before[:40], after[:40], strict=True):
            np.testing.assert_allclose(values(new, edge_kind, order, 2 * grid, x), values(old, edge_kind, order, grid, x), atol=2e-6)
            compared += 1
    assert compared >= 10


def test_a_refined_model_gives_the_same_logits(refinement):
    """Inside the grid and beyond it, where functions go on linearly: in float64, up to the rounding of the new coefficients to fp32."""
    (kind, edge_kind, order, grid), first, made = refinement
    config, finer = model_config(kind, edge_kind, order, grid), from_yaml(read_manifest(made).config).model
    assert finer.grove.edge.grid == 2 * grid
    models = [load_model(c, path, torch.device("cpu")).double() for c, path in ((config, first), (finer, made))]
    tokens = torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (model.logits(tokens) for model in models)
        for name, parameter in models[0].named_parameters():
            if name.endswith("coefficients"):
                parameter.zero_()
        assert (models[0].logits(tokens) - expected).abs().max() > 0.1, "the splines matter here"
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=0)


def test_a_refined_run_has_nothing_but_the_weights_and_what_describes_them(kit, tmp_path):
    first = write(kit, tmp_path / "first", model_config())
    made = refine(first, tmp_path / "fine")
    assert made == tmp_path / "fine" / "checkpoints" / "step-00000020"
    coarse, fine = weights(first), weights(made)
    assert fine.keys() == {name for name in coarse if name.startswith(("param/", "buffer/"))}
    assert all(kit.same_bits(fine[name], tensor) for name, tensor in coarse.items() if name in fine and not name.endswith("coefficients"))
    manifest = read_manifest(made)
    assert (manifest.step, manifest.tokens, manifest.data_index) == (20, 1280, "abc")
    assert manifest.state["model"]["grove"]["edge"]["grid"] == 10
    assert manifest.state["transform"] == {"kind": "refine", "of": [str(first)], "grid": [5, 10]}
    assert manifest.state.keys() == {"progress", "model", "transform"}
    config = yaml.safe_load(manifest.config)
    assert (config["run"]["name"], config["run"]["root"], config["checkpoint"]["location"]) == ("fine", str(tmp_path), "")
    assert sorted(path.name for path in (tmp_path / "fine").iterdir()) == ["checkpoints", "config.yaml", "tokenizer.model"]
    assert (tmp_path / "fine" / "config.yaml").read_text() == manifest.config
    assert (tmp_path / "fine" / "tokenizer.model").read_bytes() == b"of this run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fine", "first"]


def test_refining_twice(kit, tmp_path):
    first = write(kit, tmp_path / "first", model_config())
    twice = refine(refine(first, tmp_path / "fine"), tmp_path / "finer")
    name = "param/layers.1.ffn.groves.functions.coefficients"
    x = np.linspace(LOW, HIGH, 50)
    old, new = (weights(path)[name][2, 1].double().numpy() for path in (first, twice))
    np.testing.assert_allclose(values(new, "bspline", 3, 20, x), values(old, "bspline", 3, 5, x), atol=2e-6)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (model_config(edge_kind="rational"), "model.grove.edge.kind=rational, functions without a grid"),
        (model_config(edge_kind="chebyshev"), "model.grove.edge.kind=chebyshev, functions without a grid"),
        (model_config(edge_kind="silu"), "model.grove.edge.kind=silu, functions without a grid"),
        (model_config(ffn="swiglu", ffn_width=48), r"a model without splines \(model.ffn=swiglu\)"),
    ],
    ids=["rational", "chebyshev", "silu", "dense"],
)
def test_what_has_no_grid_is_refused(kit, tmp_path, config, words):
    first = write(kit, tmp_path / "first", config)
    with pytest.raises(CheckpointError, match=words):
        refine(first, tmp_path / "fine")
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


@pytest.fixture(scope="module")
def three(kit, tmp_path_factory) -> list[Path]:
    """Checkpoints of steps 10, 20 and 30, of one run, with different weights. Not to be changed."""
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    return [write(kit, run_dir, model_config(), step=step, seed=step) for step in (10, 20, 30)]


@pytest.mark.parametrize("shares", [None, [1.0, 2.0, 5.0], [0.0, 1.0, 0.0]], ids=["even", "weights", "one of them"])
def test_the_average_is_the_mean_in_float64(three, tmp_path, shares):
    made = average(three, tmp_path / "mean", weights=shares)
    found, given = weights(made), [weights(path) for path in three]
    parts = np.array(shares or [1, 1, 1], dtype=np.float64)
    for name, tensor in found.items():
        if name.endswith("pending"):
            expected = given[2][name].numpy()
        else:
            stacked = np.stack([state[name].numpy().astype(np.float64) for state in given])
            expected = np.tensordot(parts / parts.sum(), stacked, axes=1).astype(np.float32)
        assert tensor.dtype == torch.float32
        # The two orders of adding may round a tie in float64 differently.
        np.testing.assert_array_max_ulp(tensor.numpy(), expected, maxulp=1)
    assert found.keys() == {name for name in given[0] if name.startswith(("param/", "buffer/"))}
    assert any(name.endswith("pending") for name in found)


def test_an_average_says_what_it_is_of(three, tmp_path):
    """Whatever the order in which they are named, the newest gives step, counters and configuration."""
    made = average([three[2], three[0]], tmp_path / "mean", weights=[3, 1])
    manifest = read_manifest(made)
    assert (made.name, manifest.step, manifest.tokens) == ("step-00000030", 30, 1920)
    assert manifest.state["transform"] == {"kind": "average", "of": [str(three[2]), str(three[0])], "weights": [0.75, 0.25]}
    assert manifest.state["progress"]["figures"] == {}, "the last validation was not of the mean"
    name = "buffer/layers.0.ffn.router.pending"
    assert torch.equal(weights(made)[name], weights(three[2])[name])
    assert yaml.safe_load(manifest.config)["run"]["name"] == "mean"


def test_averages_are_exported_and_averaged_again(three, tmp_path):
    made = average(three, tmp_path / "mean")
    export(made, tmp_path / "mean.safetensors")
    again = average([made, three[0]], tmp_path / "again")
    name = "param/head.weight"
    expected = sum(weights(path)[name].double() * share for path, share in zip(three, (2 / 3, 1 / 6, 1 / 6), strict=True))
    torch.testing.assert_close(weights(again)[name].double(), expected, atol=1e-6, rtol=0)


def test_weights_of_a_moving_average():
    assert ema_weights(0.5, 3) == [0.25, 0.5, 1.0]
    assert ema_weights(1.0, 2) == [1.0, 1.0]


def test_other_models_are_not_averaged(kit, three, tmp_path):
    """A setting that no shape shows is enough; settings that do not change the model may differ where that is said."""
    other = write(kit, tmp_path / "other", model_config(norm_eps=1e-5), step=40)
    with pytest.raises(CheckpointError, match=r"model.norm_eps=1e-06 and .* model.norm_eps=1e-05: only weights of one model"):
        average([three[0], other], tmp_path / "mean")
    wider = write(kit, tmp_path / "wider", model_config(width=64), step=40)
    with pytest.raises(CheckpointError, match="only weights of one model"):
        average([three[0], wider], tmp_path / "mean")
    renamed = write(kit, tmp_path / "renamed", model_config(name="same"), step=40)
    with pytest.raises(CheckpointError, match=r"model\.name"):
        average([three[0], renamed], tmp_path / "mean")
    assert average([three[0], renamed], tmp_path / "mean", free=("name",)).name == "step-00000040"


BAD = {
    "one alone": (1, None, "1 checkpoint is no average"),
    "too few weights": (3, [1, 2], "--weights has 2 numbers for 3 checkpoints; use 1,1,1"),
    "a negative one": (2, [1, -1], "must be finite, not negative and not all 0"),
    "nothing at all": (2, [0, 0], "must be finite, not negative and not all 0"),
    "not a number": (2, [float("nan"), 1], "must be finite, not negative and not all 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_weights_that_are_none(three, tmp_path, case):
    count, given, words = BAD[case]
    with pytest.raises(CheckpointError, match=words):
        average(three[:count], tmp_path / "mean", weights=given)
    with pytest.raises(CheckpointError, match="is named twice"):
        average([three[0], three[0]], tmp_path / "mean")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("transform", ["refine", "average"])
def test_an_existing_run_is_not_touched(three, tmp_path, transform):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    with pytest.raises(CheckpointError, match=r"mine exists already; choose another name \(--run mine-2\)"):
        average(three, tmp_path / "mine") if transform == "average" else refine(three[0], tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]


def test_a_damaged_source_is_refused(three, tmp_path):
    shutil.copytree(three[0].parents[1], tmp_path / "copy")
    copies = [tmp_path / "copy" / "checkpoints" / path.name for path in three]
    data = next(copies[1].glob("*.safetensors"))
    content = bytearray(data.read_bytes())
    content[-5] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not have the SHA-256 of its manifest"):
        average(copies, tmp_path / "mean")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("call", ["fsync", "posix_fallocate"])
def test_a_full_disk_leaves_nothing(three, tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(CheckpointError, match="no space left to write"):
        average(three, tmp_path / "mean")
    assert list(tmp_path.iterdir()) == []


MEMORY = """
    import dataclasses, sys, threading, time
    from pathlib import Path
    import torch, torch.distributed.checkpoint, yaml
    from kan_train.checkpoint import Fragment, save
    from kan_train.checkpoint.transforms import average
    from kan_train.config import Config, DataConfig
    from kan_train.config.compose import to_yaml

    def anonymous():
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

    root, rows, text = Path(sys.argv[1]), 12, to_yaml(Config(data=DataConfig(blend={"stdlib": 1.0})))
    value = torch.ones(1 << 21)  # 8 MiB
    checkpoints = []
    for step in (1, 2):
        fragments = [Fragment.whole(f"param/w{row}", value * step) for row in range(rows)]
        checkpoints.append(save(root / "first" / "checkpoints", step=step, fragments=fragments, state={}, config=text))
        del fragments
    (root / "first" / "tokenizer.model").write_bytes(b"x")
    before, seen, done = anonymous(), [], False

    def watch():
        while not done:
            seen.append(anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    average(checkpoints, root / "mean")
    done = True
    watcher.join()
    print(value.numel() * 4, max(seen) - before, len(seen))
"""


@pytest.mark.slow
def test_memory_holds_one_tensor_and_not_the_model(tmp_path):
    """Two checkpoints of 12 tensors: at the height of it a float64 sum, what is added to it and the hash's portions; not even half of one."""
    arguments = [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path)]
    # Every tensor in pages of its own, which go back when it is freed: what the allocator keeps for later is no tensor that is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    tensor, above, samples = map(int, done.stdout.split())
    assert samples >= 10
    assert above < 9 * tensor
