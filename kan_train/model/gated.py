"""The routed sum of gated groves as one function of its inputs   (docs/model.md, section 2).

    y_t = sum_k gate_tk * W_out (F(W_up u) * (W_v x_t)),   F = silu + f,   u = x_t, or the choice's own input (the `reuse` kind)

T tokens, K choices a token, D width, I inputs of W_up, N groves, M grove width, R rows, n rows of a block.

Rows are worked through in blocks that stay in cache: products run grove by grove, elementwise work block by block. Of a row only W_up u and W_v x are
kept for the backward pass, where its token is gathered again and its activation evaluated again, value and slope together.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kan_train.model.dispatch import Block, Plan, pad, row_blocks
from kan_train.model.norm import at_least_fp32
from kan_train.model.splines import Cells, block_rows, locate


@dataclass(frozen=True)
class Grid:
    """Where the cells of a table lie."""

    low: float
    step: float


def gated_sum(
    x_TD: Tensor, own_CI: Tensor | None, gate_TK: Tensor, up_NIM: Tensor, value_NDM: Tensor, out_NMD: Tensor, table: Tensor | None, plan: Plan, grid: Grid
) -> Tensor:
    """[T, D] -> [T, D] in the dtype of x, differentiable once in every tensor.

    own_CI [T K, I] holds W_up's input for every choice, where that is not x. table [N, F, G + 2, P] (at least fp32) is that of `splines.cell_table`,
    None for plain silu. Activations, their gradients, and sums over a token's choices are at least fp32.
    """
    return _GatedSum.apply(x_TD, own_CI, gate_TK, up_NIM, value_NDM, out_NMD, table, plan, grid)


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, own: Tensor | None, gate: Tensor, up: Tensor, value: Tensor, out: Tensor, table: Tensor | None, plan: Plan, grid: Grid
    ) -> Tensor:
        rows, hidden = len(plan.token_of_row), up.shape[2]
        h, v = x.new_empty(rows, hidden), x.new_empty(rows, hidden)
        inputs = _Inputs(x, own, gate, plan)
        y = at_least_fp32(x).new_zeros(len(inputs.x), out.shape[2])
        ups, values, outs = up.unbind(), value.unbind(), out.unbind()
        for block in row_blocks(plan.sizes, block_rows(hidden, x.device)):
            x_n, own_n, gate_n, token_n = inputs.of(block)
            h_n, v_n = h[block.rows], v[block.rows]
            for grove, x_g, own_g, h_g, v_g in block.each(x_n, own_n, h_n, v_n):
                torch.mm(own_g, ups[grove], out=h_g)
                torch.mm(x_g, values[grove], out=v_g)
            product = _activation(h_n, table, block, grid).mul_(v_n).to(x.dtype)
            for grove, product_g, gate_g, token_g in block.each(product, gate_n, token_n):
                # One grove at a time: no token occurs twice among its rows, so that the sum has one order on every device.
                y.index_add_(0, token_g, torch.mm(product_g, outs[grove]).mul(gate_g))
        ctx.save_for_backward(x, own, gate, up, value, out, table, h, v)
        ctx.plan, ctx.grid = plan, grid
        return y[: len(x)].to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, own, gate, up, value, out, table, h, v = ctx.saved_tensors
        inputs, grads = _Inputs(x, own, gate, ctx.plan), _Gradients(x, own, gate, up, value, out, table, ctx.plan)
        padded, outs = pad(grad_y.contiguous(), ctx.plan.padded), out.transpose(1, 2).unbind()
        for block in row_blocks(ctx.plan.sizes, block_rows(h.shape[1], x.device)):
            x_n, own_n, gate_n, token_n = inputs.of(block)
            grad_n = padded.index_select(0, token_n)
            grad_product = torch.empty_like(h[block.rows])
            for grove, grad_g, product_g in block.each(grad_n, grad_product):
                torch.mm(grad_g, outs[grove], out=product_g)
            grad_h, grad_v, product, grad_gate = _gated_gradients(h[block.rows], v[block.rows], grad_product, gate_n, table, block, ctx.grid, grads)
            choice_n = ctx.plan.choice_of_row[block.rows]
            grads.gate.index_copy_(0, choice_n, grad_gate)
            for grove, *parts in block.each(own_n, x_n, product, grad_h, grad_v, grad_n, token_n, choice_n):
                grads.add_rows(grove, *parts)
        return grads.results()


def _activation(h: Tensor, table: Tensor | None, block: Block, grid: Grid) -> Tensor:
    """F(h) in at least fp32."""
    wide = at_least_fp32(h)
    cells = _cells(wide, table, block, grid)
    return F.silu(wide) if cells is None else F.silu(wide).add_(cells.value())


def _gated_gradients(
    h: Tensor, v: Tensor, grad_product: Tensor, gate: Tensor, table: Tensor | None, block: Block, grid: Grid, grads: "_Gradients"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h and v, gate * F(h) v, and the gradient of the gate, from the ungated gradient of F(h) v; adds that of the table to `grads`."""
    dtype, h, v, grad = h.dtype, at_least_fp32(h), at_least_fp32(v), at_least_fp32(grad_product)
    sigmoid = h.sigmoid()
    value = h * sigmoid
    slope = torch.addcmul(value, sigmoid, 1 - value)  # silu' = silu + sigmoid (1 - silu)
    cells = _cells(h, table, block, grid)
    if cells is not None:
        value += cells.value()
        slope += cells.slope()
    product = value * v
    # The product of W_out's output with its gradient, taken on this side of W_out, where the row is at hand.
    grad_gate = (product * grad).sum(-1)
    grad = grad * gate
    grad_v = value.mul_(grad)
    grad_value = grad.mul_(v)
    if cells is not None:
        grads.add_table(block, cells, grad_value)
    return slope.mul_(grad_value).to(dtype), grad_v.to(dtype), product.mul_(gate).to(dtype), grad_gate.to(gate.dtype)


def _cells(h: Tensor, table: Tensor | None, block: Block, grid: Grid) -> Cells | None:
    if table is None:
        return None
    first, last = block.groves[0], block.groves[-1]
    offset = None
    if last > first:
        numbers = torch.tensor(block.groves, dtype=torch.int32).sub_(first).mul_(table.shape[1])
        offset = numbers.repeat_interleave(torch.tensor(block.sizes))[:, None].to(h.device)
    return locate(h, table[first : last + 1], offset, grid.low, grid.step)


class _Inputs:
    """Rows of the inputs, padding rows zero."""

    def __init__(self, x: Tensor, own: Tensor | None, gate: Tensor, plan: Plan) -> None:
        self.plan = plan
        self.x, self.gate = pad(x, plan.padded), pad(gate.flatten(), plan.padded)
        self.own = None if own is None else pad(own, plan.padded)

    def of(self, block: Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [n, D], W_up's input [n, I], gate [n, 1] and token [n] of a block's rows."""
        token, choice = self.plan.token_of_row[block.rows], self.plan.choice_of_row[block.rows]
        x = self.x.index_select(0, token)
        return x, x if self.own is None else self.own.index_select(0, choice), self.gate.index_select(0, choice)[:, None], token


class _Gradients:
    """Gradients of every input, filled block by block; those of tokens and choices end with a line for padding where the plan has any."""

    def __init__(
        self, x: Tensor, own: Tensor | None, gate: Tensor, up: Tensor, value: Tensor, out: Tensor, table: Tensor | None, plan: Plan
    ) -> None:
        self.dtype, self.plan = x.dtype, plan
        self.x = pad(torch.zeros_like(at_least_fp32(x)), plan.padded)
        self.own = None if own is None else pad(torch.zeros_like(own), plan.padded)
        self.gate = pad(torch.zeros_like(gate).flatten(), plan.padded)
        self.table = None if table is None else torch.zeros_like(table)
        self.weights = [torch.empty_like(weight) for weight in (up, value, out)]
        self.by_grove = list(zip(*(weight.unbind() for weight in self.weights), strict=True))
        self.transposed = list(zip(up.transpose(1, 2).unbind(), value.transpose(1, 2).unbind(), strict=True))
        self.started = [False] * len(up)

    def add_table(self, block: Block, cells: Cells, grad_nM: Tensor) -> None:
        assert self.table is not None
        cells.moments(grad_nM, self.table[block.groves[0] : block.groves[-1] + 1])

    def add_rows(
        self, grove: int, own: Tensor, x: Tensor, product: Tensor, grad_h: Tensor, grad_v: Tensor, grad_y: Tensor, token: Tensor, choice: Tensor
    ) -> None:
        """One grove's part of a block: its matrices' gradients, and those of its rows' inputs."""
        beta = 1 if self.started[grove] else 0  # 0 overwrites what the memory held
        self.started[grove] = True
        for weight, left, right in zip(self.by_grove[grove], (own, x, product), (grad_h, grad_v, grad_y), strict=True):
            torch.addmm(weight, left.T, right, beta=beta, out=weight)
        up, value = self.transposed[grove]
        grad_x = torch.mm(grad_v, value)
        if self.own is None:
            grad_x.addmm_(grad_h, up)
        else:
            self.own.index_copy_(0, choice, torch.mm(grad_h, up))
        self.x.index_add_(0, token, grad_x.to(self.x.dtype))

    def results(self) -> tuple[Tensor | None, ...]:
        """In the order of the inputs of `_GatedSum.forward`."""
        for parts, started in zip(self.by_grove, self.started, strict=True):
            for weight in () if started else parts:
                weight.zero_()
        tokens, choices = self.plan.row_of_choice.shape
        own = None if self.own is None else self.own[: tokens * choices]
        gate = self.gate[: tokens * choices].view(tokens, choices)
        return self.x[:tokens].to(self.dtype), own, gate, *self.weights, self.table, None, None
