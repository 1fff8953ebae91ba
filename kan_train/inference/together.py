"""The processes that decode together, from their start to their end: however one of them ends, all do, and one of them says why."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from kan_train.config import Config, ConfigError, GenerateConfig, ParallelConfig, RunConfig
from kan_train.inference.ending import Ending
from kan_train.inference.layout import decode_layout
from kan_train.inference.load import choose_device, find_source
from kan_train.inference.lockstep import Lockstep
from kan_train.parallel.runtime import launch_size, runtime


def together(config: GenerateConfig, work: Callable[[torch.device, Lockstep], int]) -> int:
    """Do `work` in every process that the launcher started, with this one's device. Returns the exit status, of all the same.

    Raises ConfigError where there is one process alone: it says how to start more.
    """
    if launch_size() == 1:
        decode_layout(config.parallel, find_source(config.run, config.root).model(), 1)
    device = choose_device(config.device)
    settings = Config(run=RunConfig(device=device.type), parallel=ParallelConfig(timeout_minutes=config.parallel.timeout_minutes))
    ending = None
    try:
        with runtime(settings) as process:
            # Messages are about things in host memory, and wait for no device.
            group = dist.new_group(backend="gloo") if process.device.type == "cuda" else dist.group.WORLD
            with Ending(process.rank, process.world_size) as ending:
                return work(process.device, Lockstep(process.rank, process.world_size, group, config.max_rows))
    except BaseException as error:
        if ending is not None:
            # No collective on the way out: the others may wait in another one.
            return ending.failed(error)
        if isinstance(error, ConfigError):
            raise ConfigError(str(error).replace("run.device", "device").replace("kan_train train", "kan_train generate")) from None
        raise
