"""Routing on the device against what it should be, computed in float64 and by Python's own sort."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kan_train.config import GroveConfig, ModelConfig
from kan_train.kernels import grove_route
from kan_train.kernels.grove_route import GroveOrder, reference
from kan_train.model.dispatch import dropless_plan
from kan_train.model.init import materialise
from kan_train.model.route import Router

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-6
TRITON, SORT = (f"kan_train.kernels.grove_route.{name}" for name in ("triton", "triton_sort"))


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def norms(x: Tensor, score: Tensor) -> Tensor:
    """sqrt(sum_j (E_i x)_j^2 + eps), token by token."""
    return torch.stack([(score.double() @ token).square().sum(1).add(EPS).sqrt() for token in x.double()])


def chosen(values: Tensor, choices: int) -> Tensor:
    """By the stated rule: highest first, NaN above all, of equals the lowest number."""

    def key(pair: tuple[int, float]) -> tuple[bool, float, int]:
        number, value = pair
        return not math.isnan(value), 0.0 if math.isnan(value) else -value, number

    rows = [[number for number, _ in sorted(enumerate(row), key=key)[:choices]] for row in values.tolist()]
    return torch.tensor(rows, dtype=torch.int64)


def assert_order(order: GroveOrder, index: Tensor, groves: int) -> None:
    """Against Python's stable sort, and a count of what is below each number."""
    flat = index.flatten().tolist()
    expected = sorted(range(len(flat)), key=flat.__getitem__)
    assert order.choice_of_row.tolist() == expected
    assert order.token_of_row.tolist() == [choice // index.shape[1] for choice in expected]
    assert [order.row_of_choice.flatten().tolist()[choice] for choice in expected] == list(range(len(flat)))
    assert order.offsets_N1.tolist() == [sum(grove < number for grove in flat) for number in range(groves + 1)]
    assert [tensor.dtype for tensor in order] == [torch.int32, torch.int64, torch.int64, torch.int64]
    assert order.row_of_choice.shape == index.shape


# --- scores ------------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "groves", "rank", "width"),
    [
        (1, 3, 64, 20),  # a decode step, r above a tile's rows
        (16, 5, 1, 130),  # r below them, D over a step's end
        (70, 20, 3, 40),  # one row at a time
        (66, 17, 12, 72),  # several passes
        (2049, 19, 8, 24),  # the large tiles
        (2050, 10, 5, 16),
    ],
)
def test_scores_and_their_sums(
    tokens: int, groves: int, rank: int, width: int, dtype: torch.dtype, device: torch.device, allocations: Callable, close: Callable
) -> None:
    x, score = numbers(tokens, width, dtype=dtype, device=device), numbers(groves, rank, width, seed=1, dtype=dtype, device=device)
    mean, std = numbers(groves, seed=2, device=device), numbers(groves, seed=3, device=device).abs() + 0.5
    frobenius = score.double().square().sum((1, 2)).sqrt()
    expected = norms(x, score)
    with allocations():
        inverse = grove_route.inverse_norms(score)
        plain = grove_route.grove_scores(x, score, EPS)
        standard, sums = grove_route.scores_and_sums(x, score, EPS, inverse_N=inverse, mean_N=mean, std_N=std)
    # The products are exact in fp32, and added up in it, whatever the dtype of x: the tolerance is that of fp32 throughout.
    close(inverse, 1 / frobenius, torch.float32)
    close(plain, expected, torch.float32)
    normal = expected / frobenius
    close(standard, (normal - mean.double()) / std.double(), torch.float32)
    close(sums, torch.stack((normal.sum(0), normal.square().sum(0))), torch.float32)
    assert plain.dtype == standard.dtype == sums.dtype == torch.float32


def test_a_token_of_zeros_has_the_least_score(device: torch.device) -> None:
    x, score = torch.zeros(3, 8, device=device), numbers(4, 2, 8, device=device)
    torch.testing.assert_close(grove_route.grove_scores(x, score, 0.25), torch.full((3, 4), 0.5, device=device))


def test_no_tokens(device: torch.device) -> None:
    score = numbers(4, 2, 8, device=device)
    scores, sums = grove_route.scores_and_sums(torch.empty(0, 8, device=device), score)
    assert scores.shape == (0, 4)
    assert sums.tolist() == [[0.0] * 4] * 2
    assert grove_route.select(scores, None, 2).shape == (0, 2)
    order = grove_route.sort_by_grove(torch.empty(0, 2, dtype=torch.int64, device=device), 4)
    assert order.offsets_N1.tolist() == [0] * 5
    assert order.choice_of_row.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_need_not_be_contiguous(dtype: torch.dtype, device: torch.device, close: Callable) -> None:
    wide, tall = numbers(20, 48, dtype=dtype, device=device), numbers(24, 20, seed=1, dtype=dtype, device=device)
    score = numbers(24, 3, 7, seed=2, dtype=dtype, device=device).permute(2, 1, 0)
    for x in (wide[:, 10:34], wide[:, ::2], tall.T, wide[::3, :24], wide[:1, :24].expand(20, 24)):
        close(grove_route.grove_scores(x, score, EPS), norms(x, score), torch.float32)
    close(grove_route.inverse_norms(score), 1 / score.double().square().sum((1, 2)).sqrt(), torch.float32)
    values = numbers(7, 40, dtype=dtype, device=device).T
    assert torch.equal(grove_route.select(values, None, 3).cpu(), chosen(values, 3))
    assert_order(grove_route.sort_by_grove(chosen(values, 3).T.contiguous().T.to(device), 7), chosen(values, 3), 7)


def test_wrong_shapes_are_named(device: torch.device) -> None:
    x, score = numbers(3, 8, device=device), numbers(4, 2, 8, device=device)
    for arguments in ((x[:, 1:], score), (x.half(), score), (x[0], score), (x, score[0])):
        with pytest.raises(ValueError, match="of one dtype are needed"):
            grove_route.grove_scores(*arguments)
    with pytest.raises(ValueError, match="give both"):
        grove_route.grove_scores(x, score, mean_N=score[:, 0, 0])
    for choices in (0, 5):
        with pytest.raises(ValueError, match="between 1 and the number of groves, 4"):
            grove_route.select(x[:, :4], None, choices)
    with pytest.raises(ValueError, match="int32 offsets"):
        grove_route.sort_by_grove(torch.zeros(1, 1, dtype=torch.int64).expand(2**28, 8), 4)


# --- selection ---------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "groves", "choices"), [(1, 1, 1), (37, 20, 5), (70, 7, 7), (130, 33, 2), (3, 1000, 16)])
def test_the_highest_are_selected(tokens: int, groves: int, choices: int, dtype: torch.dtype, device: torch.device, allocations: Callable) -> None:
    values, balance = numbers(tokens, groves, dtype=dtype, device=device), numbers(groves, seed=1, device=device)
    with allocations():
        biased, plain = grove_route.select(values, balance, choices), grove_route.select(values, None, choices)
    assert torch.equal(plain.cpu(), chosen(values, choices))
    assert torch.equal(biased.cpu(), chosen(values.float() + balance, choices))
    assert biased.dtype == torch.int64


def test_of_equals_the_lowest_grove_comes_first(device: torch.device) -> None:
    values = numbers(50, 33, device=device).round()
    values[0], values[1, ::2], values[2, 5:9] = 0.0, -0.0, math.inf
    values[3], values[4, 7] = -math.inf, -math.inf
    assert torch.equal(grove_route.select(values, None, 9).cpu(), chosen(values, 9))
    # A balance that makes unequal ones equal.
    assert grove_route.select(torch.tensor([[1.0, 3.0, 2.0]], device=device), torch.tensor([2.0, 0.0, 1.0], device=device), 3).tolist() == [[0, 1, 2]]


def test_nan_is_highest_and_the_choice_in_range(device: torch.device) -> None:
    values = numbers(6, 20, device=device)
    values[0], values[1, 13], values[2, 4:8] = math.nan, math.nan, -math.nan
    values[3, 2], values[3, 9] = math.inf, math.nan
    index = grove_route.select(values, None, 6).cpu()
    assert torch.equal(index, chosen(values, 6))
    assert index[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert index[3, :2].tolist() == [9, 2]


@pytest.mark.parametrize(("groves", "choices"), [(20, 17), (1030, 4)])
def test_beyond_the_kernel_the_rule_is_the_same(groves: int, choices: int, device: torch.device) -> None:
    values = numbers(5, groves, device=device).round()
    assert torch.equal(grove_route.select(values, None, choices).cpu(), chosen(values, choices))


# --- order -------------------------------------------------------------------------------------------------------------------------------------------------


def some_choices(tokens: int, groves: int, choices: int, used: int | None = None) -> Tensor:
    """Different groves for each token, of the first `used` ones."""
    return numbers(tokens, used or groves).topk(choices, dim=-1).indices


@pytest.mark.parametrize("counted", [False, True], ids=["compared", "counted"])
@pytest.mark.parametrize(
    ("tokens", "groves", "choices", "used"), [(1, 1, 1, 1), (1, 40, 3, 40), (37, 20, 5, 20), (90, 200, 3, 5), (400, 9, 3, 9), (300, 5, 1, 1)]
)
def test_rows_are_sorted_by_grove(
    tokens: int, groves: int, choices: int, used: int, counted: bool, device: torch.device, allocations: Callable
) -> None:
    """By comparisons and by counts; scans of 32 blocks and less. With empty groves, a single token, and all tokens on one grove."""
    from kan_train.kernels.grove_route import triton_sort

    index = some_choices(tokens, groves, choices, used)
    with allocations():
        order = GroveOrder(*triton_sort.sort_by_grove(index.to(device), groves, compared_below=0 if counted else 2**20))
    assert_order(order, index, groves)


def counted_over_several_scans(device: torch.device) -> None:
    from kan_train.kernels.grove_route import triton_sort

    index = some_choices(1200, 6, 2)
    assert_order(GroveOrder(*triton_sort.sort_by_grove(index.to(device), 6, compared_below=0, scanned=4)), index, 6)


def test_counts_are_carried_from_scan_to_scan(device: torch.device) -> None:
    counted_over_several_scans(device)


@pytest.mark.parametrize("size", [24, grove_route.MOST_GROVES + 1])
def test_the_order_is_that_of_the_plan(size: int, device: torch.device) -> None:
    index = some_choices(33, size, 3)
    order, plan = grove_route.sort_by_grove(index.to(device), size), dropless_plan(index, size)
    assert order.offsets_N1.diff().tolist() == plan.sizes
    for name in ("choice_of_row", "token_of_row", "row_of_choice"):
        assert torch.equal(getattr(order, name).cpu(), getattr(plan, name)), name


@pytest.mark.parametrize("path", ["kernel", "counted", "reference"])
def test_numbers_out_of_range_count_as_the_nearest_grove(path: str, device: torch.device, allocations: Callable) -> None:
    from kan_train.kernels.grove_route import triton_sort

    index = torch.tensor([[3, 9, -1], [0, 4, 2**40], [-(2**40), 1, 2]], device=device)
    with allocations():
        if path == "reference":
            order = reference.sort_by_grove(index, 4)
        else:
            order = triton_sort.sort_by_grove(index, 4, compared_below=0 if path == "counted" else 100)
    assert_order(GroveOrder(*order), index.clamp(0, 3), 4)


def test_choices_may_be_int32(device: torch.device) -> None:
    index = some_choices(20, 9, 2)
    assert_order(grove_route.sort_by_grove(index.int().to(device), 9), index, 9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chosen_groves_are_projected_with_gradients(dtype: torch.dtype, device: torch.device, close: Callable) -> None:
    """Five rows a grove, which fill no vector; groves 7 and 8 have no token."""
    x, weight = numbers(40, 24, dtype=dtype, device=device), numbers(9, 5, 24, seed=1, dtype=dtype, device=device)
    index, grad = some_choices(40, 9, 3, used=7).to(device), numbers(40, 3, 5, seed=2, dtype=dtype, device=device)
    wide = [tensor.double().requires_grad_() for tensor in (x, weight)]
    expected = torch.stack([torch.stack([wide[1][grove] @ token for grove in row]) for token, row in zip(wide[0], index.tolist(), strict=True)])
    expected.backward(grad.double())
    x.requires_grad_()
    weight.requires_grad_()
    z = grove_route.project(x, weight, grove_route.sort_by_grove(index, 9))
    z.backward(grad)
    for found, right in ((z, expected), (x.grad, wide[0].grad), (weight.grad, wide[1].grad)):
        close(found, right, dtype)
    assert not weight.grad[7:].any()


# --- as operators ------------------------------------------------------------------------------------------------------------------------------------------


def routed(x: Tensor, score: Tensor, balance: Tensor) -> tuple[Tensor, ...]:
    scores, sums = grove_route.scores_and_sums(x, score, EPS, inverse_N=grove_route.inverse_norms(score), mean_N=balance, std_N=balance + 1)
    index = grove_route.select(scores, balance, 3)
    return scores, sums, index, *grove_route.sort_by_grove(index, len(score))


def inputs(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return numbers(70, 24, dtype=dtype, device=device), numbers(9, 4, 24, seed=1, dtype=dtype, device=device), numbers(9, seed=2, device=device).abs()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_give_the_same_bits(dtype: torch.dtype, device: torch.device) -> None:
    for first, second in zip(routed(*inputs(device, dtype)), routed(*inputs(device, dtype)), strict=True):
        assert torch.equal(first, second)


def test_it_chooses_as_the_models_router_does(device: torch.device) -> None:
    """Choices, plan and statistics of `kan_train.model.route`, from a router whose buffers have moved."""
    config = ModelConfig(width=24, grove=GroveConfig(num_groves=9, active_groves=3, width=16, score_rank=4))
    router = materialise(Router(config), seed=0)
    router.score_mean += 0.1 * numbers(9, seed=5)
    router.balance += 0.3 * numbers(9, seed=6)
    x = numbers(70, 24, seed=7)
    routing = router(x)
    score = router.score.detach().to(device)
    mean, std, balance = (getattr(router, name).to(device) for name in ("score_mean", "score_std", "balance"))
    scores, sums = grove_route.scores_and_sums(
        x.to(device), score, 1e-6, inverse_N=grove_route.inverse_norms(score), mean_N=mean, std_N=std
    )
    index = grove_route.select(scores, balance, 3)
    assert torch.equal(index.cpu(), routing.index_TK)
    order = grove_route.sort_by_grove(index, 9)
    assert torch.equal(order.row_of_choice.cpu(), routing.plan.row_of_choice)
    pending = torch.cat((order.offsets_N1.diff().float(), *sums, sums.new_tensor([70])))
    torch.testing.assert_close(pending.cpu(), router.pending)


def test_operators_are_registered_in_full(device: torch.device) -> None:
    x, score, balance = inputs(device)
    index = some_choices(10, 9, 3).to(device)
    operators = torch.ops.kan_train
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for sums in (False, True):
        torch.library.opcheck(operators.grove_scores.default, (x, score, EPS, balance + 1, balance, balance + 1, sums), test_utils=checks)
    torch.library.opcheck(operators.grove_scores.default, (x, score, EPS, None, None, None, False), test_utils=checks)
    torch.library.opcheck(operators.grove_inverse_norms.default, (score,), test_utils=checks)
    torch.library.opcheck(operators.select_groves.default, (x, None, 3), test_utils=checks)
    torch.library.opcheck(operators.sort_by_grove.default, (index, 9), test_utils=checks)


def test_compiled_checkpointed_and_without_memory(device: torch.device) -> None:
    expected = routed(*inputs(device))
    compiled = torch.compile(routed, fullgraph=True, backend="eager")(*inputs(device))
    x, score, balance = inputs(device)
    x.requires_grad_()
    recomputed = checkpoint(lambda x: (x * 1, *routed(x, score, balance)), x, use_reentrant=False)
    recomputed[0].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    # The scores of all groves have no gradient, whatever asks for one.
    assert not any(tensor.requires_grad for tensor in recomputed[1:])
    shapes = routed(*inputs(torch.device("meta")))
    for left, middle, right, shape in zip(expected, compiled, recomputed[1:], shapes, strict=True):
        assert torch.equal(left, middle)
        assert torch.equal(left, right)
        assert (left.shape, left.dtype, shape.device.type) == (shape.shape, shape.dtype, "meta")


def test_float64_takes_the_reference(device: torch.device) -> None:
    x, score = numbers(5, 12, dtype=torch.float64, device=device), numbers(4, 3, 12, seed=1, dtype=torch.float64, device=device)
    torch.testing.assert_close(grove_route.grove_scores(x, score, EPS), norms(x, score), rtol=1e-12, atol=0)


# --- what is broken is noticed -----------------------------------------------------------------------------------------------------------------------------


def scores_are_right(device: torch.device) -> None:
    x, score = numbers(20, 24, device=device), numbers(5, 6, 24, seed=1, device=device)
    scores, sums = grove_route.scores_and_sums(x, score, EPS)
    torch.testing.assert_close(scores.double(), norms(x, score), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums[0].double(), norms(x, score).sum(0), rtol=1e-5, atol=1e-5)


def ties_are_right(device: torch.device) -> None:
    values = numbers(9, 12, device=device).round()
    assert torch.equal(grove_route.select(values, None, 11).cpu(), chosen(values, 11))


def few_are_sorted(device: torch.device) -> None:
    index = some_choices(20, 5, 2)
    assert_order(grove_route.sort_by_grove(index.to(device), 5), index, 5)


@pytest.mark.parametrize(
    ("module", "old", "new", "check"),
    [
        (TRITON, "squares += tl.sum", "squares = tl.sum", scores_are_right),  # the last pass over the rows of E alone
        (TRITON, "tl.where(inside, score, 0.0)", "score", scores_are_right),  # rows past the last token are counted
        (TRITON, "tl.min(tl.where(key == best[:, None], number, BLOCK_N), 1)", "tl.max(tl.where(key == best[:, None], number, -1), 1)", ties_are_right),
        (TRITON, "bits ^ ((bits >> 31) & _HIGHEST)", "bits", ties_are_right),  # negative values in reverse
        (SORT, "(other[None, :] < turn[:, None])", "(other[None, :] > turn[:, None])", few_are_sorted),  # in reverse within a grove
        (SORT, "total + tl.cumsum(counts, 0) - counts", "tl.cumsum(counts, 0) - counts", counted_over_several_scans),  # the carry is lost
    ],
)  # fmt: skip
def test_broken_kernels_are_noticed(module: str, old: str, new: str, check: Callable, run_mutant: Callable, device: torch.device) -> None:
    check(device)
    run_mutant(module, old, new, lambda: check(device))
