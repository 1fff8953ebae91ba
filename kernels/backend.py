"""Where kernels run, and what they are told about the device.

Two questions are kept apart. `use_triton` answers the model's: does the setting `model.kernels` send a layer through this room's operators at all?
`runs_triton` answers an operator's: does it launch kernels on this device, or run its reference? A CPU runs kernels in triton's interpreter, slowly and for
tests alone, so that `auto` never chooses them there.
"""

import contextlib
import functools
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

SETTINGS = ("auto", "triton", "torch")
_INTERPRETED_PROCESSORS = 3  # few, and odd: a persistent program then takes several tiles, and no number of tiles fits


class AotCase(NamedTuple):
    """One configuration of a kernel, for the compile report: what `aot_cases(target)` of a room's `triton` module yields.

    `aot_cases(target: str) -> Iterator[AotCase]` yields every configuration that the room's launchers can choose on `target` ("sm_80", "sm_90", "gfx942"),
    from the same function `configurations(...)` that they ask.
    """

    name: str
    """Unique in the room, without the target, for example "grouped_gemm bf16 128x256x64"."""
    kernel: Any
    """The @triton.jit function."""
    signature: dict[str, str]
    """Type of every argument that is not in `constexprs`: "*bf16:16", "i32:16", "i32", "fp32", ...; ":16" tells that a launch would find it divisible by 16.
    None of a launch's arguments that is 1 or None belongs here: those are constants."""
    constexprs: dict[str, Any]
    """Values of the constants."""
    num_warps: int
    num_stages: int
    tensor_cores: bool = True
    """Whether the kernel multiplies matrices, and so must hold tensor-core instructions (none are asked of fp32 in full precision)."""
    spill_bytes: int = 0
    """Register spills that are known and accepted; say why beside the case."""


@functools.lru_cache
def triton_available() -> bool:
    """Whether triton is installed. It is not imported for the answer."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in triton's interpreter (TRITON_INTERPRET=1, to be set before a kernel module is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def runs_triton(device: torch.device) -> bool:
    """Whether an operator launches kernels for tensors on `device`; if not, it runs its reference."""
    return triton_available() and (device.type == "cuda" or (device.type == "cpu" and interpreted()))


def use_triton(setting: str, device: torch.device | str) -> bool:
    """Whether the model goes through the operators of these rooms on `device`. setting: `model.kernels`.

    auto: on a GPU (CUDA or ROCm) with triton installed. Raises ValueError where "triton" is asked for and cannot run.
    """
    device = torch.device(device)
    if setting not in SETTINGS:
        raise ValueError(f"model.kernels={setting!r} must be one of {', '.join(SETTINGS)}; auto chooses by the device")
    if setting == "triton" and device.type != "meta" and not runs_triton(device):
        missing = "a GPU, or TRITON_INTERPRET=1 for its interpreter" if triton_available() else "the package triton (pip install 'kan-train[gpu]')"
        raise ValueError(f"model.kernels=triton on the device {device.type} needs {missing}; model.kernels=auto runs without")
    return setting == "triton" or (setting == "auto" and device.type == "cuda" and triton_available())


def target(device: torch.device) -> str:
    """The architecture whose configurations fit: "sm_80", "sm_90", "gfx942", ..., or "interpreter"."""
    return "interpreter" if device.type != "cuda" else _gpu_target(device.index if device.index is not None else torch.cuda.current_device())


@functools.lru_cache
def _gpu_target(index: int) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def has_tensor_descriptors(target: str) -> bool:
    """Whether the hardware copies tiles by descriptor (TMA: sm_90 and later)."""
    return target.startswith("sm_") and int(target[3:]) >= 90


def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of the device: the programs of a persistent grid."""
    return _INTERPRETED_PROCESSORS if device.type != "cuda" else _gpu_processors(device.index if device.index is not None else torch.cuda.current_device())


@functools.lru_cache
def _gpu_processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def dot_precision(x: Tensor) -> str:
    """tl.dot's `input_precision` for operands in the dtype of x: TF32 only where torch itself is allowed to (`torch.backends.cuda.matmul.allow_tf32`)."""
    nvidia = x.is_cuda and not torch.version.hip
    return "tf32" if nvidia and x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launch on `device`, whatever the current one is, where it is a GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def descriptor_memory() -> None:
    """Give triton an allocator for the tensor descriptors that kernels make on the device; call it before a launch that makes any."""
    import triton

    triton.set_allocator(_allocate)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda" if torch.cuda.is_available() else "cpu")
