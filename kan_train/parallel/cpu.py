"""All that DeepSpeed and Megatron need to run on the CPU with gloo, and to run quietly."""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from kan_train.parallel.runtime import Runtime


def prepare_libraries(runtime: Runtime) -> None:
    """Tell DeepSpeed which device this process has; call before either library is imported. On CUDA nothing else is needed."""
    # Once a process, for things that no user of ours can change: what they would import if it were there, what they will rename.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.")
    # DeepSpeed takes the first accelerator it sees, also in a run that asked for the CPU.
    os.environ["DS_ACCELERATOR"] = runtime.device.type
    os.environ.setdefault("LOCAL_RANK", str(runtime.local_rank))
    if runtime.device.type == "cpu":
        # Megatron makes its buffers on torch.cuda.current_device(), which raises where there is no CUDA.
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]


def without_compiled_collectives() -> None:
    """Let DeepSpeed use gloo as it is; call after it is imported and before it is initialised.

    It would else compile a shared-memory collective at the first run, for most of a minute and with a compiler that may not be there.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def cuda_means_cpu() -> TorchFunctionMode:
    """A context in which tensors asked for on "cuda" are made on the CPU: Megatron's schedules name the device in their code."""
    return _CudaMeansCpu()
