"""DeepSpeed ZeRO: 0 replicates, 1 shards optimizer state, 2 also gradients, 3 also parameters.

DeepSpeed reduces, shards and steps. Ours are the optimizer it steps, the learning rates, the norm and clipping of stage 0, and what of its
flat buffers belongs to which parameter. Its own check of the gradient norm skips a step that is not finite, before any state changes and
on all ranks alike.
"""

import gc
import io
import logging
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kan_train.checkpoint.boxes import Fragment
from kan_train.config import Config
from kan_train.engine.engine import Engine, replicated_fragments
from kan_train.engine.norm import clip_gradients, gradient_norm
from kan_train.engine.optimizer import build_optimizer, ensure_state, state_tensors
from kan_train.model.lm import LanguageModel
from kan_train.parallel.cpu import prepare_libraries, without_compiled_collectives
from kan_train.parallel.params import spec_of
from kan_train.parallel.runtime import Runtime, zero_stage

if TYPE_CHECKING:
    from kan_train.data import Batch

BUCKET_ELEMENTS = 50_000_000
"""Largest number of gradient elements reduced, or parameters gathered, in one collective."""

PERSISTENT_ELEMENTS = 10_000
"""ZeRO-3 keeps parameters up to this size whole on every rank: gathering them would cost more than they take."""


class ZeroEngine(Engine):
    """Training through a DeepSpeed engine on Megatron's groups."""

    def __init__(self, config: Config, model: LanguageModel, runtime: Runtime) -> None:
        super().__init__(config, model, runtime)
        stage = zero_stage(config, runtime.world_size)
        assert stage is not None
        self.stage = stage
        prepare_libraries(runtime)
        import deepspeed

        from kan_train.parallel.groups import start_groups

        deepspeed.utils.logger.setLevel(logging.ERROR)
        without_compiled_collectives()
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        if stage == 3:
            # ZeRO-3 gathers a module's parameters around its calls, and finds the backward call by the tensors that the module returns.
            # The parts of a mixer or a feed-forward layer return other things too: each layer is gathered as a whole.
            deepspeed.utils.set_z3_leaf_modules(model, list({type(part) for layer in model.layers for part in (layer.mixer, layer.ffn)}))
        with redirect_stdout(io.StringIO()):  # tables of memory, in some of its classes
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=build_optimizer(config.optimizer, model),
                config=deepspeed_settings(config, stage, runtime.world_size, sum(p.numel() for p in model.parameters())),
                mpu=start_groups(),
                dist_init_required=False,
            )

    def named_fragments(self) -> Iterator[Fragment]:
        pieces = {0: self._whole_parameters, 1: self._flat_pieces, 2: self._flat_pieces, 3: self._partitions}[self.stage]
        for parameter, start, tensors in pieces():
            shape = spec_of(self.names[parameter], parameter).shape
            for kind, tensor in tensors.items():
                yield Fragment(
                    name=f"{kind}/{self.names[parameter]}",
                    global_shape=shape,
                    local_offset=(0,) * len(shape),
                    local_shape=shape,
                    start=start,
                    flat=tensor.detach(),
                    write=self.stage > 0 or self.runtime.is_first,
                )
        yield from replicated_fragments(self.model, self.runtime)

    def after_load(self) -> None:
        if self.stage in (1, 2):
            self.optimizer.update_lp_params()
        elif self.stage == 3:
            optimizer = self.optimizer
            for sub_group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def close(self) -> None:
        from kan_train.parallel.groups import stop_groups

        self.engine.destroy()
        stop_groups()
        gc.collect()  # DeepSpeed's hooks and buffers are cycles

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer if self.stage == 0 else self.optimizer.optimizer

    def _forward(self, batch: "Batch") -> tuple[Tensor, Tensor]:
        return self.engine(batch.tokens, batch.targets, batch.resets)

    def _backward(self, loss: Tensor, micro_batches: int, *, last: bool) -> None:
        if micro_batches != self.engine.gradient_accumulation_steps():
            raise ValueError(
                f"{micro_batches} micro-batches in a step; this engine was built for {self.engine.gradient_accumulation_steps()}"
            )
        self.engine.backward(loss)
        if not last:
            self.engine.step()  # counts the micro-batch; the optimizer steps at the last one

    def _update(self) -> tuple[float, bool]:
        if self.stage == 0:
            return self._update_replicated()
        self.engine.step()
        if self.optimizer.overflow:
            return float("nan"), True
        return float(self.engine.get_global_grad_norm()), False

    def _update_replicated(self) -> tuple[float, bool]:
        parameters = list(self.model.parameters())
        norm = gradient_norm(parameters)
        finite = bool(norm.isfinite())
        if finite:
            clip_gradients(parameters, norm.item(), self.config.optimizer.clip_norm)
        else:
            for parameter in parameters:  # an optimizer steps no parameter without a gradient
                parameter.grad = None
        self.engine.step()
        return norm.item() if finite else float("nan"), not finite

    def _whole_parameters(self) -> Iterator[tuple[nn.Parameter, int, dict[str, Tensor]]]:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = ensure_state(self.optimizer, group, parameter)
                yield parameter, 0, {"param": parameter.data.view(-1), **{kind: t.view(-1) for kind, t in state_tensors(state).items()}}

    def _flat_pieces(self) -> Iterator[tuple[nn.Parameter, int, dict[str, Tensor]]]:
        """ZeRO 1 and 2 lay each group's parameters in one flat tensor; every rank holds an equal range of it in fp32."""
        zero, inner = self.optimizer, self.optimizer.optimizer
        if hasattr(zero, "bf16_groups"):  # DeepSpeed has a class of its own for stage 1 in bf16
            layout = zip(inner.param_groups, zero.fp32_groups_flat_partition, zero.bf16_groups, strict=True)
        else:
            layout = zip(inner.param_groups, zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)
        for group, flat, members in layout:
            whole = {"param": flat, **state_tensors(ensure_state(inner, group, flat))}
            for parameter in members:
                if parameter._hp_mapping is None:  # wholly in the ranges of other ranks
                    continue
                inside = parameter._hp_mapping.hp_fragment_address
                yield (
                    parameter,
                    parameter._hp_mapping.lp_fragment_address.start,
                    {k: t.narrow(0, inside.start, inside.numel) for k, t in whole.items()},
                )

    def _partitions(self) -> Iterator[tuple[nn.Parameter, int, dict[str, Tensor]]]:
        """ZeRO-3 cuts each parameter in equal ranges, one a rank, the last ones padded."""
        zero, inner = self.optimizer, self.optimizer.optimizer
        whole = []
        for sub_group, flat in enumerate(zero.fp32_partitioned_groups_flat):
            group = inner.param_groups[zero.sub_group_to_group_id[sub_group]]
            whole.append({"param": flat, **state_tensors(ensure_state(inner, group, flat))})
        for parameter in self.names:
            sub_group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
            start = dist.get_rank(parameter.ds_process_group) * length
            mine = max(0, min(length, parameter.ds_numel - start))
            if mine:
                yield parameter, start, {kind: tensor.narrow(0, offset, mine) for kind, tensor in whole[sub_group].items()}


def deepspeed_settings(config: Config, stage: int, world_size: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's own configuration for `config`, with a model of `parameters` elements."""
    train, cuda = config.train, torch.cuda.is_available() and config.run.device != "cpu"
    bucket = max(1, min(parameters, BUCKET_ELEMENTS))
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": cuda and stage > 1,
    }
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": PERSISTENT_ELEMENTS, "stage3_prefetch_bucket_size": bucket}
    if config.parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (train.micro_batch_size * world_size),
        # Without a norm from DeepSpeed, stage 0 is clipped by us.
        "gradient_clipping": config.optimizer.clip_norm if stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # PyTorch's fused AdamW serves offloaded state too, and needs no compiler on the machine.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if train.precision == "bf16":
        # The model's buffers (score statistics, selection biases) are sums over many steps: they stay fp32.
        settings |= {
            "bf16": {"enabled": True, "check_grad_overflow": True},
            "data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": ["*"]},
        }
    return settings
