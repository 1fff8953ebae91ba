"""The scan of ADA is the recurrence S_t = a_t S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t, however it is cut."""

import itertools

import pytest
import torch
from torch import Tensor

from kan_train.model.scan import chunkwise_scan, recurrent_step

BATCH, HEADS, WIDTH = 2, 3, 5


def quadratic(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, resets: Tensor | None, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Plain masked attention: weight[i, j] is the product of the decays of tokens j+1 .. i. decay [B, T, H] is a, not log a."""
    time = q.shape[1]
    if resets is not None:
        decay = torch.where(resets[..., None], torch.zeros_like(decay), decay)
    rows, row = [], torch.zeros(q.shape[0], q.shape[2], time, dtype=q.dtype)
    for i in range(time):
        row = row * decay[:, i, :, None]
        row = torch.cat((row[..., :i], torch.ones_like(row[..., :1]), row[..., i + 1 :]), dim=-1)
        rows.append(row)
    weight = torch.stack(rows, dim=2)
    o = torch.einsum("bhij,bihd,bjhd,bjhe->bihe", weight, q, k, v)
    last = torch.einsum("bhj,bjhd,bjhe->bhde", row, k, v)
    if state is not None:
        kept = decay.cumprod(dim=1)
        o = o + torch.einsum("bih,bihd,bhde->bihe", kept, q, state)
        last = last + kept[:, -1, :, None, None] * state
    return o * scale, last


def inputs(time: int, decay: str, *, state: bool, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(time)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    log_decay = None
    if decay == "learned":
        log_decay = torch.tensor([-1.3, -0.1, -0.002], dtype=dtype, requires_grad=True)
    elif decay == "data":
        log_decay = (-torch.rand(BATCH, time, HEADS, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    qkv = {name: normal(BATCH, time, HEADS, WIDTH) for name in "qkv"}
    return {**qkv, "log_decay": log_decay, "state": normal(BATCH, HEADS, WIDTH, WIDTH) if state else None}


def factors(given: dict[str, Tensor | None], time: int) -> Tensor:
    """The decay a itself, [B, T, H]."""
    log_decay = given["log_decay"]
    return torch.ones(BATCH, time, HEADS, dtype=torch.float64) if log_decay is None else log_decay.exp().expand(BATCH, time, HEADS)


def document_starts(time: int) -> Tensor:
    """Documents that start inside a chunk, at its first and last token, at the first token of all, and twice in a row."""
    resets = torch.zeros(BATCH, time, dtype=torch.bool)
    for token in (0, 2, 3, 8, 15):
        resets[0, token % time] = True
    resets[1, time // 2] = True
    return resets


CASES = list(itertools.product((1, 7, 16, 29), (4, 8, 64), ("none", "learned", "data"), (False, True), (False, True)))


@pytest.mark.parametrize(("time", "chunk", "decay", "packed", "state"), CASES)
def test_chunkwise_form_is_the_quadratic_one(time: int, chunk: int, decay: str, packed: bool, state: bool):
    """Values, last state, and the gradients of every input, in float64."""
    given = inputs(time, decay, state=state)
    resets = document_starts(time) if packed else None
    ours = chunkwise_scan(given["q"], given["k"], given["v"], given["log_decay"], resets, given["state"], chunk=chunk, scale=0.4)
    theirs = quadratic(given["q"], given["k"], given["v"], factors(given, time), resets, given["state"], 0.4)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype) for x in theirs]
    leaves = [x for x in given.values() if x is not None]
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)
    losses = [sum((x * w).sum() for x, w in zip(pair, weights, strict=True)) for pair in (ours, theirs)]
    grads = [torch.autograd.grad(loss, leaves, allow_unused=True) for loss in losses]
    for mine, reference in zip(*grads, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if reference is None else reference, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("decay", ["none", "learned", "data"])
def test_recurrent_form_is_the_quadratic_one(decay: str):
    time = 11
    given = inputs(time, decay, state=True)
    o, state = [], given["state"]
    for t in range(time):
        log_decay = given["log_decay"] if decay != "data" else given["log_decay"][:, t]
        step, state = recurrent_step(given["q"][:, t], given["k"][:, t], given["v"][:, t], log_decay, state, scale=0.4)
        o.append(step)
    expected, last = quadratic(given["q"], given["k"], given["v"], factors(given, time), None, given["state"], 0.4)
    torch.testing.assert_close(torch.stack(o, dim=1), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


def test_a_sequence_cut_in_two_continues_from_the_state():
    """What context parallelism and prefill need: the state carries everything, gradients too."""
    given = inputs(24, "data", state=False)
    resets = document_starts(24)
    resets[1] = False
    q, k, v, log_decay = (given[name] for name in ("q", "k", "v", "log_decay"))
    whole, last = chunkwise_scan(q, k, v, log_decay, resets, chunk=8)
    first, middle = chunkwise_scan(q[:, :13], k[:, :13], v[:, :13], log_decay[:, :13], resets[:, :13], chunk=8)
    second, end = chunkwise_scan(q[:, 13:], k[:, 13:], v[:, 13:], log_decay[:, 13:], resets[:, 13:], middle, chunk=8)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, last, rtol=1e-12, atol=1e-12)
    leaves = (q, k, v, log_decay)
    one = torch.autograd.grad(whole.square().sum() + last.sum(), leaves)
    two = torch.autograd.grad(first.square().sum() + second.square().sum() + end.sum(), leaves)
    for mine, reference in zip(two, one, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rate", [1e-4, 1.0, 3.0, 60.0, 1e4])
def test_any_rate_stays_finite_and_accurate_in_fp32(rate: float):
    """exp(c_i - c_j) is masked before the exponential, and never the quotient of two: no overflow at any rate."""
    given = inputs(128, "none", state=True)
    log_decay = torch.full((HEADS,), -rate, dtype=torch.float64, requires_grad=True)
    names = ("q", "k", "v", "state")
    single = {name: given[name].detach().float().requires_grad_() for name in names}
    single_decay = log_decay.detach().float().requires_grad_()
    o, last = chunkwise_scan(single["q"], single["k"], single["v"], single_decay, None, single["state"], chunk=64)
    decay = log_decay.exp().expand(BATCH, 128, HEADS)
    expected, expected_last = quadratic(given["q"], given["k"], given["v"], decay, None, given["state"], 1.0)
    (o.square().sum() + last.square().sum()).backward()
    (expected.square().sum() + expected_last.square().sum()).backward()
    pairs = [(o, expected), (last, expected_last), *((single[name].grad, given[name].grad) for name in names)]
    for mine, reference in pairs:  # a factor below 1e-19, the root of the smallest normal number, is zero
        torch.testing.assert_close(mine.double(), reference, rtol=1e-5, atol=1e-6 * float(reference.detach().abs().max()) + 1e-17)
    # The decay's gradient is a difference of sums of q . dL/dq, and rounds as they do.
    rounding = 1e-6 * float((given["q"] * given["q"].grad).detach().sum(-1).abs().sum())
    torch.testing.assert_close(single_decay.grad.double(), log_decay.grad, rtol=1e-4, atol=rounding)


def test_bf16_inputs_keep_their_state_in_fp32():
    given = inputs(48, "learned", state=False)
    q, k, v = (given[name].detach().bfloat16() for name in "qkv")
    o, last = chunkwise_scan(q, k, v, given["log_decay"].detach().float(), chunk=16)
    assert (o.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    _, exact = quadratic(q.double(), k.double(), v.double(), factors(given, 48), None, None, 1.0)
    torch.testing.assert_close(last.double(), exact, rtol=1e-4, atol=1e-4)


def test_no_subnormal_number_reaches_the_products():
    """A subnormal factor would have no effect, and slows a CPU's product a hundredfold: what is that small must be zero."""
    ones, zeros = torch.ones(1, 128, 1, WIDTH), torch.zeros(1, 128, 1, WIDTH)
    left, last = chunkwise_scan(ones, zeros, zeros, torch.tensor([-1.0]), None, torch.ones(1, 1, WIDTH, WIDTH), chunk=128)
    visible = left[0, :, 0, 0]
    assert visible[visible != 0].min() > 1e-19
    assert (visible[:40] > 0).all()
    assert (visible[60:] == 0).all()
    assert (last == 0).all()
