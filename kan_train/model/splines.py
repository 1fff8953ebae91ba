"""Univariate functions on a uniform grid, as one polynomial a cell (docs/model.md, section 1).

B-splines of order k (polynomial degree k, de Boor 1978) and independent polynomials are both linear maps from coefficients to a table of G + 2 cells:
the G intervals of the grid, and one cell to either side that continues linearly. Inside a cell the position is u = (x - low) / h - cell in [0, 1).
"""

import functools

import torch
from torch import Tensor

from kan_train.model.dispatch import blocks

# Rows: the k+1 B-splines that live on a cell, in order; columns: powers of u.
_LOCAL_BSPLINE = {
    1: ((1.0, -1.0), (0.0, 1.0)),
    2: ((0.5, -1.0, 0.5), (0.5, 1.0, -1.0), (0.0, 0.0, 0.5)),
    3: ((1 / 6, -1 / 2, 1 / 2, -1 / 6), (2 / 3, 0.0, -1.0, 1 / 2), (1 / 6, 1 / 2, 1 / 2, -1 / 2), (0.0, 0.0, 0.0, 1 / 6)),
}
_KNOT_INSERTION = {1: (0.5, 1.0, 0.5), 2: (0.25, 0.75, 0.75, 0.25), 3: (0.125, 0.5, 0.75, 0.5, 0.125)}


def number_of_coefficients(kind: str, order: int, grid: int) -> int:
    """Coefficients of one function: G + k for bspline, G (p + 1) for piecewise_poly."""
    return grid + order if kind == "bspline" else grid * (order + 1)


@functools.lru_cache
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


def cell_table(coefficients: Tensor, kind: str, order: int, grid: int) -> Tensor:
    """[..., coefficients] -> polynomial table [..., G + 2, order + 1] in at least fp32, differentiable."""
    wide = coefficients.dtype if coefficients.dtype == torch.float64 else torch.float32
    mapping = _cell_map(kind, order, grid).to(coefficients.device, wide)
    return torch.einsum("...c,cgp->...gp", coefficients.to(wide), mapping)


def basis(x: Tensor, kind: str, order: int, grid: int, low: float, high: float) -> Tensor:
    """Every basis function at x: [...] -> [..., coefficients] in at least fp32, differentiable in x; continues linearly outside the grid."""
    wide = x if x.dtype == torch.float64 else x.float()
    scaled = (wide - low) * (grid / (high - low))
    cell = scaled.detach().floor().nan_to_num_().clamp_(0, grid - 1)
    u = scaled - cell
    inside = u.clamp(0.0, 1.0)
    beyond = u - inside  # zero inside the grid: the slope at its end carries the function on
    local = torch.tensor(_LOCAL_BSPLINE[order], dtype=wide.dtype, device=x.device) if kind == "bspline" else torch.eye(order + 1, dtype=wide.dtype, device=x.device)
    powers = torch.arange(1, order + 1, dtype=wide.dtype, device=x.device)
    monomials = torch.stack([torch.ones_like(inside)] + [inside**p for p in range(1, order + 1)], dim=-1)
    slopes = torch.cat((torch.zeros_like(monomials[..., :1]), monomials[..., :-1] * powers), dim=-1)
    weights = (monomials + slopes * beyond[..., None]) @ local.T
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


class CellPolynomials(torch.autograd.Function):
    """y = f(x) for rows sorted by grove: x [R, M], table [N, F, G + 2, P] where column m of grove n uses function m // (M / F); sizes: rows a grove.

    Keeps x alone for the backward pass; cell index, position and gradients are fp32 (fp64 for fp64 inputs). Works through one grove at a time, so that
    the intermediate values stay in cache.
    """

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, sizes: list[int], low: float, step: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, table)
        ctx.sizes, ctx.low, ctx.step = sizes, low, step
        y = torch.empty_like(x)
        for grove, x_rows, y_rows in blocks(sizes, x, y):
            u, index = _locate(x_rows, table, low, step)
            y_rows.copy_(_horner(_lookup(table[grove], index), u))
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, table = ctx.saved_tensors
        grad_x, grad_table = torch.empty_like(x), torch.zeros_like(table)
        for grove, x_rows, g_rows, out_rows in blocks(ctx.sizes, x, grad, grad_x):
            u, index = _locate(x_rows, table, ctx.low, ctx.step)
            g = g_rows.to(table.dtype)
            columns = _lookup(table[grove], index)
            slope = _horner([columns[p] * p for p in range(1, len(columns))], u) if len(columns) > 2 else columns[1]
            out_rows.copy_(slope.mul_(g) / ctx.step)
            moments = torch.empty(len(columns), table[grove].numel() // len(columns), dtype=table.dtype, device=x.device)
            for power in range(len(columns)):
                g = g * u if power else g
                moments[power] = torch.zeros_like(moments[power]).scatter_add_(0, index, g.flatten())
            grad_table[grove] = moments.T.reshape(table[grove].shape)
        return grad_x, grad_table, None, None, None


def _locate(x: Tensor, table: Tensor, low: float, step: float) -> tuple[Tensor, Tensor]:
    """Position in the cell [n, M], and flat index of each element's cell in its grove's table [n * M]."""
    _, functions, cells, _ = table.shape
    scaled = (x.to(table.dtype) - low).mul_(1 / step)
    # A non-finite input must not index outside the table: the step that met it is skipped later, not crashed here.
    cell = scaled.floor().nan_to_num_().clamp_(-1, cells - 2)
    column = torch.arange(functions, device=x.device, dtype=table.dtype).repeat_interleave(x.shape[1] // functions)
    index = (cell + (column * cells + 1)).long().flatten()
    return scaled.sub_(cell), index


def _lookup(table: Tensor, index: Tensor) -> list[Tensor]:
    """Each power's coefficient for every element, flat. A gather from one short contiguous column at a time is the fastest on CPU."""
    return [column.index_select(0, index) for column in table.flatten(0, 1).T.contiguous()]


def _horner(columns: list[Tensor], u: Tensor) -> Tensor:
    value = columns[-1].view(u.shape)
    for column in reversed(columns[:-1]):
        value = torch.addcmul(column.view(u.shape), value, u)
    return value
