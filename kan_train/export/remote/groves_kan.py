"""KalmaGrove, N small networks of which each token runs K, and the dense SwiGLU.

    s_i = sqrt(|E_i x|^2 + eps) / ||E_i||      t_i = (s_i - mean_i) / std_i      S = TopK(t_i + balance_i)
    y = shared(x) + route_scale * sum_{i in S} gate_i(x) f_i(x)

T tokens, D width, N groves, K choices a token, r scoring rank, M grove width, R rows of one grove, n coefficients of a function.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mixers_kan import linear, normalised, wide

_EPS = 1e-6
_TOKENS = 1024  # whose projections on all groves are held at a time
_BSPLINE = {  # rows: the k + 1 B-splines that live on a cell; columns: powers of the position in it
    1: ((1.0, -1.0), (0.0, 1.0)),
    2: ((0.5, -1.0, 0.5), (0.5, 1.0, -1.0), (0.0, 0.0, 0.5)),
    3: ((1 / 6, -1 / 2, 1 / 2, -1 / 6), (2 / 3, 0.0, -1.0, 1 / 2), (1 / 6, 1 / 2, 1 / 2, -1 / 2), (0.0, 0.0, 0.0, 1 / 6)),
}


def weight(*shape: int, inputs: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / math.sqrt(inputs))


class SwiGLU(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.up, self.value = (linear(config.width, config.ffn_width) for _ in range(2))
        self.out = linear(config.ffn_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.up(x)) * self.value(x))


class KalmaGrove(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.grove = grove = config.grove
        if grove["num_groves"]:
            self.router = Router(grove, config.width)
            self.groves = EdgeGroves(grove, config.width, config.norm_eps) if grove["kind"] == "edge" else GatedGroves(grove, config.width)
        if grove["shared_width"]:
            self.shared = SharedGrove(grove, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]. Only the groves that a token chose are read."""
        if not self.grove["num_groves"]:
            return self.shared(x)
        x_TD = x.flatten(0, 1)
        index, gate, z = self.router(x_TD)
        y = torch.zeros_like(wide(x_TD))
        for grove in index.unique().tolist():
            token, choice = (index == grove).nonzero(as_tuple=True)
            if self.grove["capacity_factor"]:
                capacity = max(1, math.ceil(self.grove["capacity_factor"] * index.numel() / self.grove["num_groves"]))
                highest = gate[token, choice].argsort(descending=True, stable=True)[:capacity]
                token, choice = token[highest], choice[highest]
            weighted = self.groves(grove, x_TD[token], z[token, choice]) * (gate[token, choice, None] * self.grove["route_scale"])
            y.index_add_(0, token, weighted.to(y.dtype))
        y = y.to(x.dtype).view_as(x)
        return y + self.shared(x) if self.grove["shared_width"] else y


class Router(nn.Module):
    def __init__(self, grove: dict, width: int) -> None:
        super().__init__()
        self.groves, self.active, rank = grove["num_groves"], grove["active_groves"], grove["score_rank"]
        self.kind = "linear" if grove["score"] == "linear" else grove["gate"]
        if self.kind == "linear":
            self.score = weight(self.groves, width, inputs=width)
        else:
            self.score = weight(self.groves, rank, width, inputs=width)
            self.gate, self.gate_bias = weight(self.groves, width, inputs=width), nn.Parameter(torch.zeros(self.groves))
        if self.kind == "softmax":
            self.gate_score = nn.Parameter(torch.ones(self.groves))
        for name, value in (("score_mean", 1.0), ("score_std", 1 / math.sqrt(2 * rank)), ("balance", 0.0)):
            self.register_buffer(name, torch.full((self.groves,), value, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> list[Tensor]:
        """Chosen groves [T, K], their gates [T, K] in at least fp32, and their z = E_i x [T, K, r] (r = 0 for the linear score)."""
        return [torch.cat(parts) for parts in zip(*map(self.route, x_TD.split(_TOKENS)), strict=True)]

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.kind == "linear":
            score = wide(x @ self.score.T)
            index = (score + self.balance).topk(self.active, dim=-1).indices
            return index, self.active * score.gather(1, index).softmax(-1), x.new_empty(*index.shape, 0)
        z = (x @ self.score.transpose(0, 1).flatten(0, 1).T).view(len(x), -1, self.groves)  # [T, r, N]
        score = (wide(z).square().sum(1) + _EPS).sqrt()
        if self.kind == "literal":
            index = score.topk(self.active, dim=-1).indices
        else:
            score = score * wide(self.score).flatten(1).square().sum(1).rsqrt()
            standard = (score - self.score_mean) / self.score_std
            index = (standard + self.balance).topk(self.active, dim=-1).indices
        z = z.gather(2, index[:, None].expand(-1, z.shape[1], -1)).transpose(1, 2)
        linear = wide(x @ self.gate.T).gather(1, index) + wide(self.gate_bias)[index]
        score = score.gather(1, index)
        if self.kind == "softmax":
            return index, self.active * (linear + wide(self.gate_score)[index] * standard.gather(1, index)).softmax(-1), z
        gate = linear.sigmoid() * score
        return index, gate if self.kind == "literal" else gate / score.mean(-1, keepdim=True), z


class GatedGroves(nn.Module):
    """W_out (F(W_up u) * (W_v x)), u = x; z for the kind `reuse`."""

    def __init__(self, grove: dict, width: int) -> None:
        super().__init__()
        groves, hidden, self.reuse = grove["num_groves"], grove["width"], grove["kind"] == "reuse"
        inputs = grove["score_rank"] if self.reuse else width
        self.up, self.value = weight(groves, inputs, hidden, inputs=inputs), weight(groves, width, hidden, inputs=width)
        self.out = weight(groves, hidden, width, inputs=hidden)
        self.functions = Functions(grove["edge"], groves, hidden)

    def forward(self, grove: int, x_RD: Tensor, z_Rr: Tensor) -> Tensor:
        activated = self.functions((z_Rr if self.reuse else x_RD) @ self.up[grove], grove)
        return (activated * (x_RD @ self.value[grove])).to(x_RD.dtype) @ self.out[grove]


class EdgeGroves(nn.Module):
    """W_out Phi(RMSNorm(z)), with a function of its own on every edge of Phi."""

    def __init__(self, grove: dict, width: int, eps: float) -> None:
        super().__init__()
        groves, rank, hidden, self.edge, self.eps = grove["num_groves"], grove["score_rank"], grove["width"], grove["edge"], eps
        self.edges = nn.Module()
        self.edges.base = weight(groves, rank, hidden, inputs=rank)
        self.edges.coefficients = weight(groves, rank * coefficients_of(self.edge), hidden, inputs=10 * rank)
        self.out = weight(groves, hidden, width, inputs=hidden)

    def forward(self, grove: int, x_RD: Tensor, z_Rr: Tensor) -> Tensor:
        u = normalised(z_Rr, None, 1 / z_Rr.shape[-1], self.eps)
        features = basis(wide(u), self.edge).flatten(1).to(u.dtype)
        return (F.silu(u) @ self.edges.base[grove] + features @ self.edges.coefficients[grove]) @ self.out[grove]


class SharedGrove(nn.Module):
    """A gated grove that every token runs."""

    def __init__(self, grove: dict, width: int) -> None:
        super().__init__()
        self.up, self.value = (linear(width, grove["shared_width"]) for _ in range(2))
        self.out = linear(grove["shared_width"], width)
        self.functions = Functions(grove["edge"], 1, grove["shared_width"])

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.functions(self.up(x), 0).to(x.dtype) * self.value(x))


class Functions(nn.Module):
    """F(h) = silu(h) + f(h), one learned f for a group of hidden units."""

    def __init__(self, edge: dict, groves: int, width: int) -> None:
        super().__init__()
        self.edge = edge
        if edge["kind"] != "silu":
            group = next(size for size in range(min(edge["group_size"], width), 0, -1) if width % size == 0)
            self.coefficients = nn.Parameter(torch.zeros(groves, width // group, coefficients_of(edge)))

    def forward(self, h: Tensor, grove: int) -> Tensor:
        """[..., M] -> [..., M] in at least fp32."""
        h = wide(h)
        if self.edge["kind"] == "silu":
            return F.silu(h)
        learned = wide(self.coefficients[grove])  # [F, n]
        unit = torch.arange(h.shape[-1], device=h.device) // (h.shape[-1] // len(learned))
        if self.edge["kind"] == "rational":
            return F.silu(h) + rational(h, learned[unit])
        if self.edge["kind"] == "chebyshev":
            return F.silu(h) + (basis(h, self.edge) * learned[unit]).sum(-1)
        table = torch.einsum("fn,ngp->fgp", learned, cell_map(self.edge["kind"], self.edge["order"], self.edge["grid"]).to(learned))
        cell, position = locate(h, self.edge)
        return F.silu(h) + horner(table[unit, cell], position)


def coefficients_of(edge: dict) -> int:
    """Coefficients n of one function."""
    order, grid = edge["order"], edge["grid"]
    return {"bspline": grid + order, "piecewise_poly": grid * (order + 1), "chebyshev": order, "rational": 10}[edge["kind"]]


@functools.lru_cache
def cell_map(kind: str, order: int, grid: int) -> Tensor:
    """fp64 [n, G + 2, order + 1]: the polynomial that each coefficient adds to each cell; the outer two cells go on linearly."""
    with torch.inference_mode(False), torch.device("cpu"):
        local = torch.tensor(_BSPLINE[order], dtype=torch.float64) if kind == "bspline" else torch.eye(order + 1, dtype=torch.float64)
        stride = 1 if kind == "bspline" else order + 1
        table = torch.zeros(grid * stride + order + 1 - stride, grid + 2, order + 1, dtype=torch.float64)
        for cell in range(grid):
            table[cell * stride : cell * stride + order + 1, cell + 1] = local
        table[:, 0, 1], table[:, 0, 0] = table[:, 1, 1], table[:, 1, 0] - table[:, 1, 1]
        table[:, -1, 0], table[:, -1, 1] = table[:, -2].sum(-1), (table[:, -2] * torch.arange(order + 1)).sum(-1)
        return table


def locate(x: Tensor, edge: dict) -> tuple[Tensor, Tensor]:
    """The cell of every x (int64, 0 and G + 1 outside the grid), and the position in it."""
    scaled = (x - edge["low"]) * (edge["grid"] / (edge["high"] - edge["low"]))
    cell = scaled.detach().floor().clamp(-1, edge["grid"]).nan_to_num(0.0)
    return cell.long() + 1, scaled - cell


def horner(coefficients: Tensor, x: Tensor) -> Tensor:
    """sum_p coefficients[..., p] x^p."""
    *lower, value = coefficients.unbind(-1)
    for coefficient in reversed(lower):
        value = torch.addcmul(coefficient, value, x)
    return value


def basis(x: Tensor, edge: dict) -> Tensor:
    """Every basis function at x: [...] -> [..., n]."""
    if edge["kind"] == "chebyshev":  # T_1 .. T_n of tanh(x)
        squashed = x.tanh()
        values = [torch.ones_like(squashed), squashed]
        while len(values) <= edge["order"]:
            values.append(2 * squashed * values[-1] - values[-2])
        return torch.stack(values[1 : edge["order"] + 1], dim=-1)
    cell, position = locate(x, edge)
    by_cell = cell_map(edge["kind"], edge["order"], edge["grid"]).to(x).transpose(0, 1)
    return horner(by_cell[cell], position[..., None])


def rational(x: Tensor, coefficients: Tensor) -> Tensor:
    """P5(x) / (1 + |b_1 x + .. + b_4 x^4|), coefficients [M, 10] = (a_0 .. a_5, b_1 .. b_4)."""
    above, below = coefficients.split((6, 4), dim=-1)
    return horner(above, x) / (1 + (horner(below, x) * x).abs())
