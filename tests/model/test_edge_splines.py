"""The functions of one cell table: against scipy's B-splines and numpy's polynomials in float64."""

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from kan_train.model.splines import CellPolynomials, basis, cell_table, number_of_coefficients, refine

LOW, HIGH = -3.0, 3.0
GRIDS = [(order, grid) for order in (1, 2, 3) for grid in (1, 2, 5, 8)]


def spline(coefficients: np.ndarray, order: int, grid: int, low: float = LOW, high: float = HIGH) -> BSpline:
    """The spline of these coefficients on the uniform knots that reach `order` steps beyond [low, high]."""
    step = (high - low) / grid
    knots = low + step * np.arange(-order, grid + order + 1)
    return BSpline(knots, coefficients, order)


def continued(function: BSpline, x: np.ndarray, derivative: int = 0, low: float = LOW, high: float = HIGH) -> np.ndarray:
    """The spline inside [low, high], its tangents outside; or their first derivative."""
    slope = function.derivative()
    # The spline of order 1 jumps in its slope at the upper end, where only the piece below counts.
    ends = np.clip(x, low, np.nextafter(high, low))
    if derivative:
        return slope(ends)
    return function(ends) + slope(ends) * (x - ends)


def points(grid: int) -> np.ndarray:
    """Inside every cell, near every knot and far outside, but on no knot."""
    inside = np.linspace(LOW, HIGH, 41 * grid) * 0.99991
    return np.concatenate((inside, [-30.0, -3.5, -3.0001, 3.0001, 3.7, 50.0]))


@pytest.mark.parametrize(("order", "grid"), GRIDS)
def test_basis_and_its_derivatives_equal_scipy(order: int, grid: int):
    x = points(grid)
    leaf = torch.tensor(x, requires_grad=True)
    weights = basis(leaf, "bspline", order, grid, LOW, HIGH)
    assert weights.shape == (len(x), grid + order)
    for index, one in enumerate(np.eye(grid + order)):
        expected = spline(one, order, grid)
        slope = torch.autograd.grad(weights[:, index].sum(), leaf, retain_graph=True)[0]
        np.testing.assert_allclose(weights[:, index].detach(), continued(expected, x), atol=1e-12)
        np.testing.assert_allclose(slope, continued(expected, x, 1), atol=1e-12)


@pytest.mark.parametrize(("order", "grid"), GRIDS)
def test_cell_table_and_its_gradients_equal_scipy(order: int, grid: int):
    """Value, d/dx and d/dc of two functions, each on half of the columns."""
    rng = np.random.default_rng(0)
    c = rng.normal(size=(2, grid + order))
    x = np.stack([points(grid), rng.permutation(points(grid)), points(grid)[::-1], rng.permutation(points(grid))], axis=1)
    grad = rng.normal(size=x.shape)
    leaf, coefficients = torch.tensor(x, requires_grad=True), torch.tensor(c, requires_grad=True)
    y = CellPolynomials.apply(leaf, cell_table(coefficients, "bspline", order, grid), LOW, (HIGH - LOW) / grid)
    y.backward(torch.tensor(grad))
    for column in range(4):
        function = spline(c[column // 2], order, grid)
        np.testing.assert_allclose(y.detach()[:, column], continued(function, x[:, column]), atol=1e-11, rtol=1e-12)
        np.testing.assert_allclose(leaf.grad[:, column], grad[:, column] * continued(function, x[:, column], 1), atol=1e-11)
    for function in range(2):
        columns = slice(2 * function, 2 * function + 2)
        for index, one in enumerate(np.eye(grid + order)):
            expected = (grad[:, columns] * continued(spline(one, order, grid), x[:, columns])).sum()
            assert coefficients.grad[function, index].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_another_interval(order: int):
    rng = np.random.default_rng(1)
    c, x = rng.normal(size=4 + order), np.linspace(-1, 4, 301)
    expected = continued(spline(c, order, 4, 0.5, 2.25), x, low=0.5, high=2.25)
    table = cell_table(torch.tensor(c)[None], "bspline", order, 4)
    values = CellPolynomials.apply(torch.tensor(x)[:, None], table, 0.5, 1.75 / 4)
    np.testing.assert_allclose(values[:, 0], expected, atol=1e-12)
    weights = basis(torch.tensor(x), "bspline", order, 4, 0.5, 2.25)
    np.testing.assert_allclose(weights @ torch.tensor(c), expected, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_piecewise_polynomials_equal_numpy(order: int):
    """Coefficients of cell g are those of the powers of the position in it, in units of the cell; the outer cells' tangents go on."""
    grid, rng = 5, np.random.default_rng(2)
    c, x = rng.normal(size=(grid, order + 1)), points(grid)
    scaled = (x - LOW) * grid / (HIGH - LOW)
    cell = np.clip(np.floor(scaled), 0, grid - 1).astype(int)
    expected = np.empty_like(x)
    for index, (g, s) in enumerate(zip(cell, scaled, strict=True)):
        polynomial = np.polynomial.Polynomial(c[g])
        end = np.clip(s - g, 0, 1)
        expected[index] = polynomial(end) + polynomial.deriv()(end) * (s - g - end)
    flat = torch.tensor(c.flatten())
    assert len(flat) == number_of_coefficients("piecewise_poly", order, grid)
    weights = basis(torch.tensor(x), "piecewise_poly", order, grid, LOW, HIGH)
    np.testing.assert_allclose(weights @ flat, expected, atol=1e-12)
    table = cell_table(flat[None], "piecewise_poly", order, grid)
    np.testing.assert_allclose(CellPolynomials.apply(torch.tensor(x)[:, None], table, LOW, (HIGH - LOW) / grid)[:, 0], expected, atol=1e-12)


@pytest.mark.parametrize(("kind", "order"), [("bspline", 1), ("bspline", 2), ("bspline", 3), ("piecewise_poly", 2)])
def test_gradcheck(kind: str, order: int):
    torch.manual_seed(0)
    grid = 3
    x = (torch.rand(7, 6, dtype=torch.float64) * 8 - 4).requires_grad_()
    c = torch.randn(3, number_of_coefficients(kind, order, grid), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, c: CellPolynomials.apply(x, cell_table(c, kind, order, grid), LOW, 2.0), (x, c), eps=1e-6, atol=1e-7)
    assert torch.autograd.gradcheck(lambda x: basis(x, kind, order, grid, LOW, HIGH), (x,), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize(("order", "grid"), GRIDS)
def test_refinement_keeps_the_function(order: int, grid: int):
    """Twice the cells, the same function, everywhere: inside, at the knots and on the continuation."""
    rng = np.random.default_rng(3)
    c = torch.tensor(rng.normal(size=(2, grid + order)))
    fine = refine(c, order)
    assert fine.shape == (2, 2 * grid + order)
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    before = basis(x, "bspline", order, grid, LOW, HIGH) @ c.T
    after = basis(x, "bspline", order, 2 * grid, LOW, HIGH) @ fine.T
    assert (before - after).abs().max() < 1e-12 * (1 + before.abs().max())
    twice = basis(x, "bspline", order, 4 * grid, LOW, HIGH) @ refine(fine, order).T
    assert (before - twice).abs().max() < 1e-12 * (1 + before.abs().max())


def test_coarse_inputs_meet_the_right_cell():
    """bf16 inputs are exact numbers: cell, position and polynomial are those of that number in fp32, the result is rounded once."""
    torch.manual_seed(0)
    x = torch.linspace(-4, 4, 4001).bfloat16()[:, None]
    c = torch.randn(1, 8)
    table = cell_table(c.bfloat16(), "bspline", 3, 5)
    assert table.dtype == torch.float32
    y = CellPolynomials.apply(x, table, LOW, 1.2)
    exact = CellPolynomials.apply(x.double(), cell_table(c.bfloat16().double(), "bspline", 3, 5), LOW, 1.2)
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all()
    assert basis(x, "bspline", 3, 5, LOW, HIGH).dtype == torch.float32


def test_coefficient_gradients_of_coarse_inputs_are_summed_in_fp32():
    """Sixteen thousand equal contributions: a bf16 sum stops growing at a few hundred of them."""
    x = torch.full((16384, 1), 0.25, dtype=torch.bfloat16)
    c = torch.zeros(1, 8, requires_grad=True)
    CellPolynomials.apply(x, cell_table(c, "bspline", 3, 5), LOW, 1.2).backward(torch.ones_like(x))
    expected = 16384 * basis(torch.tensor(0.25, dtype=torch.float64), "bspline", 3, 5, LOW, HIGH)
    torch.testing.assert_close(c.grad[0].double(), expected, rtol=1e-3, atol=1e-3 * 16384)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_non_finite_inputs_do_not_crash(value: float):
    x = torch.full((3, 2), value, requires_grad=True)
    y = CellPolynomials.apply(x, cell_table(torch.randn(2, 8), "bspline", 3, 5), LOW, 1.2)
    y.backward(torch.ones_like(y))
    assert basis(x, "bspline", 3, 5, LOW, HIGH).shape == (3, 2, 8)


def test_blocks_of_rows_do_not_show():
    """Rows are worked through in blocks: many rows at once equal a few at a time, gradients of the table add up."""
    torch.manual_seed(0)
    x = torch.randn(9000, 64, dtype=torch.float64, requires_grad=True)
    c = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    CellPolynomials.apply(x, cell_table(c, "bspline", 3, 5), LOW, 1.2).square().sum().backward()
    whole_x, whole_c = x.grad, c.grad
    x.grad = c.grad = None
    for rows in x.split(700):
        CellPolynomials.apply(rows, cell_table(c, "bspline", 3, 5), LOW, 1.2).square().sum().backward()
    torch.testing.assert_close(whole_x, x.grad)
    torch.testing.assert_close(whole_c, c.grad)
