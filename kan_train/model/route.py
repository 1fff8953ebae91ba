"""Which groves a token goes to, and with what weight (docs/model.md, section 2).  T tokens, D width, N groves, K active, r scoring rank.

    s_i = sqrt(sum z_i^2 + eps) / ||E_i||_F, z_i = E_i x        t_i = (s_i - mean_i) / std_i        S = TopK(t_i + balance_i)
"""

import contextvars
import math
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_train.config import ModelConfig
from kan_train.kernels import grove_route
from kan_train.kernels.backend import use_triton
from kan_train.model.dispatch import Plan, dropless_plan, gathered_linear
from kan_train.model.norm import at_least_fp32
from kan_train.model.splines import block_rows
from kan_train.parallel.mappings import copy_in
from kan_train.parallel.params import Constant, Normal, declare, declare_buffer
from kan_train.parallel.place import Axis, current_place

_SCORE_EPS = 1e-6  # keeps the gradient of the norm finite at z = 0

Selector = Callable[[Tensor, Tensor], Tensor]
"""From the selection scores [T, N] and their TopK, int64 [T, K], to the choices that are used, int64 [T, K]: to record or replay routing."""


@dataclass
class Routing:
    """The choices of T tokens."""

    index_TK: Tensor
    """int64: the chosen groves."""
    gate_TK: Tensor
    """Their weights, fp32 or wider."""
    plan: Plan
    """Rows sorted by grove, one for every choice."""
    projection_TKr: Tensor | None
    """z = E_i x of the chosen groves; None for the linear score."""


@dataclass
class _Weights:
    """The router's parameters as one forward pass uses them."""

    score: Tensor
    """E [N, r, D], or w [N, D] of the linear score."""
    gate: Tensor | None
    """w [N, D]."""
    gate_bias: Tensor | None
    """b [N]."""
    gate_score: Tensor | None
    """beta [N]."""


class Router(nn.Module):
    """Scores, standardisation, selection, gate and balancing of one layer; whole on every rank, which routes the tokens that it is given."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        grove = config.grove
        self.config, self.kernels = grove, config.kernels
        self.groves, self.active = grove.num_groves, grove.active_groves
        std = 1 / math.sqrt(config.width)
        if grove.score == "norm":
            shape = (self.groves, grove.score_rank, config.width)
            declare(self, "score", shape, init=Normal(std), decay=True)
            declare(self, "gate", (self.groves, config.width), init=Normal(std), decay=True)
            declare(self, "gate_bias", (self.groves,), init=Constant(0.0))
            if grove.gate == "softmax":
                declare(self, "gate_score", (self.groves,), init=Constant(1.0))
        else:
            declare(self, "score", (self.groves, config.width), init=Normal(std), decay=True)
        # For x of unit RMS the norm of an r-row projection, over the norm of its rows, has mean about 1 and deviation about 1 / sqrt(2 r).
        start_mean, start_std = (1.0, 1 / math.sqrt(2 * grove.score_rank)) if grove.score == "norm" else (0.0, 1.0)
        declare_buffer(self, "score_mean", (self.groves,), start_mean)
        declare_buffer(self, "score_std", (self.groves,), start_std)
        declare_buffer(self, "balance", (self.groves,), 0.0)
        declare_buffer(self, "pending", (3 * self.groves + 1,), 0.0)
        self.auxiliary: Tensor | None = None  # this rank's part of the load-balancing loss of the last forward pass
        self.selector: Selector | None = None  # sees, and may replace, the choices of every pass that is no recomputation
        place = current_place()
        self.token_axis = place.tensor if place.groves_split_tokens else Axis()
        self.sequence_axes = (self.token_axis, place.context)

    def forward(self, x_TD: Tensor, *, batch: int = 1) -> Routing:
        """Route T tokens of `batch` sequences; in training, adds their load and scores to `pending` (once, also where the layer is recomputed).

        Only the chosen groves' scores have a gradient, so that they alone are computed for it: the scoring of all N is a forward pass.
        """
        index_TK, sums_2N = self._select(x_TD.detach())
        plan = self._plan(index_TK)
        if sums_2N is not None:
            self._count(plan, sums_2N, len(x_TD))
        weights = self._weights()
        linear_TK, z_TKr = self._project(x_TD, weights, plan)
        gate_TK = self._gate(linear_TK, z_TKr, weights, index_TK)
        self.auxiliary = self._sequence_loss(x_TD, weights, index_TK, batch) if self.config.auxiliary_loss and self.training else None
        return Routing(index_TK, gate_TK, plan, z_TKr)

    @torch.no_grad()
    def apply_statistics(self, summed: Tensor, balance_rate: float) -> None:
        """Move mean, deviation and balance by statistics [3N+1] summed over all ranks (load, scores, squared scores, tokens); forget the pending ones."""
        self.pending.zero_()
        load, total, squares = summed[:-1].view(3, self.groves)
        tokens = summed[-1]
        if tokens == 0:
            return
        mean = total / tokens
        std = (squares / tokens - mean**2).clamp_(min=1e-12).sqrt_()
        momentum = self.config.score_momentum
        self.score_mean.lerp_(mean, 1 - momentum)
        self.score_std.lerp_(std, 1 - momentum)
        self.balance += balance_rate * torch.sign(load.mean() - load)

    def _weights(self) -> _Weights:
        # Once a pass: each rank of the token axis sees a part of the tokens, and the parts of a gradient are summed where the parameter comes in.
        score, gate, bias, beta = (
            None if (parameter := getattr(self, name, None)) is None else copy_in(parameter, self.token_axis)
            for name in ("score", "gate", "gate_bias", "gate_score")
        )
        assert score is not None
        return _Weights(score, gate, bias, beta)

    def _select(self, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """TopK of the standardised scores plus balance, int64 [T, K]; and, where a new choice is to be counted, sums over the tokens of s and s^2, [2, N]."""
        store = _STORE.get()
        if store is not None and store.replaying:
            return store.selections.popleft(), None
        counted = self.training and torch.is_grad_enabled()
        with torch.no_grad():
            choose = self._choose_fused if self._fused(x_TD) else self._choose
            selection_TN, sums_2N, index_TK = choose(x_TD, counted)
            if self.selector is not None:
                index_TK = self.selector(selection_TN, index_TK)
        if store is not None:
            store.selections.append(index_TK)
        return index_TK, sums_2N

    def _choose(self, x_TD: Tensor, counted: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """What the choice is made from [T, N], sums of s and s^2 [2, N] if they are asked for, and the choice [T, K]."""
        score_TN = self._all_scores(x_TD, self.score)
        selection_TN = score_TN if self.config.gate == "literal" else self._standardise(score_TN) + self.balance
        # NaN sorts first; the choice does not matter then, only that it is in range: the step that met it is skipped later.
        return selection_TN, _sums(score_TN) if counted else None, selection_TN.topk(self.active, dim=-1).indices

    def _choose_fused(self, x_TD: Tensor, counted: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """The same in kernels, where z of all groves is stored nowhere; the balance is added as the choice is made."""
        sums_2N, balance_N = None, None if self.config.gate == "literal" else self.balance
        if self.config.score == "linear":
            selection_TN = self._all_scores(x_TD, self.score)
            sums_2N = _sums(selection_TN) if counted else None
        else:
            standard = {}
            if balance_N is not None:
                standard = {"mean_N": at_least_fp32(self.score_mean), "std_N": at_least_fp32(self.score_std)}
                standard["inverse_N"] = grove_route.inverse_norms(self.score)
            if counted:
                selection_TN, sums_2N = grove_route.scores_and_sums(x_TD, self.score, _SCORE_EPS, **standard)
            else:
                selection_TN = grove_route.grove_scores(x_TD, self.score, _SCORE_EPS, **standard)
        index_TK = grove_route.select(selection_TN, balance_N, self.active)
        return selection_TN if balance_N is None or self.selector is None else selection_TN + balance_N, sums_2N, index_TK

    def _plan(self, index_TK: Tensor) -> Plan:
        if not self._fused(index_TK):
            return dropless_plan(index_TK, self.groves)
        order = grove_route.sort_by_grove(index_TK, self.groves)
        return Plan(order.offsets_N1, order.token_of_row, order.choice_of_row, order.row_of_choice, padded=False, dropped=False)

    def _fused(self, x: Tensor) -> bool:
        return use_triton(self.kernels, x.device)

    def _all_scores(self, x_TD: Tensor, weight: Tensor) -> Tensor:
        """Raw scores [T, N] in at least fp32. z is laid out [T, r, N], so that its sum over r adds whole vectors."""
        if self.config.score == "linear":
            return at_least_fp32(x_TD @ weight.T)
        columns = weight.transpose(0, 1).flatten(0, 1).T
        blocks = x_TD.split(block_rows(columns.shape[1], x_TD.device))
        squares_TN = torch.cat([at_least_fp32(x_nD @ columns).square().view(len(x_nD), -1, self.groves).sum(1) for x_nD in blocks])
        return self._normalise((squares_TN + _SCORE_EPS).sqrt(), weight)

    def _normalise(self, norm: Tensor, weight: Tensor, index_TK: Tensor | None = None) -> Tensor:
        """||z|| / ||E||, the norms [T, N] or those of the chosen groves. Without it the largest E wins, is trained most, and grows: the rich get richer."""
        if self.config.gate == "literal":
            return norm
        inverse_N = at_least_fp32(weight).flatten(1).square().sum(1).rsqrt()
        return norm * (inverse_N if index_TK is None else _look_up(inverse_N, index_TK))

    def _standardise(self, score: Tensor, index_TK: Tensor | None = None) -> Tensor:
        """t from s, for all groves [T, N] or the chosen ones."""
        if self.config.score == "linear" or self.config.gate == "literal":
            return score
        mean, std = self.score_mean, self.score_std
        return (score - mean) / std if index_TK is None else (score - mean[index_TK]) / std[index_TK]

    def _project(self, x_TD: Tensor, weights: _Weights, plan: Plan) -> tuple[Tensor, Tensor | None]:
        """w_i . x [T, K] in at least fp32, and E_i x [T, K, r], of the chosen groves."""
        weight_NRD = weights.score[:, None] if weights.gate is None else torch.cat((weights.score, weights.gate[:, None]), dim=1)
        if self._fused(x_TD):
            order = grove_route.GroveOrder(plan.offsets_N1, plan.choice_of_row, plan.token_of_row, plan.row_of_choice)
            choices_TKR = grove_route.project(x_TD, weight_NRD, order)
        else:
            rows = gathered_linear(x_TD, weight_NRD.transpose(1, 2), plan)
            choices_TKR = rows.index_select(0, plan.row_of_choice.flatten()).unflatten(0, plan.row_of_choice.shape)
        return at_least_fp32(choices_TKR[..., -1]), choices_TKR[..., :-1] if self.config.score == "norm" else None

    def _gate(self, linear_TK: Tensor, z_TKr: Tensor | None, weights: _Weights, index_TK: Tensor) -> Tensor:
        if z_TKr is None or weights.gate_bias is None:
            return self.active * linear_TK.softmax(-1)
        linear_TK = linear_TK + _look_up(weights.gate_bias, index_TK)
        norm_TK = (at_least_fp32(z_TKr).square().sum(-1) + _SCORE_EPS).sqrt()
        score_TK = self._normalise(norm_TK, weights.score, index_TK)
        if weights.gate_score is not None:
            standard_TK = self._standardise(score_TK, index_TK)
            return self.active * (linear_TK + _look_up(weights.gate_score, index_TK) * standard_TK).softmax(-1)
        if self.config.gate == "literal":
            return linear_TK.sigmoid() * score_TK
        return linear_TK.sigmoid() * score_TK / score_TK.mean(-1, keepdim=True)

    def _sequence_loss(self, x_TD: Tensor, weights: _Weights, index_TK: Tensor, batch: int) -> Tensor:
        """Weight * mean over sequences of sum_i f_i P_i: f_i the share of choices on grove i times N / K, P_i the mean softmax of its scores.

        f is that of whole sequences, of which this rank may have a part of the tokens. Summed over the token axis, and averaged over the context axis,
        the ranks' parts are the loss.
        """
        standard_TN = self._standardise(self._all_scores(x_TD, weights.score))
        probability_BN = standard_TN.softmax(-1).unflatten(0, (batch, -1)).mean(1)
        chosen = torch.zeros_like(standard_TN).scatter_(1, index_TK, 1.0)
        load_BN = chosen.unflatten(0, (batch, -1)).mean(1) * (self.groves / self.active)
        for axis in self.sequence_axes:
            load_BN = axis.sum(load_BN) / axis.size
        return self.config.auxiliary_loss * (load_BN * probability_BN).sum(-1).mean() / self.token_axis.size

    @torch.no_grad()
    def _count(self, plan: Plan, sums_2N: Tensor, tokens: int) -> None:
        moments = torch.cat((plan.offsets_N1.diff()[None], sums_2N)).flatten().to(self.pending.dtype)
        self.pending += F.pad(moments, (0, 1), value=tokens)


def _sums(score_TN: Tensor) -> Tensor:
    return torch.stack((score_TN.sum(0), score_TN.square().sum(0)))


def _look_up(vector_N: Tensor, index_TK: Tensor) -> Tensor:
    """vector[index], at least fp32; as an embedding, whose gradient adds in one order on every device."""
    return F.embedding(index_TK, at_least_fp32(vector_N)[:, None])[..., 0]


@dataclass
class _SelectionStore:
    """Selections of one checkpointed region, made in the first pass, replayed in order in each recomputation."""

    selections: deque[Tensor] = field(default_factory=deque)
    replaying: bool = False


_STORE: contextvars.ContextVar[_SelectionStore | None] = contextvars.ContextVar("selections", default=None)


class _Pass(AbstractContextManager[None]):
    """Selections go to, or come from, `store`. May be entered again: a graph kept for a second backward pass is recomputed twice."""

    def __init__(self, store: _SelectionStore, *, replaying: bool) -> None:
        self.store, self.replaying = store, replaying
        self.tokens: list[contextvars.Token[_SelectionStore | None]] = []

    def __enter__(self) -> None:
        store = _SelectionStore(deque(self.store.selections), replaying=True) if self.replaying else self.store
        self.tokens.append(_STORE.set(store))

    def __exit__(self, *_: object) -> None:
        _STORE.reset(self.tokens.pop())


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the first pass and of the recomputation, for torch.utils.checkpoint's context_fn.

    The recomputation must route as the first pass did (a near-tie may fall the other way when sums are reordered), and must not count the load twice.
    """
    store = _SelectionStore()
    return _Pass(store, replaying=False), _Pass(store, replaying=True)
