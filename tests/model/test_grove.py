"""A KalmaGrove layer against every grove run on every token and masked, in float64, with the gradients of every parameter and of x."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kan_train.config import EdgeConfig, GroveConfig, ModelConfig
from kan_train.model.ffn import SwiGLU
from kan_train.model.grove import KalmaGrove, selected_energy
from kan_train.model.init import materialise

WIDTH, GROVES, ACTIVE, HIDDEN, RANK, GROUP = 12, 6, 3, 8, 4, 4
LOW, HIGH, GRID = -3.0, 3.0, 5


def bspline_basis(x: Tensor, order: int) -> Tensor:
    """[..., G + k] by the recursion of Cox and de Boor, on uniform knots, continued by its tangents."""
    step = (HIGH - LOW) / GRID
    ends = x.clamp(LOW, HIGH - 1e-12)
    knots = [LOW + step * (j - order) for j in range(GRID + 2 * order + 1)]
    values = [((ends >= a) & (ends < b)).double() for a, b in itertools.pairwise(knots)]
    below = values
    for degree in range(1, order + 1):
        below = values
        values = [
            (ends - knots[j]) / (degree * step) * below[j] + (knots[j + degree + 1] - ends) / (degree * step) * below[j + 1]
            for j in range(len(below) - 1)
        ]
    slopes = [(below[j] - below[j + 1]) / step for j in range(len(values))]
    return torch.stack(values, -1) + torch.stack(slopes, -1) * (x - ends)[..., None]


def activation(h: Tensor, coefficients: Tensor, kind: str, order: int) -> Tensor:
    """silu + f for h [..., M], coefficients [F, n]."""
    if kind == "silu":
        return F.silu(h)
    per_unit = coefficients.repeat_interleave(h.shape[-1] // len(coefficients), dim=0)
    if kind == "bspline":
        return F.silu(h) + (bspline_basis(h, order) * per_unit).sum(-1)
    if kind == "chebyshev":
        angles = torch.arange(1, order + 1) * h.tanh().clamp(-1 + 1e-15, 1 - 1e-15).acos()[..., None]
        return F.silu(h) + (angles.cos() * per_unit).sum(-1)
    if kind == "rational":
        above = sum(per_unit[:, p] * h**p for p in range(6))
        return F.silu(h) + above / (1 + sum(per_unit[:, 5 + p] * h**p for p in range(1, 5)).abs())
    scaled = (h - LOW) * GRID / (HIGH - LOW)
    cell = scaled.detach().floor().clamp(0, GRID - 1)
    end = (scaled - cell).clamp(0, 1)
    own = per_unit.view(-1, GRID, order + 1).expand(*h.shape, GRID, order + 1)
    own = own.gather(-2, cell.long()[..., None, None].expand(*h.shape, 1, order + 1))[..., 0, :]
    value = sum(own[..., p] * end**p for p in range(order + 1))
    return F.silu(h) + value + sum(p * own[..., p] * end ** (p - 1) for p in range(1, order + 1)) * (scaled - cell - end)


def grove_output(p: dict[str, Tensor], i: int, x: Tensor, z: Tensor, config: GroveConfig) -> Tensor:
    """f_i for all tokens [T, D]."""
    edge = config.edge
    if config.kind == "edge":
        u = z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        c = p["groves.edges.coefficients"][i].view(RANK, -1, HIDDEN)
        phi = F.silu(u) @ p["groves.edges.base"][i] + torch.einsum("trg,rgm->tm", bspline_basis(u, edge.order), c)
        return phi @ p["groves.out"][i]
    up_input = z if config.kind == "reuse" else x
    coefficients = p["groves.functions.coefficients"][i] if edge.kind != "silu" else None
    h = activation(up_input @ p["groves.up"][i], coefficients, edge.kind, edge.order)
    return (h * (x @ p["groves.value"][i])) @ p["groves.out"][i]


def scores(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor, config: GroveConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    """(s, t, z) for all groves."""
    if config.score == "linear":
        s = x @ p["router.score"].T
        return s, s, None
    z = torch.einsum("nrd,td->tnr", p["router.score"], x)
    norm = (z.square().sum(-1) + 1e-6).sqrt()
    if config.gate == "literal":
        return norm, norm, z
    s = norm / p["router.score"].square().sum((1, 2)).sqrt()
    return s, (s - b["router.score_mean"]) / b["router.score_std"], z


def gates(p: dict[str, Tensor], s: Tensor, t: Tensor, x: Tensor, mask: Tensor, config: GroveConfig) -> Tensor:
    """[T, N], zero where the mask is."""
    if config.score == "linear":
        return config.active_groves * s.masked_fill(~mask, -torch.inf).softmax(-1)
    linear = x @ p["router.gate"].T + p["router.gate_bias"]
    if config.gate == "softmax":
        return config.active_groves * (linear + p["router.gate_score"] * t).masked_fill(~mask, -torch.inf).softmax(-1)
    if config.gate == "literal":
        return linear.sigmoid() * s * mask
    return linear.sigmoid() * s / ((s * mask).sum(-1, keepdim=True) / config.active_groves) * mask


def reference(p: dict[str, Tensor], b: dict[str, Tensor], x_BTD: Tensor, config: GroveConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, T, D], mask [T, N] of the choices, and the auxiliary loss."""
    x = x_BTD.flatten(0, 1)
    s, t, z = scores(p, b, x, config)
    balance = 0 if config.gate == "literal" else b["router.balance"]
    chosen = (t + balance).topk(config.active_groves).indices
    mask = torch.zeros_like(t, dtype=torch.bool).scatter(1, chosen, True)
    gate = gates(p, s, t, x, mask, config)
    kept = mask
    if config.capacity_factor:
        capacity = math.ceil(config.capacity_factor * len(x) * config.active_groves / config.num_groves)
        order = gate.detach().masked_fill(~mask, -1).argsort(0, descending=True)
        kept = mask & torch.zeros_like(mask).scatter(0, order[:capacity], True)
    y = sum((gate[:, i] * kept[:, i])[:, None] * grove_output(p, i, x, x if z is None else z[:, i], config) for i in range(config.num_groves))
    y = y * config.route_scale
    if config.shared_width:
        edge, coefficients = config.edge, p.get("shared.functions.coefficients")
        h = activation(x @ p["shared.up.weight"].T, None if coefficients is None else coefficients[0], edge.kind, edge.order)
        y = y + (h * (x @ p["shared.value.weight"].T)) @ p["shared.out.weight"].T
    per_sequence = (x_BTD.shape[0], -1)
    load = mask.double().unflatten(0, per_sequence).mean(1) * config.num_groves / config.active_groves
    auxiliary = config.auxiliary_loss * (load * t.softmax(-1).unflatten(0, per_sequence).mean(1)).sum(-1).mean()
    return y.view_as(x_BTD), mask, auxiliary


def grove_config(**settings: object) -> GroveConfig:
    edge = {"group_size": GROUP, **{k: settings.pop(k) for k in ("order", "sharing") if k in settings}}
    if "edge_kind" in settings:
        edge["kind"] = settings.pop("edge_kind")
    return GroveConfig(num_groves=GROVES, active_groves=ACTIVE, width=HIDDEN, score_rank=RANK, edge=EdgeConfig(**edge), **settings)


def build(config: GroveConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> KalmaGrove:
    """A layer away from its start: every parameter and every buffer of the router random."""
    model = ModelConfig(width=WIDTH, num_layers=1, ada=dataclasses.replace(ModelConfig().ada, num_heads=2), grove=config)
    model.validate()
    layer = materialise(KalmaGrove(model, 0), seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            size = 0.3 * parameter.double().square().mean().sqrt().clamp(min=0.5)
            parameter += (size * torch.randn(parameter.shape, generator=generator)).to(dtype)
        layer.router.balance += 0.2 * torch.randn(GROVES, generator=generator)
        layer.router.score_mean += 0.1 * torch.randn(GROVES, generator=generator)
        layer.router.score_std *= 1 + 0.2 * torch.rand(GROVES, generator=generator)
    return layer


def leaves(layer: KalmaGrove) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Independent float64 copies of parameters and buffers."""
    parameters = {name: value.detach().double().clone().requires_grad_() for name, value in layer.named_parameters()}
    return parameters, {name: value.detach().double().clone() for name, value in layer.named_buffers()}


CASES = {
    "gated": {},
    "gated order 1": {"order": 1},
    "gated order 2": {"order": 2},
    "gated plain silu": {"edge_kind": "silu"},
    "gated polynomials": {"edge_kind": "piecewise_poly", "order": 2},
    "gated rational": {"edge_kind": "rational"},
    "gated chebyshev": {"edge_kind": "chebyshev", "order": 4},
    "gated, shared grove": {"shared_width": 10},
    "gated, shared grove, silu, scaled": {"shared_width": 8, "edge_kind": "silu", "route_scale": 1.7},
    "gated, sigmoid": {"gate": "sigmoid", "route_scale": 0.5},
    "gated, literal": {"gate": "literal"},
    "gated, linear score": {"score": "linear"},
    "gated, capacity": {"capacity_factor": 0.75},
    "gated, auxiliary loss": {"auxiliary_loss": 0.3},
    "linear score, auxiliary loss": {"score": "linear", "auxiliary_loss": 0.3},
    "reuse": {"kind": "reuse"},
    "reuse, capacity": {"kind": "reuse", "capacity_factor": 0.6},
    "reuse, rational, sigmoid": {"kind": "reuse", "edge_kind": "rational", "gate": "sigmoid"},
    "edge": {"kind": "edge", "sharing": "per_edge"},
    "edge, order 2, literal": {"kind": "edge", "sharing": "per_edge", "order": 2, "gate": "literal"},
    "edge, capacity, shared": {"kind": "edge", "sharing": "per_edge", "capacity_factor": 1.0, "shared_width": 4},
}


@pytest.mark.parametrize("tokens", [(2, 9), (1, 2)], ids=["18 tokens", "2 tokens"])
@pytest.mark.parametrize("case", CASES)
def test_layer_equals_the_masked_dense_sum(case: str, tokens: tuple[int, int]):
    config = grove_config(**CASES[case])
    layer = build(config)
    parameters, buffers = leaves(layer)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(*tokens, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
    other = x.detach().clone().requires_grad_()
    weight = torch.randn(x.shape, dtype=torch.float64, generator=generator)

    y = layer(x)
    expected, _, auxiliary = reference(parameters, buffers, other, config)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    loss, expected_loss = (y * weight).sum(), (expected * weight).sum() + auxiliary
    if config.auxiliary_loss:
        torch.testing.assert_close(layer.auxiliary_loss(), auxiliary, rtol=1e-12, atol=0)
        loss = loss + layer.auxiliary_loss()
    else:
        assert layer.auxiliary_loss() is None
    loss.backward()
    expected_loss.backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-8, atol=1e-10)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        grad = parameters[name].grad
        expected_grad = torch.zeros_like(parameter) if grad is None else grad
        torch.testing.assert_close(parameter.grad, expected_grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("case", ["gated", "gated plain silu", "reuse, capacity"])
def test_the_size_of_a_block_does_not_show(case: str, rows: int, monkeypatch: pytest.MonkeyPatch):
    """Blocks cut groves apart, whose matrices then gather their gradient from several of them."""
    layer = build(grove_config(**CASES[case]))
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    runs = []
    for _ in range(2):
        layer.zero_grad()
        y = layer(x)
        grad_x = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        runs.append([y.detach(), *grad_x])
        monkeypatch.setattr("kan_train.model.gated.block_rows", lambda width, device: rows)
    for whole, cut in zip(*runs, strict=True):
        torch.testing.assert_close(whole, cut, rtol=1e-10, atol=1e-11)


def test_the_reference_drops_choices_in_the_capacity_cases():
    """Otherwise the capacity cases above would say nothing."""
    config = grove_config(capacity_factor=0.75)
    parameters, buffers = leaves(build(config))
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    roomy = reference(parameters, buffers, x, dataclasses.replace(config, capacity_factor=0.0))[0]
    assert not torch.allclose(reference(parameters, buffers, x, config)[0], roomy)


def test_enough_capacity_is_dropless():
    layer, roomy = build(grove_config()), build(grove_config(capacity_factor=GROVES / ACTIVE))
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(layer(x), roomy(x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", ["gated", "reuse", "edge", "gated, literal", "gated, sigmoid", "gated rational"])
def test_gradients_are_finite_at_zero(case: str):
    """The norm's derivative at 0 is 0/0 without its eps; padding tokens after a norm are exactly 0."""
    layer = build(grove_config(**CASES[case]), dtype=torch.float32)
    x = torch.zeros(1, 5, WIDTH, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("kind", ["gated", "reuse", "edge"])
def test_a_token_does_not_depend_on_the_others(kind: str):
    layer = build(grove_config(kind=kind, sharing="per_edge" if kind == "edge" else "grouped"))
    x = torch.randn(1, 30, WIDTH, dtype=torch.float64)
    order = torch.randperm(30)
    torch.testing.assert_close(layer(x)[:, order], layer(x[:, order]), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(layer(x)[:, 7:8], layer(x[:, 7:8]), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["gated", "reuse", "edge"])
def test_few_tokens_touch_only_their_groves(kind: str):
    """Decode: what a grove that no token chose holds cannot matter, not even NaN."""
    config = grove_config(kind=kind, sharing="per_edge" if kind == "edge" else "grouped")
    layer = build(config)
    x = torch.randn(1, 1, WIDTH, dtype=torch.float64)
    before = layer(x)
    _, mask, _ = reference(*leaves(layer), x, config)
    with torch.no_grad():
        for parameter in layer.groves.parameters():
            parameter[~mask[0]] = float("nan")
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", ["gated", "reuse", "edge"])
def test_bf16_layer_is_near_the_exact_one(kind: str):
    config = grove_config(kind=kind, sharing="per_edge" if kind == "edge" else "grouped")
    layer = build(config, dtype=torch.bfloat16)
    parameters, buffers = leaves(layer)
    x = torch.randn(2, 32, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    other = x.detach().double().requires_grad_()
    expected, mask, _ = reference(parameters, buffers, other, config)
    y.sum().backward()
    expected.sum().backward()
    # Near-ties may be chosen otherwise; those tokens are left out.
    with torch.no_grad():
        index = layer.router(x.flatten(0, 1)).index_TK
    same = mask.gather(1, index).all(1)
    assert same.float().mean() > 0.8
    assert _relative(y.flatten(0, 1)[same], expected.flatten(0, 1)[same]) < 0.03
    assert _relative(x.grad.flatten(0, 1)[same], other.grad.flatten(0, 1)[same]) < 0.06
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in layer.parameters())


def _relative(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm()).item()


def test_two_runs_are_bitwise_equal():
    layer = build(grove_config(), dtype=torch.float32)
    x = torch.randn(4, 64, WIDTH)
    runs = []
    for _ in range(2):
        layer.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        runs.append([y.detach().clone(), *(parameter.grad.clone() for parameter in layer.parameters())])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize(("kind", "share"), [("gated", (0.9, 2.0)), ("reuse", (0.9, 2.2)), ("edge", (0.9, 2.2))])
def test_output_variance_at_step_0_is_about_that_of_the_active_twin(kind: str, share: tuple[float, float]):
    """The gates sum to K; the variance of the routed sum is that of a dense layer of width K M, a little more for unequal gates."""
    grove = GroveConfig(num_groves=16, active_groves=4, width=64, kind=kind, edge=EdgeConfig(sharing="per_edge" if kind == "edge" else "grouped"))
    layer = materialise(KalmaGrove(ModelConfig(width=64, grove=grove), 0), seed=0)
    twin = materialise(SwiGLU(ModelConfig(width=64, ffn="swiglu", ffn_width=256), 0), seed=0)
    x = torch.randn(1, 2048, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ratio = (layer(x).var() / twin(x).var()).item()
    assert share[0] < ratio < share[1], ratio


@pytest.mark.parametrize(("rank", "share"), [(8, 1 / 16), (16, 0.25), (3, 1.0)])
def test_selected_energy_is_that_of_the_largest_vectors(rank: int, share: float):
    energy = torch.randn(400_000, rank, generator=torch.Generator().manual_seed(0)).square().mean(-1).sort(descending=True).values
    assert selected_energy(rank, share) == pytest.approx(energy[: int(share * len(energy))].mean().item(), rel=0.01)


def test_swiglu_is_its_formula():
    twin = materialise(SwiGLU(ModelConfig(width=8, ffn="swiglu", ffn_width=12), 0), seed=0, dtype=torch.float64)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    up, value, out = twin.up.weight, twin.value.weight, twin.out.weight
    h = x @ up.T
    torch.testing.assert_close(twin(x), (h / (1 + (-h).exp()) * (x @ value.T)) @ out.T)


def test_a_gated_layer_with_every_grove_active_and_equal_gates_is_one_swiglu():
    """N = K and zero logits: every gate is 1, and the groves side by side are one wide layer."""
    config = dataclasses.replace(grove_config(), active_groves=GROVES)
    layer = materialise(KalmaGrove(ModelConfig(width=WIDTH, grove=config), 0), seed=0, dtype=torch.float64)
    with torch.no_grad():
        layer.router.gate.zero_()
        layer.router.gate_score.zero_()
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    groves = layer.groves
    up, value = (weight.transpose(0, 1).flatten(1) for weight in (groves.up, groves.value))
    torch.testing.assert_close(layer(x), (F.silu(x @ up) * (x @ value)) @ groves.out.flatten(0, 1))


def test_facts_of_the_parameters():
    """Groves are sharded and trained at their own rate, the router is replicated; only projections decay."""
    layer = KalmaGrove(ModelConfig(width=WIDTH, grove=grove_config(shared_width=8)), 0)
    specs = {name: parameter.spec for name, parameter in layer.named_parameters()}
    for name, spec in specs.items():
        assert spec.grove == name.startswith("groves."), name
        assert (spec.axes[0] == "grove") == name.startswith("groves."), name
        assert spec.decay == name.endswith(("up", "value", "out", "weight", "router.score", "router.gate")), name
    assert specs["groves.up"].axes == ("grove", None, "hidden")
    assert specs["groves.value"].axes == ("grove", None, "hidden")
    assert specs["groves.out"].axes == ("grove", "hidden", None)
    assert specs["router.score"].axes == (None, None, None)
    assert {name for name, spec in specs.items() if spec.matrix} >= {"groves.up", "groves.value", "groves.out"}
