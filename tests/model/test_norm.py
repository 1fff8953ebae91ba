"""Normalisation: its formula, its hand-written gradients, and the precision it works in."""

import pytest
import torch
from torch import Tensor

from kan_train.model.init import materialise
from kan_train.model.norm import RMSNorm, rms_norm, unit


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("weight_shape", [(6,), (3, 6)], ids=["shared", "per_head"])
@pytest.mark.parametrize("leading", [(), (4,), (2, 5)], ids=str)
def test_rms_norm_is_its_formula(weight_shape: tuple[int, ...], leading: tuple[int, ...]):
    x, weight = normal(*leading, 3, 6), normal(*weight_shape, seed=1)
    ours = rms_norm(x, weight, 1e-3)
    theirs = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    cotangent = normal(*x.shape, seed=2).detach()
    grads = [torch.autograd.grad(y, (x, weight), cotangent) for y in (ours, theirs)]
    for mine, expected in zip(*grads, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def test_unit_rows_have_length_one_and_gradients_of_the_formula():
    x = normal(4, 7)
    torch.testing.assert_close(unit(x).norm(dim=-1), torch.ones(4, dtype=torch.float64), rtol=1e-5, atol=0.0)
    cotangent = normal(4, 7, seed=2).detach()
    expected = torch.autograd.grad(x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt(), x, cotangent)
    torch.testing.assert_close(torch.autograd.grad(unit(x), x, cotangent), expected, rtol=1e-12, atol=1e-12)


def test_zero_rows_have_finite_gradients():
    x = torch.zeros(2, 5, requires_grad=True)
    (unit(x).sum() + rms_norm(x, torch.ones(5), 1e-6).sum()).backward()
    assert torch.isfinite(x.grad).all()


def test_module_starts_at_one_without_decay_and_computes_bf16_in_fp32():
    layer = materialise(RMSNorm(64, eps=1e-6), seed=0, dtype=torch.bfloat16)
    assert torch.equal(layer.weight, torch.ones(64, dtype=torch.bfloat16))
    assert not layer.weight.spec.decay
    x = (normal(8, 64) * 300).detach().bfloat16()  # squares that bf16 would round to three digits
    y = layer(x)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=0.0)
