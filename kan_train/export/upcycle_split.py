"""A dense gated unit as N groves of M hidden units each, and a router for them made from its weights alone.  D width, r scoring rank.

Grove i is units i M .. (i+1) M: together the groves are the layer, W_out (silu(W_up x) * (W_v x)), and a sum over all of them is what it computes.
Hidden units of a trained layer stand in no order, so that these are groves of no meaning yet (as random ones, which Zhu et al., arXiv:2406.16554,
found no worse a start than clusters).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Scoring(NamedTuple):
    """The scoring of one layer's groves."""

    projection: Tensor
    """E [N, r, D]."""
    mean: Tensor
    """Mean of each score [N] for normal inputs."""
    std: Tensor
    """Its deviation [N]."""


def inputs_of_groves(matrix_FD: Tensor, groves: int) -> Tensor:
    """W_up or W_v [F, D] -> [N, D, M]."""
    return matrix_FD.unflatten(0, (groves, -1)).transpose(1, 2)


def outputs_of_groves(matrix_DF: Tensor, groves: int) -> Tensor:
    """W_out [D, F] -> [N, M, D]."""
    return matrix_DF.T.unflatten(0, (groves, -1))


def scoring(up_FD: Tensor, value_FD: Tensor, norm_D: Tensor, groves: int, rank: int) -> Scoring:
    """A projection by which ||E_i x|| says how much of x the matrices of grove i read, in float64.

    E_i is the best approximation of rank r of W_up and W_v of the grove, stacked (its leading singular vectors, times their singular values). Mean and
    deviation of ||E_i x|| / ||E_i||_F are those of inputs w * u, u of independent standard normals and w the weight of the norm before the layer, to the
    second order in the relative deviation of its square.
    """
    parts = [matrix.double().unflatten(0, (groves, -1)) for matrix in (up_FD, value_FD)]
    projection = torch.stack([_leading(torch.cat((up, value)), rank) for up, value in zip(*parts, strict=True)])
    seen = projection * norm_D.double()
    covariance = seen @ seen.transpose(1, 2)
    energy = projection.square().sum((1, 2)).clamp(min=1e-30)
    square_mean = covariance.diagonal(dim1=1, dim2=2).sum(1) / energy
    square_variance = 2 * covariance.square().sum((1, 2)) / energy**2
    # s = sqrt(q): its variance is Var(q) / (4 E[q]), and E[s]^2 = E[q] - Var(s), which stays positive for normal inputs (Var(q) <= 2 E[q]^2).
    variance = square_variance / (4 * square_mean.clamp(min=1e-30))
    return Scoring(projection, (square_mean - variance).clamp(min=0).sqrt(), variance.clamp(min=1e-12).sqrt())


def _leading(matrix_AD: Tensor, rank: int) -> Tensor:
    """The `rank` largest singular values times their right vectors, [rank, D], from the smaller of the two Gram matrices."""
    if matrix_AD.shape[0] <= matrix_AD.shape[1]:
        vectors = torch.linalg.eigh(matrix_AD @ matrix_AD.T).eigenvectors
        return vectors[:, -rank:].flip(1).T @ matrix_AD
    values, vectors = torch.linalg.eigh(matrix_AD.T @ matrix_AD)
    return (vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()).flip(1).T
