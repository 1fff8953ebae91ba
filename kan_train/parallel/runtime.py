"""Which process this is, the device it computes on, and how it talks to the others.

A run in one process of plain PyTorch needs no process group and starts none: every collective here is then the identity.
"""

import ctypes
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from kan_train.config import Config, ConfigError
from kan_train.config.layout import resolved_zero_stage

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt

LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One process of a run. Collectives go over all processes, and are the identity where there is no process group."""

    rank: int = 0
    """This process among all of the run."""
    local_rank: int = 0
    """This process among those of its machine."""
    world_size: int = 1
    """Processes of the run."""
    local_world_size: int = 1
    """Processes on this machine."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this process computes."""
    threads: int = 1
    """CPU threads of this process."""
    distributed: bool = False
    """Whether a process group was started."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once a run."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of `tensor` over all processes, in place; returns it."""
        if self.distributed and self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, value: int) -> int:
        """The largest `value` of all processes."""
        if not self.distributed or self.world_size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor.item())

    def gather(self, tensor: Tensor) -> Tensor:
        """[processes, ...]: what each process gave, by rank; every process gives the same shape and dtype, and gets all."""
        if not self.distributed or self.world_size == 1:
            return tensor.unsqueeze(0)
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor)
        return torch.stack(gathered)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.distributed and self.world_size > 1:
            dist.barrier(device_ids=[self.local_rank] if self.device.type == "cuda" else None)

    def synchronise(self) -> None:
        """Wait until the device has done what it was given, so that a clock read next is true."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def zero_stage(config: Config, world_size: int) -> int | None:
    """The ZeRO stage a run trains with, or None for plain PyTorch: what is set, else none in one fp32 process, else 1."""
    return resolved_zero_stage(config, world_size)


def launch_size(environment: Mapping[str, str] = os.environ) -> int:
    """Processes that the launcher (torchrun, Slurm's template) started for this run; 1 without a launcher."""
    return _integer(environment, "WORLD_SIZE", 1)


def launch_rank(environment: Mapping[str, str] = os.environ) -> int:
    """This process among those that the launcher started; 0 without a launcher."""
    return _integer(environment, "RANK", 0)


def single_process_runtime(config: Config) -> Runtime:
    """This process alone, without a process group: for `kan generate`, benchmarks and plain training. Sets the number of CPU threads."""
    device = _device(config.run.device, 0, 1)
    return Runtime(device=device, threads=_set_threads(config.run.threads, 1))


@contextmanager
def runtime(config: Config, environment: Mapping[str, str] = os.environ) -> Iterator[Runtime]:
    """This process as the launcher's environment describes it; a process group is started if the run needs one, and ended on the way out.

    Raises ConfigError where the environment is incomplete or the device is not there.
    """
    world_size = launch_size(environment)
    if world_size == 1 and zero_stage(config, 1) is None:
        yield single_process_runtime(config)
        return
    started = _start(config, world_size, environment)
    try:
        yield started
    except BaseException:
        # No collective on the way out of an error: the others may be in another one, and would wait in it for ever.
        raise
    else:
        started.barrier()
        dist.destroy_process_group()


def _start(config: Config, world_size: int, environment: Mapping[str, str]) -> Runtime:
    if world_size > 1:
        for name in LAUNCH_VARIABLES:
            if name not in environment:
                raise ConfigError(
                    f"WORLD_SIZE={world_size} is set but {name} is not; start several processes with: "
                    f"torchrun --nproc-per-node {world_size} -m kan_train train"
                )
    rank, local_rank = _integer(environment, "RANK", 0), _integer(environment, "LOCAL_RANK", 0)
    local_world_size = _integer(environment, "LOCAL_WORLD_SIZE", world_size)
    device = _device(config.run.device, local_rank, local_world_size)
    threads = _set_threads(config.run.threads, local_world_size)
    backend, options = ("nccl", {"device_id": device}) if device.type == "cuda" else ("gloo", {})
    if world_size == 1:  # no launcher, so no address to meet at: one process meets itself in memory
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    else:
        options |= {"rank": rank, "world_size": world_size, "init_method": "env://"}
        _loopback_alone(environment)
    dist.init_process_group(backend, timeout=timedelta(minutes=config.parallel.timeout_minutes), **options)
    return Runtime(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_world_size,
        device=device,
        threads=threads,
        distributed=True,
    )


def _loopback_alone(environment: Mapping[str, str]) -> None:
    # Where a host's name does not resolve, gloo finds no interface; on one machine the loopback always serves.
    if environment.get("MASTER_ADDR") not in ("127.0.0.1", "localhost") or "GLOO_SOCKET_IFNAME" in environment:
        return
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"


def _device(wanted: str, local_rank: int, local_world_size: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("run.device=cuda, but PyTorch sees no CUDA device here; use run.device=cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"{local_world_size} processes on this machine share {torch.cuda.device_count()} CUDA devices; "
            f"start {torch.cuda.device_count()} processes a machine, or use run.device=cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _set_threads(wanted: int, local_world_size: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    threads = wanted or max(1, cores // local_world_size)
    torch.set_num_threads(threads)
    _keep_freed_memory()
    return threads


def _keep_freed_memory() -> None:
    """Let glibc reuse what it frees instead of handing it back: a training step on the CPU otherwise spends a quarter of its time in page faults.

    Large tensors of one step are the large tensors of the next, so the process grows no larger than its largest step.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # not glibc: its own allocator's habits stand
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _integer(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name}={value!r} in the environment must be a whole number; unset it, or start with torchrun") from None
