"""Process groups: Megatron-core owns every one of them, DeepSpeed reads them through an adapter.

Imports megatron.core, which takes seconds: import this module only where a process group is used.
"""

import math
import sys
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from kan_train.config.layout import Layout
from kan_train.parallel.place import Place, place_of


def start_groups(layout: Layout, timeout: timedelta) -> Place:
    """Build Megatron's groups of `layout` on top of the default process group; returns where this process stands in them.

    DeepSpeed finds the groups of the groves' parameters where it would keep those that it makes itself.
    """
    stop_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context_parallel,
        expert_model_parallel_size=layout.expert_parallel,
        expert_tensor_parallel_size=layout.expert_tensor_parallel,
        distributed_timeout_minutes=max(1, math.ceil(timeout.total_seconds() / 60)),
        create_gloo_process_groups=False,
    )
    if layout.groves_are_experts:
        _give_deepspeed_the_grove_groups(layout)
    return place_of(layout, dist.get_rank(), _group)


def grove_group_name(layout: Layout) -> str:
    """The name under which DeepSpeed keeps the groups of the groves' parameters."""
    return f"ep_size_{layout.expert_parallel}"


def _group(dimension: str) -> ProcessGroup:
    match dimension:
        case "tensor":
            return parallel_state.get_tensor_model_parallel_group()
        case "context":
            return parallel_state.get_context_parallel_group()
        case "data":
            return parallel_state.get_data_parallel_group()
        case "pipeline":
            return parallel_state.get_pipeline_model_parallel_group()
        case "expert":
            return parallel_state.get_expert_model_parallel_group()
        case "expert_tensor":
            return parallel_state.get_expert_tensor_parallel_group()
        case "expert_data":
            return parallel_state.get_expert_data_parallel_group()
        case "data_and_context":
            return parallel_state.get_data_parallel_group(with_context_parallel=True)
        case "tensor_and_data":
            return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    raise KeyError(dimension)


def _give_deepspeed_the_grove_groups(layout: Layout) -> None:
    from deepspeed.utils import groups

    name, expert, expert_data = grove_group_name(layout), _group("expert"), _group("expert_data")
    groups._EXPERT_PARALLEL_GROUP[name], groups._EXPERT_PARALLEL_GROUP_RANKS[name] = expert, dist.get_process_group_ranks(expert)
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = expert_data
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(expert_data)


def _take_the_grove_groups_from_deepspeed() -> None:
    groups: Any = sys.modules.get("deepspeed.utils.groups")  # not imported where nothing was given to it
    if groups is not None:
        for kept in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_PARALLEL_GROUP_RANKS", "_EXPERT_DATA_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP_RANKS"):
            getattr(groups, kept).clear()
        groups.mpu = None


def stop_groups() -> None:
    """Give up Megatron's groups and the threads behind them; the default process group stays."""
    if parallel_state.model_parallel_is_initialized():
        # Megatron only forgets its groups: with gloo each would leave threads behind, which slow a process that builds many engines to a halt.
        kept = [group for group in getattr(parallel_state, "_global_process_group_list", None) or [] if group is not None]
        parallel_state.destroy_model_parallel()
        _take_the_grove_groups_from_deepspeed()
        for group in kept:
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)


class MegatronGroups:
    """What DeepSpeed calls an `mpu`: each of its questions answered by megatron.core.parallel_state.

    Data-parallel groups include the context-parallel ranks: gradients of a sequence's parts are averaged with those of other sequences.
    """

    def get_model_parallel_group(self) -> ProcessGroup:
        return parallel_state.get_model_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        return self.get_model_parallel_group().size()

    def get_model_parallel_rank(self) -> int:
        # DeepSpeed counts parameters that all ranks of this group hold alike in the norm of its rank 0 alone.
        return self.get_model_parallel_group().rank()

    def get_data_parallel_group(self) -> ProcessGroup:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        return self.get_data_parallel_group().size()

    def get_data_parallel_rank(self) -> int:
        return self.get_data_parallel_group().rank()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_expert_data_parallel_group(self) -> ProcessGroup:
        return parallel_state.get_expert_data_parallel_group()

    def get_tensor_model_parallel_group(self) -> ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    def get_tensor_model_parallel_world_size(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_tensor_model_parallel_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    def get_tensor_model_parallel_src_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_src_rank()

    def get_pipeline_model_parallel_group(self) -> ProcessGroup:
        return parallel_state.get_pipeline_model_parallel_group()

    def get_pipeline_model_parallel_world_size(self) -> int:
        return parallel_state.get_pipeline_model_parallel_world_size()

    def get_pipeline_model_parallel_rank(self) -> int:
        return parallel_state.get_pipeline_model_parallel_rank()
