"""Which groves a token goes to, and with what weight (docs/model.md, section 2).  T tokens, D width, N groves, K active, r scoring rank.

    s_i = sqrt(sum z_i^2 + eps) / ||E_i||_F, z_i = E_i x        t_i = (s_i - mean_i) / std_i        S = TopK(t_i + balance_i)
"""

import contextlib
import contextvars
import math
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kan_train.config import ModelConfig
from kan_train.model.norm import at_least_fp32
from kan_train.parallel.params import Constant, Normal, declare, declare_buffer

_SCORE_EPS = 1e-6  # keeps the gradient of the norm finite at z = 0


@dataclass
class Routing:
    """The choices of T tokens."""

    index_TK: Tensor
    """int64: the chosen groves."""
    gate_TK: Tensor
    """Their weights, fp32 or wider."""
    projection_TKr: Tensor | None
    """z of the chosen groves, for the grove kinds that work on it."""
    auxiliary_T: Tensor | None
    """Per token sum_i f_i P_i of the load-balancing loss, where it is asked for (see `Router.sequence_loss`)."""


class Router(nn.Module):
    """Scores, standardisation, selection, gate and balancing of one layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        grove = config.grove
        self.config = grove
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

    def forward(self, x_TD: Tensor, *, want_projection: bool) -> Routing:
        """Route T tokens; in training, adds their load and scores to `pending` (once, also where the layer is recomputed)."""
        score_TN, z_TNr = self._scores(x_TD)
        standard_TN = self._standardise(score_TN)
        selection_TN = score_TN if self.config.gate == "literal" else standard_TN
        replaying = _STORE.get() is not None and _STORE.get().replaying  # type: ignore[union-attr]
        index_TK = self._select(selection_TN.detach())
        if self.training and torch.is_grad_enabled() and not replaying:
            self._count(score_TN.detach(), index_TK)
        gate_TK = self._gate(x_TD, score_TN, standard_TN, index_TK)
        projection = None
        if want_projection:
            assert z_TNr is not None
            projection = z_TNr.gather(1, index_TK[..., None].expand(-1, -1, z_TNr.shape[-1]))
        auxiliary = standard_TN if self.config.auxiliary_loss else None
        return Routing(index_TK, gate_TK, projection, auxiliary)

    def sequence_loss(self, standard_TN: Tensor, index_TK: Tensor, batch: int) -> Tensor:
        """Weight * mean over sequences of sum_i f_i P_i: f_i the share of choices on grove i times N, P_i the mean softmax of its scores."""
        probability_BN = standard_TN.softmax(-1).unflatten(0, (batch, -1)).mean(1)
        chosen = torch.zeros_like(standard_TN).scatter_(1, index_TK, 1.0)
        load_BN = chosen.unflatten(0, (batch, -1)).mean(1) * (self.groves / self.active)
        return self.config.auxiliary_loss * (load_BN * probability_BN).sum(-1).mean()

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

    def _scores(self, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Raw scores [T, N] in at least fp32, and z [T, N, r] of the norm score."""
        if self.config.score == "linear":
            return at_least_fp32(x_TD @ self.score.T), None
        z_TNr = (x_TD @ self.score.flatten(0, 1).T).unflatten(-1, self.score.shape[:2])
        wide = at_least_fp32(z_TNr)
        norm_TN = (wide.square().sum(-1) + _SCORE_EPS).sqrt()
        if self.config.gate == "literal":
            return norm_TN, z_TNr
        # Without this the largest E_i wins, is trained most, and grows: the rich get richer.
        return norm_TN / at_least_fp32(self.score).flatten(1).norm(dim=1), z_TNr

    def _standardise(self, score_TN: Tensor) -> Tensor:
        if self.config.score == "linear" or self.config.gate == "literal":
            return score_TN
        return (score_TN - self.score_mean) / self.score_std

    def _select(self, selection_TN: Tensor) -> Tensor:
        store = _STORE.get()
        if store is not None and store.replaying:
            return store.selections.popleft()
        # NaN would sort first and send every token to the same groves before the step is skipped; the choice does not matter then, only its range.
        index_TK = (selection_TN + self.balance).topk(self.active, dim=-1).indices
        if store is not None:
            store.selections.append(index_TK)
        return index_TK

    def _gate(self, x_TD: Tensor, score_TN: Tensor, standard_TN: Tensor, index_TK: Tensor) -> Tensor:
        if self.config.score == "linear":
            return self.active * score_TN.gather(1, index_TK).softmax(-1)
        linear_TK = (at_least_fp32(x_TD @ self.gate.T) + self.gate_bias).gather(1, index_TK)
        if self.config.gate == "softmax":
            logits = linear_TK + (self.gate_score * standard_TN).gather(1, index_TK)
            return self.active * logits.softmax(-1)
        score_TK = score_TN.gather(1, index_TK)
        if self.config.gate == "literal":
            return linear_TK.sigmoid() * score_TK
        return linear_TK.sigmoid() * score_TK / score_TK.mean(-1, keepdim=True)

    @torch.no_grad()
    def _count(self, score_TN: Tensor, index_TK: Tensor) -> None:
        load = torch.bincount(index_TK.flatten(), minlength=self.groves)
        moments = torch.cat((load, score_TN.sum(0), score_TN.square().sum(0), load.new_tensor([len(score_TN)])))
        self.pending += moments.to(self.pending.dtype)


@dataclass
class _SelectionStore:
    """Selections of one checkpointed region, first made, then replayed in order."""

    selections: deque[Tensor] = field(default_factory=deque)
    replaying: bool = False

    @contextlib.contextmanager
    def active(self, *, replaying: bool) -> Iterator[None]:
        if replaying:
            # A graph kept for a second backward pass recomputes again: the queue is copied, not emptied.
            store = _SelectionStore(deque(self.selections), replaying=True)
        else:
            store = self
        token = _STORE.set(store)
        try:
            yield
        finally:
            _STORE.reset(token)


_STORE: contextvars.ContextVar[_SelectionStore | None] = contextvars.ContextVar("selections", default=None)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the first pass and of the recomputation, for torch.utils.checkpoint's context_fn.

    The recomputation must route as the first pass did (a near-tie may fall the other way when sums are reordered), and must not count the load twice.
    """
    store = _SelectionStore()
    return store.active(replaying=False), store.active(replaying=True)
