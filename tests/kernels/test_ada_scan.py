"""The scan of ADA is S_t = a_t S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t, with a_t = 0 where a document starts: values and every gradient."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from kan_train.kernels import backend
from kan_train.kernels.ada_scan import last_state, scan, tables

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SCAN = "kan_train.kernels.ada_scan.triton_scan"
PARTS = "kan_train.kernels.ada_scan.triton_parts"
STATES = "kan_train.kernels.ada_scan.triton_states"
LAUNCH = "kan_train.kernels.ada_scan.triton"
SCALE = 0.4


@dataclass(frozen=True)
class Case:
    """A sequence; `starts` are the tokens that start a document."""

    time: int
    width: int = 16
    decay: str = "token"
    starts: tuple[int, ...] = ()
    chunk: int = 16
    state: bool = True
    silu_q: bool = False
    batch: int = 1
    heads: int = 2
    rates: tuple[float, float] = field(default=(0.01, 0.7))
    """The range of -log a."""


CASES = {
    # Documents that start with the sequence, inside a chunk, at its last and first token, and twice in a row; T no multiple of the chunk.
    "packed documents": Case(53, starts=(0, 5, 15, 16, 31, 40, 41), silu_q=True, batch=2, heads=1),
    "packed, one decay a head": Case(45, decay="head", starts=(15, 16, 40), width=24),
    "one token": Case(1, starts=(0,), silu_q=True),
    "one token, no document start": Case(1, decay="head"),
    "no decay": Case(37, decay="none", silu_q=True),
    "no decay, packed, from zero": Case(33, decay="none", starts=(7, 20), state=False),
    "half-life below one token": Case(40, rates=(1.0, 3.0)),
    "half-life below one token, a head": Case(40, decay="head", rates=(1.0, 3.0), starts=(17,)),
    "chunk of 64, two tiles": Case(70, width=40, chunk=64, heads=1, starts=(64, 66)),
    "what the mutants get wrong": Case(40, decay="head", starts=(5, 20), rates=(0.1, 0.3)),
    "one chunk exactly, odd width": Case(32, width=17, chunk=32, state=False, decay="head"),
}


@dataclass
class Inputs:
    """Arguments of `scan`, and what the loss multiplies its results with."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    resets: Tensor | None
    state: Tensor | None
    weight_o: Tensor
    weight_last: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.q, self.k, self.v, self.log_decay, self.state) if x is not None]

    def doubled(self) -> "Inputs":
        """The same numbers in float64."""
        double = {name: None if x is None else x.detach().double() if x.is_floating_point() else x for name, x in vars(self).items()}
        copy = Inputs(**double)
        for leaf in copy.leaves:
            leaf.requires_grad_()
        return copy


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(case.time)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    shape, square = (case.batch, case.time, case.heads, case.width), (case.batch, case.heads, case.width, case.width)
    low, high = case.rates
    decay_shape = {"none": None, "head": shape[2:3], "token": shape[:3]}[case.decay]
    log_decay = None if decay_shape is None else -(low + (high - low) * torch.rand(*decay_shape, generator=generator)).to(device, wide)
    resets = None
    if case.starts:
        resets = torch.zeros(shape[:2], dtype=torch.bool, device=device)
        resets[0, list(case.starts)] = True
    k = normal(*shape)
    k = (k / k.double().norm(dim=-1, keepdim=True)).to(dtype)
    state = normal(*square, dtype=wide) if case.state else None
    given = Inputs(normal(*shape), k, normal(*shape), log_decay, resets, state, normal(*shape), normal(*square, dtype=wide))
    for leaf in given.leaves:
        leaf.requires_grad_()
    return given


def recurrence(x: Inputs, *, silu_q: bool, scale: float = SCALE) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    batch, time, heads, width = x.q.shape
    q = x.q * torch.sigmoid(x.q) if silu_q else x.q
    state = torch.zeros(batch, heads, width, width, dtype=x.q.dtype, device=x.q.device) if x.state is None else x.state
    outputs = []
    for t in range(time):
        decay = torch.ones(batch, heads, dtype=q.dtype, device=q.device)
        if x.log_decay is not None:
            decay = decay * torch.exp(x.log_decay if x.log_decay.dim() == 1 else x.log_decay[:, t])
        if x.resets is not None:
            decay = torch.where(x.resets[:, t, None], torch.zeros_like(decay), decay)
        state = decay[..., None, None] * state + k_outer_v(x, t)
        outputs.append(scale * torch.einsum("bhde,bhd->bhe", state, q[:, t]))
    return torch.stack(outputs, dim=1), state


def k_outer_v(x: Inputs, t: int) -> Tensor:
    return torch.einsum("bhd,bhe->bhde", x.k[:, t], x.v[:, t])


def with_gradients(o: Tensor, last: Tensor, x: Inputs) -> list[Tensor]:
    """Both results, and the gradients of all leaves."""
    loss = (o.double() * x.weight_o).sum() + (last.double() * x.weight_last).sum()
    return [o, last, *torch.autograd.grad(loss, x.leaves)]


def run(case: Case, x: Inputs) -> list[Tensor]:
    o, last = scan(x.q, x.k, x.v, x.log_decay, x.resets, x.state, chunk=case.chunk, scale=SCALE, silu_q=case.silu_q)
    return with_gradients(o, last, x)


def check(case: Case, dtype: torch.dtype, device: torch.device, close) -> None:
    """Against the recurrence in float64 on the numbers that the kernels see."""
    x = inputs(case, dtype, device)
    expected = x.doubled()
    actual = run(case, x)
    references = with_gradients(*recurrence(expected, silu_q=case.silu_q), expected)
    for result, reference, name in zip(actual, references, ("o", "last", "q", "k", "v", "decay", "state"), strict=False):
        # dL/d log a is a difference of two products that are exp(rate) times as large: twenty times at the strongest decay here.
        factor = 4 * math.exp(case.rates[1]) if name == "decay" and result.dim() != 4 else 1.0
        close(result, reference, dtype, factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_scan_is_the_recurrence(name, dtype, device, close):
    check(CASES[name], dtype, device, close)


def test_scan_is_masked_attention(device, close):
    """The quadratic formula: token j reaches token i with the product of the decays between them, within one document."""
    case = CASES["packed documents"]
    x = inputs(case, torch.float32, device).doubled()
    q = x.q * torch.sigmoid(x.q)
    decay = torch.where(x.resets[..., None], 0.0, x.log_decay.exp())
    weight = torch.stack([torch.stack([decay[:, j + 1 : i + 1].prod(dim=1) * (j <= i) for j in range(case.time)], -1) for i in range(case.time)], -2)
    o = torch.einsum("bhij,bihd,bjhd,bjhe->bihe", weight, q, x.k, x.v)
    o = o + torch.einsum("bih,bihd,bhde->bihe", decay.cumprod(dim=1), q, x.state)
    single = inputs(case, torch.float32, device)
    actual, _ = scan(single.q, single.k, single.v, single.log_decay, single.resets, single.state, chunk=16, scale=SCALE, silu_q=True)
    close(actual, SCALE * o, torch.float32)


@pytest.fixture
def many_processors(monkeypatch):
    """A device so large that every sequence is cut into as many segments as its chunks allow."""
    monkeypatch.setattr(backend, "processors", lambda device: 1000)
    monkeypatch.setattr(tables, "LEAST_CHUNKS", 1)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(53, width=24, starts=(0, 5, 15, 16, 31, 40, 41), silu_q=True),
        Case(40, decay="head", starts=(17,), width=40, heads=1),
        Case(33, decay="none", state=False, width=24),
    ],
    ids=["token", "head", "none"],
)
def test_segments_change_nothing(case, dtype, device, close, many_processors):
    """Segments are read at the same time, each from the state that those before it leave."""
    assert tables.cut(case.time, 16, 2, backend.processors(device))[0] > 1
    check(case, dtype, device, close)


def test_half_precision_decay_gradient_stays_accurate_over_many_chunks(device, close):
    """Its error must not grow with the distance to the sequence's end: log a of the last tenth of tokens is no better known than that of the first."""
    case = Case(400, decay="token", heads=1, rates=(0.05, 0.3), state=False)
    x = inputs(case, torch.bfloat16, device)
    expected = x.doubled()
    actual, reference = run(case, x)[-1].double(), with_gradients(*recurrence(expected, silu_q=False), expected)[-1]
    for part in (slice(0, 40), slice(360, 400)):
        close(actual[:, part], reference[:, part], torch.bfloat16, 2.0)


def test_cut_covers_a_sequence_once():
    """Segments hold all chunks, no segment is empty, and none is long enough for the rounding of dL/d log a to add up."""
    for chunks in (1, 7, 16, 64, 65, 512, 1000):
        for programs in (2, 32, 4096):
            segments, length = tables.cut(chunks * 64 - 3, 64, programs, 132)
            assert (segments - 1) * length < chunks <= segments * length
            assert length <= tables.MOST_CHUNKS
            assert length >= min(tables.LEAST_CHUNKS, chunks)


@pytest.mark.parametrize("decay", ["none", "head", "token"])
@pytest.mark.parametrize("segments", [False, True])
def test_last_state_is_what_tokens_do_to_a_state(decay, segments, device, close, monkeypatch):
    """kept * S + added is the state behind the last token, for every S; and so are its gradients."""
    if segments:
        monkeypatch.setattr(backend, "processors", lambda device: 1000)
        monkeypatch.setattr(tables, "LEAST_CHUNKS", 1)
    for starts in ((), (9, 30)):
        case = Case(37, decay=decay, starts=starts, batch=2)
        x = inputs(case, torch.float32, device)
        expected = x.doubled()
        added, kept = last_state(x.k, x.v, x.log_decay, x.resets, chunk=16)
        _, reference = recurrence(expected, silu_q=False)
        close(kept * x.state + added, reference, torch.float32)
        wanted = [leaf for leaf in x.leaves if leaf is not x.q]
        grads = torch.autograd.grad(((kept * x.state + added) * x.weight_last).sum(), wanted)
        references = torch.autograd.grad((reference * expected.weight_last).sum(), [leaf for leaf in expected.leaves if leaf is not expected.q])
        for grad, wide in zip(grads, references, strict=True):
            close(grad, wide, torch.float32)


def test_a_scan_continues_from_the_state_of_another(device, close):
    """Two halves of a sequence, the second from the last state of the first, are the whole: what context parallelism and prefill rely on."""
    case = Case(50, starts=(20,))
    x = inputs(case, torch.float32, device).doubled()
    single = inputs(case, torch.float32, device)
    cutting = 23

    def part(of: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, log_decay, resets = (t[:, of] for t in (single.q, single.k, single.v, single.log_decay, single.resets))
        return scan(q, k, v, log_decay, resets, state, chunk=16, scale=SCALE)

    head, between = part(slice(0, cutting), single.state)
    tail, last = part(slice(cutting, None), between)
    results = with_gradients(torch.cat((head, tail), dim=1), last, single)
    for actual, reference in zip(results, with_gradients(*recurrence(x, silu_q=False), x), strict=True):
        close(actual, reference, torch.float32, 2.0)


MUTANTS = {
    "a token does not see itself": (SCAN, "visible = t[:, None] >= t[None, :]", "visible = t[:, None] > t[None, :]"),
    "documents mix in a chunk": (SCAN, "t[None, :] >= document_start[:, None]", "t[None, :] >= 0 * document_start[:, None]"),
    "a state survives a document": (PARTS, "through = tl.where(tl.load(STARTS + token + last) < 0, through, 0.0)", "through = through * 1.0"),
    "the reverse reads forwards": (SCAN, "into, out = out, into", "into, out = into, out"),
    "no gradient from later chunks": (STATES, "carried += tl.sum(through, 0)", "carried += 0.0 * tl.sum(through, 0)"),
    "dk begins with an untransposed state": (SCAN, "tile, D, BD, BC, True) * state_scale", "tile, D, BD, BC, False) * state_scale"),
    "decay of one token too many": (PARTS, "rate * (last + 1)", "rate * last"),
    "the last state is not scaled": (LAUNCH, "last_scale=scale, silu=0", "last_scale=1.0, silu=0"),
}

RELOADED = {PARTS: (STATES, SCAN, LAUNCH), STATES: (LAUNCH,), SCAN: (LAUNCH,), LAUNCH: ()}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_kernel_is_noticed(name, device, close, run_mutant):
    module, old, new = MUTANTS[name]
    case = CASES["what the mutants get wrong"]
    run_mutant(module, old, new, lambda: check(case, torch.float32, device, close), reload=RELOADED[module])
