"""Products grouped by grove, and the gated grove as one pipeline.  T tokens, K choices a token, R rows sorted by grove, D width, N groves, M grove width.

    grouped_gemm    rows times their grove's matrix, tokens gathered on the way in
    combine_rows    each token the gated sum of its choices' rows
    gated_groves    y_t = sum_k gate_tk W_out (F(W_up u) * (W_v x_t)), from tokens to tokens

Where the rows of a grove lie is known to the device alone: `offsets_N1` int32 [N + 1], rows offsets[i]:offsets[i + 1] belong to grove i, offsets[N] = R.
token_of_row [R] and choice_of_row [R] (flat number t K + k) are int32 or int64; T and T K mark a row that is padding. row_of_choice [T, K]: R marks a choice
that was dropped. Sums have one order: two runs give the same bits. On a device without triton, and in float64, the reference runs.
"""

import torch
from torch import Tensor

from kan_train.kernels.grove_gemm import gated, products


def grouped_gemm(
    x: Tensor, weight_NDM: Tensor, offsets_N1: Tensor, token_of_row: Tensor | None = None, row_of_choice_TK: Tensor | None = None
) -> Tensor:
    """Rows times their grove's matrix -> [R, M] in the dtype of x, differentiable in x and weight.

    x is [R, D], or [T, D] with token_of_row, when the rows' tokens are gathered as they are read; then row_of_choice_TK is needed for the gradient of x, where
    a token's rows are added up. Raises ValueError where types or shapes do not fit.
    """
    _require_equal_types(x, weight_NDM)
    if x.shape[1] != weight_NDM.shape[1]:
        raise ValueError(f"x of width {x.shape[1]} does not fit the matrices [N, {weight_NDM.shape[1]}, {weight_NDM.shape[2]}]")
    if token_of_row is not None and row_of_choice_TK is None and x.requires_grad:
        raise ValueError("the gradient of gathered tokens needs row_of_choice_TK")
    return products.grouped_gemm(x, weight_NDM, offsets_N1, token_of_row, row_of_choice_TK)


def combine_rows(y_RD: Tensor, gate_TK: Tensor, choice_of_row: Tensor, row_of_choice_TK: Tensor) -> Tensor:
    """[R, D] -> [T, D] in the dtype of y: y_t = sum_k gate_tk row(t, k) in at least fp32, differentiable in y and gate (any floating type)."""
    return products.combine_rows(y_RD, gate_TK, choice_of_row, row_of_choice_TK)


def gated_groves(
    x_TD: Tensor, own_TKr: Tensor | None, gate_TK: Tensor, up_NIM: Tensor, value_NDM: Tensor, out_NMD: Tensor, table_NFGP: Tensor | None,
    token_of_row: Tensor, choice_of_row: Tensor, row_of_choice_TK: Tensor, offsets_N1: Tensor, *, low: float, step: float,
) -> Tensor:  # fmt: skip
    """The routed sum of gated groves, [T, D] -> [T, D] in the dtype of x, differentiable once in every floating tensor   (docs/model.md, section 2).

    own_TKr is W_up's input for every choice (the `reuse` kind), None where that is x. table_NFGP [N, F, G + 2, P]: of each of a grove's F functions, which
    M / F columns share, the polynomials of the cells of a grid that begins at `low` with cells of width `step`, and of a cell to either side of it; None for
    plain silu. x, own and the matrices are of one type; gate and table may be of any floating type, and are read in fp32 at least.
    Kept for the backward pass: h = W_up u and v = W_v x, 2 R M numbers, only where a gradient is asked for. Raises ValueError where types do not fit.
    """
    _require_equal_types(x_TD, up_NIM, value_NDM, out_NMD, *(() if own_TKr is None else (own_TKr,)))
    inputs = (x_TD, own_TKr, gate_TK, up_NIM, value_NDM, out_NMD, table_NFGP)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    own = None if own_TKr is None else own_TKr.flatten(0, 1)
    y, _, _ = gated.gated_groves(
        x_TD, own, up_NIM, value_NDM, out_NMD, gate_TK, table_NFGP, token_of_row, choice_of_row, row_of_choice_TK, offsets_N1, low, step, keep
    )
    return y


def _require_equal_types(*tensors: Tensor) -> None:
    types = {tensor.dtype for tensor in tensors}
    if len(types) > 1:
        raise ValueError(f"inputs and matrices must be of one type, not {', '.join(sorted(map(str, types)))}: cast them to that of the activations")
