"""Around the scan of ADA: diffused keys, the gated norm, the recurrent step; and what holds for every operator of the room."""

import re

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kan_train.kernels import ada_scan, backend
from kan_train.kernels.ada_scan import diffused_keys, gated_norm, last_state, scan, step, tables

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FUSED = "kan_train.kernels.ada_scan.triton_fused"
ROWS = "kan_train.kernels.ada_scan.triton_rows"
OPS = torch.ops.kan_train


def normal(seed: int, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()


def doubled(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.detach().double().requires_grad_() for x in tensors]


def marks(batch: int, time: int, starts: tuple[int, ...], device: torch.device) -> Tensor | None:
    if not starts:
        return None
    resets = torch.zeros(batch, time, dtype=torch.bool, device=device)
    resets[0, [start for start in starts if start < time]] = True
    return resets


def all_close(actual: list[Tensor], references: list[Tensor], dtype: torch.dtype, close) -> None:
    for result, reference in zip(actual, references, strict=True):
        close(result, reference, dtype)


def with_gradients(result: Tensor, weight: Tensor, leaves: list[Tensor | None]) -> list[Tensor]:
    return [result, *torch.autograd.grad((result.double() * weight).sum(), [x for x in leaves if x is not None])]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def diffusion(keys: Tensor, kernel: Tensor, resets: Tensor | None, before: Tensor | None, *, feature: bool) -> Tensor:
    """Token by token: walk back from it until the taps end, or its document starts."""
    batch, time, _, _ = keys.shape
    rows = []
    for b in range(batch):
        for t in range(time):
            total = torch.zeros_like(keys[0, 0])
            for lag in range(kernel.shape[-1]):
                source = t - lag
                if source >= 0:
                    total = total + kernel[..., lag] * keys[b, source]
                elif before is not None:
                    total = total + kernel[..., lag] * before[b, source]
                if resets is not None and source >= 0 and bool(resets[b, source]):
                    break
            rows.append(total)
    y = torch.stack(rows).view(keys.shape)
    if not feature:
        return y
    return silu(y) / torch.sqrt(silu(y).pow(2).sum(dim=-1, keepdim=True) + 1e-6)


def check_keys(dtype: torch.dtype, device: torch.device, close, *, time=21, width=32, taps=4, starts=(0, 1, 7, 20), before=True, feature=True) -> None:
    keys, kernel = normal(0, 2, time, 2, width, dtype=dtype, device=device), normal(1, 2, width, taps, dtype=dtype, device=device)
    earlier = normal(2, 2, taps - 1, 2, width, dtype=dtype, device=device) if before else None
    weight, resets = normal(3, 2, time, 2, width, dtype=dtype, device=device).detach(), marks(2, time, starts, device)
    actual = with_gradients(diffused_keys(keys, kernel, resets, earlier, feature=feature), weight, [keys, kernel, earlier])
    wide = doubled(keys, kernel, earlier)
    references = with_gradients(diffusion(wide[0], wide[1], resets, wide[2], feature=feature), weight.double(), wide)
    all_close(actual, references, dtype, close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"starts": (), "width": 24},
        {"before": False, "starts": (3, 4, 10)},
        {"time": 1, "starts": ()},
        {"time": 2, "starts": (1,), "taps": 5},
        {"taps": 1, "before": False},
        {"feature": False, "time": 70, "starts": (64,), "taps": 3},
    ],
    ids=str,
)
def test_diffused_keys_are_the_convolution_and_its_feature_map(given, dtype, device, close):
    """Taps stop at the first token of a document, and read the keys before the first one where none starts there; so do the gradients."""
    check_keys(dtype, device, close, **given)


def normed(o: Tensor, weight: Tensor | None, gate: Tensor | None) -> Tensor:
    y = o / torch.sqrt(o.pow(2).mean(dim=-1, keepdim=True) + 1e-5)
    y = y if weight is None else y * weight
    return y if gate is None else y * silu(gate)


def check_norm(dtype: torch.dtype, device: torch.device, close, *, time=37, width=24, weighted=True, gated=True) -> None:
    shape = (2, time, 3, width)
    o, weight = normal(0, *shape, dtype=dtype, device=device), normal(1, 3, width, dtype=torch.promote_types(dtype, torch.float32), device=device)
    gate, direction = normal(2, *shape, dtype=dtype, device=device), normal(3, *shape, dtype=dtype, device=device).detach()
    leaves = [o, weight if weighted else None, gate if gated else None]
    wide = doubled(*leaves)
    all_close(with_gradients(gated_norm(*leaves, 1e-5), direction, leaves), with_gradients(normed(*wide), direction.double(), wide), dtype, close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [{}, {"weighted": False}, {"gated": False, "width": 32}, {"weighted": False, "gated": False}, {"time": 1}], ids=str)
def test_gated_norm_is_its_formula(given, dtype, device, close):
    """fp32 weights beside 16-bit activations, as the optimiser keeps them."""
    check_norm(dtype, device, close, **given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", ["none", "head", "token"])
def test_steps_are_the_recurrence(decay, dtype, device, close):
    """Three tokens; in place the state's memory is the result's, otherwise it stays as it was."""
    wide, width = torch.promote_types(dtype, torch.float32), 40
    q, k, v = (normal(seed, 3, 2, 2, width, dtype=dtype, device=device).detach() for seed in range(3))
    shape = {"none": None, "head": (2,), "token": (3, 2, 2)}[decay]
    log_decay = None if shape is None else -normal(3, *shape, dtype=wide, device=device).detach().abs()
    state = normal(4, 2, 2, width, width, dtype=wide, device=device).detach()
    expected, kept, here = state.double(), state.clone(), state.clone()
    for t in range(3):
        now = log_decay[t] if decay == "token" else log_decay
        factor = 1.0 if now is None else now.double().exp()[..., None, None]
        expected = factor * expected + torch.einsum("bhd,bhe->bhde", k[t].double(), v[t].double())
        output = 0.3 * torch.einsum("bhde,bhd->bhe", expected, silu(q[t].double()))
        before = state.clone()
        o, new = step(q[t], k[t], v[t], now, state, scale=0.3, silu_q=True)
        assert torch.equal(state, before)
        state = new
        o_here, same = step(q[t], k[t], v[t], now, here, scale=0.3, silu_q=True, in_place=True)
        assert same.data_ptr() == here.data_ptr()
        assert torch.equal(o_here, o)
        close(o, output, dtype)
    close(state, expected, wide)
    assert torch.equal(here, state)
    assert not torch.equal(here, kept)


def scan_arguments(device: torch.device, dtype: torch.dtype = torch.float32, *, time: int = 37, width: int = 24) -> tuple:
    q, k, v = (normal(seed, 1, time, 2, width, dtype=dtype, device=device) for seed in range(3))
    log_decay = (-torch.rand(1, time, 2, generator=torch.Generator().manual_seed(4))).to(device).requires_grad_()
    return q, k, v, log_decay, marks(1, time, (5, 20), device), normal(5, 1, 2, width, width, dtype=torch.float32, device=device)


def everything(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Every function of the room forwards and backwards, at shapes that fill no tile."""
    q, k, v, log_decay, resets, state = scan_arguments(device, dtype)
    kernel, before = normal(6, 2, 24, 4, dtype=torch.float32, device=device), normal(7, 1, 3, 2, 24, dtype=dtype, device=device)
    weight, gate = normal(8, 2, 24, dtype=torch.float32, device=device), normal(9, *q.shape, dtype=dtype, device=device)
    phi = diffused_keys(k, kernel, resets, before)
    o, last = scan(q, phi, v, log_decay, resets, state, chunk=16, scale=0.2, silu_q=True)
    added, kept = last_state(phi, v, log_decay, resets, chunk=16)
    y = gated_norm(o, weight, gate, 1e-5)
    leaves = [q, k, v, log_decay, state, kernel, before, weight, gate]
    grads = torch.autograd.grad(y.float().sin().sum() + last.sin().sum() + added.sin().sum() + kept.sum(), leaves)
    single = step(q[:, 0].detach(), k[:, 0].detach(), v[:, 0].detach(), log_decay[:, 0].detach(), state.detach())
    return [y, last, added, kept, *grads, *single]


@pytest.mark.parametrize("segments", [False, True])
def test_nothing_is_written_outside_outputs(segments, device, allocations, monkeypatch):
    """And nothing is read that was not written: memory starts as NaN."""
    if segments:
        monkeypatch.setattr(backend, "processors", lambda device: 1000)
        monkeypatch.setattr(tables, "LEAST_CHUNKS", 1)
    with allocations() as made:
        results = everything(device)
    assert len(made) > 20
    assert all(bool(x.isfinite().all()) for x in results)


def test_two_runs_give_the_same_bits(device):
    """No sum depends on the order in which programs run."""
    for first, second in zip(everything(device, torch.bfloat16), everything(device, torch.bfloat16), strict=True):
        assert torch.equal(first, second)


def test_inputs_need_not_be_contiguous(device, close):
    """Slices of one projection, and gradients of stride zero (a sum's)."""
    arguments = scan_arguments(device)
    together = torch.stack(arguments[:3], dim=3).flatten(2, 3).detach().requires_grad_()
    q, k, v = (together[:, :, i::3] for i in range(3))
    assert not q.is_contiguous()
    o, last = scan(q, k, v, *arguments[3:], chunk=16)
    whole, whole_last = scan(*arguments, chunk=16)
    assert torch.equal(o, whole)
    (grad,) = torch.autograd.grad(o.sum() + last.sum(), together)
    for i, reference in enumerate(torch.autograd.grad(whole.sum() + whole_last.sum(), arguments[:3])):
        assert torch.equal(grad[:, :, i::3], reference)


def operator_calls(device: torch.device) -> dict[str, tuple]:
    q, k, v, log_decay, _, state = scan_arguments(device, time=5, width=16)
    kernel, before = normal(6, 2, 16, 2, dtype=torch.float32, device=device), normal(7, 1, 1, 2, 16, dtype=torch.float32, device=device)
    weight, one = normal(8, 2, 16, dtype=torch.float32, device=device), [x[:, 0].detach() for x in (q, k, v, log_decay)]
    return {
        "ada_scan": (q, k, v, log_decay, None, state, 16, 0.5, True),
        "ada_last_state": (k, v, log_decay, None, 16),
        "ada_diffused_keys": (k, kernel, None, before, True),
        "ada_gated_norm": (q, weight, v, 1e-5),
        "ada_step": (*one, state.detach(), 0.5, True),
        "ada_step_": (*one, state.detach(), 0.5, True),
        "ada_scan_backward": (q, state, q, k, v, log_decay, None, state, state, 16, 0.5, True),
        "ada_last_state_backward": (state, normal(9, 1, 2, 1, 1, dtype=torch.float32, device=device), k, v, log_decay, None),
        "ada_diffused_keys_backward": (q, k, kernel, None, before, True),
        "ada_gated_norm_backward": (q, q, weight, v, 1e-5),
    }


@pytest.mark.parametrize("name", operator_calls(torch.device("cpu")))
def test_operators_are_registered_as_torch_wants_them(name, device):
    """Schema, mutation, shapes of fake tensors, and autograd through them."""
    arguments = operator_calls(device)[name]
    checks = ["test_schema", "test_faketensor"]
    if not name.endswith(("backward", "step", "step_")):
        checks.append("test_autograd_registration")
    if name.endswith(("backward", "step", "step_")):
        arguments = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    if name == "ada_scan":
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(OPS, name).default, arguments, test_utils=checks)


def layer(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, resets: Tensor, state: Tensor, kernel: Tensor) -> Tensor:
    o, last = scan(q, diffused_keys(k, kernel, resets), v, log_decay, resets, state, chunk=16, silu_q=True)
    return gated_norm(o, None, q, 1e-5).sum() + last.sum()


def test_compiled_and_checkpointed_layers_are_the_eager_one(device):
    """One graph, and the same bits: operators are opaque to the compiler, and recomputation runs the same kernels."""
    arguments = (*scan_arguments(device, time=20), normal(6, 2, 24, 4, dtype=torch.float32, device=device))
    leaves = [x for x in arguments if x.is_floating_point()]
    expected = torch.autograd.grad(layer(*arguments), leaves)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for loss in (compiled(*arguments), checkpoint(layer, *arguments, use_reentrant=False)):
        for grad, reference in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
            assert torch.equal(grad, reference)


def test_meta_tensors_have_the_shapes_of_results(device):
    """A model is built, counted and planned without memory."""
    arguments = [None if x is None else x.detach().to("meta").requires_grad_(x.is_floating_point()) for x in scan_arguments(device)]
    o, last = scan(*arguments, chunk=16)
    (grad,) = torch.autograd.grad(o.sum() + last.sum(), arguments[3])
    assert o.shape == arguments[0].shape
    assert last.shape == arguments[5].shape
    assert grad.shape == arguments[3].shape
    assert step(*(x[:, 0] for x in arguments[:4]), arguments[5])[1].is_meta


def test_without_kernels_the_reference_answers(device, close, monkeypatch):
    """Same numbers where triton is missing, in every type."""
    with_kernels = everything(device, torch.bfloat16)
    monkeypatch.setattr(backend, "runs_triton", lambda device: False)
    for actual, reference in zip(everything(device, torch.bfloat16), with_kernels, strict=True):
        close(actual, reference, torch.bfloat16, 2.0)


def test_an_empty_batch_and_wide_heads_run_the_reference(device):
    """No grid of zero programs, and no tile wider than the tables know."""
    empty, wide = torch.zeros(0, 5, 2, 16, device=device), torch.ones(1, 3, 1, 136, device=device)
    assert scan(empty, empty, empty)[1].shape == (0, 2, 16, 16)
    assert torch.equal(scan(wide, wide, wide)[0][0, :, 0, 0], 136 * torch.arange(1.0, 4.0, device=device))


def test_shapes_that_do_not_fit_are_named(device):
    x, bits = torch.zeros(1, 4, 2, 16, device=device), torch.zeros(1, 4, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=re.escape("v [1, 4, 2, 16] torch.float16 must be")):
        scan(x, x, x.half())
    with pytest.raises(ValueError, match=re.escape("log_decay must be None, [2] or [1, 4, 2]")):
        scan(x, x, x, torch.zeros(4, device=device))
    with pytest.raises(ValueError, match=re.escape("resets must be bool [1, 4]")):
        scan(x, x, x, None, bits)
    with pytest.raises(ValueError, match="divided by scale"):
        scan(x, x, x, scale=0.0)
    with pytest.raises(ValueError, match=re.escape("before [1, 4, 2, 16] must be [1, 1, 2, 16]")):
        diffused_keys(x, torch.zeros(2, 16, 2, device=device), None, x)
    assert ada_scan.__all__ == ["WIDEST_HEAD", "diffused_keys", "gated_norm", "last_state", "scan", "step"]


MUTANTS = {
    "a tap reaches over a document's start": (FUSED, "newest = t - lag + 1", "newest = t - lag + 2", check_keys),
    "the gradient of keys ignores documents": (FUSED, "grad_keys += tl.where((reach & inside)[:, None]", "grad_keys += tl.where(inside[:, None]", check_keys),
    "keys before the first are shifted": (FUSED, "+ source + W - 1) * H + head)", "+ source + W - 2) * H + head)", check_keys),
    "the gradient along phi is kept": (FUSED, "inverse * (grad - phi * tl.sum(grad * phi, 1)[:, None])", "inverse * grad", check_keys),
    "partial sums of one program alone": (ROWS, "partial.sum(dim=0)", "partial[0]", check_norm),
    "the norm's gradient ignores its weight": (FUSED, "            grad = grad * weight\n", "            grad = grad\n", check_norm),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_kernel_is_noticed(name, device, close, run_mutant):
    module, old, new, check = MUTANTS[name]
    run_mutant(module, old, new, lambda: check(torch.float32, device, close), reload=() if module == ROWS else (ROWS,))
