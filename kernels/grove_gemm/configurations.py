"""Which tiles a kernel takes, by device and precision. A table, not a search: results are the same in every run, and nothing is timed at the start.

The choice follows from the compile report (registers, spills, shared memory; docs/kernels/grove_gemm.md) and has not been measured on a GPU.
"""

from dataclasses import dataclass

import torch

from kan_train.kernels.backend import has_tensor_descriptors

KINDS = ("product", "few_product", "gated", "few_gated", "back", "weights", "gathered_weights", "two_weights")
FEW_ROWS = 16  # rows a grove, on average, up to which reading the weights is all that counts


@dataclass(frozen=True)
class Tiles:
    """Tiles of a matrix product."""

    rows: int
    """Rows of the output tile."""
    columns: int
    """Its columns; two tiles of so many in a kernel that makes two products at once."""
    inner: int
    """Step along the dimension that is summed."""
    warps: int
    stages: int
    """Tiles of operands in flight; of operands that are gathered about half as many, since their numbers are loaded ahead of them."""
    blocks: int = 1
    """Persistent programs for every processor."""
    descriptors: bool = False
    """Weights by tensor descriptor, where their rows are a multiple of 16 bytes."""


# 16-bit operands. sm_90: two warpgroups of 64 rows; the output tile of 128 x 256 (or twice 128 x 128) takes 128 registers a thread. gfx942: 64 KB of LDS.
_HALF = {
    "sm_90": {
        "product": Tiles(128, 256, 64, 8, 3),
        "few_product": Tiles(16, 128, 128, 4, 3, 2),
        "gated": Tiles(128, 128, 64, 8, 3),
        "few_gated": Tiles(16, 64, 128, 4, 3, 2),
        "back": Tiles(128, 128, 64, 8, 3),
        "weights": Tiles(128, 256, 64, 8, 4),
        "gathered_weights": Tiles(128, 256, 64, 8, 5),
        "two_weights": Tiles(128, 128, 64, 8, 5),
    },
    "sm_80": {
        "product": Tiles(128, 128, 64, 8, 4),
        "few_product": Tiles(16, 128, 64, 4, 4, 2),
        "gated": Tiles(128, 64, 64, 8, 4),
        "few_gated": Tiles(16, 64, 64, 4, 4, 2),
        "back": Tiles(128, 64, 64, 8, 4),
        "weights": Tiles(128, 128, 64, 8, 4),
        "gathered_weights": Tiles(128, 128, 64, 8, 7),
        "two_weights": Tiles(128, 64, 64, 8, 7),
    },
    "gfx942": {
        "product": Tiles(128, 128, 64, 8, 2),
        "few_product": Tiles(16, 64, 128, 4, 2, 2),
        "gated": Tiles(128, 64, 64, 8, 2),
        "few_gated": Tiles(16, 64, 64, 4, 2, 2),
        "back": Tiles(128, 64, 64, 8, 2),
        "weights": Tiles(128, 128, 64, 8, 2),
        "gathered_weights": Tiles(128, 128, 64, 8, 3),
        "two_weights": Tiles(128, 64, 64, 8, 3),
    },
}
# fp32 in full precision has no tensor cores on NVIDIA: small tiles, since every multiplication is an instruction. TF32 has them, at twice the bytes of bf16.
_FULL = {
    "product": Tiles(64, 64, 32, 4, 2, 2),
    "few_product": Tiles(16, 64, 32, 4, 2, 2),
    "gated": Tiles(64, 32, 32, 8, 2, 2),
    "few_gated": Tiles(16, 32, 32, 4, 2, 2),
    "back": Tiles(64, 32, 32, 4, 2, 2),
    "weights": Tiles(64, 64, 32, 4, 2, 2),
    "gathered_weights": Tiles(64, 64, 32, 4, 2, 2),
    "two_weights": Tiles(64, 32, 32, 4, 2, 2),
}
_TF32 = {
    "product": Tiles(128, 128, 32, 8, 3),
    "few_product": Tiles(16, 64, 64, 4, 3, 2),
    "gated": Tiles(128, 64, 32, 8, 3),
    "few_gated": Tiles(16, 64, 32, 4, 3, 2),
    "back": Tiles(128, 64, 32, 8, 3),
    "weights": Tiles(128, 128, 32, 8, 3),
    "gathered_weights": Tiles(128, 128, 32, 8, 5),
    "two_weights": Tiles(128, 64, 32, 8, 5),
}
# The interpreter's time is a call of numpy for every operation on a tile, whatever its size: tiles that leave edges in small shapes.
_INTERPRETED = dict.fromkeys(KINDS, Tiles(32, 64, 32, 4, 1, descriptors=True))


def configurations(target: str, dtype: torch.dtype, precision: str) -> dict[str, Tiles]:
    """The tiles of every kind of kernel on `target` for operands of `dtype`; precision: tl.dot's, which tells TF32 from full fp32."""
    if target == "interpreter":
        return _INTERPRETED
    if dtype == torch.float32:
        chosen = _TF32 if precision == "tf32" else _FULL
    elif target.startswith("sm_"):
        chosen = _HALF["sm_90" if has_tensor_descriptors(target) else "sm_80"]
    else:
        chosen = _HALF["gfx942"]
    # Descriptors feed tensor cores; beside fp32's multiplications in registers they cost spills.
    descriptors = has_tensor_descriptors(target) and chosen is not _FULL
    return {kind: Tiles(t.rows, t.columns, t.inner, t.warps, t.stages, t.blocks, descriptors) for kind, t in chosen.items()}


def few(rows: int, groves: int) -> bool:
    """Whether groves have so few rows on average that a tile of 128 would be mostly empty."""
    return rows <= FEW_ROWS * groves


def sum_blocks(target: str, width: int) -> Tiles:
    """Blocks of the sums over rows [., width]: one row of a thousand columns a program on a GPU, several in the interpreter, where a program is dear."""
    if target == "interpreter":
        return Tiles(16, 32, 0, 4, 1)
    return Tiles(1, 1024, 0, 4, 2) if width > 256 else Tiles(4, 256, 0, 4, 2)


def columns_together(per_function: int, tiles: Tiles) -> int:
    """Columns that are summed into one number of a function's gradient: the largest power of two that divides both them and a part of a tile."""
    return min(per_function & -per_function, part_columns(tiles))


def part_columns(tiles: Tiles) -> int:
    """Columns of a tile that the backward kernel's epilogue works on at a time, so that registers suffice: a quarter, or an eighth of a wide tile."""
    return tiles.columns // (8 if tiles.columns >= 128 else 4)
