"""Univariate functions on a uniform grid, as one polynomial a cell (docs/model.md, section 1).

B-splines of order k (polynomial degree k, de Boor 1978) and independent polynomials are both linear maps from coefficients to a table of G + 2 cells:
the G intervals of the grid, and one cell to either side that continues linearly. Inside a cell the position is u = (x - low) / h - cell in [0, 1).
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows: the k+1 B-splines that live on a cell, in order; columns: powers of u.
_LOCAL_BSPLINE = {
    1: ((1.0, -1.0), (0.0, 1.0)),
    2: ((0.5, -1.0, 0.5), (0.5, 1.0, -1.0), (0.0, 0.0, 0.5)),
    3: ((1 / 6, -1 / 2, 1 / 2, -1 / 6), (2 / 3, 0.0, -1.0, 1 / 2), (1 / 6, 1 / 2, 1 / 2, -1 / 2), (0.0, 0.0, 0.0, 1 / 6)),
}
_CPU_BLOCK, _BLOCK = 196608, 1 << 25  # elements
_KNOT_INSERTION = {1: (0.5, 1.0, 0.5), 2: (0.25, 0.75, 0.75, 0.25), 3: (0.125, 0.5, 0.75, 0.5, 0.125)}


def number_of_coefficients(kind: str, order: int, grid: int) -> int:
    """Coefficients of one function: G + k for bspline, G (p + 1) for piecewise_poly."""
    return grid + order if kind == "bspline" else grid * (order + 1)


@functools.lru_cache
@torch.inference_mode(mode=False)  # it is kept, and training may be the next to use it
def _cell_map(kind: str, order: int, grid: int) -> Tensor:
    """fp64 [coefficients, G + 2, order + 1]: the table of cells that each coefficient contributes."""
    table = torch.zeros(number_of_coefficients(kind, order, grid), grid + 2, order + 1, dtype=torch.float64)
    for cell in range(grid):
        for j in range(order + 1):
            if kind == "bspline":
                table[cell + j, cell + 1] += torch.tensor(_LOCAL_BSPLINE[order][j], dtype=torch.float64)
            else:
                table[cell * (order + 1) + j, cell + 1, j] = 1.0
    powers = torch.arange(order + 1, dtype=torch.float64)
    left_value, left_slope = table[:, 1, 0], table[:, 1, 1]
    right_value, right_slope = table[:, grid].sum(-1), (table[:, grid] * powers).sum(-1)
    # The left cell ends at u = 1 where the grid begins, the right cell starts at u = 0 where it ends.
    table[:, 0, 0], table[:, 0, 1] = left_value - left_slope, left_slope
    table[:, grid + 1, 0], table[:, grid + 1, 1] = right_value, right_slope
    return table


@functools.lru_cache
@torch.inference_mode(mode=False)
def _cell_map_on(kind: str, order: int, grid: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`_cell_map` where it is used: a copy from the host every layer would make a GPU wait."""
    return _cell_map(kind, order, grid).to(device, dtype)


def cell_table(coefficients: Tensor, kind: str, order: int, grid: int) -> Tensor:
    """[..., coefficients] -> polynomial table [..., G + 2, order + 1] in at least fp32, differentiable."""
    wide = coefficients.dtype if coefficients.dtype == torch.float64 else torch.float32
    return torch.einsum("...c,cgp->...gp", coefficients.to(wide), _cell_map_on(kind, order, grid, coefficients.device, wide))


def basis(x: Tensor, kind: str, order: int, grid: int, low: float, high: float) -> Tensor:
    """Every basis function at x: [...] -> [..., coefficients] in at least fp32, differentiable in x; continues linearly outside the grid."""
    wide = x if x.dtype == torch.float64 else x.float()
    scaled = (wide - low) * (grid / (high - low))
    cell = scaled.detach().floor().nan_to_num_().clamp_(0, grid - 1)
    u = scaled - cell
    inside = u.clamp(0.0, 1.0)
    beyond = u - inside  # zero inside the grid: the slope at its end carries the function on
    local = torch.tensor(_LOCAL_BSPLINE[order], dtype=torch.float64) if kind == "bspline" else torch.eye(order + 1, dtype=torch.float64)
    powers = torch.arange(1, order + 1, dtype=wide.dtype, device=x.device)
    monomials = torch.stack([torch.ones_like(inside)] + [inside**p for p in range(1, order + 1)], dim=-1)
    slopes = torch.cat((torch.zeros_like(monomials[..., :1]), monomials[..., :-1] * powers), dim=-1)
    weights = (monomials + slopes * beyond[..., None]) @ local.T.to(wide)
    first = cell.long() * (1 if kind == "bspline" else order + 1)
    index = first[..., None] + torch.arange(order + 1, device=x.device)
    out = weights.new_zeros(*x.shape, number_of_coefficients(kind, order, grid))
    return out.scatter(-1, index, weights)


def refine(coefficients: Tensor, order: int) -> Tensor:
    """Dyadic knot insertion: B-spline coefficients [..., G + k] on a grid of G cells -> [..., 2G + k] of exactly the same functions inside the grid."""
    mask = _KNOT_INSERTION[order]
    length = coefficients.shape[-1]
    wide = coefficients.new_zeros(*coefficients.shape[:-1], 2 * length + order)
    for offset, weight in enumerate(mask):
        wide[..., offset : offset + 2 * length : 2] += weight * coefficients
    grid = length - order
    # Spline j of the coarse grid has its fine images at 2j .. 2j + k + 1; the fine splines that live on the grid start k further on.
    return wide[..., order : order + 2 * grid + order]


@dataclass
class Cells:
    """Where the elements of a block h [n, M] lie, and their functions' polynomials there."""

    u: Tensor
    """Position in the cell [n, M]: 0 to 1 inside the grid, beyond it in the outer cells."""
    index: Tensor
    """int64 [n * M]: flat number of the element's cell in the block's table."""
    columns: Tensor
    """For each power of u its coefficient [P, n, M], lowest power first."""
    step: float
    """Width of a cell."""

    def value(self) -> Tensor:
        """f(h) [n, M]."""
        return _horner(self.columns, self.u)

    def slope(self) -> Tensor:
        """f'(h) [n, M]."""
        return _horner([column * (power / self.step) for power, column in enumerate(self.columns) if power], self.u)

    def moments(self, grad: Tensor, out: Tensor) -> None:
        """Add the gradient of the block's table, out [f, G + 2, P], for the gradient [n, M] of f(h)."""
        grads = torch.empty_like(self.columns)
        grads[0] = grad
        for power in range(1, len(grads)):
            torch.mul(grads[power - 1], self.u, out=grads[power])
        flat = out.new_zeros(len(grads), out.numel() // len(grads))
        # A row a power: a CPU adds up one row on one thread, in the order of the elements, whatever the number of threads.
        flat.scatter_add_(1, self.index.expand(len(grads), -1), grads.flatten(1))
        out += flat.T.view_as(out)


def locate(h: Tensor, table: Tensor, first_function: Tensor | None, low: float, step: float) -> Cells:
    """Find the elements of h [n, M] in a block's table [f, F, G + 2, P] (f groves of F functions, column m uses function m // (M / F)).

    `first_function` (int32 [n, 1]) is the number of each row's first function in the block, where its rows are not all of one grove. Works in the table's
    dtype, at least fp32, whatever the dtype of h: a cell index rounded to bf16 would be a wrong cell.
    """
    _, functions, cells, powers = table.shape
    scaled = (h.to(table.dtype) - low).mul_(1 / step)
    # A non-finite input must not index outside the table: the step that met it is skipped later, not crashed here.
    cell = scaled.floor().clamp_(-1, cells - 2).nan_to_num_(0.0)
    u = scaled.sub_(cell)
    column = torch.arange(functions, device=h.device, dtype=torch.int32).repeat_interleave(h.shape[1] // functions)
    # By way of int32, to which CPUs convert whole vectors of floats.
    flat = cell.int().add_(column.mul_(cells).add_(1))
    if first_function is not None:
        flat.add_(first_function * cells)
    index = flat.long().flatten()
    # A gather from one short contiguous row a power is the fastest on CPU, where the rows are shared out among the threads.
    by_power = table.reshape(-1, powers).T.contiguous()
    return Cells(u, index, by_power.gather(1, index.expand(powers, -1)).unflatten(1, u.shape), step)


class CellPolynomials(torch.autograd.Function):
    """y = f(x) for one set of functions: x [n, M], table [F, G + 2, P] -> [n, M]. Keeps x alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, low: float, step: float) -> Tensor:
        ctx.save_for_backward(x, table)
        ctx.low, ctx.step = low, step
        y = torch.empty_like(x)
        for x_rows, y_rows in _blocks(x, y):
            y_rows.copy_(locate(x_rows, table[None], None, low, step).value())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, table = ctx.saved_tensors
        grad_x, grad_table = torch.empty_like(x), torch.zeros_like(table)
        for x_rows, g_rows, out_rows in _blocks(x, grad, grad_x):
            cells, g = locate(x_rows, table[None], None, ctx.low, ctx.step), g_rows.to(table.dtype)
            out_rows.copy_(cells.slope().mul_(g))
            cells.moments(g, grad_table)
        return grad_x, grad_table, None, None


def block_rows(width: int, device: torch.device) -> int:
    """Rows of a block of elementwise work on [rows, width]: on CPU what stays in cache, elsewhere what bounds the memory of intermediate values."""
    return max(64, (_CPU_BLOCK if device.type == "cpu" else _BLOCK) // width)


def _blocks(first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = block_rows(first.shape[1], first.device)
    for start in range(0, first.shape[0], rows):
        yield tuple(part[start : start + rows] for part in (first, *others))


def _horner(columns: Sequence[Tensor] | Tensor, u: Tensor) -> Tensor:
    *lower, value = columns
    for column in reversed(lower):
        value = torch.addcmul(column, value, u)
    return value
