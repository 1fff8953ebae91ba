"""Root-mean-square normalisation, and rows of unit length: one formula, x / sqrt(share * sum(x^2) + eps), share = 1/n or 1."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kan_train.parallel.mappings import copy_in
from kan_train.parallel.params import Constant, declare
from kan_train.parallel.place import Axis, current_place

_UNIT_EPS = 1e-6


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in at least fp32 and returned in the dtype of x."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = declare(self, "weight", (width,), init=Constant(1.0))
        place = current_place()
        self.token_axis = place.tensor if place.sequence_parallel else Axis()

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, copy_in(self.weight, self.token_axis), self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x [..., n], at least fp32 inside, in the dtype of x.

    weight is [n], or has more of the last dimensions of x: [H, n] for a norm per head of x [..., H, n].
    """
    if x.is_cuda and weight.dim() == 1:
        return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)  # one kernel there; here it falls apart into a dozen passes
    return _Normalise.apply(x, weight, 1 / x.shape[-1], eps)


def unit(x: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + 1e-6) over the last dimension, at least fp32 inside, in the dtype of x; eps keeps the gradient at 0 finite."""
    return _Normalise.apply(x, None, 1.0, _UNIT_EPS)


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is when it is fp32 or wider."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _Normalise(torch.autograd.Function):
    """y = x * r * weight, r = (share * sum(x^2) + eps)^(-1/2); keeps x and r alone, and needs half the passes of automatic differentiation.

    With n = x * r and g = dL/dn:  dL/dx = r * (g - share * n * sum(g * n)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, share: float, eps: float) -> Tensor:
        wide = at_least_fp32(x)
        inverse = (wide * wide).sum(dim=-1, keepdim=True).mul_(share).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.share = share
        y = wide * inverse
        if weight is not None:
            y.mul_(weight)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normal = at_least_fp32(x) * inverse
        grad = at_least_fp32(grad_y)
        scratch = grad * normal
        grad_weight = None
        if weight is not None:
            grad_weight = scratch.reshape(-1, *weight.shape).sum(dim=0).to(weight.dtype)
            grad = grad * weight
            scratch.mul_(weight)
        along = scratch.sum(dim=-1, keepdim=True).mul_(ctx.share)
        grad_x = torch.addcmul(grad, normal, along, value=-1.0, out=scratch).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight, None, None
