"""ADA against its formula, written out as masked attention in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kan_train.config import AdaConfig, ModelConfig
from kan_train.model.ada import Ada, half_lives
from kan_train.model.init import materialise

BATCH, WIDTH, HEADS, HEAD = 2, 24, 3, 8
VARIANTS = {
    "default": {},
    "data": {"decay": "data"},
    "no_decay": {"decay": "none"},
    "no_gate": {"output_gate": False},
    "no_norm": {"output_norm": False},
    "no_conv": {"conv_width": 1},
    "mixture": {"mixture": 2},
    "everything": {"decay": "data", "mixture": 3, "conv_width": 6},
    "literal": {"feature_map": "identity", "decay": "none", "output_norm": False, "output_gate": False},
}


def build(variant: str, *, dtype: torch.dtype = torch.float64, noise: float = 0.3, chunk: int = 8) -> Ada:
    """A layer whose every parameter is away from its initial value, where a zero or a one could hide a mistake."""
    config = ModelConfig(width=WIDTH, num_layers=2, sequence_length=64, ada=AdaConfig(num_heads=HEADS, chunk=chunk, **VARIANTS[variant]))
    layer = materialise(Ada(config, 0), seed=1, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return layer


def normal(time: int, seed: int = 0, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, time, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def starts(time: int) -> Tensor:
    resets = torch.zeros(BATCH, time, dtype=torch.bool)
    resets[0, [0, 5, 6, min(16, time - 1)]] = True
    resets[1, time // 2] = True
    return resets


def reference(layer: Ada, x: Tensor, resets: Tensor | None = None) -> Tensor:
    """One document at a time, one head at a time, with T x T scores."""
    p = dict(layer.named_parameters())
    if resets is None:
        return torch.stack([_document(p, row) for row in x])
    rows = []
    for row, marks in zip(x, resets, strict=True):
        edges = sorted({0, len(row), *marks.nonzero().flatten().tolist()})
        rows.append(torch.cat([_document(p, row[a:b]) for a, b in itertools.pairwise(edges)]))
    return torch.stack(rows)


def _document(p: dict[str, Tensor], x: Tensor) -> Tensor:
    heads = [_head(p, x, slice(h * HEAD, (h + 1) * HEAD), h) for h in range(HEADS)]
    y = torch.cat(heads, dim=-1)
    if "gate.weight" in p:
        y = y * F.silu(x @ p["gate.weight"].T)
    return y @ p["out.weight"].T


def _head(p: dict[str, Tensor], x: Tensor, rows: slice, h: int) -> Tensor:
    time = len(x)
    q, k, v = (x @ p[f"{name}.weight"][rows].T for name in ("query", "key", "value"))
    if "kernel" in p:
        kernel = p["kernel"][h]
        k = torch.stack([sum(kernel[:, j] * k[t - j] for j in range(min(kernel.shape[1], t + 1))) for t in range(time)])
    if "mixture_weight" in p:
        k = k + sum(w[h] * _means(k, torch.exp(-rate[h].exp())) for w, rate in zip(p["mixture_weight"], p["mixture_log_rate"], strict=True))
    if "norm_weight" in p or "gate.weight" in p:  # all but the literal form
        q, k = F.silu(q), F.silu(k)
        k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    decay = torch.ones(time, dtype=x.dtype)
    if "rate_weight" in p:
        decay = torch.sigmoid(-(x @ p["rate_weight"][h]) - torch.log(torch.exp(p["log_rate"][h].exp()) - 1))
    elif "log_rate" in p:
        decay = torch.exp(-p["log_rate"][h].exp()).expand(time)
    left = [[decay[j + 1 : i + 1].prod() if j <= i else decay.new_zeros(()) for j in range(time)] for i in range(time)]
    o = (q @ k.T * torch.stack([torch.stack(row) for row in left])) @ v / math.sqrt(HEAD)
    if "norm_weight" in p:
        o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p["norm_weight"][h]
    return o


def _means(k: Tensor, keep: Tensor) -> Tensor:
    rows, m = [], torch.zeros_like(k[0])
    for row in k:
        m = keep * m + (1 - keep) * row
        rows.append(m)
    return torch.stack(rows)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("packed", [False, True])
def test_layer_is_its_formula(variant: str, packed: bool):
    """Output, and gradients of the input and of every parameter, for a length that the chunk does not divide."""
    time = 21
    layer, x = build(variant), normal(time).requires_grad_()
    resets = starts(time) if packed else None
    ours, theirs = layer(x, resets), reference(layer, x, resets)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    weight, leaves = normal(time, seed=7), [x, *layer.parameters()]
    names = ["x", *dict(layer.named_parameters())]
    grads = [torch.autograd.grad(y, leaves, weight) for y in (ours, theirs)]
    for name, mine, expected in zip(names, *grads, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
        assert expected.abs().max() > 0, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_and_steps_equal_the_forward_pass(variant: str):
    """Prefill in two parts, then token by token: the same outputs, and a state of constant size."""
    layer, x = build(variant), normal(37)
    state = layer.init_state(BATCH, "cpu", torch.float64)
    shapes = {name: value.shape for name, value in vars(state).items()}
    parts = []
    for start, stop in ((0, 1), (1, 19)):
        part, state = layer.prefill(x[:, start:stop], state)
        parts.append(part)
    for t in range(19, 37):
        y, state = layer.step(x[:, t], state)
        parts.append(y[:, None])
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x), rtol=1e-10, atol=1e-11)
    assert {name: value.shape for name, value in vars(state).items()} == shapes


def test_reading_a_token_leaves_the_state_before_it_as_it_was():
    """Two continuations of one prompt may start from the same state."""
    layer, x = build("everything"), normal(9)
    _, state = layer.prefill(x, layer.init_state(BATCH, "cpu", torch.float64))
    first, _ = layer.step(x[:, 0], state)
    layer.step(x[:, 1], state)
    again, _ = layer.step(x[:, 0], state)
    assert torch.equal(first, again)


@pytest.mark.parametrize("variant", ["default", "everything", "literal"])
def test_no_token_sees_a_later_one(variant: str):
    layer, x = build(variant), normal(24)
    changed = x.clone()
    changed[:, 13] += 1.0
    difference = (layer(changed) - layer(x)).abs().amax(dim=(0, 2))
    assert (difference[:13] == 0).all()
    assert (difference[13:] > 0).all()


def test_the_chunk_is_an_implementation_detail():
    x = normal(32)
    outputs = [build("default", chunk=chunk)(x) for chunk in (1, 8, 32, 100)]
    for y in outputs[1:]:
        torch.testing.assert_close(y, outputs[0], rtol=1e-11, atol=1e-12)


def test_literal_form_is_the_papers():
    """ADA(Q, K, V) = Q (K * kern)^T / sqrt(d) V with a causal mask, and with the identity kernel Q K^T / sqrt(d) V at step 0."""
    layer, x = build("literal", noise=0.0), normal(12)
    heads = []
    for h in range(HEADS):
        q, k, v = (x @ linear.weight[h * HEAD : (h + 1) * HEAD].T for linear in (layer.query, layer.key, layer.value))
        heads.append((q @ k.mT / math.sqrt(HEAD)).tril() @ v)
    torch.testing.assert_close(layer(x), torch.cat(heads, dim=-1) @ layer.out.weight.T, rtol=1e-11, atol=1e-11)
    assert {name for name, _ in layer.named_parameters()} == {"query.weight", "key.weight", "value.weight", "out.weight", "kernel"}


def test_data_dependent_decay_starts_as_the_learned_one():
    x = normal(20)
    torch.testing.assert_close(build("data", noise=0.0)(x), build("default", noise=0.0)(x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("heads", "length"), [(1, 256), (2, 256), (3, 512), (4, 512), (8, 1024), (16, 2048), (48, 4096)])
def test_half_lives_start_where_the_specification_says(heads: int, length: int):
    config = ModelConfig(width=48 * 4, sequence_length=length, ada=AdaConfig(num_heads=heads))
    lives = half_lives(heads, config)
    assert list(lives) == sorted(lives)
    assert sum(life <= 16.0 + 1e-9 for life in lives) >= heads / 2
    if heads > 1:
        assert lives[0] == pytest.approx(1.0)
        assert lives[-1] == pytest.approx(length / 2)
    layer = materialise(Ada(config, 0), seed=0, dtype=torch.float64)
    halved = torch.exp(-layer.log_rate.exp()) ** torch.tensor(lives, dtype=torch.float64)
    torch.testing.assert_close(halved, torch.full_like(halved, 0.5), rtol=1e-6, atol=0.0)


def test_lower_precision_follows_float64():
    """fp32 closely; bf16 weights and activations to bf16's rounding, with decay and state in fp32."""
    x, exact = normal(150), build("default", chunk=64)
    single = build("default", dtype=torch.float32, chunk=64)
    torch.testing.assert_close(single(x.float()).double(), exact(x), rtol=1e-4, atol=1e-4)
    half = build("default", dtype=torch.bfloat16, chunk=64)
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert half.init_state(1, "cpu", torch.bfloat16).memory_BHdd.dtype == torch.float32
    error = (y.double() - exact(x)).square().mean().sqrt() / exact(x).square().mean().sqrt()
    assert error < 0.03
