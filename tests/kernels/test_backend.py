"""Where kernels run: the model's setting, the operators' own question, and rooms that need torch and numpy alone."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kan_train.config.model import KERNELS
from kan_train.kernels import backend

ROOMS = ("ada_scan", "edge_spline", "grove_gemm", "grove_route")
BLOCKED = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ImportError(f"{{name}} is not installed here")

sys.meta_path.insert(0, Refuse())
"""
HEAVY = ("deepspeed", "megatron", "hydra", "omegaconf", "wandb", "webdataset", "sentencepiece", "safetensors", "rich", "pyarrow", "psutil", "scipy")


def test_auto_never_chooses_the_interpreter(monkeypatch: pytest.MonkeyPatch):
    """The model on a CPU trains in plain torch; the interpreter is for who asks for it by name."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cpu = torch.device("cpu")
    assert not backend.use_triton("auto", cpu)
    assert not backend.use_triton("torch", "cuda")
    assert backend.use_triton("triton", cpu) == backend.runs_triton(cpu) == backend.triton_available()
    assert backend.use_triton("auto", "cuda") == backend.triton_available()


def test_the_settings_are_those_of_the_configuration():
    """Neither room may import the other: the words are written twice, and are the same."""
    assert backend.SETTINGS == KERNELS


def test_a_setting_that_cannot_be_met_says_what_would(monkeypatch: pytest.MonkeyPatch):
    """Without a GPU and without the interpreter, asking for triton is an error that names what is missing."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not backend.runs_triton(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"model.kernels=auto runs without"):
        backend.use_triton("triton", "cpu")
    with pytest.raises(ValueError, match="one of auto, triton, torch"):
        backend.use_triton("cuda", "cpu")


def test_rooms_need_torch_and_numpy_alone(tmp_path: Path):
    """Every room is imported, and its references with it, where triton and all else that kan_train depends on is missing."""
    modules = ", ".join(f"kan_train.kernels.{room}, kan_train.kernels.{room}.reference" for room in ROOMS)
    code = BLOCKED.format(refused=("triton", *HEAVY)) + f"import {modules}\nprint('triton' in sys.modules)\n"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "False", result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is no interpreter to repair")
def test_the_interpreter_rounds_as_a_gpu(neighbour: Callable):
    """bf16 to the nearest, ties to even, a carry into the exponent included; the interpreter of itself cuts off."""
    narrow, wide = neighbour("interpreter")._narrow, neighbour("interpreter")._widen
    values = torch.cat((torch.randn(4096) * 2.0 ** torch.randint(-30, 30, (4096,)), torch.tensor([1.99999, 255.9, 0.0, -0.0, 1e-40, float("inf"), 1.00390625])))
    expected = values.bfloat16().float().numpy()
    assert np.array_equal(wide(narrow(values.numpy())), expected)
    assert np.isnan(wide(narrow(np.array([np.nan], np.float32)))).all()


def test_guard_zones_notice_a_neighbour(guarded: Callable, allocations: Callable):
    """The canaries themselves: an element before or past the output is seen, inside allocations too; the output starts as NaN."""
    for place in (-1, 12):
        guard = guarded((3, 4), torch.float32)
        assert bool(guard.view.isnan().all())
        assert guard.intact()
        guard.memory[guard.start : guard.end].view(torch.float32)[:] = 1.0
        assert guard.intact()
        guard.view.as_strided((1,), (1,), guard.view.storage_offset() + place).fill_(0.0)
        assert not guard.intact()

    def past_the_end() -> None:
        with allocations():
            output = torch.empty(5)
            output.as_strided((1,), (1,), output.storage_offset() + 5).fill_(1.0)

    with pytest.raises(AssertionError, match="written outside"):
        past_the_end()
