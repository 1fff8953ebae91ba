"""Diffusion of keys: a causal depthwise convolution and a mixture of exponentials, neither across the start of a document."""

import pytest
import torch
from torch import Tensor

from kan_train.model.conv import causal_conv, exponential_mixture, last_inputs

BATCH, HEADS, WIDTH = 2, 2, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def starts(time: int) -> Tensor:
    resets = torch.zeros(BATCH, time, dtype=torch.bool)
    resets[0, [0, time // 3, min(time // 3 + 1, time - 1), time - 1]] = True
    if time > 2:
        resets[1, time // 2] = True
    return resets


def convolve(x: Tensor, kernel: Tensor, resets: Tensor | None, before: Tensor | None) -> Tensor:
    """Token by token, tap by tap: walk back from a token until a document starts."""
    rows = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            total = torch.zeros_like(x[0, 0])
            for lag in range(kernel.shape[-1]):
                if t - lag >= 0:
                    total = total + kernel[..., lag] * x[b, t - lag]
                elif before is not None:
                    total = total + kernel[..., lag] * before[b, before.shape[1] + t - lag]
                if resets is not None and t - lag >= 0 and resets[b, t - lag]:
                    break
            rows.append(total)
    return torch.stack(rows).view_as(x)


def assert_same_values_and_gradients(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weight = normal(*theirs.shape, seed=9).detach()
    for mine, reference in zip(torch.autograd.grad(ours, leaves, weight), torch.autograd.grad(theirs, leaves, weight), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("time", [1, 2, 13])
@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("continued", [False, True])
def test_convolution_is_the_sum_over_taps(time: int, taps: int, packed: bool, continued: bool):
    x, kernel = normal(BATCH, time, HEADS, WIDTH), normal(HEADS, WIDTH, taps, seed=1)
    resets = starts(time) if packed else None
    before = normal(BATCH, taps - 1, HEADS, WIDTH, seed=2) if continued else None
    leaves = [x, kernel, *([before] if continued else [])]
    assert_same_values_and_gradients(causal_conv(x, kernel, resets, before), convolve(x, kernel, resets, before), leaves)


def test_convolution_continues_from_the_last_inputs():
    x, kernel = normal(BATCH, 9, HEADS, WIDTH), normal(HEADS, WIDTH, 4, seed=1)
    before, parts = torch.zeros(BATCH, 3, HEADS, WIDTH, dtype=torch.float64), []
    for start, stop in ((0, 1), (1, 3), (3, 9)):
        parts.append(causal_conv(x[:, start:stop], kernel, None, before))
        before = last_inputs(x[:, start:stop], before)
        assert before.untyped_storage().nbytes() == before.nbytes  # a state does not keep all that was read
    torch.testing.assert_close(torch.cat(parts, dim=1), causal_conv(x, kernel), rtol=1e-14, atol=1e-14)


def mix(x: Tensor, log_rate: Tensor, weight: Tensor, resets: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The recurrence itself, token by token."""
    keep = torch.exp(-log_rate.exp())
    m = torch.zeros(BATCH, *log_rate.shape, dtype=x.dtype) if state is None else state
    rows = []
    for t in range(x.shape[1]):
        if resets is not None:
            m = torch.where(resets[:, t, None, None, None], torch.zeros_like(m), m)
        m = keep * m + (1 - keep) * x[:, t, None]
        rows.append(x[:, t] + (weight * m).sum(1))
    return torch.stack(rows, dim=1), m


@pytest.mark.parametrize("time", [1, 2, 13, 16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("continued", [False, True])
def test_mixture_is_its_recurrence(time: int, packed: bool, continued: bool):
    x, weight = normal(BATCH, time, HEADS, WIDTH), normal(3, HEADS, WIDTH, seed=1)
    log_rate = (normal(3, HEADS, WIDTH, seed=2) - 1).detach().requires_grad_()
    resets = starts(time) if packed else None
    state = normal(BATCH, 3, HEADS, WIDTH, seed=3) if continued else None
    ours, theirs = exponential_mixture(x, log_rate, weight, resets, state), mix(x, log_rate, weight, resets, state)
    leaves = [x, log_rate, weight, *([state] if continued else [])]
    both = [torch.cat((y.flatten(), m.flatten())) for y, m in (ours, theirs)]
    assert_same_values_and_gradients(*both, leaves)


def test_low_precision_comes_back_as_it_went_in():
    x, kernel = normal(BATCH, 9, HEADS, WIDTH).detach().bfloat16(), normal(HEADS, WIDTH, 4).detach().bfloat16()
    assert causal_conv(x, kernel).dtype == torch.bfloat16
    y, m = exponential_mixture(x, kernel[None, ..., 0], kernel[None, ..., 1])
    assert (y.dtype, m.dtype) == (torch.bfloat16, torch.float32)
