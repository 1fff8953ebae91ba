"""Products grouped by grove and the gated pipeline: inputs at the stated shapes, the kernels, their rivals, and what must at least move and be multiplied.

T tokens, K choices a token, R = T K rows, D width, N groves, M grove width, F functions a grove.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_train.kernels.grove_gemm import combine_rows, gated_groves, grouped_gemm

GRID, POWERS, GROUP = 5, 4, 16  # cells, powers of a cubic, columns that share a function
LOW, STEP = -3.0, 6.0 / GRID


class Shape(NamedTuple):
    """Of a layer."""

    tokens: int
    groves: int
    choices: int
    width: int
    hidden: int

    def label(self) -> str:
        return f"T {self.tokens} N {self.groves} K {self.choices} D {self.width} M {self.hidden}"


def cases(device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """Timed rows: 2,048 and 512 rows a grove, and the few tokens of a decode step."""
    if dry:
        shapes, few = [Shape(16, 4, 2, 32, 32)], [Shape(1, 4, 2, 32, 32)]
    else:
        shapes = [Shape(tokens, 128, 8, 2048, 1024) for tokens in (32768, 8192)]
        few = [Shape(tokens, 128, 8, 2048, 1024) for tokens in (1, 8, 64)]
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        layer = Layer(shape, torch.bfloat16, device)
        rows += [_up(layer), _down(layer), _up_backward(layer), _combine(layer), _gated(layer, "inference"), _gated_backward(layer)]
    rows += [_gated(Layer(shape, torch.bfloat16, device), "decode") for shape in few]
    return rows


def checks(device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """Small shapes in three types, forward and gradients, against the room's reference in float64."""
    rows = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shape in (Shape(16, 4, 2, 32, 32),) if dry else (Shape(300, 8, 2, 256, 256), Shape(77, 8, 3, 136, 80), Shape(5, 16, 2, 128, 64)):
            layer = Layer(shape, dtype, device)
            for reuse in (False, True):
                kernel = _gradients(layer, reuse)
                name = f"check gated {'reuse ' if reuse else ''}forward + gradients, {shape.label()} {_type(dtype)}"
                reference = lambda *inputs, kernel=kernel: kernel(*(part.double() if part.is_floating_point() else part for part in inputs))  # noqa: E731
                rows.append(_row(name, lambda seed, layer=layer: layer.small(seed), kernel, reference, {}, 0, 0))
    return rows


class Layer:
    """Weights of a layer, made once, and inputs, made anew for every copy that a measurement rotates."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self._weights: tuple[Tensor, ...] | None = None

    def random(self, seed: int, *shape: int, scale: float = 1.0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return (torch.randn(*shape, generator=generator, device=self.device) * scale).to(self.dtype)

    def weights(self) -> tuple[Tensor, ...]:
        """W_up, W_v, W_out and the table."""
        if self._weights is None:
            _, groves, _, width, hidden = self.shape
            table = self.random(4, groves, max(hidden // GROUP, 1), GRID + 2, POWERS, scale=0.1).float()
            self._weights = (
                self.random(1, groves, width, hidden, scale=width**-0.5), self.random(2, groves, width, hidden, scale=width**-0.5),
                self.random(3, groves, hidden, width, scale=hidden**-0.5), table,
            )  # fmt: skip
        return self._weights

    def routing(self, seed: int) -> tuple[Tensor, ...]:
        """token_of_row, choice_of_row, row_of_choice, offsets of a random routing."""
        tokens, groves, choices = self.shape[:3]
        generator = torch.Generator(self.device).manual_seed(seed)
        flat = torch.rand(tokens, groves, generator=generator, device=self.device).topk(choices).indices.flatten()
        choice_of_row = flat.argsort(stable=True)
        row_of_choice = torch.empty_like(choice_of_row)
        row_of_choice[choice_of_row] = torch.arange(len(flat), device=self.device)
        offsets = torch.zeros(groves + 1, dtype=torch.int32, device=self.device)
        offsets[1:] = torch.bincount(flat, minlength=groves).cumsum(0)
        return choice_of_row // choices, choice_of_row, row_of_choice.view(tokens, choices), offsets

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        """x, gate, and the routing."""
        gate = torch.rand(self.shape.tokens, self.shape.choices, generator=torch.Generator(self.device).manual_seed(seed + 1), device=self.device)
        return self.random(seed, self.shape.tokens, self.shape.width), gate, *self.routing(seed + 2)

    def small(self, seed: int) -> tuple[Tensor, ...]:
        """`inputs`, own inputs of rank 16 and their W_up, and the weights, for the checks."""
        own = self.random(seed + 3, self.shape.tokens, self.shape.choices, 16)
        return *self.inputs(seed), own, self.random(seed + 4, self.shape.groves, 16, self.shape.hidden, scale=0.25), *self.weights()


def _up(layer: Layer) -> dict[str, Any]:
    def kernel(x: Tensor, _gate: Tensor, token: Tensor, _choice: Tensor, row: Tensor, offsets: Tensor) -> Tensor:
        return grouped_gemm(x, layer.weights()[0], offsets, token, row)

    rivals = {
        "gather + torch._grouped_mm": lambda x, _g, token, _c, _r, offsets: torch._grouped_mm(x[token], layer.weights()[0], offs=offsets[1:]),
        "gather + loop of cuBLAS": lambda x, _g, token, _c, _r, offsets: _loop(x[token], layer.weights()[0], offsets),
        "one dense product of equal FLOPs": lambda x, _g, token, _c, _r, _o: x[token] @ layer.weights()[0][0],
    }
    flops, (rows, width, hidden) = _flops(layer.shape), _sizes(layer.shape)
    least = _bytes(layer, layer.shape.tokens * width + _read(layer.shape) * width * hidden + rows * hidden)
    return _row(f"grouped gemm, tokens gathered, {layer.shape.label()} bf16", layer.inputs, kernel, rivals["gather + loop of cuBLAS"], rivals, least, flops)


def _down(layer: Layer) -> dict[str, Any]:
    def make(seed: int) -> tuple[Tensor, Tensor]:
        return layer.random(seed, layer.shape.tokens * layer.shape.choices, layer.shape.hidden), layer.routing(seed + 2)[3]

    rivals = {
        "torch._grouped_mm": lambda x, offsets: torch._grouped_mm(x, layer.weights()[2], offs=offsets[1:]),
        "loop of cuBLAS": lambda x, offsets: _loop(x, layer.weights()[2], offsets),
        "one dense product of equal FLOPs": lambda x, _offsets: x @ layer.weights()[2][0],
    }
    flops, (rows, width, hidden) = _flops(layer.shape), _sizes(layer.shape)
    least = _bytes(layer, rows * hidden + _read(layer.shape) * width * hidden + rows * width)
    name = f"grouped gemm, rows, {layer.shape.label()} bf16"
    return _row(name, make, lambda x, offsets: grouped_gemm(x, layer.weights()[2], offsets), rivals["loop of cuBLAS"], rivals, least, flops)


def _up_backward(layer: Layer) -> dict[str, Any]:
    def grads(product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        def run(rows: Tensor, grad: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
            leaves = rows.detach().requires_grad_(), layer.weights()[0].detach().requires_grad_()
            return torch.autograd.grad(product(*leaves, offsets), leaves, grad)

        return run

    def make(seed: int) -> tuple[Tensor, ...]:
        rows, width, hidden = _sizes(layer.shape)
        return layer.random(seed, rows, width), layer.random(seed + 1, rows, hidden), layer.routing(seed + 2)[3]

    rivals = {
        "torch._grouped_mm": grads(lambda rows, weight, offsets: torch._grouped_mm(rows, weight, offs=offsets[1:])),
        "loop of cuBLAS": grads(_loop),
    }
    rows, width, hidden = _sizes(layer.shape)
    least = _bytes(layer, 3 * rows * width + 2 * rows * hidden + (2 * _read(layer.shape) + layer.shape.groves) * width * hidden)
    name = f"grouped gemm, forward + backward, {layer.shape.label()} bf16"
    return _row(name, make, grads(lambda *inputs: grouped_gemm(*inputs)), rivals["loop of cuBLAS"], rivals, least, 3 * _flops(layer.shape))


def _combine(layer: Layer) -> dict[str, Any]:
    def make(seed: int) -> tuple[Tensor, ...]:
        _, gate, _, choice, row, _ = layer.inputs(seed)
        return layer.random(seed, layer.shape.tokens * layer.shape.choices, layer.shape.width), gate, choice, row

    def gather(y: Tensor, gate: Tensor, _choice: Tensor, row: Tensor) -> Tensor:
        return torch.einsum("tkd,tk->td", y[row], gate.to(y.dtype))

    rows, width, _ = _sizes(layer.shape)
    least = _bytes(layer, rows * width + layer.shape.tokens * width) + 12 * rows
    return _row(f"combine rows, {layer.shape.label()} bf16", make, combine_rows, gather, {"gather + einsum": gather}, least, 2 * rows * width)


def _gated(layer: Layer, what: str) -> dict[str, Any]:
    def kernel(x: Tensor, gate: Tensor, *rows: Tensor) -> Tensor:
        up, value, out, table = layer.weights()
        with torch.no_grad():
            return gated_groves(x, None, gate, up, value, out, table, *rows, low=LOW, step=STEP)

    rivals = {
        "gather, torch._grouped_mm, elementwise, combine": lambda *inputs: _steps(layer, *inputs, product=_grouped_mm),
        "the same with a loop of cuBLAS": lambda *inputs: _steps(layer, *inputs, product=_loop),
    }
    rows, width, hidden = _sizes(layer.shape)
    least = _bytes(layer, 2 * layer.shape.tokens * width + 3 * _read(layer.shape) * width * hidden) + 12 * rows
    reference = rivals["the same with a loop of cuBLAS"]
    return _row(f"gated groves, {what}, {layer.shape.label()} bf16", layer.inputs, kernel, reference, rivals, least, 3 * _flops(layer.shape))


def _gated_backward(layer: Layer) -> dict[str, Any]:
    def run(forward: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        def gradients(x: Tensor, gate: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
            leaves = [part.detach().requires_grad_() for part in (x, gate, *layer.weights())]
            y = forward(*leaves, *rows)
            return torch.autograd.grad(y, leaves, torch.ones_like(y))

        return gradients

    def fused(x: Tensor, gate: Tensor, up: Tensor, value: Tensor, out: Tensor, table: Tensor, *rows: Tensor) -> Tensor:
        return gated_groves(x, None, gate, up, value, out, table, *rows, low=LOW, step=STEP)

    def steps(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, gate, up, value, out, table, *rows: _steps(layer, x, gate, *rows, product=product, weights=(up, value, out, table))

    rivals = {"gather, torch._grouped_mm, elementwise, combine": run(steps(_grouped_mm)), "the same with a loop of cuBLAS": run(steps(_loop))}
    rows, width, hidden = _sizes(layer.shape)
    # x, y and their gradients; h and v once out and once in; the matrices twice in and their gradients once out.
    matrices = (2 * _read(layer.shape) + layer.shape.groves) * 3 * width * hidden
    least = _bytes(layer, 4 * layer.shape.tokens * width + 4 * rows * hidden + matrices)
    name = f"gated groves, forward + backward, {layer.shape.label()} bf16"
    return _row(name, layer.inputs, run(fused), rivals["the same with a loop of cuBLAS"], rivals, least, 9 * _flops(layer.shape))


def _gradients(layer: Layer, reuse: bool) -> Callable[..., tuple[Tensor, ...]]:
    """y and the gradients of everything, from the inputs of `Layer.small`."""

    def run(x: Tensor, gate: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        token, choice, row, offsets, own, own_up, up, value, out, table = others
        table = table.float() if x.dtype != torch.float64 else table
        leaves = [part.detach().requires_grad_() for part in (x, gate, own_up if reuse else up, value, out, table, *((own,) if reuse else ()))]
        x, gate, up, value, out, table, *own_leaf = leaves
        y = gated_groves(x, own_leaf[0] if reuse else None, gate, up, value, out, table, token, choice, row, offsets, low=LOW, step=STEP)
        weights = torch.linspace(-1, 1, y.shape[1], device=y.device, dtype=y.dtype).expand_as(y)
        return y, *torch.autograd.grad(y, leaves, weights)

    return run


def _steps(
    layer: Layer, x: Tensor, gate: Tensor, token: Tensor, choice: Tensor, row: Tensor, offsets: Tensor, *, product: Callable[..., Tensor],
    weights: tuple[Tensor, ...] | None = None,
) -> Tensor:  # fmt: skip
    """The pipeline without fusion: every step a library's kernel."""
    up, value, out, table = weights or layer.weights()
    x_rows = x[token]
    h = product(x_rows, up, offsets)
    activated = F.silu(h) + _spline(h, table, offsets)
    rows = product((activated * product(x_rows, value, offsets)).to(x.dtype), out, offsets)
    return torch.einsum("tkd,tk->td", rows[row], gate.to(rows.dtype))


def _spline(h: Tensor, table: Tensor, offsets: Tensor) -> Tensor:
    """f(h) by a gather of a cell's coefficients."""
    functions = table.shape[1]
    row = torch.arange(len(h), device=h.device, dtype=offsets.dtype)
    grove = torch.searchsorted(offsets[1:].contiguous(), row, right=True)
    scaled = (h.float() - LOW) / STEP
    cell = scaled.floor().clamp(-1, GRID)
    u = scaled - cell
    function = torch.arange(h.shape[1], device=h.device) // (h.shape[1] // functions)
    coefficients = table.flatten(0, 2)[(grove[:, None] * functions + function) * (GRID + 2) + cell.long() + 1]
    value = coefficients[..., POWERS - 1]
    for power in range(POWERS - 2, -1, -1):
        value = value * u + coefficients[..., power]
    return value


def _grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return torch._grouped_mm(x, weight, offs=offsets[1:])


def _loop(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """A product a grove, the sizes read on the host."""
    parts = x.split(offsets.diff().tolist())
    return torch.cat([rows @ matrix for rows, matrix in zip(parts, weight, strict=True)])


def _sizes(shape: Shape) -> tuple[int, int, int]:
    return shape.tokens * shape.choices, shape.width, shape.hidden


def _flops(shape: Shape) -> int:
    rows, width, hidden = _sizes(shape)
    return 2 * rows * width * hidden


def _read(shape: Shape) -> int:
    """Groves whose matrices must be read: no more than there are rows."""
    return min(shape.groves, shape.tokens * shape.choices)


def _bytes(layer: Layer, elements: int) -> int:
    return elements * layer.dtype.itemsize


def _type(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def _row(
    name: str, make: Callable[[int], tuple[Any, ...]], kernel: Callable[..., Any], reference: Callable[..., Any] | None, rivals: dict[str, Callable[..., Any]],
    least: int, flops: int,
) -> dict[str, Any]:  # fmt: skip
    return {"name": name, "make": make, "kernel": kernel, "reference": reference, "rivals": rivals, "bytes": least, "flops": flops}
