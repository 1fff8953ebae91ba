"""Cases of functions on edges for benchmarks/gpu.py.  R rows sorted by grove, N groves, I inputs (the scoring rank r), O outputs, n coefficients, B tokens."""

import functools
from typing import Any

import torch
from torch import Tensor

from kan_train.kernels import edge_spline
from kan_train.kernels.edge_spline import reference
from kan_train.kernels.edge_spline.functions import Functions

_CUBIC = Functions("bspline", 3, 5, -3.0, 3.0)
_LINEAR = Functions("bspline", 1, 3, -3.0, 3.0)
_INDEPENDENT = Functions("piecewise_poly", 3, 5, -3.0, 3.0)


def cases(device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """Groves of a training batch (32k tokens, K 8 of N 128, M 1024) at r 16 and 64, a plain layer, decode steps of 1 to 64 tokens, and the activation; bf16."""
    groves, outputs, rows, choices = (4, 40, 60, 2) if dry else (128, 1024, 32768 * 8, 8)
    found = []
    for inputs in (8,) if dry else (16, 64):
        for part in (_forward, _grad_input, _grad_weights):
            found.append(part(rows, groves, inputs, outputs, _CUBIC, torch.bfloat16, device))
    plain = (60, 1, 8, 40) if dry else (8192, 1, 1024, 1024)
    for part in (_forward, _grad_input, _grad_weights):
        found.append(part(*plain, _CUBIC, torch.bfloat16, device))
    for tokens in (1, 3) if dry else (1, 8, 64):
        found.append(_decode(tokens * choices, groves, 8 if dry else 64, outputs, _CUBIC, torch.bfloat16, device))
    for part in (_activation, _activation_grad):
        found.append(part(rows, groves, outputs, 2 if dry else 64, _CUBIC, torch.bfloat16, device))
    return found


def checks(device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """Odd sizes, one row, one and several eights of functions, in three dtypes."""
    shapes = [(60, 4, 5, 40)] if dry else [(1, 1, 1, 1), (1000, 7, 33, 130), (5000, 16, 16, 320), (6000, 1, 20, 72)]
    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for functions in (_CUBIC,) if dry else (_CUBIC, _LINEAR, _INDEPENDENT):
            for shape in shapes:
                found += [part(*shape, functions, dtype, device) for part in (_forward, _grad_input, _grad_weights)]
                found.append(_decode(min(shape[0], 50), *shape[1:], functions, dtype, device))
        for rows, groves, columns, count in [(60, 4, 40, 2)] if dry else [(1, 1, 1, 1), (1000, 7, 132, 11), (3000, 2, 140, 1), (5000, 16, 1024, 64)]:
            found += [part(rows, groves, columns, count, _CUBIC, dtype, device) for part in (_activation, _activation_grad)]
    return found


def _forward(rows: int, groves: int, inputs: int, outputs: int, functions: Functions, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    arguments, edges = _arguments(functions), inputs * (functions.count + 1)
    return _layer("forward", rows, groves, inputs, outputs, functions, dtype, device) | {
        "kernel": lambda _, *tensors: torch.ops.kan_train.edge_layer(*tensors, *arguments),
        "reference": lambda g, u, w, c, offsets: reference.edge_layer(*_wide(g, u, w, c)[1:], offsets, functions),
        "rivals": {
            "one matmul of equal FLOPs": _matmul((rows, edges), (edges, outputs), dtype, device),
            "basis in memory, _grouped_mm": lambda _, u, w, c, offsets: _materialised(u, w, c, offsets, functions),
        },
    }


def _grad_input(rows: int, groves: int, inputs: int, outputs: int, functions: Functions, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    arguments, edges = _arguments(functions), inputs * (functions.count + 1)
    return _layer("gradient of the input", rows, groves, inputs, outputs, functions, dtype, device) | {
        "kernel": lambda g, *tensors: torch.ops.kan_train.edge_layer_grad_input(g, *tensors, *arguments),
        "reference": lambda g, u, w, c, offsets: reference.edge_layer_grad_input(*_wide(g, u, w, c), offsets, functions),
        "rivals": {"one matmul of equal FLOPs": _matmul((rows, outputs), (outputs, edges), dtype, device)},
    }


def _grad_weights(rows: int, groves: int, inputs: int, outputs: int, functions: Functions, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    arguments, edges = _arguments(functions), inputs * (functions.count + 1)
    return _layer("gradients of the weights", rows, groves, inputs, outputs, functions, dtype, device) | {
        "kernel": lambda g, u, w, c, offsets: torch.ops.kan_train.edge_layer_grad_weights(g, u, w, offsets, *arguments),
        "reference": lambda g, u, w, c, offsets: reference.edge_layer_grad_weights(*_wide(g, u, w), offsets, functions),
        "rivals": {"one matmul of equal FLOPs": _matmul((edges, rows), (rows, outputs), dtype, device)},
    }


def _layer(name: str, rows: int, groves: int, inputs: int, outputs: int, functions: Functions, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What the three products of a layer have in common: each reads or writes u, y and the weights once, and multiplies as much."""

    def make(seed: int) -> tuple[Tensor, ...]:
        """Gradient of y, u, base, coefficients, offsets."""
        random = _random(seed, device, dtype)
        weights = random(groves, inputs, outputs), random(groves, inputs * functions.count, outputs)
        return random(rows, outputs), random(rows, inputs), *weights, _offsets(rows, groves, seed, device)

    edges = inputs * (functions.count + 1)
    return {
        "name": f"edge layer {name}, R {rows} N {groves} I {inputs} O {outputs} n {functions.count} {_short(dtype)}",
        "make": make,
        "bytes": dtype.itemsize * (rows * (inputs + outputs) + groves * edges * outputs),
        "flops": 2 * rows * edges * outputs,
    }


def _decode(rows: int, groves: int, inputs: int, outputs: int, functions: Functions, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    arguments = _arguments(functions)

    def make(seed: int) -> tuple[Tensor, ...]:
        random = _random(seed, device, dtype)
        generator = torch.Generator(device).manual_seed(seed)
        grove = torch.randint(groves, (rows,), device=device, generator=generator)
        return random(rows, inputs), random(groves, inputs, outputs), random(groves, inputs * functions.count, outputs), grove

    def whole(u: Tensor, w: Tensor, c: Tensor, grove: Tensor) -> Tensor:
        """The kernel of a batch on the same rows, sorted: reads every coefficient of a grove, once."""
        sorted_grove, order = grove.sort()
        offsets = torch.searchsorted(sorted_grove, torch.arange(groves + 1, device=grove.device)).int()
        return edge_spline.edge_layer(u[order], w, c, offsets, *arguments)

    return {
        "name": f"edge layer decode, B {rows} N {groves} I {inputs} O {outputs} n {functions.count} {_short(dtype)}",
        "make": make,
        "kernel": lambda *tensors: edge_spline.edge_layer_decode(*tensors, *arguments),
        "reference": lambda u, w, c, grove: reference.edge_layer_decode(*_wide(u, w, c), grove, functions),
        "rivals": {"sort, then the whole layer": whole, "gather in torch": lambda *tensors: reference.edge_layer_decode(*tensors, functions)},
        # No more than all weights, which many rows would share.
        "bytes": dtype.itemsize * (inputs * outputs * min(rows * (functions.order + 2), groves * (functions.count + 1)) + rows * (inputs + outputs)),
        "flops": 2 * rows * inputs * (functions.order + 2) * outputs,
    }


def _activation(rows: int, groves: int, columns: int, count: int, functions: Functions, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    low, step = functions.low, 1 / functions.inverse_step
    return _elementwise("activation", rows, groves, columns, count, functions, dtype, device, 2) | {
        "kernel": lambda _, h, table, offsets: edge_spline.grouped_activation(h, table, offsets, low, step),
        "reference": lambda _, h, table, offsets: reference.grouped_activation(*_wide(h, table), offsets, low, step),
        "rivals": {"torch silu alone": lambda g, h, *_: torch.nn.functional.silu(h)},
    }


def _activation_grad(rows: int, groves: int, columns: int, count: int, functions: Functions, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    low, step = functions.low, 1 / functions.inverse_step
    return _elementwise("gradients of the activation", rows, groves, columns, count, functions, dtype, device, 3) | {
        "kernel": lambda g, h, table, offsets: torch.ops.kan_train.grouped_activation_grad(g, h, table, offsets, low, step),
        "reference": lambda g, h, table, offsets: reference.grouped_activation_grad(*_wide(g, h, table), offsets, low, step),
        "rivals": {"torch silu's gradient alone": lambda g, h, *_: torch.ops.aten.silu_backward(g, h)},
    }


def _elementwise(
    name: str, rows: int, groves: int, columns: int, count: int, functions: Functions, dtype: torch.dtype, device: torch.device, passes: int
) -> dict[str, Any]:
    def make(seed: int) -> tuple[Tensor, ...]:
        """Gradient, h, table, offsets."""
        random = _random(seed, device, dtype)
        table = _random(seed, device, torch.float32)(groves, count, functions.grid + 2, functions.order + 1)
        return random(rows, columns), random(rows, columns), table, _offsets(rows, groves, seed, device)

    found = {
        "name": f"{name}, R {rows} N {groves} M {columns} F {count} G {functions.grid} {_short(dtype)}",
        "make": make,
        "bytes": passes * dtype.itemsize * rows * columns,
        "flops": 0,
    }
    # The reference holds a polynomial of its own for every element.
    return found | ({"check": False} if rows * columns > 2**24 else {})


def _matmul(left: tuple[int, int], right: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Any:
    """cuBLAS on operands of these shapes, whatever the inputs: they are made once, before the timing."""

    @functools.cache
    def operands() -> tuple[Tensor, Tensor]:
        random = _random(0, device, dtype)
        return random(*left), random(*right)

    return lambda *_: torch.mm(*operands())


def _materialised(u: Tensor, w: Tensor, c: Tensor, offsets: Tensor, functions: Functions) -> Tensor:
    """What a layer without a kernel of its own would do: the basis written to memory, then two grouped products. The basis itself in eager torch."""
    first, values, _ = reference.active(u.float(), functions)
    basis = values.new_zeros(*u.shape, functions.count).scatter_(-1, first[..., None] + torch.arange(functions.order + 1, device=u.device), values)
    ends = offsets[1:]
    return torch._grouped_mm(torch.nn.functional.silu(u), w, offs=ends) + torch._grouped_mm(basis.flatten(1).to(u.dtype), c, offs=ends)


def _arguments(functions: Functions) -> tuple[Any, ...]:
    return functions.kind, functions.order, functions.grid, functions.low, functions.high


def _offsets(rows: int, groves: int, seed: int, device: torch.device) -> Tensor:
    """int32 [N + 1]: every row a random grove, as under a balanced router."""
    grove = torch.randint(groves, (rows,), device=device, generator=torch.Generator(device).manual_seed(seed))
    return torch.cat((grove.new_zeros(1), torch.bincount(grove, minlength=groves).cumsum(0))).int()


def _random(seed: int, device: torch.device, dtype: torch.dtype) -> Any:
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(*shape, device=device, dtype=dtype, generator=generator)


def _wide(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """fp64 where the gradient or the result is small, which the first tensor tells; fp32 at the shapes that are timed."""
    dtype = torch.float64 if x.numel() <= 2**22 else torch.float32
    return tuple(tensor.to(dtype) for tensor in (x, *others))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
