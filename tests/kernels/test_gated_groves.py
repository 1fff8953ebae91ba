"""The gated grove as one pipeline against a float64 reference that works choice by choice, its splines by the Cox-de Boor recursion."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kan_train.kernels.grove_gemm import gated_groves

ROOM = "kan_train.kernels.grove_gemm"
NAMES = ("x", "own", "gate", "up", "value", "out", "coefficients")


@pytest.fixture(scope="module")
def reference(neighbour: Callable) -> Any:
    """tests/kernels/grove_reference.py."""
    return neighbour("grove_reference")


class Grove:
    """Random inputs of a small layer: leaves in `dtype`, the gate and the coefficients in fp32 as the model has them."""

    def __init__(self, reference: Any, routing: Any, dtype: torch.dtype, device: torch.device, **sizes: Any) -> None:
        width, hidden = sizes.get("width", 40), sizes.get("hidden", 24)
        functions, own = sizes.get("functions", 3), sizes.get("own", 0)
        generator = torch.Generator().manual_seed(sizes.get("seed", 0))
        self.routing, self.splines = routing, reference.Splines(sizes.get("order", 3), sizes.get("grid", 2)) if functions else None
        self.cells = self.splines.cells() if self.splines else torch.empty(0)
        (tokens, choices), groves = routing.grove_TK.shape, len(routing.offsets) - 1

        def leaf(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device, dtype).requires_grad_()

        self.leaves: dict[str, Tensor | None] = {
            "x": leaf(tokens, width),
            "own": leaf(tokens, choices, own) if own else None,
            "gate": leaf(tokens, choices, dtype=torch.float32),
            # h of standard deviation 1.5 on a grid from -2 to 2: a fifth of it lies outside.
            "up": leaf(groves, own or width, hidden, scale=1.5 * (own or width) ** -0.5),
            "value": leaf(groves, width, hidden, scale=width**-0.5),
            "out": leaf(groves, hidden, width, scale=hidden**-0.5),
            "coefficients": leaf(groves, functions, self.splines.grid + self.splines.order, dtype=torch.float32) if self.splines else None,
        }
        self.weights = torch.randn(tokens, width, generator=generator).to(dtype)

    def kernel(self) -> Tensor:
        """y through the operators."""
        x, own, gate, up, value, out, coefficients = self.leaves.values()
        table = None if coefficients is None else torch.einsum("nfc,cgp->nfgp", coefficients, self.cells.to(coefficients))
        rows = (part.to(x.device) for part in self.routing.rows())
        grid = {"low": self.splines.low, "step": self.splines.step} if self.splines else {"low": 0.0, "step": 1.0}
        return gated_groves(x, own, gate, up, value, out, table, *rows, **grid)

    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """y and the gradients of every leaf."""
        for part in self.leaves.values():
            if part is not None:
                part.grad = None
        y = self.kernel()
        y.backward(self.weights.to(y.device))
        return y, {name: part.grad for name, part in self.leaves.items() if part is not None}

    def expected(self, reference: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The same in float64."""
        wide = {name: None if part is None else part.detach().double().cpu().requires_grad_() for name, part in self.leaves.items()}
        y = reference.gated(*(wide[name] for name in NAMES[:6]), self.splines, wide["coefficients"], self.routing)
        y.backward(self.weights.double())
        return y, {name: part.grad for name, part in wide.items() if part is not None}


def check(grove: Grove, reference: Any, close: Callable, dtype: torch.dtype) -> None:
    (y, grads), (y64, grads64) = grove.gradients(), grove.expected(reference)
    close(y, y64, dtype)
    assert grads.keys() == grads64.keys()
    for name, grad in grads.items():
        try:
            close(grad, grads64[name], dtype)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None


KINDS = {
    "spline": {"sizes": [10, 0, 40, 3, 0, 1], "hidden": 72, "functions": 9, "width": 24},
    "silu": {"sizes": [5, 0, 9], "functions": 0, "hidden": 17, "width": 33},
    "reuse": {"sizes": [4, 7, 0, 3], "own": 16, "grid": 5},
    "capacity": {"sizes": [9, 0, 4, 1], "capacity": 4, "order": 1, "functions": 1, "hidden": 10},
    "reuse with capacity": {"sizes": [9, 0, 4, 1], "capacity": 4, "order": 2, "own": 7},
    "one token": {"sizes": [0, 1, 1], "hidden": 16, "functions": 1},
    "odd functions": {"sizes": [3, 0, 5], "hidden": 15, "functions": 3, "width": 17, "order": 2, "grid": 3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(device: torch.device, reference: Any, close: Callable, kind: str, dtype: torch.dtype):
    """All kinds of groves and plans: y, and the gradients of tokens, own inputs, gates, the three matrices and the splines' coefficients."""
    sizes = dict(KINDS[kind])
    routing = reference.route(sizes.pop("sizes"), 2, capacity=sizes.pop("capacity", 0))
    check(Grove(reference, routing, dtype, device, **sizes), reference, close, dtype)


def test_nothing_outside_the_outputs_is_written(device: torch.device, reference: Any, allocations: Callable):
    """Guard zones around every allocation stay intact; what starts as NaN is written in full; two runs give the same bits."""
    routing = reference.route([9, 0, 14, 5], 2, capacity=9)
    grove = Grove(reference, routing, torch.float16, device, hidden=17, functions=1, width=33)
    with allocations() as made:
        y, grads = grove.gradients()
    assert len(made) >= 12
    again, grads_again = grove.gradients()
    assert bool(y.isfinite().all())
    assert torch.equal(y, again)
    assert all(bool(grads[name].isfinite().all()) and torch.equal(grads[name], grads_again[name]) for name in grads)


def test_launches_do_not_depend_on_the_number_of_groves(device: torch.device, reference: Any, monkeypatch: pytest.MonkeyPatch):
    """One launch a step of the pipeline: three forward, seven backward."""
    from kan_train.kernels.grove_gemm import triton as launch

    launched: list[str] = []
    for name in ("gated_forward", "gated_backward", "grouped_product", "weight_gradients", "combine", "sum_gate", "sum_table"):
        kernel = getattr(launch, name)

        class Counted:
            def __init__(self, name: str, kernel: Any) -> None:
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                launched.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(launch, name, Counted(name, kernel))
    counts = []
    for groves in (1, 7):
        launched.clear()
        Grove(reference, reference.route([2] * groves, 2), torch.float32, device, hidden=8, functions=1, width=8).gradients()
        counts.append(sorted(launched))
    assert counts[0] == counts[1]
    assert len(counts[0]) == 10


def test_what_is_kept_for_the_backward_pass(device: torch.device, reference: Any):
    """Beside its inputs h and v alone, and nothing where no gradient is asked for."""
    routing = reference.route([3, 0, 5], 2)
    grove = Grove(reference, routing, torch.bfloat16, device, hidden=16, functions=1)
    inputs = {part.untyped_storage().data_ptr() for part in grove.leaves.values() if part is not None}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
        grove.kernel()
    state = [part for part in kept if part.shape == (8, 16) and part.untyped_storage().data_ptr() not in inputs]
    assert sum(part.numel() * part.itemsize for part in state) == 2 * 8 * 16 * 2
    with torch.no_grad():
        x, own, gate, up, value, out, _ = grove.leaves.values()
        rows = [part.to(device) for part in routing.rows()]
        _, h, v = torch.ops.kan_train.gated_groves(x, own, up, value, out, gate, None, *rows, 0.0, 1.0, False)
    assert h.numel() == v.numel() == 0


def test_compile_checkpoint_and_meta(device: torch.device, reference: Any):
    """Compiled as one graph, and recomputed under checkpointing, the layer gives the same bits; on meta tensors the same shapes."""
    grove = Grove(reference, reference.route([3, 0, 5], 2), torch.float32, device, hidden=16, functions=1, width=16, grid=1)
    y, grads = grove.gradients()
    plain = grove.kernel
    for wrapped in (lambda: checkpoint(plain, use_reentrant=False), torch.compile(plain, fullgraph=True, backend="aot_eager")):
        grove.kernel = wrapped
        other, others = grove.gradients()
        assert torch.equal(y, other)
        assert all(torch.equal(grads[name], others[name]) for name in grads)
    grove.kernel = plain
    grove.leaves = {name: None if part is None else part.detach().to("meta").requires_grad_() for name, part in grove.leaves.items()}
    y, grads = grove.gradients()
    assert y.is_meta
    assert all(grad.is_meta and grad.shape == grove.leaves[name].shape for name, grad in grads.items())


def test_operators_keep_their_contracts(device: torch.device, reference: Any):
    """Schema, shapes on meta tensors, autograd registration."""
    grove = Grove(reference, reference.route([2, 0, 2], 2), torch.float32, device, hidden=4, functions=1, width=8, own=8)
    x, own, gate, up, value, out, _ = grove.leaves.values()
    rows = [part.to(device) for part in grove.routing.rows()]
    table = torch.randn(3, 2, 3, 2, device=device, requires_grad=True)
    arguments = (x, own.flatten(0, 1).detach().requires_grad_(), up, value, out, gate, table, *rows, -1.0, 2.0, True)
    torch.library.opcheck(torch.ops.kan_train.gated_groves.default, arguments)
    with torch.no_grad():
        y, h, v = torch.ops.kan_train.gated_groves(*arguments)
        inputs = [part.detach() for part in arguments[:7]]
        torch.library.opcheck(torch.ops.kan_train.gated_groves_backward.default, (y, *inputs, h, v, *rows, -1.0, 2.0))


def test_the_reference_runs_where_no_kernel_can(reference: Any, close: Callable):
    """float64 has no kernel: there the operators equal the choice-by-choice reference to float64's precision."""
    for sizes in ({"functions": 3}, {"functions": 0}, {"functions": 2, "own": 5}):
        routing = reference.route([5, 0, 4, 1], 2, capacity=3)
        grove = Grove(reference, routing, torch.float64, torch.device("cpu"), hidden=6, width=7, **sizes)
        (y, grads), (y64, grads64) = grove.gradients(), grove.expected(reference)
        close(y, y64, torch.float32, 1e-2)  # the table comes from fp32 coefficients
        for name in grads:
            close(grads[name], grads64[name], torch.float32, 1e-1)


MUTANTS = {
    "the gate": ("triton_sums", "part = part * tl.load(gate + place", "part = part + 0 * tl.load(gate + place"),
    "the spline's slope": ("triton_gated", "return value, slope * inverse_step, scaled", "return value, slope, scaled"),
    "the outer cell": ("triton_gated", "(scaled < left + 1.0) | (cell == CELLS - 1)", "(scaled < left + 1.0)"),
    "the second weight gradient": ("triton_products", "tl.load(grad2 + g_place", "tl.load(grad + g_place"),
    "another grove's function": ("triton_gated", "return (grove * (hidden // per_function) + function)", "return (function)"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_kernel_is_noticed(device: torch.device, reference: Any, close: Callable, run_mutant: Callable, mutant: str):
    """The comparison with the reference would see these."""
    module, old, new = MUTANTS[mutant]
    grove = Grove(reference, reference.route([3, 0, 5], 2), torch.float32, device, hidden=16, functions=2, width=16, order=2, grid=5)
    reload = [f"{ROOM}.{name}" for name in ("triton_gated", "triton_sums", "cases", "triton") if name != module]
    run_mutant(f"{ROOM}.{module}", old, new, lambda: check(grove, reference, close, torch.float32), reload)
