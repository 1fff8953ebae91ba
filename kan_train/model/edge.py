"""Learnable univariate functions on the edges of a network (docs/model.md, section 1).

R rows (tokens sorted by grove), N groves, I inputs, O outputs, M hidden units, F functions a grove, n coefficients of a function.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_train.config import EdgeConfig
from kan_train.config.model import largest_divisor
from kan_train.kernels import edge_spline
from kan_train.kernels.backend import use_triton
from kan_train.model.dispatch import GroveRows, grouped_linear
from kan_train.model.norm import at_least_fp32
from kan_train.model.splines import CellPolynomials, basis, cell_table, number_of_coefficients
from kan_train.parallel.params import Constant, Normal, declare

SILU_GAIN = 0.355775  # E[silu(x)^2] for x ~ N(0, 1)
_RATIONAL = (6, 4)  # coefficients of P5 and, its constant being 1, of Q4


class GroupedFunctions(nn.Module):
    """The learnable part of an activation F(h) = silu(h) + f(h), one f for `group_size` hidden units; f = 0 at step 0.

    Strictly these functions sit on nodes: phi_oi(x) = w_oi * f_group(i)(x) is a linear layer after an elementwise activation.
    """

    def __init__(self, config: EdgeConfig, *, groves: int, width: int, grove: bool) -> None:
        super().__init__()
        self.config = config
        functions = width // largest_divisor(width, config.group_size)
        if config.kind != "silu":
            shape = (groves, functions, coefficients_of(config))
            axes = ("grove" if grove else None, "hidden", None)
            declare(self, "coefficients", shape, axes=axes, init=Constant(0.0), grove=grove)

    def forward(self) -> Tensor | None:
        """What `activate` needs of them: a table of cells [N, F, G + 2, P], the coefficients [N, F, n] of rational and chebyshev, None for silu."""
        if self.config.kind == "silu":
            return None
        if self.config.kind in ("bspline", "piecewise_poly"):
            return cell_table(self.coefficients, self.config.kind, self.config.order, self.config.grid)
        return self.coefficients


def activate(h_RM: Tensor, functions: Tensor | None, rows: GroveRows, config: EdgeConfig, kernels: str) -> Tensor:
    """F(h): [R, M] -> [R, M], every grove's rows by its own functions, which are as `GroupedFunctions` gives them. kernels: `model.kernels`."""
    if functions is None:
        return F.silu(h_RM)
    splines = config.kind in ("bspline", "piecewise_poly")
    if splines and use_triton(kernels, h_RM.device):
        return edge_spline.grouped_activation(h_RM, functions, rows.offsets_N1, config.low, config.step)
    parts = []
    for h, grove_functions in zip(h_RM.split(rows.sizes), functions, strict=True):
        if splines:
            parts.append(CellPolynomials.apply(h, grove_functions, config.low, config.step))
            continue
        per_unit_Mn = at_least_fp32(grove_functions).repeat_interleave(h_RM.shape[1] // len(grove_functions), dim=0)
        wide = at_least_fp32(h)
        value = rational(wide, per_unit_Mn) if config.kind == "rational" else (edge_basis(wide, config) * per_unit_Mn).sum(-1)
        parts.append(value.to(h_RM.dtype))
    return F.silu(h_RM) + torch.cat(parts)


class EdgeLayer(nn.Module):
    """A full Kolmogorov-Arnold layer a grove: y_o = sum_i [ w_oi silu(x_i) + sum_g c_oig B_g(x_i) ], for inputs of unit variance.

    The basis is evaluated once an input, then one product: 2 FLOP a parameter, like a linear layer.
    """

    def __init__(self, config: EdgeConfig, *, groves: int, inputs: int, outputs: int, kernels: str) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        count = coefficients_of(config)
        silu_std, spline_std = edge_initial_stds(config, inputs)
        axes = ("grove", None, "hidden")
        declare(self, "base", (groves, inputs, outputs), axes=axes, init=Normal(silu_std), grove=True, decay=True, matrix=True)
        declare(self, "coefficients", (groves, inputs * count, outputs), axes=axes, init=Normal(spline_std), grove=True)

    def forward(self, u_RI: Tensor, rows: GroveRows) -> Tensor:
        """[R, I] -> [R, O], every grove's rows by its own functions."""
        config = self.config
        if config.kind != "chebyshev" and use_triton(self.kernels, u_RI.device):
            functions = (config.kind, config.order, config.grid, config.low, config.high)
            return edge_spline.edge_layer(u_RI, self.base, self.coefficients, rows.offsets_N1, *functions)
        features = edge_basis(at_least_fp32(u_RI), config).flatten(1).to(u_RI.dtype)
        return grouped_linear(F.silu(u_RI), self.base, rows.sizes) + grouped_linear(features, self.coefficients, rows.sizes)


def coefficients_of(config: EdgeConfig) -> int:
    """Coefficients of one function of this kind (besides the weight of silu)."""
    if config.kind == "rational":
        return sum(_RATIONAL)
    if config.kind == "chebyshev":
        return config.order
    return number_of_coefficients(config.kind, config.order, config.grid)


def edge_basis(x: Tensor, config: EdgeConfig) -> Tensor:
    """Basis of the kinds that are linear in their coefficients: [...] -> [..., n].

    chebyshev: T_1 .. T_n of tanh(x), the polynomials of the first kind by their recurrence.
    """
    if config.kind == "chebyshev":
        squashed = x.tanh()
        values = [torch.ones_like(squashed), squashed]
        while len(values) <= config.order:
            values.append(2 * squashed * values[-1] - values[-2])
        return torch.stack(values[1 : config.order + 1], dim=-1)
    return basis(x, config.kind, config.order, config.grid, config.low, config.high)


def rational(x: Tensor, coefficients: Tensor) -> Tensor:
    """P5(x) / (1 + |b_1 x + .. + b_4 x^4|): x [..., M], coefficients [M, 10] (a_0 .. a_5, b_1 .. b_4); no pole on the real line."""
    above, below = coefficients.split(_RATIONAL, dim=-1)
    numerator = above[..., -1] * torch.ones_like(x)
    for index in range(_RATIONAL[0] - 2, -1, -1):
        numerator = numerator * x + above[..., index]
    denominator = below[..., -1] * x
    for index in range(_RATIONAL[1] - 2, -1, -1):
        denominator = (denominator + below[..., index]) * x
    return numerator / (1 + denominator.abs())


def edge_initial_stds(config: EdgeConfig, inputs: int) -> tuple[float, float]:
    """Standard deviations of w and c that give outputs of unit variance from `inputs` normal inputs, a share `spline_share` of it by the splines.

    A fine grid makes steep splines: where their backward gain is above the forward one, that one sets the scale, so that neither direction is
    amplified.
    """
    silu_gain, forward, backward = edge_gains(config.kind, config.order, config.grid, config.low, config.high)
    share = config.spline_share
    return math.sqrt((1 - share) / (inputs * silu_gain)), math.sqrt(share / (inputs * max(forward, backward)))


@functools.lru_cache
@torch.enable_grad()  # the slopes are derivatives, also where a model is built without gradients
def edge_gains(kind: str, order: int, grid: int, low: float, high: float) -> tuple[float, float, float]:
    """(E[silu(x)^2], E[sum B_g(x)^2], E[sum B_g'(x)^2]) for x ~ N(0, 1), by the trapezoid rule over [-8, 8]."""
    x = torch.linspace(-8, 8, 8001, dtype=torch.float64, requires_grad=True)
    density = torch.exp(-x.detach() ** 2 / 2) / math.sqrt(2 * math.pi)
    config = EdgeConfig(kind=kind, order=order, grid=grid, low=low, high=high)
    values = edge_basis(x, config)
    slopes = torch.stack([torch.autograd.grad(values[:, g].sum(), x, retain_graph=True)[0] for g in range(values.shape[1])], dim=-1)

    def mean(y: Tensor) -> float:
        return float(torch.trapezoid(y.detach() * density, x.detach()))

    return mean(F.silu(x) ** 2), mean((values**2).sum(-1)), mean((slopes**2).sum(-1))
