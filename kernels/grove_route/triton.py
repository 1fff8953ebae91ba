"""Scores with the norm in the epilogue of their product, and the selection of the highest, in Triton.

T tokens, D width, N groves, K choices a token, r scoring rank.  Layouts, tiles and costs: docs/kernels/grove_route.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kan_train.kernels import backend

_FEW, _SOME = 16, 2048  # tokens of a decode step, and of a batch whose tiles of 128 tokens would not fill the device


@dataclass(frozen=True)
class ScoreTile:
    """What one program of the scoring product works on."""

    tokens: int
    """Rows of x."""
    groves: int
    """Groves; with `rows` of each of them the columns of the product."""
    rows: int
    """Rows of E_i that are multiplied at once; where r has more, one product follows another."""
    depth: int
    """Steps of D."""
    warps: int
    stages: int


def score_tile(tokens: int, groves: int, rank: int, dtype: torch.dtype, target: str) -> ScoreTile:
    """The tile of a shape; target as of `backend.target`. A table that no GPU has measured yet.

    N and r are padded to whole tiles: of the tiles for this many tokens the one that multiplies least is taken, then the one with the fewest passes over x.
    """

    def cost(tile: ScoreTile) -> tuple[int, int]:
        passes = triton.cdiv(rank, tile.rows)
        return triton.cdiv(groves, tile.groves) * tile.groves * passes * tile.rows, passes

    return min(score_tiles(tokens, dtype, target), key=cost)


def score_tiles(tokens: int, dtype: torch.dtype, target: str) -> list[ScoreTile]:
    """The tiles that `score_tile` chooses from. 16 groves of a tile, or more, store a token's scores in whole sectors of memory."""
    amd, wide = target.startswith("gfx"), dtype == torch.float32
    stages = 2 if amd or wide else 3
    if tokens <= _FEW:
        # Memory bound: as many programs as groves, each of which reads its own E once; that columns of a small r are empty costs nothing.
        return [ScoreTile(16, 1, 16, 64 if wide else 128, 4, stages)]
    if wide:
        return [ScoreTile(64, 16, 4, 32, 4, stages)]
    if tokens <= _SOME:
        return [ScoreTile(64, *columns, 64, 4, stages) for columns in ((16, 4), (64, 1))]
    few_passes = (32, 8) if backend.has_tensor_descriptors(target) else (16, 8)  # wgmma takes 256 columns at a time, and is fed best so
    return [ScoreTile(128, *columns, 64, 8, stages) for columns in (few_passes, (128, 1))]


@triton.jit
def scores_kernel(
    x_ptr, score_ptr, inverse_ptr, mean_ptr, std_ptr, out_ptr, sums_ptr,
    tokens, groves, rank, width, x_stride, eps,
    NORMALISE: tl.constexpr, STANDARDISE: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[t, i] = sqrt(sum_j (x_t . E_ij)^2 + eps) for BLOCK_T tokens and BLOCK_N groves, normalised and standardised on request.

    Column c of the product is row c // BLOCK_N of grove c % BLOCK_N: the rows of a grove lie BLOCK_N apart, in one thread's registers, which adds their
    squares without speaking to another. sums_ptr [token tiles, 2, groves] takes this tile's sums over its tokens.
    """
    grove_tiles = tl.cdiv(groves, BLOCK_N)
    program = tl.program_id(0)
    token_tile = program // grove_tiles  # tiles of the same tokens run side by side: x comes from memory once, E stays in the cache
    grove = (program - token_tile * grove_tiles) * BLOCK_N
    token = token_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_N * BLOCK_R)
    column_grove = grove + column % BLOCK_N
    depth = tl.arange(0, BLOCK_D)
    x_row = x_ptr + token.to(tl.int64)[:, None] * x_stride
    squares = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for first in range(0, rank, BLOCK_R):
        row = first + column // BLOCK_N
        score_row = score_ptr + (column_grove.to(tl.int64) * rank + row)[None, :] * width
        there = (column_grove < groves) & (row < rank)
        z = tl.zeros((BLOCK_T, BLOCK_N * BLOCK_R), tl.float32)
        for start in range(0, width, BLOCK_D):
            d = start + depth
            x = tl.load(x_row + d[None, :], mask=(token < tokens)[:, None] & (d < width)[None, :], other=0.0)
            e = tl.load(score_row + d[:, None], mask=there[None, :] & (d < width)[:, None], other=0.0)
            z = tl.dot(x, e, z, input_precision=PRECISION)
        squares += tl.sum(tl.reshape(z * z, (BLOCK_T, BLOCK_R, BLOCK_N)), 1)
    own = grove + tl.arange(0, BLOCK_N)
    inside = (token < tokens)[:, None] & (own < groves)[None, :]
    score = tl.sqrt(squares + eps)
    if NORMALISE:
        score *= tl.load(inverse_ptr + own, mask=own < groves, other=1.0)[None, :]
    if SUMS:
        counted = tl.where(inside, score, 0.0)
        sums = sums_ptr + token_tile.to(tl.int64) * 2 * groves + own
        tl.store(sums, tl.sum(counted, 0), mask=own < groves)
        tl.store(sums + groves, tl.sum(counted * counted, 0), mask=own < groves)
    if STANDARDISE:
        mean = tl.load(mean_ptr + own, mask=own < groves, other=0.0)
        std = tl.load(std_ptr + own, mask=own < groves, other=1.0)
        score = (score - mean[None, :]) / std[None, :]
    tl.store(out_ptr + token.to(tl.int64)[:, None] * groves + own[None, :], score, mask=inside)


@triton.jit
def inverse_norms_kernel(score_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """out[i] = 1 / ||E_i||, of `size` numbers each."""
    grove = tl.program_id(0)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        e = tl.load(score_ptr + grove.to(tl.int64) * size + at, mask=at < size, other=0.0).to(tl.float32)
        squares += e * e
    tl.store(out_ptr + grove, 1.0 / tl.sqrt(tl.sum(squares, 0)))


_LOWEST = tl.constexpr(-(2**31))
_HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def select_kernel(
    selection_ptr, balance_ptr, index_ptr, tokens, groves, stride,
    BALANCE: tl.constexpr, CHOICES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """index[t] = the CHOICES groves of the highest selection + balance.

    Values become integers of the same order: a warp finds the highest integer in one instruction (redux), and NaN has a place among them, the highest.
    A choice keeps its rank in the place where it was found, and is written from there.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    grove = tl.arange(0, BLOCK_N)
    inside = (token < tokens)[:, None] & (grove < groves)[None, :]
    value = tl.load(selection_ptr + token.to(tl.int64)[:, None] * stride + grove[None, :], mask=inside, other=0.0).to(tl.float32)
    if BALANCE:
        value += tl.load(balance_ptr + grove, mask=grove < groves, other=0.0).to(tl.float32)[None, :]
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)  # -0 and 0 are equals
    key = tl.where(value == value, bits ^ ((bits >> 31) & _HIGHEST), _HIGHEST)
    key = tl.where(inside, key, _LOWEST)
    number = tl.zeros((BLOCK_T, BLOCK_N), tl.int32) + grove[None, :]
    rank = tl.full((BLOCK_T, BLOCK_N), CHOICES, tl.int32)
    for choice in tl.static_range(CHOICES):
        best = tl.max(key, 1)
        first = tl.min(tl.where(key == best[:, None], number, BLOCK_N), 1)
        found = number == first[:, None]
        rank = tl.where(found, choice, rank)
        key = tl.where(found, _LOWEST, key)
    place = index_ptr + token.to(tl.int64)[:, None] * CHOICES + rank
    tl.store(place, number.to(tl.int64), mask=(rank < CHOICES) & (token < tokens)[:, None])


def grove_scores(
    x_TD: Tensor, score_NrD: Tensor, eps: float, inverse_N: Tensor | None, mean_N: Tensor | None, std_N: Tensor | None, sums: bool
) -> tuple[Tensor, Tensor]:
    """As `reference.grove_scores`, in fp32."""
    (tokens, width), (groves, rank, _) = x_TD.shape, score_NrD.shape
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    tile = score_tile(tokens, groves, rank, x_TD.dtype, backend.target(x_TD.device))
    token_tiles, grove_tiles = triton.cdiv(tokens, tile.tokens), triton.cdiv(groves, tile.groves)
    out = x_TD.new_empty(tokens, groves, dtype=torch.float32)
    parts = x_TD.new_empty(token_tiles if sums else 0, 2, groves, dtype=torch.float32)
    vectors = [out if vector is None else vector.float().contiguous() for vector in (inverse_N, mean_N, std_N)]
    if tokens and groves:
        with backend.on(x_TD.device):
            scores_kernel[(token_tiles * grove_tiles,)](
                x_TD, score_NrD.contiguous(), *vectors, out, parts, tokens, groves, rank, width, x_TD.stride(0), eps,
                NORMALISE=inverse_N is not None, STANDARDISE=mean_N is not None, SUMS=sums, PRECISION=backend.dot_precision(x_TD),
                BLOCK_T=tile.tokens, BLOCK_N=tile.groves, BLOCK_R=tile.rows, BLOCK_D=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    # The second stage is torch's own reduction: one order, whatever else the device is doing.
    return out, parts.sum(0) if sums else parts.view(0, groves)


def inverse_norms(score_NrD: Tensor) -> Tensor:
    """1 / ||E_i||_F, fp32 [N]."""
    out = score_NrD.new_empty(len(score_NrD), dtype=torch.float32)
    if len(score_NrD):
        with backend.on(out.device):
            inverse_norms_kernel[(len(score_NrD),)](score_NrD.contiguous(), out, score_NrD[0].numel(), BLOCK=1024, num_warps=4)
    return out


def select(selection_TN: Tensor, balance_N: Tensor | None, choices: int) -> Tensor:
    """As `reference.select`, compared in fp32."""
    tokens, groves = selection_TN.shape
    selection_TN = selection_TN if selection_TN.stride(1) == 1 else selection_TN.contiguous()
    index = selection_TN.new_empty(tokens, choices, dtype=torch.int64)
    block_n, block_t = select_block(groves)
    if tokens:
        with backend.on(index.device):
            select_kernel[(triton.cdiv(tokens, block_t),)](
                selection_TN, selection_TN if balance_N is None else balance_N.contiguous(), index, tokens, groves, selection_TN.stride(0),
                BALANCE=balance_N is not None, CHOICES=choices, BLOCK_T=block_t, BLOCK_N=block_n, num_warps=4,
            )  # fmt: skip
    return index


def select_block(groves: int) -> tuple[int, int]:
    """Groves, padded, and tokens of a selecting program: 2048 numbers, 16 a thread."""
    block_n = max(2, triton.next_power_of_2(groves))
    return block_n, max(1, min(64, 2048 // block_n))


def aot_cases(target: str) -> Iterator[backend.AotCase]:
    """Every tile of scores, in the dtypes that differ, at the shapes of a large model; selections of the common and of the largest size; and the sort."""
    from kan_train.kernels.grove_route import MOST_CHOICES, MOST_GROVES, triton_sort

    for dtype, letters in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        tiles = {tile: None for tokens in (_FEW, _SOME, _SOME + 1) for tile in score_tiles(tokens, dtype, target)}
        yield from (_scores_case(tile, letters) for tile in tiles)
    pointer, index = "*fp32:16", "*i64:16"
    for groves, choices in ((128, 8), (MOST_GROVES, MOST_CHOICES)):
        block_n, block_t = select_block(groves)
        signature = {"selection_ptr": pointer, "balance_ptr": pointer, "index_ptr": index, "tokens": "i32:16", "groves": "i32:16", "stride": "i32:16"}
        constants = {"BALANCE": True, "CHOICES": choices, "BLOCK_T": block_t, "BLOCK_N": block_n}
        yield backend.AotCase(f"select N {groves} K {choices}", select_kernel, signature, constants, 4, 3, tensor_cores=False)
    signature = {"score_ptr": "*bf16:16", "out_ptr": pointer, "size": "i32:16"}
    yield backend.AotCase("inverse_norms bf16", inverse_norms_kernel, signature, {"BLOCK": 1024}, 4, 3, tensor_cores=False)
    yield from triton_sort.aot_cases(target)


def _scores_case(tile: ScoreTile, letters: str) -> backend.AotCase:
    name = f"scores {letters} {tile.tokens}x{tile.groves}x{tile.rows}x{tile.depth}"
    signature = dict.fromkeys(("inverse_ptr", "mean_ptr", "std_ptr", "out_ptr", "sums_ptr"), "*fp32:16")
    signature |= dict.fromkeys(("x_ptr", "score_ptr"), f"*{letters}:16") | {"rank": "i32", "eps": "fp32"}
    signature |= dict.fromkeys(("tokens", "groves", "width", "x_stride"), "i32:16")
    constants = {"NORMALISE": True, "STANDARDISE": True, "SUMS": True, "PRECISION": "ieee"}
    constants |= {"BLOCK_T": tile.tokens, "BLOCK_N": tile.groves, "BLOCK_R": tile.rows, "BLOCK_D": tile.depth}
    return backend.AotCase(name, scores_kernel, signature, constants, tile.warps, tile.stages, tensor_cores=letters != "fp32")
