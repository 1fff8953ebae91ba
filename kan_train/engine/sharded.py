"""What every engine on DeepSpeed has in common. ZeRO 0 replicates, 1 shards optimizer state, 2 also gradients, 3 also parameters.

DeepSpeed reduces, shards and steps. Ours are the optimizer it steps, the learning rates, the norm and clipping of stage 0, and what of its
flat buffers belongs to which parameter. Its own check of the gradient norm skips a step that is not finite, before any state changes and
on all ranks alike.
"""

import gc
import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kan_train.checkpoint.boxes import Fragment
from kan_train.config import Config
from kan_train.engine.engine import Engine, replicated_fragments
from kan_train.engine.marks import expert_marker, is_expert, mark_parameters
from kan_train.engine.norm import clip_gradients, gradient_norm
from kan_train.engine.optimizer import build_optimizer, ensure_state, state_tensors
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel
from kan_train.parallel.cpu import prepare_libraries, without_compiled_collectives
from kan_train.parallel.layout import Layout
from kan_train.parallel.params import is_split, shard_of, spec_of
from kan_train.parallel.place import Place
from kan_train.parallel.runtime import Runtime

BUCKET_ELEMENTS = 50_000_000
"""Largest number of gradient elements reduced, or parameters gathered, in one collective."""

PERSISTENT_ELEMENTS = 10_000
"""ZeRO-3 keeps parameters up to this size whole on every rank: gathering them would cost more than they take."""


def start_libraries(config: Config, runtime: Runtime, layout: Layout) -> Place:
    """Import DeepSpeed and Megatron for the device of this process, and build the groups of `layout`. Collective."""
    prepare_libraries(runtime)
    import deepspeed

    from kan_train.parallel.groups import start_groups

    deepspeed.utils.logger.setLevel(logging.ERROR)
    without_compiled_collectives()
    return start_groups(layout, timedelta(minutes=config.parallel.timeout_minutes))


def fill_and_partition(model: LanguageModel, config: Config, layout: Layout, *, seed: int, device: torch.device) -> None:
    """Give `model` its initial weights under ZeRO-3: each module's parameters are cut over the ranks before the next module gets memory. Collective.

    A rank never holds more than its own part of the model and the whole of one module, in the dtype that the model computes in.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    from kan_train.parallel.groups import MegatronGroups

    dtype, groups = compute_dtype(config), MegatronGroups()
    dense = Init(data_parallel_group=groups.get_data_parallel_group(), dtype=dtype)
    expert = Init(data_parallel_group=groups.get_expert_data_parallel_group(), dtype=dtype)

    def partition(module: nn.Module) -> None:
        # Only what is filled: the children's turn comes. Parameters are marked first: how they are cut follows from what they are.
        own = _OwnParameters(module)
        mark_parameters(own, layout)
        for parameter in own.parameters():
            (expert if is_expert(parameter) else dense)._convert_to_zero_parameters([parameter])

    materialise(model, seed=seed, device=device, dtype=dtype, after_module=partition)


class _OwnParameters(nn.Module):
    """The parameters that a module holds itself, without its children's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)


def compute_dtype(config: Config) -> torch.dtype:
    """The dtype of weights and activations."""
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def initialise_deepspeed(module: nn.Module, models: Sequence[LanguageModel], config: Config, layout: Layout, *, accumulation: int) -> tuple[Any, Any]:
    """(DeepSpeed's engine, its optimizer) around `module`, which holds `models`; `accumulation`: backward passes a step that it counts."""
    import deepspeed

    from kan_train.parallel.groups import MegatronGroups

    assert layout.zero_stage is not None
    for model in models:
        mark_parameters(model, layout)
    if layout.groves_are_experts:
        module.add_module("expert_marker", expert_marker(config.model.grove.num_groves, layout.zero_stage))
    held = sum(shard_of(name, parameter).numel for model in models for name, parameter in model.named_parameters())
    settings = deepspeed_settings(config, layout, accumulation, held)
    with redirect_stdout(io.StringIO()):  # tables of memory, in some of its classes
        engine, optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=build_optimizer(config.optimizer, models), config=settings, mpu=MegatronGroups(), dist_init_required=False
        )
    return engine, optimizer


class ShardedEngine(Engine):
    """A DeepSpeed engine on Megatron's groups, and what of its flat buffers belongs to which parameter."""

    def __init__(
        self, config: Config, module: nn.Module, parts: Sequence[LanguageModel], runtime: Runtime, layout: Layout, place: Place, *, accumulation: int
    ) -> None:
        """module: holds `parts`, and is what DeepSpeed wraps. accumulation: backward passes a step that DeepSpeed counts."""
        super().__init__(config, parts, runtime, place)
        assert layout.zero_stage is not None
        self.layout, self.stage = layout, layout.zero_stage
        self.names = {parameter: name for part in parts for name, parameter in part.named_parameters()}
        self.engine, self.optimizer = initialise_deepspeed(module, parts, config, layout, accumulation=accumulation)

    def named_fragments(self) -> Iterator[Fragment]:
        pieces = {0: self._whole_parameters, 1: self._flat_pieces, 2: self._flat_pieces, 3: self._partitions}[self.stage]
        for parameter, start, tensors in pieces():
            name = self.names[parameter]
            shape, shard = spec_of(name, parameter).shape, shard_of(name, parameter)
            for kind, tensor in tensors.items():
                yield Fragment(
                    name=f"{kind}/{name}",
                    global_shape=shape,
                    local_offset=shard.offset,
                    local_shape=shard.size,
                    start=start,
                    flat=tensor.detach(),
                    write=self._writes(parameter),
                )
        yield from replicated_fragments(self.parts, self.place)

    def _writes(self, parameter: nn.Parameter) -> bool:
        """Whether this rank writes what it holds of `parameter`, which other ranks may hold too."""
        if is_expert(parameter):  # ZeRO shards it over all ranks that hold it
            return True
        alone = is_split(parameter) or self.place.tensor.is_first
        return alone and (self.stage > 0 or self.place.replicas.is_first)

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

    def _update(self) -> tuple[float, bool]:
        if self.stage == 0:
            return self._update_replicated()
        self.engine.step()
        if self.optimizer.overflow:
            return float("nan"), True
        return float(self.engine.get_global_grad_norm()), False

    def _update_replicated(self) -> tuple[float, bool]:
        parameters = list(self.names)
        norm = gradient_norm(parameters, self.place.tensor)
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


def deepspeed_settings(config: Config, layout: Layout, accumulation: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's own configuration for `config`, with `parameters` elements on this rank."""
    stage = layout.zero_stage
    train, cuda = config.train, torch.cuda.is_available() and config.run.device != "cpu"
    # DeepSpeed halves the buckets of stages 1 and 2, and refuses an odd number.
    bucket = max(2, min(parameters + parameters % 2, BUCKET_ELEMENTS))
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": cuda and stage in (2, 3),
    }
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": PERSISTENT_ELEMENTS, "stage3_prefetch_bucket_size": bucket}
    if config.parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
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
