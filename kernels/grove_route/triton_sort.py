"""The stable order by grove, in Triton: a counting sort.  N groves, R choices, B = ceil(R / BLOCK) blocks of them.

Every place is computed from counts alone, so that the order is one whatever runs first, and nothing is read by the host.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kan_train.kernels import backend

COMPARED_BELOW = 8192
"""Choices up to which each is compared with all others in one launch: fewer microseconds than the launches of counts, scan and scatter."""

SCANNED = 1024
"""Blocks whose counts a program scans at once."""
_COMPARED = 64  # choices of a comparing program, and of those that it compares them with at a time
_BLOCK, _CHUNK = 256, 16  # choices of a block, and of those that they are compared with at a time: the comparisons fill 32 registers a thread


@triton.jit
def _grove(index_ptr, at, count, groves):
    """Grove of choices `at`, brought into range; `groves`, which sorts past all, beyond the last choice."""
    grove = tl.load(index_ptr + at, mask=at < count, other=0)
    return tl.where(at < count, tl.minimum(tl.maximum(grove, 0), groves - 1), groves).to(tl.int32)


@triton.jit
def compare_kernel(
    index_ptr, offsets_ptr, choice_ptr, token_ptr, row_ptr, count, groves, choices, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Row of a choice = how many choices come before it. Behind the choices stand N + 1 marks, and before mark i come the choices of lower groves."""
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    grove = tl.where(own < count, _grove(index_ptr, own, count, groves), own - count)
    turn = tl.where(own < count, own, -1)  # among choices of one grove the earlier comes first; none of them comes before a mark
    row = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, CHUNK):
        other = start + tl.arange(0, CHUNK)
        against = _grove(index_ptr, other, count, groves)
        before = (against[None, :] < grove[:, None]) | ((against[None, :] == grove[:, None]) & (other[None, :] < turn[:, None]))
        row += tl.sum((before & (other < count)[None, :]).to(tl.int32), 1)
    tl.store(choice_ptr + row, own.to(tl.int64), mask=own < count)
    tl.store(token_ptr + row, (own // choices).to(tl.int64), mask=own < count)
    tl.store(row_ptr + own, row.to(tl.int64), mask=own < count)
    tl.store(offsets_ptr + own - count, row, mask=(own >= count) & (own <= count + groves))


@triton.jit
def count_kernel(index_ptr, table_ptr, row_ptr, count, groves, blocks, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """row[c] = how many choices of its grove come before it in its block; table[i, b] = choices of grove i in block b, which stays 0 where there are none."""
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    at = block * BLOCK + lane
    grove = _grove(index_ptr, at, count, groves)
    earlier = tl.zeros((BLOCK,), tl.int32)
    later = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, BLOCK, CHUNK):
        other = start + tl.arange(0, CHUNK)
        same = _grove(index_ptr, block * BLOCK + other, count, groves)[None, :] == grove[:, None]
        earlier += tl.sum((same & (other[None, :] < lane[:, None])).to(tl.int32), 1)
        later += tl.sum((same & (other[None, :] > lane[:, None])).to(tl.int32), 1)
    tl.store(row_ptr + at, earlier.to(tl.int64), mask=at < count)
    # The last of its grove knows how many they are: nothing is added up in memory.
    tl.store(table_ptr + grove.to(tl.int64) * blocks + block, earlier + 1, mask=(at < count) & (later == 0))


@triton.jit
def scan_kernel(table_ptr, totals_ptr, blocks, BLOCK: tl.constexpr):
    """Each grove's counts become the number of its choices in the blocks before; totals[i] is that of all."""
    grove = tl.program_id(0)
    row = table_ptr + grove.to(tl.int64) * blocks
    total = 0
    for start in range(0, blocks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        counts = tl.load(row + at, mask=at < blocks, other=0)
        tl.store(row + at, total + tl.cumsum(counts, 0) - counts, mask=at < blocks)
        total += tl.sum(counts, 0)
    tl.store(totals_ptr + grove, total)


@triton.jit
def offsets_kernel(totals_ptr, offsets_ptr, groves, BINS: tl.constexpr):
    """offsets[i] = choices of the groves before i."""
    grove = tl.arange(0, BINS)
    ends = tl.cumsum(tl.load(totals_ptr + grove, mask=grove < groves, other=0), 0)
    tl.store(offsets_ptr + grove, tl.zeros_like(ends), mask=grove == 0)
    tl.store(offsets_ptr + grove + 1, ends, mask=grove < groves)


@triton.jit
def scatter_kernel(index_ptr, table_ptr, offsets_ptr, choice_ptr, token_ptr, row_ptr, count, groves, choices, blocks, BLOCK: tl.constexpr):
    """Row of a choice = where its grove begins + its grove's choices in the blocks before + those before it in this block, which row_ptr holds."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    grove = _grove(index_ptr, at, count, groves)
    before = tl.load(table_ptr + grove.to(tl.int64) * blocks + block, mask=inside, other=0)
    row = tl.load(row_ptr + at, mask=inside, other=0) + tl.load(offsets_ptr + grove, mask=inside, other=0) + before
    tl.store(choice_ptr + row, at, mask=inside)
    tl.store(token_ptr + row, at // choices, mask=inside)
    tl.store(row_ptr + at, row, mask=inside)


def sort_by_grove(index_TK: Tensor, groves: int, compared_below: int = COMPARED_BELOW, scanned: int = SCANNED) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.sort_by_grove`."""
    tokens, choices = index_TK.shape
    count = tokens * choices
    index = index_TK.contiguous()
    offsets = index.new_empty(groves + 1, dtype=torch.int32)
    choice, token = (index.new_empty(count, dtype=torch.int64) for _ in range(2))
    row = index.new_empty(tokens, choices, dtype=torch.int64)
    if not count:
        return offsets.zero_(), choice, token, row
    with backend.on(index.device):
        if count <= compared_below:
            compare_kernel[(triton.cdiv(count + groves + 1, _COMPARED),)](
                index, offsets, choice, token, row, count, groves, choices, BLOCK=_COMPARED, CHUNK=_COMPARED, num_warps=4
            )  # fmt: skip
            return offsets, choice, token, row
        blocks = triton.cdiv(count, _BLOCK)
        table = index.new_zeros(groves, blocks, dtype=torch.int32)
        totals = index.new_empty(groves, dtype=torch.int32)
        count_kernel[(blocks,)](index, table, row, count, groves, blocks, BLOCK=_BLOCK, CHUNK=_CHUNK, num_warps=4)
        scan_kernel[(groves,)](table, totals, blocks, BLOCK=scanned, num_warps=4)
        offsets_kernel[(1,)](totals, offsets, groves, BINS=_bins(groves), num_warps=4)
        scatter_kernel[(blocks,)](index, table, offsets, choice, token, row, count, groves, choices, blocks, BLOCK=_BLOCK, num_warps=4)
    return offsets, choice, token, row


def _bins(groves: int) -> int:
    return max(2, triton.next_power_of_2(groves))


def aot_cases(target: str) -> Iterator[backend.AotCase]:
    """The kernels, where N matters at the largest; they are the same on every target."""
    from kan_train.kernels.grove_route import MOST_GROVES

    types = dict.fromkeys(("index_ptr", "choice_ptr", "token_ptr", "row_ptr"), "*i64:16")
    types |= dict.fromkeys(("table_ptr", "offsets_ptr", "totals_ptr"), "*i32:16") | dict.fromkeys(("count", "groves", "blocks"), "i32:16") | {"choices": "i32"}

    def case(name: str, kernel: Any, **constants: int) -> backend.AotCase:
        signature = {argument: types[argument] for argument in kernel.arg_names if argument not in constants}
        return backend.AotCase(name, kernel, signature, constants, 4, 3, tensor_cores=False)

    yield case("sort compare", compare_kernel, BLOCK=_COMPARED, CHUNK=_COMPARED)
    yield case("sort scan", scan_kernel, BLOCK=SCANNED)
    yield case("sort count", count_kernel, BLOCK=_BLOCK, CHUNK=_CHUNK)
    yield case("sort scatter", scatter_kernel, BLOCK=_BLOCK)
    yield case("sort offsets", offsets_kernel, BINS=_bins(MOST_GROVES))
