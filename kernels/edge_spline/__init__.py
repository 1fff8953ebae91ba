"""Learnable univariate functions on the edges of a network: the full per-edge layer, its decode step, and the grouped activation.

The operators are torch.ops.kan_train.edge_layer, edge_layer_grad_input, edge_layer_grad_weights, edge_layer_decode, grouped_activation and
grouped_activation_grad. They run Triton kernels where there are any for the device and the type, `reference.py` elsewhere. Each is differentiable once.

R rows sorted by grove, N groves, I inputs, O outputs, n coefficients of a function, M columns, F functions a grove, G grid cells, P = k + 1 powers.
docs/kernels/edge_spline.md explains the kernels, docs/model.md (section 1) the mathematics.
"""

from typing import Any

import torch
from torch import Tensor

from kan_train.kernels.backend import runs_triton
from kan_train.kernels.edge_spline import reference
from kan_train.kernels.edge_spline.functions import Functions

__all__ = ["edge_layer", "edge_layer_decode", "grouped_activation"]

_KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def edge_layer(
    u_RI: Tensor,
    base_NIO: Tensor,
    coefficients_NCO: Tensor,
    offsets_N1: Tensor | None = None,
    kind: str = "bspline",
    order: int = 3,
    grid: int = 5,
    low: float = -3.0,
    high: float = 3.0,
) -> Tensor:
    """y_o = sum_i [ w_oi silu(u_i) + sum_g c_oig B_g(u_i) ], every grove's rows by its own functions: [R, I] -> [R, O].

    u_RI: rows sorted by grove, of the type of the result. base_NIO: w. coefficients_NCO [N, I n, O]: c, where the n coefficients of an input are neighbours:
    n = G + k for `bspline`, G (k + 1) for `piecewise_poly`. offsets_N1: int32 [N + 1] on the device, the rows of grove i being offsets[i] : offsets[i + 1],
    from 0 to R; None for one grove that has all rows. Functions continue linearly outside [low, high].

    Differentiable once in u, base and coefficients; keeps only these for the backward pass. The basis is evaluated in fp32 (fp64 for fp64) and rounded to the
    type of u for the product, sums are at least fp32. Raises ValueError for shapes or functions that do not fit.
    """
    functions = Functions(kind, order, grid, low, high)
    _check_layer(u_RI, base_NIO, coefficients_NCO, functions)
    groves = base_NIO.shape[0]
    if offsets_N1 is None:
        _require(groves == 1, f"offsets_N1 is needed to share rows out among {groves} groves")
        offsets_N1 = torch.arange(2, device=u_RI.device, dtype=torch.int32) * u_RI.shape[0]
    _require(offsets_N1.shape == (groves + 1,), f"offsets_N1 {list(offsets_N1.shape)} must be [{groves + 1}]")
    weights = [weight.to(u_RI.dtype).contiguous() for weight in (base_NIO, coefficients_NCO)]
    offsets = offsets_N1.to(torch.int32).contiguous()
    return torch.ops.kan_train.edge_layer(u_RI.contiguous(), *weights, offsets, kind, order, grid, low, high)


def edge_layer_decode(
    u_BI: Tensor,
    base_NIO: Tensor,
    coefficients_NCO: Tensor,
    grove_B: Tensor | None = None,
    kind: str = "bspline",
    order: int = 3,
    grid: int = 5,
    low: float = -3.0,
    high: float = 3.0,
) -> Tensor:
    """`edge_layer` for few rows in any order, [B, I] -> [B, O]: reads k + 2 of the n + 1 weights of every edge of a row, each row its own.

    grove_B: integers [B], the grove of every row; None where there is one grove; a row with a number outside 0 .. N - 1 gives zeros. Pays while a grove has
    fewer than about (n + 1) / (k + 2) rows. The basis is not rounded, so that results differ from `edge_layer` by the rounding of the basis. For inference:
    not differentiable. Raises ValueError for shapes or functions that do not fit.
    """
    functions = Functions(kind, order, grid, low, high)
    _check_layer(u_BI, base_NIO, coefficients_NCO, functions)
    if grove_B is None:
        _require(base_NIO.shape[0] == 1, f"grove_B is needed to tell which of {base_NIO.shape[0]} groves a row belongs to")
        grove_B = torch.zeros(u_BI.shape[0], device=u_BI.device, dtype=torch.int32)
    _require(grove_B.shape == u_BI.shape[:1], f"grove_B {list(grove_B.shape)} must be [{u_BI.shape[0]}], a grove for every row")
    weights = [weight.to(u_BI.dtype).contiguous() for weight in (base_NIO, coefficients_NCO)]
    return torch.ops.kan_train.edge_layer_decode(u_BI.contiguous(), *weights, grove_B.contiguous(), kind, order, grid, low, high)


def grouped_activation(h_RM: Tensor, table_NFCP: Tensor, offsets_N1: Tensor, low: float, step: float) -> Tensor:
    """silu(h) + f(h), every grove's rows by its own functions, one for M / F neighbouring columns: [R, M] -> [R, M] of the type of h.

    h_RM: rows sorted by grove. table_NFCP [N, F, G + 2, P] (at least fp32): polynomials in the position (h - low) / step - cell, lowest power first, of the
    cell left of the grid, the G cells, and the cell right of it. offsets_N1: int32 [N + 1] on the device, from 0 to R.

    Differentiable once in h and the table; keeps only these. Works in at least fp32. Raises ValueError for shapes that do not fit.
    """
    groves, functions, _, powers = table_NFCP.shape
    _require(h_RM.ndim == 2 and h_RM.shape[1] % functions == 0, f"h_RM {list(h_RM.shape)} must be [R, M] with M a multiple of the table's F={functions}")
    _require(2 <= powers <= 4, f"table_NFCP has {powers} powers; use 2 to 4 (functions of order 1 to 3)")
    _require(step > 0, f"step={step} must be positive; it is (high - low) / G")
    _require(offsets_N1.shape == (groves + 1,), f"offsets_N1 {list(offsets_N1.shape)} must be [{groves + 1}]")
    table = table_NFCP if table_NFCP.dtype == torch.float64 else table_NFCP.float()
    return torch.ops.kan_train.grouped_activation(h_RM.contiguous(), table.contiguous(), offsets_N1.to(torch.int32).contiguous(), low, step)


def _check_layer(u: Tensor, base: Tensor, coefficients: Tensor, functions: Functions) -> None:
    _require(u.ndim == 2 and base.ndim == 3 and base.shape[1] == u.shape[1], f"base {list(base.shape)} must be [N, I, O] with I of u {list(u.shape)}")
    expected = (base.shape[0], base.shape[1] * functions.count, base.shape[2])
    _require(
        coefficients.shape == expected,
        f"coefficients {list(coefficients.shape)} must be {list(expected)}: {functions.count} of a function for "
        f"kind={functions.kind}, order={functions.order}, grid={functions.grid}",
    )


def _require(fits: bool, message: str) -> None:
    if not fits:
        raise ValueError(message)


def _on(x: Tensor) -> Any:
    """The kernels, or the reference where there is none for this device or type."""
    if x.dtype in _KERNEL_TYPES and runs_triton(x.device):
        from kan_train.kernels.edge_spline import triton

        return triton
    return reference


# ---- operators: torch.compile, checkpointing and meta tensors see these


@torch.library.custom_op("kan_train::edge_layer", mutates_args=())
def _edge_layer(u: Tensor, base: Tensor, coefficients: Tensor, offsets: Tensor, kind: str, order: int, grid: int, low: float, high: float) -> Tensor:
    return _on(u).edge_layer(u, base, coefficients, offsets, Functions(kind, order, grid, low, high))


@_edge_layer.register_fake
def _(u: Tensor, base: Tensor, coefficients: Tensor, offsets: Tensor, kind: str, order: int, grid: int, low: float, high: float) -> Tensor:
    return u.new_empty(u.shape[0], base.shape[2])


@torch.library.custom_op("kan_train::edge_layer_grad_input", mutates_args=())
def _edge_layer_grad_input(
    grad: Tensor, u: Tensor, base: Tensor, coefficients: Tensor, offsets: Tensor, kind: str, order: int, grid: int, low: float, high: float
) -> Tensor:
    return _on(u).edge_layer_grad_input(grad, u, base, coefficients, offsets, Functions(kind, order, grid, low, high))


@_edge_layer_grad_input.register_fake
def _(grad: Tensor, u: Tensor, base: Tensor, coefficients: Tensor, offsets: Tensor, kind: str, order: int, grid: int, low: float, high: float) -> Tensor:
    return torch.empty_like(u)


@torch.library.custom_op("kan_train::edge_layer_grad_weights", mutates_args=())
def _edge_layer_grad_weights(
    grad: Tensor, u: Tensor, base: Tensor, offsets: Tensor, kind: str, order: int, grid: int, low: float, high: float
) -> tuple[Tensor, Tensor]:
    return _on(u).edge_layer_grad_weights(grad, u, base, offsets, Functions(kind, order, grid, low, high))


@_edge_layer_grad_weights.register_fake
def _(grad: Tensor, u: Tensor, base: Tensor, offsets: Tensor, kind: str, order: int, grid: int, low: float, high: float) -> tuple[Tensor, Tensor]:
    groves, inputs, outputs = base.shape
    return torch.empty_like(base), base.new_empty(groves, inputs * Functions(kind, order, grid, low, high).count, outputs)


def _keep_layer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.functions = inputs[4:]


def _edge_layer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    u, base, coefficients, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    ops, grads = torch.ops.kan_train, [None, None, None]
    if ctx.needs_input_grad[0]:
        grads[0] = ops.edge_layer_grad_input(grad, u, base, coefficients, offsets, *ctx.functions)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grads[1:] = ops.edge_layer_grad_weights(grad, u, base, offsets, *ctx.functions)
    return *grads, *[None] * 6


_edge_layer.register_autograd(_edge_layer_backward, setup_context=_keep_layer)


@torch.library.custom_op("kan_train::edge_layer_decode", mutates_args=())
def _edge_layer_decode(u: Tensor, base: Tensor, coefficients: Tensor, groves: Tensor, kind: str, order: int, grid: int, low: float, high: float) -> Tensor:
    return _on(u).edge_layer_decode(u, base, coefficients, groves, Functions(kind, order, grid, low, high))


@_edge_layer_decode.register_fake
def _(u: Tensor, base: Tensor, coefficients: Tensor, groves: Tensor, kind: str, order: int, grid: int, low: float, high: float) -> Tensor:
    return u.new_empty(u.shape[0], base.shape[2])


@torch.library.custom_op("kan_train::grouped_activation", mutates_args=())
def _grouped_activation(h: Tensor, table: Tensor, offsets: Tensor, low: float, step: float) -> Tensor:
    return _on(h).grouped_activation(h, table, offsets, low, step)


@_grouped_activation.register_fake
def _(h: Tensor, table: Tensor, offsets: Tensor, low: float, step: float) -> Tensor:
    return torch.empty_like(h)


@torch.library.custom_op("kan_train::grouped_activation_grad", mutates_args=())
def _grouped_activation_grad(grad: Tensor, h: Tensor, table: Tensor, offsets: Tensor, low: float, step: float) -> tuple[Tensor, Tensor]:
    return _on(h).grouped_activation_grad(grad, h, table, offsets, low, step)


@_grouped_activation_grad.register_fake
def _(grad: Tensor, h: Tensor, table: Tensor, offsets: Tensor, low: float, step: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h), torch.empty_like(table)


def _keep_activation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.grid = inputs[3:]


def _grouped_activation_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    h, table, offsets = ctx.saved_tensors
    return *torch.ops.kan_train.grouped_activation_grad(grad.contiguous(), h, table, offsets, *ctx.grid), None, None, None


_grouped_activation.register_autograd(_grouped_activation_backward, setup_context=_keep_activation)
