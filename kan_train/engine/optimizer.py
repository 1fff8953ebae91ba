"""From the table of parameters to optimizer groups: who decays, who learns at which multiple of the rate, who is orthogonalised."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kan_train.config import OptimizerConfig
from kan_train.engine.marks import is_expert
from kan_train.engine.muon import MuonAdamW
from kan_train.parallel.params import ParamSpec, spec_of

STATE_NAMES = ("exp_avg", "exp_avg_sq", "momentum")
"""Optimizer state tensors of a parameter's shape, under the names that checkpoints give them."""


def parameter_groups(config: OptimizerConfig, named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Optimizer groups of parameters that share weight decay, learning-rate multiple and rule, in order of first appearance.

    The learning rate of a group is its `multiple` times the schedule's: 1 for dense parameters under AdamW, `grove_learning_rate` for
    the groves', and for matrices under Muon that times muon_learning_rate / learning_rate.
    """
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in named:
        spec = spec_of(name, parameter)
        rule = _rule(config, spec) | _reduction(parameter)
        group = groups.setdefault(tuple(rule.items()), {"params": [], **rule})
        group["params"].append(parameter)
    return list(groups.values())


def _rule(config: OptimizerConfig, spec: ParamSpec) -> dict[str, Any]:
    # Rows of the vocabulary's matrices are separate vectors, most of them unseen in a step: orthogonalised, they would all move alike.
    muon = config.kind == "muon" and spec.matrix and "vocab" not in spec.axes
    multiple = (config.grove_learning_rate if spec.grove else 1.0) * (config.muon_learning_rate / config.learning_rate if muon else 1.0)
    rule: dict[str, Any] = {"weight_decay": config.weight_decay if spec.decay else 0.0, "multiple": multiple}
    return rule | {"muon": True, "momentum": config.muon_momentum} if muon else rule


def _reduction(parameter: nn.Parameter) -> dict[str, Any]:
    # DeepSpeed reduces a group's gradients over one set of ranks; those of expert parameters have their own (`kan_train.engine.marks`).
    return {"moe": True, "name": parameter.group_name} if is_expert(parameter) else {}


def build_optimizer(config: OptimizerConfig, models: Sequence[nn.Module]) -> torch.optim.AdamW:
    """AdamW, or Muon with AdamW, over the declared parameters of `models`; `set_learning_rate` gives it its rates at each step."""
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps, "weight_decay": 0.0}
    optimizer = MuonAdamW if config.kind == "muon" else torch.optim.AdamW
    named = [pair for model in models for pair in model.named_parameters()]
    groups = parameter_groups(config, named)
    # The fused kernel reads and writes each tensor once; it exists for floating-point tensors on CPU and CUDA.
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for _, p in named)
    return optimizer(groups, fused=fused, **settings)


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Give every group `learning_rate` times its multiple."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["multiple"]


def ensure_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], tensor: Tensor) -> dict[str, Tensor]:
    """State of `tensor` (a parameter, or ZeRO's flat piece of many): created as zeros before the first step, as the optimizer itself would.

    A checkpoint then has the same tensors whenever it is taken, and a load has something to fill.
    """
    state = optimizer.state[tensor]
    if not state and group.get("muon"):
        state["momentum"] = torch.zeros_like(tensor)
    elif not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device if group.get("fused") else "cpu")
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(tensor), torch.zeros_like(tensor)
    return state


def state_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `state` that have their parameter's shape."""
    return {name: state[name] for name in STATE_NAMES if name in state}


def optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    """Optimizer steps done, as AdamW's bias correction counts them (skipped steps do not count)."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


def set_optimizer_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Continue the bias correction after `steps` optimizer steps."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(steps)
