"""Megatron's pipeline schedules, 1F1B and interleaved, over the stages of a model.

A stage takes the residual stream [T, B, D] from the one before it (Megatron's order of dimensions; tokens in the first stage) and gives it on; the last one
gives the loss. Imports megatron.core: import this module only where there is a pipeline.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from kan_train.parallel.cpu import cuda_means_cpu
from kan_train.parallel.layout import Layout

RunStage = Callable[[Any, Tensor | None], Tensor]
"""(micro-batch, stream [B, T, D] from the stage before or None in the first) -> the stream behind the stage, or the loss in the last."""


class Stage(nn.Module):
    """One chunk of the model, as Megatron's schedules want it."""

    def __init__(self, part: nn.Module, run: RunStage, config: ModelParallelConfig, chunk: int | None, *, is_last: bool) -> None:
        """run: the computation of `part`. chunk: its number among those of this rank under the interleaved schedule."""
        super().__init__()
        self.part, self.run, self.config, self.is_last = part, run, config, is_last
        self.vp_stage, self.model_type = chunk, ModelType.encoder_or_decoder
        self._received: Tensor | None = None

    def set_input_tensor(self, received: Any) -> None:
        """What the stage before sent: [T, B, D], None in the first stage."""
        self._received = received[0] if isinstance(received, list) else received

    def forward(self, micro_batch: Any) -> Tensor:
        stream = None if self._received is None else self._received.transpose(0, 1)
        out = self.run(micro_batch, stream)
        return out if self.is_last else out.transpose(0, 1).contiguous()


def schedule_config(layout: Layout, width: int, dtype: torch.dtype) -> ModelParallelConfig:
    """What Megatron's schedules must know, for a stream of `width` numbers of `dtype` a token."""
    interleaved = layout.virtual_pipeline > 1
    config = ModelParallelConfig(
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if interleaved else None,
        context_parallel_size=layout.context_parallel,
        sequence_parallel=layout.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        deallocate_pipeline_outputs=False,
        # Batched transfers between two interleaved stages swap their messages, without an error: one by one, overlapped, they arrive right.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=False,
        microbatch_group_size_per_vp_stage=layout.pipeline_parallel,
    )
    # The schedules read these of a transformer's configuration, which ours is not.
    config.hidden_size = width
    for name in ("num_moe_experts", "mtp_num_layers", "cuda_graph_impl", "cuda_graph_scope"):
        if not hasattr(config, name):
            setattr(config, name, None)
    for name in ("fine_grained_activation_offloading", "calculate_per_token_loss", "overlap_moe_expert_parallel_comm"):
        if not hasattr(config, name):
            setattr(config, name, False)
    return config


def run_schedule(stages: Sequence[Stage], micro_batches: Sequence[Any], *, tokens: int, sequences: int, forward_only: bool = False) -> None:
    """All micro-batches through all stages; gradients of the mean of their losses, unless `forward_only`. Collective over the pipeline.

    tokens: of a whole sequence, before context and sequence parallelism split it. sequences: of a micro-batch.
    """
    device = next(stages[0].parameters()).device
    with cuda_means_cpu() if device.type == "cpu" else nullcontext():
        get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=[iter(micro_batches) for _ in stages],
            model=list(stages),
            num_microbatches=len(micro_batches),
            seq_length=tokens,
            micro_batch_size=sequences,
            forward_only=forward_only,
        )


def chunk_stages(layout: Layout) -> list[int]:
    """Numbers among all stages of the chunks that this process holds, in order."""
    rank = parallel_state.get_pipeline_model_parallel_rank()
    return [chunk * layout.pipeline_parallel + rank for chunk in range(layout.virtual_pipeline)]


def attach_loss(stream: Tensor, loss: Tensor, micro_batches: int) -> Tensor:
    """`stream`, whose backward pass also adds the gradient of loss / micro_batches: a stage before the last has no other way to its own losses."""
    return _AttachLoss.apply(stream, loss, 1 / micro_batches)


def _forward_step(micro_batches: Any, stage: Stage) -> tuple[Tensor, Any]:
    return stage(next(micro_batches)), partial(_loss, device=next(stage.parameters()).device)


def _loss(loss: Tensor, *, device: torch.device) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    # With a number of tokens the schedule leaves the loss alone but for the number of micro-batches; without, it also multiplies by the context ranks.
    return loss.clone(), torch.ones((), dtype=torch.int, device=device), {}


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.dtype = scale, loss.dtype
        return stream.view_as(stream)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full((), ctx.scale, dtype=ctx.dtype, device=grad.device), None
