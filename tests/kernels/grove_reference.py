"""References for the kernels grouped by grove, written choice by choice in float64; they import nothing of what they check.

T tokens, K choices, N groves, D width, M grove width, F functions a grove, G grid cells, k spline order.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.interpolate import BSpline
from torch import Tensor


@dataclass
class Routing:
    """Which grove every choice goes to, and where its row lies."""

    grove_TK: Tensor
    token_of_row: Tensor
    choice_of_row: Tensor
    row_of_choice: Tensor
    offsets: Tensor

    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order in which `gated_groves` takes them."""
        return self.token_of_row, self.choice_of_row, self.row_of_choice, self.offsets


def route(sizes: list[int], choices: int, *, capacity: int = 0, seed: int = 0, index: torch.dtype = torch.int64) -> Routing:
    """A random routing with so many rows a grove; with a capacity, every grove has so many rows: surplus choices are dropped, missing ones are padding."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    flat = flat[torch.randperm(len(flat), generator=generator)]
    tokens, count = len(flat) // choices, len(flat)
    lists = [[choice for choice in range(count) if flat[choice] == grove] for grove in range(len(sizes))]
    if capacity:
        lists = [(own + [count] * capacity)[:capacity] for own in lists]
    choice_of_row = [choice for own in lists for choice in own]
    row_of_choice = torch.full((count,), len(choice_of_row))
    for row, choice in enumerate(choice_of_row):
        if choice < count:
            row_of_choice[choice] = row
    ends = np.cumsum([0] + [len(own) for own in lists])
    by_row = torch.tensor(choice_of_row, dtype=torch.int64)
    return Routing(
        flat.view(tokens, choices), torch.where(by_row == count, tokens, by_row // choices).to(index), by_row.to(index),
        row_of_choice.view(tokens, choices).to(index), torch.tensor(ends, dtype=torch.int32),
    )  # fmt: skip


def gated(
    x: Tensor, own: Tensor | None, gate: Tensor, up: Tensor, value: Tensor, out: Tensor, functions: "Splines | None", coefficients: Tensor | None,
    routing: Routing,
) -> Tensor:  # fmt: skip
    """y_t = sum_k gate_tk W_out (F(W_up u) * (W_v x_t)), a choice at a time; coefficients [N, F, G + k]."""
    rows = []
    for token, groves in enumerate(routing.grove_TK.tolist()):
        y = torch.zeros_like(x[0])
        for choice, grove in enumerate(groves):
            if routing.row_of_choice[token, choice] < len(routing.token_of_row):
                h = (x[token] if own is None else own[token, choice]) @ up[grove]
                activated = h / (1 + torch.exp(-h))
                if functions is not None and coefficients is not None:
                    activated = activated + functions(h, coefficients[grove])
                y = y + gate[token, choice] * ((activated * (x[token] @ value[grove])) @ out[grove])
        rows.append(y)
    return torch.stack(rows)


@dataclass
class Splines:
    """Splines of order k on a uniform grid of G cells from `low` to `high`, continued linearly."""

    order: int
    grid: int
    low: float = -2.0
    high: float = 2.0

    @property
    def step(self) -> float:
        """Width of a cell."""
        return (self.high - self.low) / self.grid

    def __call__(self, h: Tensor, coefficients: Tensor) -> Tensor:
        """h [M], coefficients [F, G + k] -> [M]; column m has function m // (M / F)."""
        each = coefficients.repeat_interleave(len(h) // len(coefficients), dim=0)
        inside = h.clamp(self.low, self.high)
        value = (self._basis(inside, self.order) * each).sum(-1)
        # The derivative of a spline is a spline of one order less, whose coefficients are differences.
        slope = (self._basis(inside, self.order - 1) * each.diff(dim=-1)).sum(-1) / self.step
        return value + slope * (h - inside)

    def _basis(self, x: Tensor, order: int) -> Tensor:
        """Cox-de Boor: [M] -> [M, G + order]."""
        knots = self.low + self.step * torch.arange(-order, self.grid + order + 1, dtype=torch.float64)
        cell = ((x.detach() - self.low) / self.step).floor().clamp(0, self.grid - 1).long()
        basis = torch.nn.functional.one_hot(cell + order, self.grid + 2 * order).to(x.dtype)
        x = x[:, None]
        for p in range(1, order + 1):
            left = (x - knots[: -p - 1]) / (knots[p:-1] - knots[: -p - 1])
            right = (knots[p + 1 :] - x) / (knots[p + 1 :] - knots[1:-p])
            basis = left * basis[:, :-1] + right * basis[:, 1:]
        return basis

    def cells(self) -> Tensor:
        """The linear map [G + k, G + 2, k + 1] from coefficients to the polynomials of the cells, by interpolation of scipy's splines."""
        k, powers = self.order, np.arange(self.order + 1)
        knots = self.low + self.step * np.arange(-k, self.grid + k + 1)
        points = np.linspace(0.05, 0.95, k + 1)
        result = np.zeros((self.grid + k, self.grid + 2, k + 1))
        for number, unit in enumerate(np.eye(self.grid + k)):
            spline = BSpline(knots, unit, k)
            for cell in range(self.grid):
                result[number, cell + 1] = np.linalg.solve(points[:, None] ** powers, spline(self.low + self.step * (cell + points)))
            first, last = result[number, 1], result[number, self.grid]
            # To the left u = 1 is the grid's beginning, to the right u = 0 its end.
            result[number, 0, :2] = first[0] - first[1], first[1]
            result[number, self.grid + 1, :2] = last.sum(), (last * powers).sum()
        return torch.tensor(result)
