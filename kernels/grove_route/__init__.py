"""Routing on the device: scores of all groves, selection, and the order of rows by grove.

T tokens, D width, N groves, K choices a token, r scoring rank, R = T K rows sorted by grove.

    order = sort_by_grove(select(grove_scores(x, score, inverse_N=..., mean_N=..., std_N=...), balance, K), N)

The scores of all N groves, and what is chosen from them, have no gradient (those of the chosen groves come from `project`). The choices' order is a function
of the choices alone: the same on every run, and nothing is read by the host. Operators: torch.ops.kan_train.{grove_scores, grove_inverse_norms, select_groves,
sort_by_grove}; they run in Triton where it is, in `reference` elsewhere and for what the kernels do not cover (float64, K > 16, N > 1024).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_train.kernels import backend, grove_gemm
from kan_train.kernels.grove_route import reference

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_CHOICES, MOST_GROVES = 16, 1024


class GroveOrder(NamedTuple):
    """Rows sorted by grove, one for every choice; within a grove in the order of the choices."""

    offsets_N1: Tensor
    """int32 [N + 1]: rows of grove i are offsets[i] : offsets[i + 1]; their differences are the load."""
    choice_of_row: Tensor
    """int64 [R]: flat number t * K + k of the choice."""
    token_of_row: Tensor
    """int64 [R]."""
    row_of_choice: Tensor
    """int64 [T, K]."""


def grove_scores(
    x_TD: Tensor,
    score_NrD: Tensor,
    eps: float = 1e-6,
    *,
    inverse_N: Tensor | None = None,
    mean_N: Tensor | None = None,
    std_N: Tensor | None = None,
) -> Tensor:
    """s_i = sqrt(sum_j (E_i x)_j^2 + eps) of every grove, [T, N] in at least fp32, without gradient; z = E_i x is stored nowhere.

    x [T, D] and score E [N, r, D] have one dtype. inverse_N (`inverse_norms(score)`) makes it s_i / ||E_i||; mean_N and std_N, both or neither, then
    (s_i - mean_i) / std_i (docs/model.md, section 2). ValueError where shapes or dtypes do not fit.
    """
    return _scores(x_TD, score_NrD, eps, inverse_N, mean_N, std_N, sums=False)[0]


def scores_and_sums(
    x_TD: Tensor,
    score_NrD: Tensor,
    eps: float = 1e-6,
    *,
    inverse_N: Tensor | None = None,
    mean_N: Tensor | None = None,
    std_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`grove_scores`, and [2, N]: sums over the tokens of s and of s^2, before standardisation, in one order on every run."""
    return _scores(x_TD, score_NrD, eps, inverse_N, mean_N, std_N, sums=True)


def inverse_norms(score_NrD: Tensor) -> Tensor:
    """1 / ||E_i||_F of E [N, r, D]: [N] in at least fp32, without gradient."""
    return torch.ops.kan_train.grove_inverse_norms(score_NrD.detach())


def select(selection_TN: Tensor, balance_N: Tensor | None, choices: int) -> Tensor:
    """The `choices` groves of the highest selection_TN + balance_N, int64 [T, K], highest first. 1 <= K <= N, else ValueError.

    Of equal values the lowest grove number comes first, where torch.topk promises no order. NaN is above +inf, as in torch.topk: a row of NaN chooses 0 .. K-1.
    """
    if not 1 <= choices <= selection_TN.shape[1]:
        raise ValueError(f"choices={choices} must lie between 1 and the number of groves, {selection_TN.shape[1]}")
    return torch.ops.kan_train.select_groves(selection_TN.detach(), balance_N, choices)


def sort_by_grove(index_TK: Tensor, groves: int) -> GroveOrder:
    """The rows of all choices, sorted by grove. index_TK int64 or int32 [T, K], T K < 2^31; numbers outside 0 .. N-1 count as the nearest grove."""
    if index_TK.numel() >= 2**31:
        raise ValueError(f"{index_TK.numel()} choices do not fit the int32 offsets of rows; route fewer tokens at once")
    return GroveOrder(*torch.ops.kan_train.sort_by_grove(index_TK, groves))


def project(x_TD: Tensor, weight_NRD: Tensor, order: GroveOrder) -> Tensor:
    """W_i x_t of every token's chosen groves: [T, K, R'] in the dtype of x, differentiable in x [T, D] and weight [N, R', D] (of one dtype, else ValueError).

    With weight = E_i above w_i it is what the gate is made of (docs/model.md, section 2). The product is `grove_gemm.grouped_gemm`, which gathers tokens.
    """
    rank = weight_NRD.shape[1]
    # The copy that turns the matrices round also fills their rows up to 16 bytes, below which memory is read in pieces.
    weight_NDR = F.pad(weight_NRD.transpose(1, 2), (0, -rank % 8))
    rows = grove_gemm.grouped_gemm(x_TD, weight_NDR, order.offsets_N1, order.token_of_row, order.row_of_choice)
    return rows.index_select(0, order.row_of_choice.flatten()).unflatten(0, order.row_of_choice.shape)[..., :rank]


def _scores(
    x: Tensor, score: Tensor, eps: float, inverse: Tensor | None, mean: Tensor | None, std: Tensor | None, *, sums: bool
) -> tuple[Tensor, Tensor]:
    if x.dim() != 2 or score.dim() != 3 or x.shape[1] != score.shape[2] or x.dtype != score.dtype:
        raise ValueError(f"x [T, D] and score [N, r, D] of one dtype are needed, not {tuple(x.shape)} {x.dtype} and {tuple(score.shape)} {score.dtype}")
    if (mean is None) != (std is None):
        raise ValueError("mean_N and std_N standardise together; give both or neither")
    return torch.ops.kan_train.grove_scores(x.detach(), score.detach(), eps, inverse, mean, std, sums)


def _in_triton(tensor: Tensor) -> bool:
    return tensor.dtype in _DTYPES and backend.runs_triton(tensor.device)


@torch.library.custom_op("kan_train::grove_scores", mutates_args=())
def _grove_scores(
    x: Tensor, score: Tensor, eps: float, inverse: Tensor | None, mean: Tensor | None, std: Tensor | None, sums: bool
) -> tuple[Tensor, Tensor]:
    if not _in_triton(x):
        return reference.grove_scores(x, score, eps, inverse, mean, std, sums)
    from kan_train.kernels.grove_route import triton

    return triton.grove_scores(x, score, eps, inverse, mean, std, sums)


@_grove_scores.register_fake
def _(
    x: Tensor, score: Tensor, eps: float, inverse: Tensor | None, mean: Tensor | None, std: Tensor | None, sums: bool
) -> tuple[Tensor, Tensor]:
    dtype, groves = torch.promote_types(x.dtype, torch.float32), score.shape[0]
    return x.new_empty(x.shape[0], groves, dtype=dtype), x.new_empty(2 if sums else 0, groves, dtype=dtype)


@torch.library.custom_op("kan_train::grove_inverse_norms", mutates_args=())
def _grove_inverse_norms(score: Tensor) -> Tensor:
    if not _in_triton(score):
        return reference.inverse_norms(score)
    from kan_train.kernels.grove_route import triton

    return triton.inverse_norms(score)


@_grove_inverse_norms.register_fake
def _(score: Tensor) -> Tensor:
    return score.new_empty(score.shape[0], dtype=torch.promote_types(score.dtype, torch.float32))


@torch.library.custom_op("kan_train::select_groves", mutates_args=())
def _select_groves(selection: Tensor, balance: Tensor | None, choices: int) -> Tensor:
    if not _in_triton(selection) or choices > MOST_CHOICES or selection.shape[1] > MOST_GROVES:
        return reference.select(selection, balance, choices)
    from kan_train.kernels.grove_route import triton

    return triton.select(selection, balance, choices)


@_select_groves.register_fake
def _(selection: Tensor, balance: Tensor | None, choices: int) -> Tensor:
    return selection.new_empty(selection.shape[0], choices, dtype=torch.int64)


@torch.library.custom_op("kan_train::sort_by_grove", mutates_args=())
def _sort_by_grove(index: Tensor, groves: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not backend.runs_triton(index.device) or groves > MOST_GROVES:
        return reference.sort_by_grove(index, groves)
    from kan_train.kernels.grove_route import triton_sort

    return triton_sort.sort_by_grove(index, groves)


@_sort_by_grove.register_fake
def _(index: Tensor, groves: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = index.numel()
    choice, token = (index.new_empty(rows, dtype=torch.int64) for _ in range(2))
    return index.new_empty(groves + 1, dtype=torch.int32), choice, token, index.new_empty(index.shape, dtype=torch.int64)
