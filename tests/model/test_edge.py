"""Edge layers and grouped activations: their formulas in numpy, and the variance that they start with."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, stats
from scipy.interpolate import BSpline
from torch import nn

from kan_train.config import EdgeConfig
from kan_train.model.dispatch import rows_of_sizes
from kan_train.model.edge import SILU_GAIN, EdgeLayer, GroupedFunctions, activate, coefficients_of, edge_basis, edge_gains, edge_initial_stds, rational
from kan_train.model.init import materialise

CPU = torch.device("cpu")


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def bspline_values(x: np.ndarray, order: int, grid: int) -> np.ndarray:
    """[..., G + k] on [-3, 3], continued linearly, from scipy."""
    step = 6 / grid
    knots = -3 + step * np.arange(-order, grid + order + 1)
    ends = np.clip(x, -3, np.nextafter(3, 0))
    values = []
    for one in np.eye(grid + order):
        function = BSpline(knots, one, order)
        values.append(function(ends) + function.derivative()(ends) * (x - ends))
    return np.stack(values, axis=-1)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_edge_layer_is_the_sum_over_edges(order: int):
    """y_o = sum_i [ w_oi silu(x_i) + sum_g c_oig B_g(x_i) ], for each grove on its own rows, one of them empty."""
    groves, inputs, outputs, sizes = 3, 4, 5, [6, 0, 3]
    config = EdgeConfig(order=order, sharing="per_edge")
    layer = materialise(EdgeLayer(config, groves=groves, inputs=inputs, outputs=outputs, kernels="torch"), seed=1, dtype=torch.float64)
    x = np.random.default_rng(0).normal(size=(9, inputs)) * 2
    y = layer(torch.tensor(x), rows_of_sizes(sizes, CPU))
    w = layer.base.detach().numpy()
    c = layer.coefficients.detach().numpy().reshape(groves, inputs, 5 + order, outputs)
    grove = [0] * 6 + [2] * 3
    expected = np.stack([silu(x[row]) @ w[g] + np.einsum("ig,igo->o", bspline_values(x[row], order, 5), c[g]) for row, g in enumerate(grove)])
    np.testing.assert_allclose(y.detach(), expected, atol=1e-12)


@pytest.mark.parametrize("kind", ["bspline", "piecewise_poly", "chebyshev"])
def test_edge_layer_gradcheck(kind: str):
    config = EdgeConfig(kind=kind, order=3, grid=4, sharing="per_edge")
    layer = materialise(EdgeLayer(config, groves=2, inputs=3, outputs=2, kernels="torch"), seed=1, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def output(x, base, coefficients):
        return torch.func.functional_call(layer, {"base": base, "coefficients": coefficients}, (x, rows_of_sizes([3, 2], CPU)))

    assert torch.autograd.gradcheck(output, (x, layer.base, layer.coefficients), atol=1e-6)


def test_chebyshev_equals_numpy():
    x = np.linspace(-4, 4, 101)
    values = edge_basis(torch.tensor(x), EdgeConfig(kind="chebyshev", order=6))
    assert values.shape == (101, 6) == (101, coefficients_of(EdgeConfig(kind="chebyshev", order=6)))
    for degree in range(1, 7):
        coefficients = np.eye(7)[degree]
        np.testing.assert_allclose(values[:, degree - 1], np.polynomial.chebyshev.chebval(np.tanh(x), coefficients), atol=1e-12)


def test_rational_equals_numpy_and_has_no_pole():
    rng = np.random.default_rng(0)
    c = rng.normal(size=(3, 10))
    x = np.linspace(-5, 5, 203)[:, None].repeat(3, axis=1)
    expected = np.stack([np.polyval(row[5::-1], x[:, 0]) / (1 + np.abs(np.polyval([*row[:5:-1], 0.0], x[:, 0]))) for row in c], axis=1)
    np.testing.assert_allclose(rational(torch.tensor(x), torch.tensor(c)), expected, rtol=1e-12, atol=1e-12)
    assert coefficients_of(EdgeConfig(kind="rational")) == 10


@pytest.mark.parametrize("kind", ["bspline", "piecewise_poly", "rational", "chebyshev", "silu"])
def test_grouped_activation_starts_as_silu(kind: str):
    config = EdgeConfig(kind=kind, group_size=4)
    functions = materialise(GroupedFunctions(config, groves=2, width=12, grove=True), seed=0)
    h = torch.randn(7, 12)
    assert torch.equal(activate(h, functions(), rows_of_sizes([3, 4], CPU), config, "torch"), F.silu(h))
    assert len(list(functions.parameters())) == (kind != "silu")


@pytest.mark.parametrize("kind", ["bspline", "piecewise_poly", "rational", "chebyshev"])
def test_grouped_activation_shares_one_function_a_group(kind: str):
    """Unit m of grove n uses function m // group_size of that grove; in numpy, one unit at a time."""
    config = EdgeConfig(kind=kind, order=3, group_size=4)
    functions = materialise(GroupedFunctions(config, groves=2, width=12, grove=True), seed=0, dtype=torch.float64)
    c = np.random.default_rng(0).normal(size=(2, 3, coefficients_of(config)))
    with torch.no_grad():
        functions.coefficients.copy_(torch.tensor(c))
    h = np.random.default_rng(1).normal(size=(7, 12)) * 2
    y = activate(torch.tensor(h), functions(), rows_of_sizes([3, 4], CPU), config, "torch").detach().numpy()
    for row in range(7):
        for unit in range(12):
            own, x = c[int(row >= 3), unit // 4], h[row, unit]
            if kind == "bspline":
                value = bspline_values(np.array(x), 3, 5) @ own
            elif kind == "chebyshev":
                value = np.polynomial.chebyshev.chebval(np.tanh(x), [0, *own])
            elif kind == "rational":
                value = np.polyval(own[5::-1], x) / (1 + abs(np.polyval([*own[:5:-1], 0.0], x)))
            else:
                scaled = (x + 3) * 5 / 6
                cell = int(np.clip(np.floor(scaled), 0, 4))
                polynomial, end = np.polynomial.Polynomial(own[4 * cell : 4 * cell + 4]), np.clip(scaled - cell, 0, 1)
                value = polynomial(end) + polynomial.deriv()(end) * (scaled - cell - end)
            assert y[row, unit] == pytest.approx(silu(np.array(x)) + value, abs=1e-11)


def test_group_size_above_the_width_is_one_function():
    functions = GroupedFunctions(EdgeConfig(group_size=64), groves=1, width=8, grove=False)
    assert functions.coefficients.shape == (1, 1, 8)


def test_gains_are_those_of_the_normal_distribution():
    """Against Monte Carlo, and for silu against adaptive quadrature."""
    x = np.random.default_rng(0).normal(size=200_000)
    exact = integrate.quad(lambda t: silu(t) ** 2 * stats.norm.pdf(t), -12, 12)[0]
    for order in (1, 2, 3):
        silu_gain, forward, backward = edge_gains("bspline", order, 5, -3.0, 3.0)
        assert silu_gain == pytest.approx(exact, rel=1e-6)
        assert silu_gain == pytest.approx(SILU_GAIN, rel=1e-5)
        assert forward == pytest.approx((bspline_values(x, order, 5) ** 2).sum(-1).mean(), rel=0.01)
        slopes = (bspline_values(x + 1e-4, order, 5) - bspline_values(x - 1e-4, order, 5)) / 2e-4
        assert backward == pytest.approx((slopes**2).sum(-1).mean(), rel=0.02)


def test_gains_of_fine_grids_are_steeper_backward():
    """The ratio of backward to forward gain grows with the square of the grid: about 1 for G = 5, 2.5 for 8, 3.9 for 10 (k = 3)."""
    for grid, ratio in ((5, 0.97), (8, 2.5), (10, 3.9)):
        _, forward, backward = edge_gains("bspline", 3, grid, -3.0, 3.0)
        assert backward / forward == pytest.approx(ratio, rel=0.05)


def test_gains_can_be_computed_where_gradients_are_off():
    edge_gains.cache_clear()
    with torch.no_grad():
        assert edge_gains("bspline", 2, 7, -3.0, 3.0)[2] > 0


@pytest.mark.parametrize(("kind", "order", "grid"), [("bspline", 3, 5), ("bspline", 1, 5), ("bspline", 2, 16), ("piecewise_poly", 3, 5), ("chebyshev", 4, 5)])
def test_edge_layer_keeps_variance(kind: str, order: int, grid: int):
    """Unit-variance inputs give outputs of unit variance, of which the splines bear eps^2, unless their slopes must be held back; gradients do not grow."""
    config = EdgeConfig(kind=kind, order=order, grid=grid, sharing="per_edge")
    layer = materialise(EdgeLayer(config, groves=1, inputs=64, outputs=64, kernels="torch"), seed=3)
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = layer(x, rows_of_sizes([4096], CPU))
    base = F.silu(x) @ layer.base[0]
    assert base.var().item() == pytest.approx(0.9, rel=0.1)
    splines = y - base
    _, forward, backward = edge_gains(kind, order, grid, -3.0, 3.0)
    assert splines.square().mean().item() == pytest.approx(0.1 * min(1, forward / backward), rel=0.15)
    slope = torch.autograd.grad(splines, x, torch.randn_like(y))[0]
    assert slope.square().mean().item() == pytest.approx(0.1 * min(1, backward / forward), rel=0.15)


def test_initial_stds_follow_their_formula():
    silu_gain, forward, backward = edge_gains("bspline", 3, 5, -3.0, 3.0)
    w, c = edge_initial_stds(EdgeConfig(sharing="per_edge", spline_share=0.25), 32)
    assert w == pytest.approx(math.sqrt(0.75 / 32 / silu_gain))
    assert c == pytest.approx(math.sqrt(0.25 / 32 / max(forward, backward)))


def test_what_decays_and_what_is_a_matrix():
    """Spline coefficients never decay; only projections may be orthogonalised."""
    layer: nn.Module = EdgeLayer(EdgeConfig(sharing="per_edge"), groves=2, inputs=3, outputs=4, kernels="torch")
    assert layer.base.spec.decay
    assert layer.base.spec.matrix
    assert not layer.coefficients.spec.decay
    assert not layer.coefficients.spec.matrix
    grouped = GroupedFunctions(EdgeConfig(), groves=2, width=32, grove=True)
    assert not grouped.coefficients.spec.decay
    assert grouped.coefficients.spec.grove
