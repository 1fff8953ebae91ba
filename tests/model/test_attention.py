"""Softmax attention against explicit scores, and rotary positions against rotations of complex numbers, in float64."""

import math

import pytest
import torch
from torch import Tensor

from kan_train.config import AttentionConfig, ModelConfig
from kan_train.model.attention import SoftmaxAttention, rotary_tables, rotate
from kan_train.model.init import materialise

BATCH, WIDTH, HEADS, HEAD, THETA = 2, 32, 4, 8, 500.0


def build(kv_heads: int, dtype: torch.dtype = torch.float64) -> SoftmaxAttention:
    attention = AttentionConfig(num_heads=HEADS, num_kv_heads=kv_heads, rope_theta=THETA)
    config = ModelConfig(width=WIDTH, num_layers=2, attention_pattern=1, attention=attention)
    return materialise(SoftmaxAttention(config, 0), seed=1, dtype=dtype)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(x: Tensor, theta: float) -> Tensor:
    """x [T, d] at positions 0 .. T-1: channel pair (i, i + d/2) as a complex number, times exp(i t theta^(-2i/d))."""
    time, width = x.shape
    z = torch.complex(x[:, : width // 2], x[:, width // 2 :])
    angle = torch.tensor([[t * theta ** (-2 * i / width) for i in range(width // 2)] for t in range(time)], dtype=torch.float64)
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), dim=-1)


def reference(layer: SoftmaxAttention, x: Tensor, resets: Tensor | None, kv_heads: int) -> Tensor:
    """Row by row, head by head, key by key that the query may see."""
    p = dict(layer.named_parameters())
    outputs = []
    for b in range(x.shape[0]):
        document = torch.zeros(x.shape[1]) if resets is None else resets[b].cumsum(0)
        heads = []
        for h in range(HEADS):
            g = h * kv_heads // HEADS
            q, (k, v) = x[b] @ p["query.weight"][h * HEAD : (h + 1) * HEAD].T, (
                x[b] @ p[f"{name}.weight"][g * HEAD : (g + 1) * HEAD].T for name in ("key", "value")
            )
            q, k = turned(q, THETA), turned(k, THETA)
            rows = []
            for t in range(x.shape[1]):
                seen = [s for s in range(t + 1) if document[s] == document[t]]
                rows.append(torch.softmax(k[seen] @ q[t] / math.sqrt(HEAD), dim=0) @ v[seen])
            heads.append(torch.stack(rows))
        outputs.append(torch.cat(heads, dim=-1) @ p["out.weight"].T)
    return torch.stack(outputs)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_its_formula(kv_heads: int, packed: bool):
    """Output, and gradients of the input and every parameter; queries of a group share keys; documents do not see each other."""
    layer, x = build(kv_heads), normal(BATCH, 11, WIDTH).requires_grad_()
    resets = None
    if packed:
        resets = torch.zeros(BATCH, 11, dtype=torch.bool)
        resets[0, [0, 4, 5]] = True
        resets[1, 7] = True
    ours, theirs = layer(x, resets), reference(layer, x, resets, kv_heads)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    weight, leaves = normal(BATCH, 11, WIDTH, seed=2), [x, *layer.parameters()]
    for mine, expected in zip(torch.autograd.grad(ours, leaves, weight), torch.autograd.grad(theirs, leaves, weight), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_prefill_and_steps_equal_the_forward_pass(kv_heads: int):
    layer, x = build(kv_heads), normal(BATCH, 15, WIDTH)
    parts, state = [], layer.init_state(BATCH, "cpu", torch.float64)
    for start, stop in ((0, 1), (1, 2), (2, 8)):
        part, state = layer.prefill(x[:, start:stop], state)
        parts.append(part)
    for t in range(8, 15):
        y, state = layer.step(x[:, t], state)
        parts.append(y[:, None])
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x), rtol=1e-11, atol=1e-11)
    fresh, _ = layer.prefill(x, layer.init_state(BATCH, "cpu", torch.float64))
    torch.testing.assert_close(fresh, layer(x), rtol=1e-11, atol=1e-11)


def test_scores_depend_on_the_distance_alone():
    """Rotary positions: moving a query and a key together changes nothing; moving one of them does."""
    q, k = normal(1, 1, 1, HEAD), normal(1, 1, 1, HEAD, seed=1)

    def score(at: int, other: int) -> Tensor:
        rotated = (rotate(x, *rotary_tables(torch.tensor([place]), HEAD, THETA)) for x, place in ((q, at), (k, other)))
        return math.prod(rotated).sum()

    torch.testing.assert_close(score(7, 3), score(1007, 1003), rtol=1e-11, atol=1e-12)
    assert (score(7, 3) - score(7, 4)).abs() > 1e-3


def test_documents_packed_together_equal_documents_alone():
    """Positions count from the start of the packed sequence: they must not show."""
    layer, x = build(2), normal(1, 12, WIDTH)
    resets = torch.zeros(1, 12, dtype=torch.bool)
    resets[0, 5] = True
    alone = torch.cat((layer(x[:, :5]), layer(x[:, 5:])), dim=1)
    torch.testing.assert_close(layer(x, resets), alone, rtol=1e-11, atol=1e-11)


def test_low_precision_rotates_in_fp32():
    x = normal(1, 1, 4, HEAD).bfloat16()
    tables = rotary_tables(torch.arange(100_000, 100_004), HEAD, THETA)
    exact = rotate(x.double(), *tables)
    assert rotate(x, *tables).dtype == torch.bfloat16
    torch.testing.assert_close(rotate(x, *tables).double(), exact, rtol=2**-8, atol=0.0)
