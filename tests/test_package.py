"""The package as users have it: imports that need little, a wheel that works outside the clone, neighbours that it must not break."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CLONE = Path(__file__).resolve().parents[1]

BLOCKED = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root in {allowed_out!r}:
            raise ImportError(f"{{name}} is not installed here")

sys.meta_path.insert(0, Refuse())
"""
HEAVY = ("deepspeed", "megatron", "hydra", "omegaconf", "wandb", "webdataset", "sentencepiece", "safetensors", "rich", "pyarrow", "matplotlib", "psutil")


def python(code: str, *, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=240)


def test_the_model_needs_torch_and_numpy_alone(tmp_path: Path):
    """The model must run where DeepSpeed, Megatron and Hydra are not installed."""
    code = BLOCKED.format(allowed_out=HEAVY) + (
        "import torch\n"
        "from kan_train.config import ModelConfig\n"
        "from kan_train.model.lm import LanguageModel\n"
        "from kan_train.model.init import materialise\n"
        "model = materialise(LanguageModel(ModelConfig(sequence_length=32, vocab_size=256)), seed=0)\n"
        "loss, _ = model(torch.zeros(1, 32, dtype=torch.long), torch.zeros(1, 32, dtype=torch.long))\n"
        "loss.backward()\n"
        "print(float(loss) > 0)\n"
    )
    result = python(code, cwd=tmp_path)
    assert result.stdout.strip() == "True", result.stderr


def test_plain_training_does_not_load_deepspeed_or_megatron(tmp_path: Path):
    """Start-up in one process stays short because the heavy libraries stay out."""
    code = "import sys, kan_train.engine.trainer; print([m for m in ('deepspeed', 'megatron.core', 'wandb', 'transformers') if m in sys.modules])"
    result = python(code, cwd=tmp_path)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_neighbours_keep_their_names(tmp_path: Path):
    """PyPI's `kernels`, which transformers imports, is not shadowed by the room of that name, and both work beside this package."""
    code = (
        "import kan_train.data_tools, kan_train.conf, kernels, transformers\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16))\n"
        "print(hasattr(kernels, 'get_kernel'), 'site-packages' in kernels.__file__)\n"
    )
    result = python(code, cwd=tmp_path)
    assert result.stdout.split() == ["True", "True"], result.stderr


@pytest.fixture(scope="module")
def wheel_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the clone and unpacked where the clone is not on the path."""
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy: setuptools leaves a build folder beside the sources, from which a later wheel would take files that are gone.
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CLONE / name, source)
    for name in ("kan_train", "data_tools", "kernels", "launch", "conf"):
        shutil.copytree(CLONE / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "site"), str(source)]
    subprocess.run(command, check=True, cwd=folder, timeout=240)
    return folder / "site"


def test_the_wheel_works_outside_the_clone(wheel_tree: Path, tmp_path: Path):
    """Rooms beside kan_train/ and the YAML leaves must travel with the wheel."""
    env = {"PYTHONPATH": str(wheel_tree)}
    where = python("import kan_train, kan_train.conf, kan_train.data_tools as d; print(kan_train.__file__); print(d.__file__)", cwd=tmp_path, env=env)
    assert all(Path(line).is_relative_to(wheel_tree) for line in where.stdout.split()), where.stdout
    rooms = ("ada_scan", "edge_spline", "grove_gemm", "grove_route")
    for module in ("backend", *(f"{room}.{part}" for room in rooms for part in ("reference", "triton"))):
        assert (wheel_tree / "kan_train" / "kernels" / f"{module.replace('.', '/')}.py").is_file(), module
    command = [sys.executable, "-m", "kan_train", "train", "--cfg", "job", "model=kan_125m", "run.name=x"]
    result = subprocess.run(command, cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)
    assert "name: kan_125m" in result.stdout, result.stderr
