"""Groves for few tokens: only the chosen ones' weights are read, nothing is sorted on the device, nothing is dense over N but the scores.

B rows, D width, N groves, K choices a row, r scoring rank, M grove width, R = B K rows of choices, F functions a grove, P powers.
"""

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_train.kernels.backend import use_triton
from kan_train.model.grove import GatedGroves, KalmaGrove
from kan_train.model.norm import at_least_fp32
from kan_train.model.route import Router


class GroveStep:
    """The sparse feed-forward layer, one token a row, added to the residual stream."""

    @staticmethod
    def fits(layer: KalmaGrove) -> bool:
        """Whether this form computes the layer: gated groves chosen by norm with the softmax gate, all on this process, without kernels of a GPU."""
        grove, region = layer.config, layer.region
        if not grove.num_groves or grove.kind == "edge" or grove.capacity_factor or (grove.score, grove.gate) != ("norm", "softmax"):
            return False
        alone = layer.expert.size == region.axis.size == region.inside.size == 1
        spline = grove.edge.kind in ("bspline", "piecewise_poly", "silu")
        return alone and spline and layer.router.selector is None and not use_triton(layer.router.kernels, layer.router.gate.device)

    def __init__(self, layer: KalmaGrove) -> None:
        groves: GatedGroves = layer.groves
        self.choose = _Choose(layer.router, layer.config.route_scale)
        self.reuse = groves.reuse
        self.width, self.hidden = groves.out.shape[2], groves.out.shape[1]
        self.up, self.value, self.out = groves.up.unbind(), groves.value.unbind(), groves.out.unbind()
        self.activate = _Activate(groves)
        self.shared = layer.shared if layer.config.shared_width else None

    def __call__(self, u_BD: Tensor, x_BD: Tensor) -> Tensor:
        """x + the layer's output for u [B, D], the normalised x."""
        index_BK, gate_BK, z_BKr = self.choose(u_BD, projection=self.reuse)
        if self.shared is not None:
            x_BD = x_BD + self.shared(u_BD[:, None])[:, 0]
        index = index_BK.flatten().tolist()
        choices = index_BK.shape[1]
        # Rows of one grove lie together, so that its weights are read once.
        order = sorted(range(len(index)), key=index.__getitem__)
        groves, sizes = _runs([index[choice] for choice in order])
        moved = None if len(groves) == len(index) == choices else torch.tensor(order, device=u_BD.device)
        if moved is None:  # one row, whose choices are all different: as they come
            groves, sizes = index, [1] * choices
        x_RD = u_BD.expand(choices, -1) if moved is None else u_BD.index_select(0, moved // choices)
        own_RI = x_RD
        if z_BKr is not None:
            own_RI = z_BKr.flatten(0, 1) if moved is None else z_BKr.flatten(0, 1).index_select(0, moved)
        grove_R = index_BK.flatten() if moved is None else index_BK.flatten().index_select(0, moved)

        h_RM, v_RM, y_RD = u_BD.new_empty(len(index), self.hidden), u_BD.new_empty(len(index), self.hidden), u_BD.new_empty(len(index), self.width)
        for grove, own, x, h, v in zip(groves, own_RI.split(sizes), x_RD.split(sizes), h_RM.split(sizes), v_RM.split(sizes), strict=True):
            torch.mm(own, self.up[grove], out=h)
            torch.mm(x, self.value[grove], out=v)
        product_RM = self.activate(h_RM, grove_R).mul_(v_RM).to(h_RM.dtype)
        for grove, product, y in zip(groves, product_RM.split(sizes), y_RD.split(sizes), strict=True):
            torch.mm(product, self.out[grove], out=y)
        return _weighted(x_BD, gate_BK, y_RD, moved)


def _runs(ordered: list[int]) -> tuple[list[int], list[int]]:
    """Distinct values of a sorted list, and how often each occurs."""
    runs = [(value, len(list(equal))) for value, equal in groupby(ordered)]
    return [value for value, _ in runs], [count for _, count in runs]


def _weighted(x_BD: Tensor, gate_BK: Tensor, y_RD: Tensor, moved: Tensor | None) -> Tensor:
    """x + sum_k gate_k y_k, summed in the dtype of the gates (at least fp32)."""
    y_RD = y_RD.to(gate_BK.dtype)
    if moved is None:
        return torch.addmm(x_BD.to(gate_BK.dtype), gate_BK, y_RD).to(x_BD.dtype)
    y_BKD = torch.empty_like(y_RD).index_copy_(0, moved, y_RD).view(*gate_BK.shape, -1)
    return torch.baddbmm(x_BD.to(gate_BK.dtype)[:, None], gate_BK[:, None], y_BKD)[:, 0].to(x_BD.dtype)


class _Choose:
    """The router's selection and gate. z of all groves is at hand here, so that nothing is projected again for the chosen ones.

    Both are affine in the norms: selection = slope * |z| + offset, gate logit = w . x + gate_slope * |z| + gate_offset.
    """

    def __init__(self, router: Router, route_scale: float) -> None:
        self.active, self.scale = router.active, router.active * route_scale
        self.score, self.gate, self.groves = router.score.flatten(0, 1), router.gate, router.groves
        inverse = at_least_fp32(router.score).flatten(1).square().sum(1).rsqrt()
        bias, beta = at_least_fp32(router.gate_bias), at_least_fp32(router.gate_score)
        self.slope, self.offset = inverse / router.score_std, router.balance - router.score_mean / router.score_std
        self.gate_slope, self.gate_offset = beta * self.slope, bias - beta * (router.score_mean / router.score_std)
        self.root = inverse.new_tensor(1e-3)  # the score's eps is its square

    def __call__(self, u_BD: Tensor, *, projection: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Chosen groves int64 [B, K], their gates [B, K] in at least fp32, and z [B, K, r] where it is asked for."""
        z_BNr = F.linear(u_BD, self.score).view(len(u_BD), self.groves, -1)
        norm_BN = torch.hypot(torch.linalg.vector_norm(z_BNr, dim=-1, dtype=self.root.dtype), self.root)
        index_BK = torch.addcmul(self.offset, norm_BN, self.slope).topk(self.active, dim=-1).indices
        logit_BN = torch.addcmul(self.gate_offset, norm_BN, self.gate_slope).add_(F.linear(u_BD, self.gate))
        gate_BK = logit_BN.gather(1, index_BK).softmax(-1).mul_(self.scale)
        z_BKr = z_BNr.gather(1, index_BK[..., None].expand(-1, -1, z_BNr.shape[2])) if projection else None
        return index_BK, gate_BK, z_BKr


class _Activate:
    """F(h) = silu(h) + f(h): of every hidden unit the coefficients of one cell are read."""

    def __init__(self, groves: GatedGroves) -> None:
        table_NFGP = groves.functions()
        self.table_CP: Tensor | None = None
        if table_NFGP is None:
            return
        count, functions, cells, powers = table_NFGP.shape
        hidden = groves.up.shape[2]
        self.table_CP = table_NFGP.reshape(-1, powers)
        first_F = torch.arange(count * functions, device=table_NFGP.device) * cells
        self.first_NM = first_F.view(count, functions).repeat_interleave(hidden // functions, dim=1)
        grid = groves.edge
        self.per_step, self.start = 1 / grid.step, grid.low / grid.step - 1  # cell 0 is the one below the grid
        self.knots = torch.arange(1, cells, device=table_NFGP.device, dtype=table_NFGP.dtype)

    def __call__(self, h_RM: Tensor, grove_R: Tensor) -> Tensor:
        """[R, M] in at least fp32, row by row by the functions of `grove_R`."""
        h_RM = at_least_fp32(h_RM)
        if self.table_CP is None:
            return F.silu(h_RM)
        place_RM = (h_RM * self.per_step).sub_(self.start)
        # The number of knots at or below: NaN lies above all, and reads inside the table.
        cell_RM = torch.bucketize(place_RM, self.knots, right=True)
        coefficients = F.embedding(cell_RM + self.first_NM.index_select(0, grove_R), self.table_CP).unbind(-1)
        u_RM = place_RM.sub_(cell_RM)
        value = coefficients[-1]
        for coefficient in reversed(coefficients[:-1]):
            value = torch.addcmul(coefficient, value, u_RM)
        return F.silu(h_RM).add_(value)
