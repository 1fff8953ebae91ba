"""The same as `kan_train.planner.kept`, for a KalmaGrove layer: router, dispatch, groves of every kind, shared grove, and the exchange between ranks.

m tokens that this rank routes, K choices each, R rows that its groves run: m K where every token draws its groves evenly (what a rank gets beyond that is not
counted), a capacity's rows where there is one. N groves, of which a rank holds N / ranks, M hidden units of one on this rank, r scoring rank.
"""

import math
from dataclasses import replace

import torch

from kan_train.config.model import largest_divisor
from kan_train.model.edge import coefficients_of
from kan_train.model.splines import block_rows
from kan_train.planner.kept import WIDE, Cut, Op, gated_unit, norm
from kan_train.planner.traffic import expected_destinations

INDEX = 8
"""Bytes of an index."""
CPU = torch.device("cpu")


def kalmagrove(cut: Cut) -> list[Op]:
    """The sparse feed-forward layer, from its norm to the stream behind it, in the order of its operators."""
    return _Layer(cut).ops()


class _Layer:
    def __init__(self, cut: Cut) -> None:
        model, grove = cut.model, cut.model.grove
        self.cut, self.grove, self.e, self.width = cut, grove, cut.element, model.width
        self.splits = cut.tensor > 1 and cut.expert_tensor == 1
        self.m = cut.tokens // cut.tensor if self.splits else cut.tokens
        self.choices = self.m * grove.active_groves
        self.held, self.hidden = grove.num_groves // cut.expert, grove.width // cut.expert_tensor
        capped = grove.capacity_factor and cut.model.has_groves
        self.rows = math.ceil(grove.capacity_factor * self.choices / grove.num_groves) * grove.num_groves if capped else self.choices
        self.columns = grove.score_rank + 1 if grove.score == "norm" else 1
        if cut.kernels:
            self.columns = -(-self.columns // 8) * 8  # rows of matrices filled up to 16 bytes
        self.received = self.m if cut.expert == 1 else math.ceil(self.m * expected_destinations(grove.num_groves, grove.active_groves, cut.expert))
        self.stream, self.routed = cut.stream_bytes, self.e * self.m * self.width  # of the tokens that are routed

    def ops(self) -> list[Op]:
        """The order matters: what stands behind the groves is done, and free, before their backward pass."""
        cut = self.cut
        before = norm("norms", cut, cut.stream, self.width)
        if not cut.model.has_groves:
            return [before, *self._shared()]
        first = [before, self._enter(), *self._route()]
        shared = self._shared()
        if cut.expert > 1:
            return [*first, self._send(), *shared, self._arrive(), *self._groves(), self._return(), self._end()]
        return [*first, *self._groves(), *shared, self._end()]

    def _enter(self) -> Op:
        """Tokens to the rank that routes them: a part of what is there, or all of it."""
        cut, inner = self.cut, self.cut.inner_bytes
        if cut.tensor == 1 or (self.splits and cut.split):
            return Op("dispatch", kept=self.stream, backward=self.stream)
        if self.splits:
            return Op("dispatch", kept=self.routed if cut.sequences > 1 else inner, forward=2 * inner, backward=2 * inner)
        return Op("dispatch", kept=inner, forward=2 * inner, backward=2 * inner)

    def _route(self) -> list[Op]:
        grove, e, m, choices = self.grove, self.e, self.m, self.choices
        scores, selection = e * grove.num_groves * self.columns * self.width, WIDE * m * grove.num_groves
        columns = grove.num_groves * max(1, self.columns - 1)
        wide = 0 if self.cut.kernels else WIDE * min(m, block_rows(columns, CPU)) * columns  # kernels store z of all groves nowhere
        select = Op("dispatch", kept=4 * INDEX * choices, forward=3 * selection + (0 if self.cut.kernels else scores + 2 * wide))
        numbers, z = e * choices * self.columns, choices * grove.score_rank if grove.score == "norm" else 0
        # The chosen groves' projection: their matrices side by side, the rows' products in the order of groves and of choices.
        sums = self.routed + WIDE * m * self.width + 3 * scores
        project = Op("router", kept=numbers, own=scores, forward=numbers, backward=sums + 2 * numbers, weights=scores)
        matrices = WIDE * grove.num_groves * z // choices * self.width if grove.gate != "literal" else 0
        narrow = 0 if e == WIDE else 1  # in bf16 the norms are taken of fp32 copies, of z and of the matrices themselves
        own = 7 * WIDE * choices + narrow * (WIDE * z + matrices)
        gate = Op("router", own=own, forward=matrices, backward=self.routed + 2 * WIDE * z + 2 * matrices + scores)
        found = [select, project, gate]
        if grove.auxiliary_loss:
            own = 4 * selection + m * columns * (e + narrow * WIDE)
            found.append(Op("router", own=own, forward=2 * selection, backward=5 * selection + 2 * wide + 2 * scores))
        return found

    def _shared(self) -> list[Op]:
        """The grove that every token runs, whose activation is kept as silu and spline together."""
        cut, grove = self.cut, self.grove
        if not grove.shared_width:
            return []
        hidden = grove.shared_width // cut.tensor
        ops = gated_unit("shared grove", cut, hidden)
        if cut.model.has_groves:  # it reads what the router reads, and the sum with the stream is that of all groves
            ops = ops[1 if cut.tensor == 1 and not cut.strided else 0 : -1]
        u = self.e * cut.tokens * hidden
        if grove.edge.kind != "silu":
            ops = [replace(op, forward=op.forward + (2 * u if op.kept else 0)) for op in ops]
        if steps := self._steps(cut.tokens * hidden):
            ops.append(Op("shared grove", own=steps))
        return ops

    def _end(self) -> Op:
        """The sum with the shared grove's and the stream, and what brought the routed sum there."""
        cut = self.cut
        gathered = cut.inner_bytes if self.splits and not cut.split else 0
        inside = cut.inner_bytes if cut.expert_tensor > 1 else 0
        return Op("stream", kept=self.stream, forward=self.routed + 2 * self.stream + gathered + inside, backward=inside)

    # --- groves -----------------------------------------------------------------------------------------------------------------------------------------

    def _groves(self) -> list[Op]:
        match self.grove.kind:
            case "edge":
                return self._edge()
            case _:
                return [self._gated()] if self.grove.edge.kind in ("bspline", "piecewise_poly", "silu") else self._by_autograd()

    def _matrices(self) -> int:
        """Bytes of the gradients of this rank's groves."""
        grove = self.grove
        inputs = grove.score_rank if grove.kind == "reuse" else self.width
        return self.e * self.held * self.hidden * (inputs + 2 * self.width)

    def _table(self) -> int:
        """Bytes of the functions' cells, in fp32."""
        edge = self.grove.edge
        if edge.kind == "silu":
            return 0
        functions = self.hidden // largest_divisor(self.hidden, edge.group_size)
        return WIDE * self.held * functions * (edge.grid + 2) * (edge.order + 1)

    def _gated(self) -> Op:
        """`kan_train.model.gated`: of a row W_up u and W_v x are kept; the rest block by block."""
        cut, grove, e = self.cut, self.grove, self.e
        kept = 2 * e * self.rows * self.hidden + self._table() + WIDE * self.choices
        if cut.kernels:
            rows = e * self.rows
            backward = rows * (3 * self.hidden + self.width) + self._matrices() + 2 * self._table() + e * self.received * self.width
            return Op("groves", own=kept, forward=rows * (self.hidden + self.width), backward=backward, weights=self._matrices())
        block = min(self.rows, block_rows(self.hidden, CPU))
        powers = grove.edge.order + 1
        spline = 0 if grove.edge.kind == "silu" else (2 * WIDE * powers + INDEX + WIDE)
        numbers, narrow = block * self.hidden, 0 if e == WIDE else 1
        rows = e * block * self.width
        sums = WIDE * self.received * self.width
        forward = sums + rows + numbers * (spline // 2 + 3 * WIDE) + self.routed * narrow
        moments = numbers * (e + 5 * WIDE + spline + 3 * narrow * WIDE)
        own = e * self.choices * grove.score_rank if grove.kind == "reuse" else 0
        backward = sums + 2 * rows + moments + self._matrices() + 2 * self._table() + 2 * own + self.cut.inner_bytes * bool(grove.shared_width)
        return Op("groves", own=kept, forward=forward, backward=backward, weights=self._matrices())

    def _by_autograd(self) -> list[Op]:
        """Ablations of the activation: rows of their tokens are kept, and every step of the activation's arithmetic."""
        e, rows, hidden = self.e, self.rows, self.hidden
        u, x = e * rows * hidden, e * rows * self.width
        return [
            Op("groves", kept=x, backward=2 * x),
            Op("groves", own=4 * u + self._steps(rows * hidden), forward=4 * u, backward=6 * u + x + self._matrices(), weights=self._matrices()),
            Op("groves", own=x, forward=x, backward=3 * x),
        ]

    def _steps(self, numbers: int) -> int:
        """Bytes of the steps of an activation that automatic differentiation goes through, in fp32; 0 for those that keep their input alone."""
        match self.grove.edge.kind:
            case "rational":
                return 12 * WIDE * numbers
            case "chebyshev":
                return (2 * self.grove.edge.order + 1) * WIDE * numbers
        return 0

    def _edge(self) -> list[Op]:
        """Full edge layers on the chosen groves' projection: the basis of every input is kept, in fp32 and as the product reads it."""
        grove, edge, e = self.grove, self.grove.edge, self.e
        count = coefficients_of(edge)
        z, hidden, out = self.rows * grove.score_rank, e * self.rows * self.hidden, e * self.rows * self.width
        matrices = e * self.held * (grove.score_rank * self.hidden * (1 + count) + self.hidden * self.width)
        read = Op("groves", kept=(WIDE + e) * z, backward=3 * WIDE * z)  # the projection in fp32, which its norm keeps, and normalised
        if self.cut.kernels and edge.kind != "chebyshev":
            both = Op("groves", kept=hidden, backward=2 * hidden + e * z + matrices, weights=matrices)
            return [read, both, Op("groves", own=out, forward=out, backward=2 * out + self.routed)]
        powers = edge.order + 1
        steps = WIDE * powers if edge.kind == "chebyshev" else WIDE * (3 + powers) + INDEX * powers
        kept = z * (e + steps + e * count)
        basis = Op("groves", own=kept, forward=z * WIDE * (2 * count + powers), backward=z * WIDE * (2 * count + 4 * powers))
        both = Op("groves", kept=hidden, forward=2 * hidden, backward=2 * hidden + z * e * (count + 2) + matrices, weights=matrices)
        last = Op("groves", own=out, forward=2 * out, backward=2 * out + self.routed + matrices)
        return [read, basis, both, last]

    # --- between ranks ----------------------------------------------------------------------------------------------------------------------------------

    def _packed(self) -> int:
        """Bytes of a choice on its way."""
        grove = self.grove
        return 4 + WIDE + (self.e * grove.score_rank if grove.kind != "gated" else 0)

    def _sent(self) -> int:
        return self.e * self.received * self.width if self.grove.kind != "edge" else 0

    def _send(self) -> Op:
        """Tokens and choices leave; indices stay."""
        travelling = 2 * self._sent() + 2 * self.choices * self._packed()
        own = INDEX * (self.received + 2 * self.choices) + 4 * self.choices
        return Op("dispatch", own=own, forward=travelling, backward=travelling + WIDE * self.m * self.width)

    def _arrive(self) -> Op:
        """Tokens and choices that other ranks sent: as many as go out."""
        slots = min(self.grove.active_groves, self.held)
        gates = self.received * slots * (WIDE + (self.e * self.grove.score_rank if self.grove.kind != "gated" else 0))
        kept = self._sent() + gates + INDEX * (4 * self.choices + self.received * slots)
        travelling = 2 * self._sent() + self.choices * self._packed()
        return Op("dispatch", kept=kept, forward=travelling, backward=travelling)

    def _return(self) -> Op:
        """Outputs back to their tokens."""
        sent = self.e * self.received * self.width
        return Op("dispatch", forward=3 * sent + WIDE * self.m * self.width, backward=3 * sent)
