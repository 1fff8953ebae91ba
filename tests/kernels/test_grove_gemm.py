"""Grouped products and the gated sum of a token's rows, against float64 references that work choice by choice."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kan_train.kernels.grove_gemm import combine_rows, grouped_gemm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROOM = "kan_train.kernels.grove_gemm"


@pytest.fixture(scope="module")
def reference(neighbour: Callable) -> object:
    """tests/kernels/grove_reference.py."""
    return neighbour("grove_reference")


def leaf(generator: torch.Generator, *shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype).requires_grad_()


def wide(*tensors: Tensor) -> list[Tensor]:
    """Copies in float64 on the CPU, leaves of their own."""
    return [tensor.detach().double().cpu().requires_grad_() for tensor in tensors]


# Odd sizes and empty groups; one token; all in one grove, and several tiles of it; widths that descriptors can and cannot take.
CASES = [([10, 0, 40, 3, 0], 40, 72), ([0, 0, 1], 33, 20), ([0, 75, 0], 64, 17)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sizes", "width", "columns"), CASES, ids=str)
def test_grouped_gemm(device: torch.device, reference: object, close: Callable, dtype: torch.dtype, sizes: list[int], width: int, columns: int):
    """Each row its grove's product, and both gradients, from rows that are not contiguous and a gradient without strides."""
    generator = torch.Generator().manual_seed(1)
    offsets = torch.tensor([0, *sizes], device=device).cumsum(0).int()
    x = leaf(generator, sum(sizes), 2 * width, dtype=dtype, device=device)
    weight = leaf(generator, len(sizes), columns, width, dtype=dtype, device=device)
    scale = torch.randn(columns, generator=generator)
    y = grouped_gemm(x[:, ::2], weight.transpose(1, 2), offsets)
    (y * scale.to(device, dtype)).sum().backward()
    x64, weight64 = wide(x, weight)
    expected = torch.cat([rows[:, ::2] @ matrix.T for rows, matrix in zip(x64.split(sizes), weight64, strict=True)])
    (expected * scale.to(dtype).double()).sum().backward()
    close(y, expected, dtype)
    close(x.grad, x64.grad, dtype)
    close(weight.grad, weight64.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_gemm_of_gathered_tokens(device: torch.device, reference, close: Callable, dtype: torch.dtype):
    """Tokens are gathered on the way in; padding rows are zero, and dropped choices have no part in a token's gradient."""
    generator, routing = torch.Generator().manual_seed(2), reference.route([9, 0, 14, 5], 2, capacity=8, index=torch.int32)
    x = leaf(generator, 14, 24, dtype=dtype, device=device)
    weight = leaf(generator, 4, 24, 40, dtype=dtype, device=device)
    index = routing.token_of_row.to(device)
    y = grouped_gemm(x, weight, routing.offsets.to(device), index, routing.row_of_choice.to(device))
    grad = torch.randn(y.shape, generator=generator).to(dtype)
    y.backward(grad.to(device))
    x64, weight64 = wide(x, weight)
    expected = torch.stack([x64[token] @ weight64[row // 8] if token < 14 else 0 * weight64[0, 0] for row, token in enumerate(routing.token_of_row.tolist())])
    # A padding row's gradient belongs to no token.
    (expected * torch.where(routing.token_of_row < 14, 1.0, 0.0)[:, None] * grad.double()).sum().backward()
    close(y, expected, dtype)
    close(x.grad, x64.grad, dtype)
    close(weight.grad, weight64.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate_dtype", [torch.float32, None], ids=["gate fp32", "gate alike"])
def test_combine_rows(device: torch.device, reference, close: Callable, dtype: torch.dtype, gate_dtype: torch.dtype | None):
    """The sum of a token's rows with its gates, dropped choices and padding rows aside."""
    generator, routing = torch.Generator().manual_seed(3), reference.route([9, 0, 14, 7], 3, capacity=8)
    y = leaf(generator, len(routing.token_of_row), 40, dtype=dtype, device=device)
    gate = leaf(generator, 10, 3, dtype=gate_dtype or dtype, device=device)
    combined = combine_rows(y, gate, routing.choice_of_row.to(device), routing.row_of_choice.to(device))
    combined.sum().backward()
    y64, gate64 = wide(y, gate)
    rows = torch.cat((y64, torch.zeros(1, 40, dtype=torch.float64)))
    expected = (rows[routing.row_of_choice] * gate64[..., None]).sum(1)
    expected.sum().backward()
    close(combined, expected, dtype)
    close(y.grad, y64.grad, dtype)
    close(gate.grad, gate64.grad, dtype)


def test_outputs_are_written_in_full_and_nothing_else(device: torch.device, reference, allocations: Callable):
    """Guard zones around every allocation stay intact, and no value keeps the NaN that it started with."""
    generator, routing = torch.Generator().manual_seed(4), reference.route([9, 0, 14, 5], 2, capacity=9)
    x = leaf(generator, 14, 33, dtype=torch.float32, device=device)
    weight = leaf(generator, 4, 33, 17, dtype=torch.float32, device=device)
    gate = leaf(generator, 14, 2, dtype=torch.float32, device=device)
    with allocations() as made:
        y = grouped_gemm(x, weight, routing.offsets.to(device), routing.token_of_row.to(device), routing.row_of_choice.to(device))
        combine_rows(y, gate, routing.choice_of_row.to(device), routing.row_of_choice.to(device)).square().sum().backward()
    assert len(made) >= 6
    assert all(bool(part.isfinite().all()) for part in (y, x.grad, weight.grad, gate.grad))


def test_operators_keep_their_contracts(device: torch.device, reference):
    """Schema, shapes on meta tensors, autograd registration: what torch.compile and checkpointing rely on."""
    generator, routing = torch.Generator().manual_seed(5), reference.route([3, 0, 1], 2)
    x, weight = leaf(generator, 2, 8, dtype=torch.float32, device=device), leaf(generator, 3, 8, 5, dtype=torch.float32, device=device)
    y, gate = leaf(generator, 4, 8, dtype=torch.float32, device=device), leaf(generator, 2, 2, dtype=torch.float32, device=device)
    token, choice, row, offsets = (part.to(device) for part in routing.rows())
    operators = torch.ops.kan_train
    torch.library.opcheck(operators.grouped_gemm.default, (x, weight, offsets, token, row))
    grad = torch.ones(4, 5, device=device)
    torch.library.opcheck(operators.grouped_gemm_backward.default, (grad, x.detach(), weight.detach(), offsets, token, row, True, True))
    torch.library.opcheck(operators.combine_rows.default, (y, gate, choice, row))
    torch.library.opcheck(operators.combine_rows_backward.default, (x.detach(), y.detach(), gate.detach(), choice, row))


def test_the_reference_runs_where_no_kernel_can(reference, close: Callable):
    """float64 has no kernel: its results are the independent reference's to float64's precision, gradients included (gradcheck)."""
    generator, routing = torch.Generator().manual_seed(6), reference.route([3, 0, 4, 1], 2, capacity=3)
    x, weight = (leaf(generator, *shape, dtype=torch.float64, device=torch.device("cpu")) for shape in ((4, 3), (4, 3, 2)))
    gate = leaf(generator, 4, 2, dtype=torch.float64, device=torch.device("cpu"))
    token, choice, row, offsets = routing.rows()

    def both(x: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        return combine_rows(grouped_gemm(x, weight, offsets, token, row), gate, choice, row)

    expected = torch.zeros(4, 2, dtype=torch.float64)
    for place, grove in enumerate(routing.grove_TK.flatten().tolist()):
        if routing.row_of_choice.flatten()[place] < len(token):
            expected[place // 2] += (gate[place // 2, place % 2] * (x[place // 2] @ weight[grove])).detach()
    close(both(x, weight, gate), expected, torch.float64)
    assert torch.autograd.gradcheck(both, (x, weight, gate))


def test_what_does_not_fit_is_refused(device: torch.device):
    """An error names what to change."""
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="cast them"):
        grouped_gemm(torch.ones(4, 8), torch.ones(1, 8, 4, dtype=torch.bfloat16), offsets)
    with pytest.raises(ValueError, match="width 8"):
        grouped_gemm(torch.ones(4, 8), torch.ones(1, 6, 4), offsets)
    with pytest.raises(ValueError, match="row_of_choice"):
        grouped_gemm(torch.ones(4, 8, requires_grad=True), torch.ones(1, 8, 4), offsets, torch.arange(4))


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("triton_products", "grove, tl.load(offsets + grove) + (row_tile - first) * ROWS", "grove, tl.load(offsets + grove)"),
        ("triton_products", "matrix + c[:, None] * inner + i[None, :]", "matrix + c[:, None] * inner + i[None, :] % 16"),
        ("triton_sums", "total += grad * tl.load(rows + place", "total = grad * tl.load(rows + place"),
    ],
    ids=["every tile of a grove its first", "wrong columns of a weight", "the gate's gradient of the last columns"],
)
def test_a_broken_kernel_is_noticed(device: torch.device, reference, close: Callable, run_mutant: Callable, module: str, old: str, new: str):
    """The tests above would see these."""
    check = [
        lambda: test_grouped_gemm(device, reference, close, torch.float32, [0, 40, 3], 33, 20),
        lambda: test_grouped_gemm(device, reference, close, torch.float32, [0, 9, 3], 33, 17),
        lambda: test_combine_rows(device, reference, close, torch.float32, None),
    ][["(row_tile", "matrix +", "total +="].index(next(part for part in ("(row_tile", "matrix +", "total +=") if part in old))]
    reload = [f"{ROOM}.{name}" for name in ("triton_gated", "triton_sums", "cases", "triton") if name != module]
    run_mutant(f"{ROOM}.{module}", old, new, check, reload)
