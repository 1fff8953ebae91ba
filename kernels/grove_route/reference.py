"""Routing in plain PyTorch: any device, any dtype, float64 too.  T tokens, D width, N groves, K choices a token, r scoring rank, R = T K rows."""

import torch
from torch import Tensor

_NUMBERS_AT_ONCE = 2**22  # of z [tokens, r, N]: it is never whole in memory


def grove_scores(
    x_TD: Tensor, score_NrD: Tensor, eps: float, inverse_N: Tensor | None, mean_N: Tensor | None, std_N: Tensor | None, sums: bool
) -> tuple[Tensor, Tensor]:
    """Scores [T, N] and their sums [2, N] (or [0, N]), at least fp32; the arguments are those of `kan_train.kernels.grove_route.scores_and_sums`."""
    groves, rank, _ = score_NrD.shape
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    columns = score_NrD.to(wide).transpose(0, 1).flatten(0, 1).T
    blocks = x_TD.split(max(1, _NUMBERS_AT_ONCE // (groves * rank)))
    squares = torch.cat([(x.to(wide) @ columns).square().view(len(x), rank, groves).sum(1) for x in blocks])
    scores = (squares + eps).sqrt()
    if inverse_N is not None:
        scores = scores * inverse_N
    moments = torch.stack((scores.sum(0), scores.square().sum(0))) if sums else scores.new_empty(0, groves)
    if mean_N is not None and std_N is not None:
        scores = (scores - mean_N) / std_N
    return scores, moments


def inverse_norms(score_NrD: Tensor) -> Tensor:
    """1 / ||E_i||_F, [N] in at least fp32."""
    return score_NrD.to(torch.promote_types(score_NrD.dtype, torch.float32)).flatten(1).square().sum(1).rsqrt()


def select(selection_TN: Tensor, balance_N: Tensor | None, choices: int) -> Tensor:
    """The `choices` groves of the highest selection + balance, int64 [T, K], highest first; NaN is above all; of equals the lowest number first."""
    biased = selection_TN if balance_N is None else selection_TN + balance_N
    return biased.sort(dim=-1, descending=True, stable=True).indices[:, :choices].contiguous()


def sort_by_grove(index_TK: Tensor, groves: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """offsets int32 [N + 1], and int64 choice_of_row [R], token_of_row [R], row_of_choice [T, K]: the stable order by grove."""
    flat = index_TK.flatten().clamp(0, groves - 1)
    choice_of_row = flat.argsort(stable=True)
    row_of_choice = torch.empty_like(choice_of_row)
    row_of_choice[choice_of_row] = torch.arange(flat.numel(), device=flat.device)
    # Boundaries by search in the sorted numbers: a count by number would be read by the host, or added up in no fixed order.
    numbers = torch.arange(groves + 1, device=flat.device)
    offsets = torch.searchsorted(flat[choice_of_row], numbers).to(torch.int32)
    return offsets, choice_of_row, choice_of_row // max(1, index_TK.shape[1]), row_of_choice.view(index_TK.shape)
