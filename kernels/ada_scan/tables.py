"""How the kernels are cut into tiles and segments: tables by shape, type and target, chosen by compile reports, not yet by time on a GPU."""

from dataclasses import dataclass

import torch

KINDS = ("o", "dq", "dk_dv", "states")
"""Launches of the scan: outputs; gradient of q; gradients of k and v together; what segments add to a state."""
WIDEST = 128
"""The widest head with kernels; wider ones run the reference."""
LEAST_CHUNKS, MOST_CHUNKS = 8, 64
"""Chunks of a segment: fewer would cost more in states than in rows; more would let the rounding of dL/d log a add up over too many chunks."""
CARRY_BLOCK = 1024
"""State elements that a program carries from segment to segment."""
GRADIENT_ROWS = 16
"""Rows of two states that the gradient of the decay multiplies at a time."""
WAVES = 2
"""Programs a multiprocessor is to get: as many as its registers hold at a time."""


@dataclass(frozen=True)
class Tiling:
    """One launch of the scan."""

    columns: int
    """Columns of the values a program takes, a power of two."""
    chunk: int
    """Tokens of a chunk."""
    warps: int
    stages: int
    """Depth of the loads' pipeline."""

    def tiles(self, width: int) -> int:
        """Programs that share a head and segment."""
        return -(-width // self.columns)


def padded(width: int) -> int:
    """The power of two that holds a head, at least the 16 that a matrix instruction takes."""
    return max(16, 1 << (width - 1).bit_length())


def scan_tiling(kind: str, width: int, dtype: torch.dtype, chunk: int, target: str, precision: str = "ieee") -> Tiling:
    """The tiling of a launch of the scan on `target` (kernels.backend.target).

    chunk: the model's, an upper bound to the kernel's, which is a power of two from 16 to 64, alike for all kinds, and does not change the result.
    Registers decide: the state of a program takes width * columns of them, and four warps, one matrix instruction of 64 rows, are what a chunk of
    64 tokens feeds. Products in fp32 without TF32 have no tensor cores, and hold whole operands in registers: small tiles.
    Raises ValueError for a kind that is none of KINDS.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    most = 64
    if dtype == torch.float32:
        most = 32 if precision == "tf32" else 16
    tokens = max(16, min(most, 1 << (chunk.bit_length() - 1)))
    full = padded(width)
    if dtype == torch.float32:
        return Tiling(min(full, most), tokens, 4 if precision == "tf32" else 8, 1)
    if not target.startswith("sm_"):  # 64 KiB of shared memory: no room for a second buffer
        return Tiling(min(full, 32), tokens, 4, 1)
    wide = kind == "states" or (kind == "o" and (width <= 64 or target != "sm_80"))
    return Tiling(min(full, 64 if wide else 32), tokens, 4, 2)


def cut(time: int, chunk: int, programs: int, processors: int) -> tuple[int, int]:
    """Segments of a sequence, and chunks of each, for a launch that has `programs` a segment: enough of them to fill the processors, and no more.

    A segment costs a state, and a second reading of keys and values that one segment alone does without.
    """
    chunks = -(-time // chunk)
    wanted = round(WAVES * processors / programs)
    segments = max(min(wanted, chunks // LEAST_CHUNKS), -(-chunks // MOST_CHUNKS), 1)
    length = -(-chunks // segments)
    return -(-chunks // length), length


def rows_tokens(width: int) -> int:
    """Tokens of one head that a program of the elementwise kernels takes at a time: 2,048 elements, 16 a thread."""
    return max(1, 2048 // padded(width))


def keys_tokens(width: int) -> int:
    """The same for the gradients of the diffused keys, which hold several tiles at a time."""
    return max(1, 1024 // padded(width))


def rows_programs(blocks: int, others: int, processors: int) -> int:
    """Programs that share `blocks` of one head's tokens where `others` heads and sequences run beside it: each leaves one row of partial sums."""
    return max(1, min(blocks, -(-16 * processors // others)))


def step_columns(width: int) -> int:
    """Columns of a state that a program of the recurrent step takes: 4,096 elements of a head of 128."""
    return min(padded(width), 32)
