"""Process groups: Megatron-core owns every one of them, DeepSpeed reads them through an adapter.

Imports megatron.core, which takes seconds: import this module only where a process group is used.
"""

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import ProcessGroup


def start_groups() -> "MegatronGroups":
    """Build Megatron's groups over all processes, data-parallel, on top of the default process group; returns what DeepSpeed asks."""
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    return MegatronGroups()


def stop_groups() -> None:
    """Forget Megatron's groups; the default process group stays."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()


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
