"""KalmaGrove: N small networks of which each token runs K (docs/model.md, section 2).  B batch, T tokens, D width, N groves, M grove width, R rows.

    y = shared(x) + route_scale * sum_{i in S} gate_i(x) f_i(x)
    gated:  f(x) = W_out (F(W_up x) * (W_v x))      reuse: the same with W_up z      edge: f(x) = W_out Phi(RMSNorm(z))
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_train.config import ModelConfig
from kan_train.kernels import grove_gemm
from kan_train.kernels.backend import use_triton
from kan_train.model.dispatch import Plan, capacity_plan, combine_rows, gather_choices, gather_rows, grouped_linear, own_part, partial_plan, rows_of_sizes
from kan_train.model.edge import SILU_GAIN, EdgeLayer, GroupedFunctions, activate
from kan_train.model.gated import Grid, gated_sum
from kan_train.model.norm import at_least_fp32
from kan_train.model.route import Router, Routing
from kan_train.parallel.expert import Exchange
from kan_train.parallel.layers import ColumnLinear, GroveRegion, RowLinear, TensorRegion
from kan_train.parallel.params import Normal, declare
from kan_train.parallel.place import current_place


class KalmaGrove(nn.Module):
    """The sparse feed-forward layer; with N = 0 its shared grove alone."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.norm_eps = config.grove, config.norm_eps
        self.region, self.expert = GroveRegion(), current_place().expert
        if config.has_groves:
            self.router = Router(config)
            self.groves = EdgeGroves(config) if config.grove.kind == "edge" else GatedGroves(config)
        if config.grove.shared_width:
            self.shared = SharedGrove(config)

    def forward(self, x_BTD: Tensor, resets_BT: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D] (T/n tokens under sequence parallelism); resets do not matter to a layer without memory."""
        if not self.config.num_groves:
            return self.shared(x_BTD)
        own_BtD = self.region(x_BTD)
        x_TD = own_BtD.flatten(0, 1)
        routing = self.router(x_TD, batch=own_BtD.shape[0])
        y_BtD, shared_BTD = self._groves_and_shared(x_TD, routing, x_BTD)
        y_BTD = self.region.leave(y_BtD.view_as(own_BtD))
        return y_BTD if shared_BTD is None else y_BTD + shared_BTD

    def _groves_and_shared(self, x_TD: Tensor, routing: Routing, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        """The routed sum [T, D] of this rank's tokens, and the shared grove's output of the layer's input."""
        z_TKr = None if routing.projection_TKr is None else self.region.inputs(routing.projection_TKr)
        x_TD, gate_TK = self.region.inputs(x_TD), self.region.inputs(routing.gate_TK * self.config.route_scale)
        if self.expert.size == 1 or self.region.same_tokens:
            plan = self._plan(routing)
            y_TD = self.groves(x_TD, z_TKr, gate_TK, plan if self.expert.size == 1 else own_part(plan, self.expert))
            return y_TD, self._shared(x_BTD)
        exchange = Exchange(routing.plan, self.expert)
        reads_x, reads_z = self.config.kind != "edge", self.config.kind != "gated"
        pending = exchange.start(x_TD if reads_x else None, gate_TK, z_TKr if reads_z else None)
        shared_BTD = self._shared(x_BTD)  # while the tokens travel
        received = pending.wait()
        plan = partial_plan(received.choice_of_row, received.sizes, *received.gate_RJ.shape)
        return exchange.combine(self.groves(received.x_RD, received.z_RJr, received.gate_RJ, plan)), shared_BTD

    def _shared(self, x_BTD: Tensor) -> Tensor | None:
        return self.shared(x_BTD) if self.config.shared_width else None

    def auxiliary_loss(self) -> Tensor | None:
        """The load-balancing loss of the last forward pass, or None where it is not asked for."""
        return self.router.auxiliary

    @property
    def pending(self) -> Tensor:
        """Routing statistics [3N+1] since the last `apply_statistics`."""
        return self.router.pending

    def apply_statistics(self, summed: Tensor, balance_rate: float) -> None:
        """See `Router.apply_statistics`."""
        self.router.apply_statistics(summed, balance_rate)

    def _plan(self, routing: Routing) -> Plan:
        groves, factor = self.config.num_groves, self.config.capacity_factor
        if not factor:
            return routing.plan
        capacity = max(1, math.ceil(factor * routing.index_TK.numel() / groves))
        return capacity_plan(routing.index_TK, routing.gate_TK, groves, capacity)


class GatedGroves(nn.Module):
    """N gated units with a learnable activation; SwiGLU at step 0. The `reuse` kind reads the score's projection instead of x."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        grove, width = config.grove, config.width
        self.kernels, self.reuse = config.kernels, grove.kind == "reuse"
        inputs = grove.score_rank if self.reuse else width
        axes = ("grove", None, "hidden")

        def matrix(name: str, rows: int, columns: int, std: float, axes: tuple[str | None, ...]) -> None:
            declare(self, name, (grove.num_groves, rows, columns), axes=axes, init=Normal(std), grove=True, decay=True, matrix=True)

        # The chosen groves are those with the longest z: without the division W_up z would start far above unit variance.
        energy = selected_energy(grove.score_rank, grove.active_groves / grove.num_groves) if self.reuse else 1.0
        matrix("up", inputs, grove.width, 1 / math.sqrt(inputs * energy), axes)
        matrix("value", width, grove.width, 1 / math.sqrt(width), axes)
        matrix("out", grove.width, width, residual_std(config), ("grove", "hidden", None))
        self.edge = grove.edge
        self.functions = GroupedFunctions(grove.edge, groves=grove.num_groves, width=grove.width, grove=True)

    def forward(self, x_TD: Tensor, z_TKr: Tensor | None, gate_TK: Tensor, plan: Plan) -> Tensor:
        own_TKr = z_TKr if self.reuse else None
        functions = self.functions()
        if self.edge.kind in ("bspline", "piecewise_poly", "silu"):
            grid = Grid(self.edge.low, self.edge.step)
            if use_triton(self.kernels, x_TD.device):
                rows = (plan.token_of_row, plan.choice_of_row, plan.row_of_choice, plan.offsets_N1)
                return grove_gemm.gated_groves(
                    x_TD, own_TKr, gate_TK, self.up, self.value, self.out, functions, *rows, low=grid.low, step=grid.step
                )
            own = None if own_TKr is None else own_TKr.flatten(0, 1)
            return gated_sum(x_TD, own, gate_TK, self.up, self.value, self.out, functions, plan, grid)
        # The ablations, step by step through automatic differentiation.
        x_RD = gather_rows(x_TD, plan)
        up_input = x_RD if own_TKr is None else gather_choices(own_TKr, plan)
        h_RM = activate(grouped_linear(up_input, self.up, plan.sizes), functions, plan, self.edge, self.kernels)
        return combine_rows(grouped_linear(h_RM * grouped_linear(x_RD, self.value, plan.sizes), self.out, plan.sizes), gate_TK, plan)


class EdgeGroves(nn.Module):
    """N full per-edge layers on the score's normalised projection: the paper's edge activations, affordable since r is small."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        grove = config.grove
        self.kernels, self.norm_eps = config.kernels, config.norm_eps
        self.edges = EdgeLayer(grove.edge, groves=grove.num_groves, inputs=grove.score_rank, outputs=grove.width, kernels=config.kernels)
        shape = (grove.num_groves, grove.width, config.width)
        # Phi has unit variance, the product of silu and a linear value in a gated unit E[silu^2] of it.
        std = residual_std(config) * math.sqrt(SILU_GAIN)
        declare(self, "out", shape, axes=("grove", "hidden", None), init=Normal(std), grove=True, decay=True, matrix=True)

    def forward(self, x_TD: Tensor | None, z_TKr: Tensor | None, gate_TK: Tensor, plan: Plan) -> Tensor:
        assert z_TKr is not None
        z_Rr = gather_choices(z_TKr, plan)
        u_Rr = F.rms_norm(at_least_fp32(z_Rr), z_Rr.shape[-1:], eps=self.norm_eps).to(z_Rr.dtype)
        hidden_RM = self.edges(u_Rr, plan)
        if use_triton(self.kernels, z_Rr.device):
            rows_RD = grove_gemm.grouped_gemm(hidden_RM, self.out, plan.offsets_N1)
            return grove_gemm.combine_rows(rows_RD, gate_TK, plan.choice_of_row, plan.row_of_choice)
        return combine_rows(grouped_linear(hidden_RM, self.out, plan.sizes), gate_TK, plan)


class SharedGrove(nn.Module):
    """A gated grove that every token runs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.grove.shared_width
        self.region = TensorRegion()
        self.up = ColumnLinear(config.width, hidden, axis="hidden")
        self.value = ColumnLinear(config.width, hidden, axis="hidden")
        self.out = RowLinear(hidden, config.width, axis="hidden", std=1 / math.sqrt(hidden * 2 * config.num_layers))
        self.edge, self.kernels = config.grove.edge, config.kernels
        self.functions = GroupedFunctions(config.grove.edge, groves=1, width=hidden, grove=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = self.region(x_BTD)
        up_BTM = self.up(x_BTD)
        up_TM = up_BTM.flatten(0, 1)
        h_TM = activate(up_TM, self.functions(), rows_of_sizes([len(up_TM)], up_TM.device), self.edge, self.kernels)
        return self.out(h_TM.view_as(up_BTM) * self.value(x_BTD))


def residual_std(config: ModelConfig) -> float:
    """Standard deviation of W_out over hidden units such as a gated unit's.

    The gates of the K active groves sum to K, so that the fan-in of the routed sum is K M, as in the dense twin of equal active size.
    """
    return 1 / math.sqrt(config.grove.active_groves * config.grove.width * 2 * config.num_layers)


def selected_energy(rank: int, share: float) -> float:
    """E[|z|^2 / r | |z|^2 among the largest `share`] for z of `rank` standard normals: a ratio of upper incomplete gamma functions."""

    def above(shape: float, threshold: float) -> float:
        return float(torch.special.gammaincc(torch.tensor(shape, dtype=torch.float64), torch.tensor(threshold, dtype=torch.float64)))

    low, high = 0.0, 50.0 + 2 * rank
    for _ in range(60):  # |z|^2 / 2 has the gamma distribution of shape r / 2
        middle = (low + high) / 2
        low, high = (middle, high) if above(rank / 2, middle) > share else (low, middle)
    return above(rank / 2 + 1, low) / above(rank / 2, low)
