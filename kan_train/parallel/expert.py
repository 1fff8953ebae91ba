"""Tokens to the ranks that hold their groves, and the groves' outputs back: all-to-all over the expert axis.

T own tokens, K choices a token, D width, r scoring rank; E ranks, each the owner of n of the N = E n groves.
P rows go out, one for each pair (token, rank that holds any of its groves), with C = T K choices; R rows come in, with c choices, at most
J = min(K, n) a row. What a rank sends for a layer, s bytes a number of x, g a gate (what goes to the rank itself included):

    forward     8 E (n + 1)               counts, which the host waits for
                P D s                     rows of x; nothing for groves that read only z
                C (4 + g [+ r s])         choices: their place among the rows, gate, z where the groves read it
                R D s                     back: for each row the weighted sum of its choices' outputs
    backward    P D s                     gradients of those sums
                R D s + c (g [+ r s])     back: gradients of rows and choices

Seven all-to-alls (five where x stays), whatever N and T are. Choices go out sorted by grove, so that the counts tell their groves.
The sums over a token's ranks add one rank after the other: the same order every time, on every device.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kan_train.config import ConfigError
from kan_train.parallel.place import Axis


class SortedChoices(Protocol):
    """The T K choices sorted by grove (a `kan_train.model.dispatch.Plan`)."""

    choice_of_row: Tensor
    """int64 [T K]: flat number t * K + k of each, those of one grove in the order of their tokens."""
    row_of_choice: Tensor
    """int64 [T, K]: the inverse."""
    padded: bool
    """Whether groves have a capacity."""

    @property
    def sizes(self) -> list[int]:
        """Choices of each of the N groves."""
        ...


@dataclass
class Received:
    """What the groves of this rank work on."""

    x_RD: Tensor | None
    """Tokens in the order of their source ranks; None where x did not travel."""
    gate_RJ: Tensor
    """Gates of each row's choices here, in the order of groves; zero where it has fewer than J."""
    z_RJr: Tensor | None
    """Their z, likewise; None where z did not travel."""
    choice_of_row: Tensor
    """int64: the choices sorted by grove, as flat numbers row * J + j."""
    sizes: list[int]
    """Choices of each of the n groves."""


class Exchange:
    """The way of one layer's tokens to their groves and back, for one forward pass and its backward pass.

        exchange = Exchange(plan, axis)
        pending = exchange.start(x_TD, gate_TK, z_TKr)      # what is computed before `wait` overlaps with the transfer, in both passes
        received = pending.wait()
        y_TD = exchange.combine(y_RD)

    Every rank of the axis makes the same calls in the same order, also one without tokens, and asks for the same gradients.
    """

    def __init__(self, plan: SortedChoices, axis: Axis) -> None:
        """Exchange the counts, and wait for them. ValueError where the axis has no group or does not divide the groves."""
        groves, ranks = len(plan.sizes), axis.size
        if axis.group is None or groves % ranks:
            raise ValueError(f"{groves} groves over {ranks} ranks: tokens travel over a process group whose size divides the groves")
        if plan.padded:
            raise ConfigError("groves over several ranks take every token that chose them; use model.grove.capacity_factor=0 or parallel.expert_parallel=1")
        device = plan.choice_of_row.device
        self.tokens, choices = plan.row_of_choice.shape
        self.slots = min(choices, groves // ranks)
        self.group, self.order_C, self.row_TK = axis.group, plan.choice_of_row, plan.row_of_choice
        sizes_En = torch.tensor(plan.sizes).view(ranks, -1)

        rank_C, token_C = _repeat(torch.arange(ranks), sizes_En.sum(1), device), self.order_C // choices
        travels_ET = torch.zeros(ranks, self.tokens, dtype=torch.bool, device=device)
        travels_ET[rank_C, token_C] = True
        rows_E = travels_ET.sum(1)
        row_C = travels_ET.flatten().cumsum(0).view_as(travels_ET)[rank_C, token_C] - 1  # rows to all ranks counted on
        own_row_C = row_C - (rows_E.cumsum(0) - rows_E)[rank_C]
        self.place_C = (own_row_C * self.slots + self._slot(rank_C)).int()

        counts = torch.cat((rows_E[:, None], sizes_En.to(device)), dim=1)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self.group)
        self._read_counts(torch.cat((rows_E[:, None], received), dim=1).cpu(), sizes_En, device)
        self.token_P = torch.empty(sum(self.rows_sent), dtype=torch.int64, device=device)
        self.token_P[row_C] = token_C  # a row with several choices is written several times, the same each time

    def _slot(self, rank_C: Tensor) -> Tensor:
        """Where each choice stands among those that its token has at the same rank, in the order of groves."""
        rank_TK = rank_C[self.row_TK]
        earlier_TKK = (rank_TK[:, :, None] == rank_TK[:, None, :]) & (self.row_TK[:, :, None] > self.row_TK[:, None, :])
        return earlier_TKK.sum(-1).flatten()[self.order_C]

    def _read_counts(self, counts: Tensor, sizes_En: Tensor, device: torch.device) -> None:
        """Lists for the transfers, and where arriving choices belong. counts: rows to, rows from, and choices by grove from each rank."""
        rows, from_En = counts[:, 1], counts[:, 2:]
        self.rows_sent: list[int] = counts[:, 0].tolist()
        self.rows_received: list[int] = rows.tolist()
        self.choices_sent: list[int] = sizes_En.sum(1).tolist()
        self.choices_received: list[int] = from_En.sum(1).tolist()
        self.sizes: list[int] = from_En.sum(0).tolist()
        self.first_place = _repeat((rows.cumsum(0) - rows) * self.slots, from_En.sum(1), device)
        # They arrive rank by rank, each rank's sorted by grove, and are wanted grove by grove.
        arrives = (from_En.flatten().cumsum(0).view_as(from_En) - from_En).T.flatten()
        lengths = from_En.T.flatten()
        shift = _repeat(arrives - (lengths.cumsum(0) - lengths), lengths, device)
        self.by_grove = shift + torch.arange(len(shift), device=device)

    def start(self, x_TD: Tensor | None, gate_TK: Tensor, z_TKr: Tensor | None) -> "Pending":
        """Send tokens and choices; returns at once. x_TD is None for groves that read only z, z_TKr for those that do not read it."""
        journey = _Journey(self)
        return Pending(journey, _Depart.apply(journey, x_TD, gate_TK, z_TKr))

    def combine(self, y_RD: Tensor) -> Tensor:
        """Rows [R, D] back to their tokens: [T, D] in the dtype of y_RD, each the sum over the ranks that it was at, in at least fp32."""
        return _Combine.apply(self, y_RD)

    def send(self, rows: Tensor, *, back: bool = False) -> "_Transfer":
        """Rows of tokens to the groves' ranks, or back."""
        there, here = self.rows_sent, self.rows_received
        return _Transfer(rows, self.group, *((here, there) if back else (there, here)))

    def send_choices(self, *columns: Tensor, back: bool = False) -> "_Transfer":
        """What belongs to choices, as one transfer."""
        there, here = self.choices_sent, self.choices_received
        return _Transfer(_pack(columns), self.group, *((here, there) if back else (there, here)))

    def sum_rows(self, rows_PD: Tensor) -> Tensor:
        """[P, D] -> [T, D]."""
        out = torch.zeros(self.tokens, rows_PD.shape[1], dtype=torch.promote_types(rows_PD.dtype, torch.float32), device=rows_PD.device)
        for token, rows in zip(self.token_P.split(self.rows_sent), rows_PD.split(self.rows_sent), strict=True):
            out.index_add_(0, token, rows.to(out.dtype))
        return out.to(rows_PD.dtype)


class Pending:
    """Tokens on their way."""

    def __init__(self, journey: "_Journey", link: Tensor) -> None:
        self._journey, self._link = journey, link

    def wait(self) -> Received:
        """What arrived here, once it has; call once."""
        x_RD, gate_RJ, z_RJr, choice_of_row = _Arrive.apply(self._journey, self._link)
        return Received(x_RD, gate_RJ, z_RJr, choice_of_row, self._journey.exchange.sizes)


class _Transfer:
    """One all-to-all under way. Dtypes travel as bytes: not every backend moves each of them."""

    def __init__(self, rows: Tensor, group: dist.ProcessGroup, send: list[int], receive: list[int]) -> None:
        self.dtype, self.sent = rows.dtype, rows.contiguous().view(torch.uint8)  # held until it has left
        self.received = self.sent.new_empty(sum(receive), self.sent.shape[1])
        self.work = dist.all_to_all_single(self.received, self.sent, receive, send, group=group, async_op=True)

    def wait(self) -> Tensor:
        self.work.wait()
        return self.received.view(self.dtype)


class _Journey:
    """What the two ends of a transfer know of each other: each pass leaves at one end what the other waits for."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.rows: _Transfer | None = None
        self.choices: _Transfer | None = None
        self.columns: list[tuple[torch.dtype, int]] = []
        self.needs_rows = self.needs_choices = False

    def land(self) -> tuple[Tensor | None, Tensor | None]:
        """Wait for both transfers, and forget them."""
        rows, choices = self.rows, self.choices
        self.rows = self.choices = None
        return None if rows is None else rows.wait(), None if choices is None else choices.wait()


class _Depart(torch.autograd.Function):
    """Its output is an empty tensor: it ties departure to arrival, so that gradients of what travels pass between them unseen."""

    @staticmethod
    def forward(ctx: Any, journey: _Journey, x_TD: Tensor | None, gate_TK: Tensor, z_TKr: Tensor | None) -> Tensor:
        exchange = journey.exchange
        ctx.journey = journey
        _, journey.needs_rows, *needs_choices = ctx.needs_input_grad
        journey.needs_choices = any(needs_choices)
        if x_TD is not None:
            journey.rows = exchange.send(x_TD.index_select(0, exchange.token_P))
        columns = [gate_TK.flatten()[:, None]] if z_TKr is None else [gate_TK.flatten()[:, None], z_TKr.flatten(0, 1)]
        journey.columns = [(column.dtype, column.shape[1]) for column in columns]
        journey.choices = exchange.send_choices(exchange.place_C[:, None], *(column.index_select(0, exchange.order_C) for column in columns))
        return gate_TK.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        exchange = ctx.journey.exchange
        rows, choices = ctx.journey.land()
        x = None if rows is None else exchange.sum_rows(rows)
        gate = z = None
        if choices is not None:
            shape = exchange.row_TK.shape
            back = [column.index_select(0, exchange.row_TK.flatten()).unflatten(0, shape) for column in _unpack(choices, ctx.journey.columns)]
            gate, z = back[0].squeeze(-1), back[1] if len(back) > 1 else None
        return None, x, gate, z


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, journey: _Journey, link: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
        exchange = journey.exchange
        x_RD, choices = journey.land()
        assert choices is not None
        place, *columns = _unpack(choices, [(torch.int32, 1), *journey.columns])
        choice = place.squeeze(1).long() + exchange.first_place
        rows = sum(exchange.rows_received)
        gate, *z = (column.new_zeros(rows * exchange.slots, column.shape[1]).index_copy_(0, choice, column) for column in columns)
        choice_of_row = choice[exchange.by_grove]
        ctx.journey = journey
        ctx.save_for_backward(choice, link)
        ctx.mark_non_differentiable(choice_of_row)
        return x_RD, gate.view(rows, exchange.slots), z[0].view(rows, exchange.slots, z[0].shape[1]) if z else None, choice_of_row

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor | None, grad_gate: Tensor, grad_z: Tensor | None, _: Any) -> tuple[None, Tensor]:
        choice, link = ctx.saved_tensors
        journey, exchange = ctx.journey, ctx.journey.exchange
        if journey.needs_rows:
            journey.rows = exchange.send(grad_x, back=True)
        if journey.needs_choices:
            columns = [grad_gate.flatten()[:, None]] if grad_z is None else [grad_gate.flatten()[:, None], grad_z.flatten(0, 1)]
            journey.choices = exchange.send_choices(*(column.index_select(0, choice) for column in columns), back=True)
        return None, torch.zeros_like(link)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, y_RD: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.sum_rows(exchange.send(y_RD, back=True).wait())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[None, Tensor]:
        return None, ctx.exchange.send(grad_TD.index_select(0, ctx.exchange.token_P)).wait()


def _repeat(values: Tensor, counts: Tensor, device: torch.device) -> Tensor:
    """values[i] counts[i] times; both on the host, the result on `device`, which is not waited for."""
    return values.to(device).repeat_interleave(counts.to(device), output_size=int(counts.sum()))


def _pack(columns: tuple[Tensor, ...]) -> Tensor:
    """Tensors [C, any] as the bytes of one."""
    return torch.cat([column.contiguous().view(torch.uint8) for column in columns], dim=1)


def _unpack(packed: Tensor, columns: list[tuple[torch.dtype, int]]) -> list[Tensor]:
    """The tensors of these dtypes and widths again, each in memory of its own: a slice need not be aligned to its dtype."""
    parts = packed.split([dtype.itemsize * width for dtype, width in columns], dim=1)
    return [part.clone(memory_format=torch.contiguous_format).view(dtype) for part, (dtype, _) in zip(parts, columns, strict=True)]
