"""From tokens to rows sorted by grove, and back.  T tokens, D width, N groves, K choices a token, R rows.

Rows are added up choice by choice or grove by grove, among which no token occurs twice: the same sum in the same order every time, on every device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kan_train.model.norm import at_least_fp32
from kan_train.parallel.place import Axis


@dataclass
class GroveRows:
    """Where the rows of each grove lie: one grove after the other."""

    offsets_N1: Tensor
    """int32 [N + 1]: the rows of grove i are offsets[i] : offsets[i + 1]."""

    @cached_property
    def sizes(self) -> list[int]:
        """Rows of each grove. The host waits for the device to tell them: kernels read the offsets instead."""
        return self.offsets_N1.diff().tolist()


def rows_of_sizes(sizes: list[int], device: torch.device) -> GroveRows:
    """Groves of sizes that the host knows."""
    rows = GroveRows(torch.tensor([0, *accumulate(sizes)], dtype=torch.int32).to(device, non_blocking=True))
    rows.sizes = sizes
    return rows


@dataclass
class Plan(GroveRows):
    """Where each of a token's K choices stands among the rows."""

    token_of_row: Tensor
    """int64 [R]; T where a row is padding."""
    choice_of_row: Tensor
    """int64 [R]: flat number t * K + k of the choice; T * K where a row is padding."""
    row_of_choice: Tensor
    """int64 [T, K]; R where the choice was dropped."""
    padded: bool
    """Whether rows may be padding, so that tokens and choices need a line past their end."""
    dropped: bool
    """Whether choices may lack a row, so that rows need a line past their end."""


def dropless_plan(index_TK: Tensor, groves: int) -> Plan:
    """Every choice has a row. index_TK (int64): the groves chosen by each token."""
    tokens, choices = index_TK.shape
    flat = index_TK.flatten()
    choice_of_row = flat.argsort(stable=True)
    row_of_choice = torch.empty_like(choice_of_row)
    row_of_choice[choice_of_row] = torch.arange(flat.numel(), device=flat.device)
    offsets = F.pad(torch.bincount(flat, minlength=groves).cumsum(0, dtype=torch.int32), (1, 0))
    return Plan(offsets, choice_of_row // choices, choice_of_row, row_of_choice.view(tokens, choices), padded=False, dropped=False)


def capacity_plan(index_TK: Tensor, gate_TK: Tensor, groves: int, capacity: int) -> Plan:
    """Every grove has `capacity` rows: the choices of the highest gates, then padding. Shapes do not depend on the routing."""
    tokens, choices = index_TK.shape
    flat, count = index_TK.flatten(), tokens * choices
    by_gate = gate_TK.detach().flatten().argsort(descending=True, stable=True)
    order = by_gate[flat[by_gate].argsort(stable=True)]
    first = torch.searchsorted(flat[order].contiguous(), torch.arange(groves, device=flat.device))
    rank = torch.arange(count, device=flat.device) - first[flat[order]]
    rows = groves * capacity
    row = torch.where(rank < capacity, flat[order] * capacity + rank, rows)
    row_of_choice = torch.empty_like(flat)
    row_of_choice[order] = row
    choice_of_row = torch.full((rows + 1,), count, device=flat.device)
    choice_of_row[row] = order
    choice_of_row = choice_of_row[:rows]
    token_of_row = torch.where(choice_of_row == count, tokens, choice_of_row // choices)
    offsets = torch.arange(0, rows + 1, capacity, device=flat.device, dtype=torch.int32)
    plan = Plan(offsets, token_of_row, choice_of_row, row_of_choice.view(tokens, choices), padded=True, dropped=True)
    plan.sizes = [capacity] * groves
    return plan


def partial_plan(choice_of_row: Tensor, sizes: list[int], tokens: int, choices: int) -> Plan:
    """Every choice that there is has a row; a token has at most `choices` of them.

    choice_of_row: int64, the flat numbers t * choices + k of the choices sorted by grove, of which sizes[0] belong to the first, and so on.
    """
    rows = len(choice_of_row)
    row_of_choice = torch.full((tokens * choices,), rows, device=choice_of_row.device)
    row_of_choice[choice_of_row] = torch.arange(rows, device=choice_of_row.device)
    offsets = rows_of_sizes(sizes, choice_of_row.device).offsets_N1
    plan = Plan(offsets, choice_of_row // choices, choice_of_row, row_of_choice.view(tokens, choices), padded=False, dropped=True)
    plan.sizes = sizes
    return plan


def own_part(plan: Plan, axis: Axis) -> Plan:
    """Of a plan for all groves the choices of those that this rank of `axis` holds; as if the others had been dropped, and none by padding."""
    tokens, choices = plan.row_of_choice.shape
    held = len(plan.sizes) // axis.size
    first = axis.rank * held
    sizes = plan.sizes[first : first + held]
    start = sum(plan.sizes[:first])
    choice_of_row = plan.choice_of_row[start : start + sum(sizes)]
    if plan.padded:
        real = choice_of_row < tokens * choices
        sizes = [int(part.sum()) for part in real.split(sizes)]
        choice_of_row = choice_of_row[real]
    return partial_plan(choice_of_row, sizes, tokens, choices)


def gather_rows(x_TD: Tensor, plan: Plan) -> Tensor:
    """[T, D] -> [R, D]: each row its token, padding rows zero."""
    return _Gather.apply(x_TD, plan)


def combine_rows(y_RD: Tensor, gate_TK: Tensor, plan: Plan) -> Tensor:
    """[R, D] -> [T, D]: each token the sum of its choices' rows, weighted by gate_TK; dropped choices add nothing."""
    return _Combine.apply(y_RD, gate_TK, plan)


def gather_choices(z_TKr: Tensor, plan: Plan) -> Tensor:
    """[T, K, r] -> [R, r]: each row its choice, padding rows zero."""
    return pad(z_TKr.flatten(0, 1), plan.padded).index_select(0, plan.choice_of_row)


def grouped_linear(x_RI: Tensor, weight_NIO: Tensor, sizes: list[int]) -> Tensor:
    """Rows times their grove's matrix: x [R, I], weight [N, I, O] -> [R, O]; the first sizes[0] rows by weight[0], and so on.

    Only the matrices of groves that have rows are read.
    """
    return _GroupedLinear.apply(x_RI, weight_NIO, sizes)


def gathered_linear(x_TD: Tensor, weight_NDO: Tensor, plan: Plan) -> Tensor:
    """Each row its token times its grove's matrix: x [T, D], weight [N, D, O] -> [R, O], padding rows zero. Keeps no row's copy of its token."""
    return _GatheredLinear.apply(x_TD, weight_NDO, plan)


def pad(rows: Tensor, needed: bool) -> Tensor:
    """With a line of zeros past the end, where it is needed."""
    return torch.cat((rows, rows.new_zeros(1, *rows.shape[1:]))) if needed else rows


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return pad(x_TD, plan.padded).index_select(0, plan.token_of_row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        plan = ctx.plan
        rows = pad(grad_RD, plan.dropped)
        grad = rows.index_select(0, plan.row_of_choice[:, 0])
        for choice in range(1, plan.row_of_choice.shape[1]):
            grad += rows.index_select(0, plan.row_of_choice[:, choice])
        return grad, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, gate_TK: Tensor, plan: Plan) -> Tensor:
        ctx.save_for_backward(y_RD, gate_TK)
        ctx.plan = plan
        rows, gate = pad(y_RD, plan.dropped), gate_TK.to(y_RD.dtype)
        out = rows.index_select(0, plan.row_of_choice[:, 0]).mul_(gate[:, :1])
        for choice in range(1, gate.shape[1]):
            out.addcmul_(rows.index_select(0, plan.row_of_choice[:, choice]), gate[:, choice : choice + 1])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        y_RD, gate_TK = ctx.saved_tensors
        plan = ctx.plan
        rows = pad(grad_TD, plan.padded).index_select(0, plan.token_of_row)
        # One dot product a row, then each choice looks its own up.
        row_gate = pad((rows * y_RD).sum(-1, dtype=gate_TK.dtype), plan.dropped)
        weight = pad(gate_TK.to(y_RD.dtype).flatten(), plan.padded).index_select(0, plan.choice_of_row)
        return rows.mul_(weight[:, None]), row_gate[plan.row_of_choice], None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_NIO: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x_RI, weight_NIO)
        ctx.sizes = sizes
        out = x_RI.new_empty(x_RI.shape[0], weight_NIO.shape[2])
        for grove, x, y in blocks(sizes, x_RI, out):
            torch.mm(x, weight_NIO[grove], out=y)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_RI, weight_NIO = ctx.saved_tensors
        grad_RO = grad_RO.contiguous()
        grad_x = torch.empty_like(x_RI) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight_NIO) if ctx.needs_input_grad[1] else None
        if grad_weight is not None:
            for grove, size in enumerate(ctx.sizes):
                if not size:
                    grad_weight[grove].zero_()
        for grove, x, g, start in _offsets(ctx.sizes, x_RI, grad_RO):
            if grad_x is not None:
                torch.mm(g, weight_NIO[grove].T, out=grad_x[start : start + len(g)])
            if grad_weight is not None:
                torch.mm(x.T, g, out=grad_weight[grove])
        return grad_x, grad_weight, None


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_NDO: Tensor, plan: Plan) -> Tensor:
        ctx.save_for_backward(x_TD, weight_NDO)
        ctx.plan = plan
        x, weights = pad(x_TD, plan.padded), weight_NDO.unbind()
        out = x.new_empty(len(plan.token_of_row), weight_NDO.shape[2])
        for grove, token, y in blocks(plan.sizes, plan.token_of_row, out):
            torch.mm(x.index_select(0, token), weights[grove], out=y)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TD, weight_NDO = ctx.saved_tensors
        x, weights = pad(x_TD, ctx.plan.padded), weight_NDO.transpose(1, 2).unbind()
        grad_x, grad_weight = torch.zeros_like(at_least_fp32(x)), torch.zeros_like(weight_NDO)
        for grove, token, grad in blocks(ctx.plan.sizes, ctx.plan.token_of_row, grad_RO.contiguous()):
            torch.mm(x.index_select(0, token).T, grad, out=grad_weight[grove])
            # No token occurs twice among the rows of one grove, so that the sum has one order on every device (padding rows all add zero).
            grad_x.index_add_(0, token, torch.mm(grad, weights[grove]).to(grad_x.dtype))
        return grad_x[: len(x_TD)].to(x_TD.dtype), grad_weight, None


def blocks(sizes: list[int], *rows: Tensor) -> Iterator[tuple[Any, ...]]:
    """For each grove that has rows: its number, and its part of every tensor."""
    start = 0
    for grove, size in enumerate(sizes):
        if size:
            yield grove, *(part[start : start + size] for part in rows)
        start += size


@dataclass
class Block:
    """Consecutive rows that are worked on together: whole groves, or a part of one."""

    groves: list[int]
    """The groves of the block, in order."""
    sizes: list[int]
    """Rows of each of them in the block; none is 0."""
    rows: slice
    """Where the block lies among all rows."""

    def each(self, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
        """For each grove its number, and its part of every tensor of the block's rows."""
        return zip(self.groves, *(tensor.split(self.sizes) for tensor in tensors), strict=True)


def row_blocks(sizes: list[int], at_most: int) -> list[Block]:
    """Cut the rows of all groves into blocks of at most `at_most` rows, in order."""
    done = [Block([], [], slice(0, 0))]
    for grove, size in enumerate(sizes):
        for first in range(0, size, at_most):
            piece, block = min(at_most, size - first), done[-1]
            if block.rows.stop - block.rows.start + piece > at_most:
                block = Block([], [], slice(block.rows.stop, block.rows.stop))
                done.append(block)
            block.groves.append(grove)
            block.sizes.append(piece)
            block.rows = slice(block.rows.start, block.rows.stop + piece)
    return done if done[0].groves else done[1:]


def _offsets(sizes: list[int], *rows: Tensor) -> Iterator[tuple[Any, ...]]:
    start = 0
    for grove, *parts in blocks(sizes, *rows):
        yield grove, *parts, start
        start += sizes[grove]
