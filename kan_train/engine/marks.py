"""What DeepSpeed must know of each parameter, as the attributes that it looks for: who holds which part of it, and over whom its gradient is reduced."""

from torch import Tensor, nn

from kan_train.config.layout import Layout
from kan_train.parallel.params import is_split, spec_of


def mark_parameters(module: nn.Module, layout: Layout) -> None:
    """Mark the declared parameters that `module` and its children hold for DeepSpeed.

    tensor_model_parallel: tensor ranks hold different parts of it, and each counts its own in the gradient norm; without the mark the norm would be
    that of the first rank's part, and clipping wrong, with no error. allreduce=False and group_name: an expert parameter, whose gradient is reduced
    over the ranks that hold the same groves. Under ZeRO-3 the same is said with two more names.
    """
    from kan_train.parallel.groups import grove_group_name

    group_name = grove_group_name(layout)
    for name, parameter in module.named_parameters():
        expert = layout.groves_are_experts and spec_of(name, parameter).grove
        parameter.tensor_model_parallel = layout.tensor_parallel > 1 if expert else is_split(parameter)  # type: ignore[attr-defined]
        if expert:
            parameter.allreduce, parameter.group_name = False, group_name  # type: ignore[attr-defined]
            if layout.zero_stage == 3:
                parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
                parameter.ds_zero_partition_group_name = group_name  # type: ignore[attr-defined]


def is_expert(parameter: Tensor) -> bool:
    """Whether `parameter` is marked as one whose gradient is reduced over the ranks that hold the same groves."""
    return not getattr(parameter, "allreduce", True)


def expert_marker(num_groves: int, zero_stage: int) -> nn.Module:
    """An empty module of the class by which DeepSpeed knows that a model has expert parameters; it looks for another one under ZeRO-3."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.moe.layer import MoE

    base: type[nn.Module] = AutoEPMoELayer if zero_stage == 3 else MoE

    class ExpertMarker(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            nn.Module.__init__(self)  # the base classes would build experts
            self.num_experts = num_groves

        def set_deepspeed_parallelism(self, *_: object, **__: object) -> None:
            """Nothing: the groups are Megatron's."""

    return ExpertMarker()
