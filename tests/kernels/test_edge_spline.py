"""The per-edge layer, its decode step and the grouped activation, against float64 references that share nothing with them: scipy's B-splines, plain loops.

R rows sorted by grove, N groves, I inputs, O outputs, M columns, F functions a grove, G cells.
"""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import BSpline
from torch.utils.checkpoint import checkpoint

from kan_train.kernels.edge_spline import edge_layer, edge_layer_decode, grouped_activation  # after conftest has asked for the interpreter

# The interpreter's numpy warns of what a kernel means to do: exp(-x) of a large negative x, arithmetic on the infinities of a test.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
ROOM = "kan_train.kernels.edge_spline"
CUBIC = ("bspline", 3, 5, -3.0, 3.0)
# n = 8, 4, 11 (two eights), 20 (three), 8, 3: full and partly filled eights, one cell, and grids that are not symmetric.
FUNCTIONS = [
    CUBIC, ("bspline", 1, 3, -1.0, 2.0), ("bspline", 2, 9, -2.0, 4.0), ("piecewise_poly", 3, 5, -3.0, 3.0), ("piecewise_poly", 1, 4, -2.0, 2.0),
    ("piecewise_poly", 2, 1, -1.0, 1.0),
]  # fmt: skip
ALL = [(FP32, functions) for functions in FUNCTIONS] + list(itertools.product([FP16, BF16], [CUBIC, FUNCTIONS[2]]))


def basis(x, kind, order, grid, low, high):
    """Every function and its slope at x (float64): two [..., n], continued linearly outside the grid."""
    step, at = (high - low) / grid, x.numpy()
    inside = np.clip(at, low, high)
    if kind == "bspline":
        splines = BSpline(low + step * np.arange(-order, grid + order + 1), np.eye(grid + order), order)
        values, slopes = splines(inside), splines.derivative()(inside)
    else:
        values, slopes = np.zeros((2, *at.shape, grid * (order + 1)))
        cell = np.clip(np.floor((inside - low) / step), 0, grid - 1)
        for number, power in itertools.product(range(grid), range(order + 1)):
            here, position = cell == number, (inside - low) / step - number
            values[..., number * (order + 1) + power] = np.where(here, position**power, 0)
            slopes[..., number * (order + 1) + power] = np.where(here, power * position ** max(power - 1, 0) / step, 0)
    return torch.from_numpy(values + slopes * (at - inside)[..., None]), torch.from_numpy(slopes)


def reference_layer(u, base, coefficients, groves, functions):
    """float64, differentiable by autograd; `groves` holds the grove of every row."""
    values, slopes = basis(u.detach(), *functions)
    features = values + slopes * (u - u.detach())[..., None]  # the value, with its slope for autograd
    rows = [F.silu(u[r]) @ base[g] + features[r].flatten() @ coefficients[g] for r, g in enumerate(groves)]
    return torch.stack(rows) if rows else u.new_zeros(0, base.shape[2])


def make(dtype, functions, sizes, inputs, outputs, device, seed=0):
    """u, base, coefficients and the gradient of y, with u about as wide as the grid; offsets; the grove of every row."""
    torch.manual_seed(seed)
    kind, order, grid, low, high = functions
    count, rows, groves = grid + order if kind == "bspline" else grid * (order + 1), sum(sizes), len(sizes)
    u = torch.randn(rows, inputs) * (high - low) / 3 + (high + low) / 2
    tensors = u, torch.randn(groves, inputs, outputs), torch.randn(groves, inputs * count, outputs), torch.randn(rows, outputs)
    offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=device)
    return [tensor.to(device, dtype) for tensor in tensors], offsets, [grove for grove, size in enumerate(sizes) for _ in range(size)]


def gradients(function, tensors, grad):
    """The result and the gradients of all tensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def check_layer(close, allocations, device, dtype, functions, sizes, inputs=9, outputs=40):
    (*tensors, grad), offsets, groves = make(dtype, functions, sizes, inputs, outputs, device)
    with allocations():
        actual = gradients(lambda u, w, c: edge_layer(u, w, c, offsets, *functions), tensors, grad)
    exact = gradients(lambda u, w, c: reference_layer(u, w, c, groves, functions), [t.double().cpu() for t in tensors], grad.double().cpu())
    for result, expected in zip(actual, exact, strict=True):
        assert result.dtype == dtype
        close(result, expected, dtype)


@pytest.mark.parametrize(("dtype", "functions"), ALL, ids=str)
def test_layer_and_all_gradients(close, allocations, device, dtype, functions):
    """Sizes that fill no tile, a grove without rows and one with a single row; nothing is written outside a result."""
    check_layer(close, allocations, device, dtype, functions, [33, 0, 1, 16], inputs=9 if functions == CUBIC else 5)


@pytest.mark.parametrize(("sizes", "inputs", "outputs"), [([1], 1, 1), ([64], 16, 32), ([0, 3], 17, 65)], ids=str)
def test_other_shapes(close, allocations, device, sizes, inputs, outputs):
    """One row of one edge, whole tiles, and one more than a tile."""
    check_layer(close, allocations, device, FP32, CUBIC, sizes, inputs, outputs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs its own tiles everywhere else")
@pytest.mark.parametrize(("target", "dtype", "functions"), [("sm_90", BF16, CUBIC), ("sm_80", FP16, FUNCTIONS[2])], ids=str)
def test_tiles_of_a_gpu(close, allocations, device, monkeypatch, target, dtype, functions):
    """The widest tiles that launches choose there, larger than the interpreter's own, for one and for two eights of functions."""
    monkeypatch.setattr(f"{ROOM}.triton.target", lambda _: target)
    check_layer(close, allocations, device, dtype, functions, [70], inputs=3, outputs=130)


def test_long_reductions_in_two_stages(close, allocations, device):
    """One grove of many rows: weight gradients are sums of parts (more than one), the same bits every time."""
    (*tensors, grad), _, groves = make(FP32, CUBIC, [300], 5, 20, device)
    runs = []
    for _ in range(2):
        with allocations() as made:
            runs.append(gradients(lambda u, w, c: edge_layer(u, w, c, None, *CUBIC), tensors, grad))
        assert device.type == "cuda" or any(guard.view.ndim == 4 and len(guard.view) > 1 for guard in made)
    exact = gradients(lambda u, w, c: reference_layer(u, w, c, groves, CUBIC), [t.double().cpu() for t in tensors], grad.double().cpu())
    for first, second, expected in zip(*runs, exact, strict=True):
        assert torch.equal(first, second)
        close(first, expected, FP32)


def check_knots(device, functions):
    """Every value and slope by itself: on knots, at both ends, and far outside, where functions are lines."""
    _, _, grid, low, high = functions
    knots = torch.linspace(low, high, grid + 1)
    u = torch.cat((knots, torch.tensor([low - 0.25, high + 0.25, low - 1e4, high + 1e4])))[:, None]
    (_, base, coefficients, _), _, _ = make(FP32, functions, [1], 1, 3, device)
    wide, ones = [base.double().cpu(), coefficients.double().cpu()], torch.ones(len(u), 3)
    y, grad_u = gradients(lambda x: edge_layer(x, base, coefficients, None, *functions), [u.to(device)], ones.to(device))
    exact = gradients(lambda x: reference_layer(x, *wide, [0] * len(u), functions), [u.double()], ones)
    decoded = edge_layer_decode(u.to(device), base, coefficients, None, *functions)
    for actual, expected in ((y, exact[0]), (grad_u, exact[1]), (decoded, exact[0])):
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["bspline", "piecewise_poly"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_knots_and_far_outside(device, kind, order):
    """Knots that fp32 holds exactly: a value on one belongs to the cell on its right, the last one to the last cell."""
    check_knots(device, (kind, order, 4, -2.0, 2.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_values_that_are_not_finite_stay_in_their_row(allocations, device, bad):
    """They index nothing outside, do not vanish, and touch no other row."""
    (u, base, coefficients, _), offsets, groves = make(FP32, CUBIC, [5, 4], 3, 7, device)
    spoilt = u.clone()
    spoilt[2, 1] = bad
    others = torch.arange(9) != 2
    owner = torch.tensor(groves, device=device)
    for function in (lambda x: edge_layer(x, base, coefficients, offsets), lambda x: edge_layer_decode(x, base, coefficients, owner)):
        with allocations():
            clean, y = function(u), function(spoilt)
        assert torch.equal(y[others], clean[others])
        assert abs(bad) == 1e38 or not y[2].isfinite().any()
    table = torch.randn(2, 3, 7, 4, device=device, requires_grad=True)
    with allocations():
        activated = grouped_activation(spoilt, table, offsets, -3.0, 1.2)
        (grad_table,) = torch.autograd.grad(activated, table, torch.ones_like(activated))
    assert torch.equal(activated[others], grouped_activation(u, table, offsets, -3.0, 1.2)[others])
    assert grad_table[0, [0, 2]].isfinite().all()
    assert grad_table[1].isfinite().all()


def check_decode(close, allocations, device, dtype, functions, inputs=21):
    (u, base, coefficients, _), _, _ = make(dtype, functions, [2, 2, 1], inputs, 40, device)
    groves = [1, 0, 2, 2, 1]
    with allocations():
        y = edge_layer_decode(u, base, coefficients, torch.tensor(groves, device=device), *functions)
    close(y, reference_layer(u.double().cpu(), base.double().cpu(), coefficients.double().cpu(), groves, functions), dtype)


@pytest.mark.parametrize(("dtype", "functions"), [(FP32, functions) for functions in FUNCTIONS] + [(FP16, CUBIC), (BF16, CUBIC)], ids=str)
def test_decode(close, allocations, device, dtype, functions):
    """Rows of several groves, in no order."""
    check_decode(close, allocations, device, dtype, functions)


def test_decode_reads_only_active_coefficients(close, allocations, device):
    """All others are NaN here. Many inputs of one row are shared out among programs; a row without a grove gives zeros."""
    (u, base, coefficients, _), _, _ = make(FP32, CUBIC, [1, 0], 70, 8, device)
    u = u.clamp(-2.9, 2.9)  # at an end of the grid the last active function is zero too
    expected = reference_layer(u.double().cpu(), base.double().cpu(), coefficients.double().cpu(), [0], CUBIC)
    inactive = (basis(u.double().cpu(), *CUBIC)[0] == 0).flatten().to(device)
    coefficients[0, inactive] = float("nan")
    with allocations() as made:
        y = edge_layer_decode(u, base, coefficients, torch.tensor([0], device=device), *CUBIC)
    assert any(guard.view.ndim == 3 and len(guard.view) > 1 for guard in made)
    close(y, expected, FP32)
    assert not edge_layer_decode(u, base, coefficients, torch.tensor([-1], device=device), *CUBIC).any()


def reference_activation(h, table, groves, low, step):
    """float64, differentiable by autograd: every element by its own polynomial."""
    functions, cells, powers = table.shape[1:]
    rows = []
    for row, grove in zip(h, groves, strict=True):
        scaled = (row - low) / step
        cell = scaled.detach().floor().clamp(-1, cells - 2)
        position = scaled - cell
        function = torch.arange(len(row)) // (len(row) // functions)
        polynomial = table[grove, function, cell.long() + 1]
        rows.append(F.silu(row) + sum(polynomial[:, power] * position**power for power in range(powers)))
    return torch.stack(rows)


def check_activation(close, allocations, device, dtype, sizes, columns, shape):
    torch.manual_seed(0)
    h, grad = (torch.randn(sum(sizes), columns) * 2).to(device, dtype), torch.randn(sum(sizes), columns).to(device, dtype)
    table = torch.randn(len(sizes), *shape, device=device)
    offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=device)
    low, step = -3.0, 6 / (shape[1] - 2)
    runs = []
    for _ in range(2):
        with allocations() as made:
            runs.append(gradients(lambda a, b: grouped_activation(a, b, offsets, low, step), [h, table], grad))
    groves = [grove for grove, size in enumerate(sizes) for _ in range(size)]
    exact = gradients(lambda a, b: reference_activation(a, b, groves, low, step), [h.double().cpu(), table.double().cpu()], grad.double().cpu())
    for first, second, expected, kind in zip(*runs, exact, (dtype, dtype, FP32), strict=True):
        assert torch.equal(first, second)
        close(first, expected, kind)
    return made


@pytest.mark.parametrize(
    ("dtype", "columns", "shape"),
    [(FP32, 36, (3, 7, 4)), (FP16, 36, (3, 7, 4)), (BF16, 36, (3, 7, 4)), (FP32, 32, (2, 5, 2)), (FP32, 70, (1, 4, 3)), (FP32, 8, (8, 3, 4))],
    ids=str,
)
def test_activation_and_its_gradients(close, allocations, device, dtype, columns, shape):
    """Functions of 12, 16, 70 columns and of one; a grove without rows; the same bits every time."""
    check_activation(close, allocations, device, dtype, [33, 0, 1, 16], columns, shape)


def test_table_gradient_in_two_stages(close, allocations, device):
    """One grove of many rows: sums of parts, of which there are several."""
    made = check_activation(close, allocations, device, FP32, [130], 16, (1, 4, 3))
    assert device.type == "cuda" or any(guard.view.ndim == 5 and len(guard.view) > 1 for guard in made)


def test_inputs_that_are_not_contiguous(close, device):
    """Also a gradient of stride 0, as the backward pass of a sum hands it on."""
    (u, base, coefficients, _), offsets, groves = make(FP32, CUBIC, [5, 8], 6, 10, device)
    strided = [u.T.contiguous().T, base.transpose(1, 2).contiguous().transpose(1, 2), torch.stack((coefficients, coefficients), -1)[..., 0]]
    assert not any(tensor.is_contiguous() for tensor in strided)
    ones = torch.ones((), device=device).expand(13, 10)
    actual = gradients(lambda u, w, c: edge_layer(u, w, c, offsets), strided, ones)
    exact = gradients(lambda u, w, c: reference_layer(u, w, c, groves, CUBIC), [t.double().cpu() for t in (u, base, coefficients)], ones.double().cpu())
    for result, expected in zip(actual, exact, strict=True):
        close(result, expected, FP32)


def test_no_rows(device):
    """A rank may get no token: gradients of the weights are zero, not what the memory held."""
    (*tensors, grad), offsets, _ = make(FP32, CUBIC, [0, 0], 4, 6, device)
    y, _, grad_base, grad_coefficients = gradients(lambda u, w, c: edge_layer(u, w, c, offsets), tensors, grad)
    assert y.shape == (0, 6)
    assert not grad_base.any()
    assert not grad_coefficients.any()
    assert edge_layer_decode(tensors[0], *tensors[1:], torch.zeros(0, dtype=torch.int32, device=device)).shape == (0, 6)


def test_reference_gradients_in_fp64(device):
    """fp64 has no kernel: the operators run the reference, whose gradients are those of its values."""
    torch.manual_seed(0)
    offsets = torch.tensor([0, 3, 5], dtype=torch.int32, device=device)
    for functions in (CUBIC, FUNCTIONS[3]):
        (u, base, coefficients, _), _, _ = make(torch.float64, functions, [3, 2], 2, 3, device)
        leaves = [tensor.requires_grad_() for tensor in (u, base, coefficients)]
        assert torch.autograd.gradcheck(lambda u, w, c, f=functions: edge_layer(u, w, c, offsets, *f), leaves)
    table = torch.randn(2, 2, 5, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, t: grouped_activation(h, t, offsets, -3.0, 2.0), [torch.randn_like(table[0, 0])[:, :4].requires_grad_(), table])


def operators(device):
    """Every operator of the room with arguments for it."""
    (u, base, coefficients, grad), offsets, _ = make(FP32, CUBIC, [3, 2], 4, 6, device)
    table, ops = torch.randn(2, 2, 7, 4, device=device), torch.ops.kan_train
    leaves = [tensor.requires_grad_() for tensor in (u.clone(), base.clone(), coefficients.clone())]
    return {
        ops.edge_layer: (*leaves, offsets, *CUBIC),
        ops.edge_layer_grad_input: (grad, u, base, coefficients, offsets, *CUBIC),
        ops.edge_layer_grad_weights: (grad, u, base, offsets, *CUBIC),
        ops.edge_layer_decode: (u, base, coefficients, torch.tensor([0, 1, 1, 0, 1], device=device), *CUBIC),
        ops.grouped_activation: (u.clone().requires_grad_(), table.clone().requires_grad_(), offsets, -3.0, 1.2),
        ops.grouped_activation_grad: (torch.randn_like(u), u, table, offsets, -3.0, 1.2),
    }


def test_operators_are_registered_in_full(device):
    """torch's own check of schemas, meta shapes and gradients, and shapes on the meta device."""
    for operator, arguments in operators(device).items():
        torch.library.opcheck(operator.default, arguments)
        result = operator(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
        expected = operator(*arguments)
        for meta, real in zip(*(r if isinstance(r, tuple) else (r,) for r in (result, expected)), strict=True):
            assert (meta.device.type, meta.shape, meta.dtype) == ("meta", real.shape, real.dtype)


def test_compile_and_checkpointing(device):
    """One graph, and the same bits where the forward pass is run again."""
    (*tensors, grad), offsets, _ = make(FP32, CUBIC, [3, 2], 4, 6, device)
    table = torch.randn(2, 3, 7, 4, device=device)

    def block(u, w, c, t):
        return grouped_activation(edge_layer(u, w, c, offsets), t, offsets, -3.0, 1.2)

    expected = gradients(block, [*tensors, table], grad)
    compiled = gradients(torch.compile(block, fullgraph=True, backend="eager"), [*tensors, table], grad)
    again = gradients(lambda *leaves: checkpoint(block, *leaves, use_reentrant=False), [*tensors, table], grad)
    for first, second, third in zip(expected, compiled, again, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)


def test_arguments_that_do_not_fit_are_refused(device):
    (u, base, coefficients, _), offsets, _ = make(FP32, CUBIC, [3, 2], 4, 6, device)
    for words, call in (
        ("coefficients", lambda: edge_layer(u, base, coefficients, offsets, grid=6)),
        ("offsets_N1 is needed", lambda: edge_layer(u, base, coefficients)),
        ("order=4", lambda: edge_layer(u, base, coefficients, offsets, order=4)),
        ("grove_B", lambda: edge_layer_decode(u, base, coefficients, offsets)),
        ("multiple", lambda: grouped_activation(u, torch.zeros(2, 3, 7, 4), offsets, -3.0, 1.2)),
    ):
        with pytest.raises(ValueError, match=words):
            call()


MUTANTS = {
    "functions end with the grid": ("cells", "inside, position - inside", "inside, 0.0 * position", "knots"),
    "a wrong piece of the spline": ("cells", "v * v * (0.5 * v - 1.0)", "v * v * (0.5 * v - 0.9)", "layer"),
    "a wrong slope": ("cells", "v * (1.5 * v - 2.0)", "v * (1.4 * v - 2.0)", "layer"),
    "rows written past a grove's last": (
        "triton_layer",
        "y.dtype.element_ty), mask=row_in & column_in)",
        "y.dtype.element_ty), mask=column_in)",
        "guard zones",
    ),
    "parts that overlap": ("triton_layer", "end = tl.minimum(begin + share, end)", "end = end", "two stages"),
    "coefficients of the wrong cell": ("triton_decode", "* COUNT + first)", "* COUNT + first // 2)", "decode"),
    "a wrong moment": ("triton_activation", "moment = chosen * square\n", "moment = chosen * position\n", "activation"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a broken kernel belongs into the interpreter")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(run_mutant, close, allocations, device, name):
    """The checks above can fail."""
    module, old, new, check = MUTANTS[name]
    checks = {
        "knots": lambda: check_knots(device, ("bspline", 3, 4, -2.0, 2.0)),
        "layer": lambda: check_layer(close, allocations, device, FP32, CUBIC, [33, 1]),
        # Few outputs: 31 rows too many must fit into a guard zone, or the test itself would die.
        "guard zones": lambda: check_layer(close, allocations, device, FP32, CUBIC, [33, 1], outputs=20),
        "two stages": lambda: check_layer(close, allocations, device, FP32, CUBIC, [300], 3, 5),
        "decode": lambda: check_decode(close, allocations, device, FP32, CUBIC),
        "activation": lambda: check_activation(close, allocations, device, FP32, [20], 16, (1, 5, 4)),
    }
    above = [f"{ROOM}.{name}" for name in ("triton_layer", "triton_decode", "triton_activation", "triton_cases", "triton")]
    reload = [name for name in above if name != f"{ROOM}.{module}"]
    run_mutant(f"{ROOM}.{module}", old, new, checks[check], reload)
