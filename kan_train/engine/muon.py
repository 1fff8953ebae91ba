"""Muon: momentum of each matrix, made nearly orthogonal, is the update; AdamW serves all other parameters.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). `torch.optim.Muon` takes 2-D parameters alone; a layer
of groves keeps its projections as one stack [N, m, n], whose matrices are orthogonalised each by itself in batched products.
"""

import math
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic Newton-Schulz coefficients (Jordan et al.): the steepest slope at 0 that keeps singular values near 1."""
ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearly orthogonal matrices [..., m, n], bfloat16, with the singular vectors of `matrices`: singular values go to about 0.7 to 1.2.

    Quintic Newton-Schulz iteration X <- a X + (b A + c A A) X with A = X X^T, from X scaled to Frobenius norm 1.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:  # the Gram matrix of the shorter side is the smaller one
        x = x.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.view(shape)
    return x.mT if tall else x


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups marked `muon=True` are stepped by Muon with Nesterov momentum and decoupled weight decay instead.

    A Muon update is scaled by sqrt(max(1, outputs / inputs)); a 2-D weight is [outputs, inputs], a stack [.., inputs, outputs].
    State of a Muon parameter: `momentum`, of the parameter's shape.
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, groups: list[dict[str, Any]], **adamw: Any) -> None:
        super().__init__(groups, **adamw)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every group."""
        every = self.param_groups
        try:
            self.param_groups = [group for group in every if not group.get("muon")]
            super().step()
        finally:
            self.param_groups = every
        for group in every:
            if group.get("muon"):
                self._muon_step(group)

    def _muon_step(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state, momentum = self.state[parameter], group["momentum"]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - momentum)
            update = orthogonalise(parameter.grad.lerp(state["momentum"], momentum))
            outputs, inputs = parameter.shape if parameter.dim() == 2 else (parameter.size(-1), parameter.size(-2))
            rate = group["lr"] * math.sqrt(max(1, outputs / inputs))
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)
