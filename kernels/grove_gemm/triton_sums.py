"""Sums in one fixed order, without atomics: of a token's rows, and of the parts that the backward pass leaves.  T tokens, K choices, D width, R rows."""

import triton
import triton.language as tl

from kan_train.kernels.grove_gemm.triton_products import tile_ends


@triton.jit
def combine(y, rows, gate, row_of_choice, tokens, limit, width, GATE: tl.constexpr, CHOICES: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """y [T, D] = sum over a token's choices, in their order, of rows[row_of_choice] [R, D], times the gate [T, K] where GATE; a row of `limit` adds nothing."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = token < tokens
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for choice in tl.static_range(CHOICES):
        place = token.to(tl.int64) * CHOICES + choice
        row = tl.load(row_of_choice + place, mask=here, other=0).to(tl.int64)
        there = here & (row < limit)
        part = tl.load(rows + row[:, None] * width + c[None, :], mask=there[:, None] & (c < width)[None, :], other=0.0).to(tl.float32)
        if GATE:
            part = part * tl.load(gate + place, mask=there, other=0.0).to(tl.float32)[:, None]
        total += part
    tl.store(y + token.to(tl.int64)[:, None] * width + c[None, :], total.to(y.dtype.element_ty), mask=here[:, None] & (c < width)[None, :])


@triton.jit
def combine_gradients(
    grad_y, rows, gate, choice_of_row, grad_rows, gate_parts, count, choices, width, CHOICES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """grad_rows [R, D] = gate * grad_y of the row's token, and gate_parts [R] = <grad_y, row>, both zero for padding."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < count
    choice = tl.load(choice_of_row + row, mask=here, other=0).to(tl.int64)
    there = here & (choice < choices)
    weight = tl.load(gate + choice, mask=there, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for column in range(0, width, COLUMNS):
        c = column + tl.arange(0, COLUMNS)
        place = row.to(tl.int64)[:, None] * width + c[None, :]
        mask = (c < width)[None, :] & there[:, None]
        grad = tl.load(grad_y + (choice // CHOICES)[:, None] * width + c[None, :], mask=mask, other=0.0).to(tl.float32)
        total += grad * tl.load(rows + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_rows + place, (grad * weight[:, None]).to(grad_rows.dtype.element_ty), mask=here[:, None] & (c < width)[None, :])
    tl.store(gate_parts + row, tl.sum(total, 1), mask=here)


@triton.jit
def sum_gate(grad_gate, gate_parts, row_of_choice, choices, limit, parts, BLOCK: tl.constexpr):
    """grad_gate [T, K]: the sum of the parts [R, parts] of the choice's row, zero where it was dropped."""
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_of_choice + choice, mask=choice < choices, other=0).to(tl.int64)
    there = (choice < choices) & (row < limit)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, parts):
        total += tl.load(gate_parts + row * parts + part, mask=there, other=0.0)
    tl.store(grad_gate + choice, total.to(grad_gate.dtype.element_ty), mask=choice < choices)


@triton.jit
def sum_table(
    grad_table, table_parts, offsets, groves, functions, together, SLOTS: tl.constexpr, ROWS: tl.constexpr, GROVES: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """grad_table [N, F, SLOTS]: the second stage, a program a function. table_parts [row tiles of ROWS, F * together, SLOTS]; WIDE: a power of two >= SLOTS."""
    function = tl.program_id(0)
    grove = function // functions
    ends = tile_ends(offsets, groves, ROWS, GROVES)
    number = tl.arange(0, GROVES)
    first = tl.max(tl.where(number < grove, ends, 0), 0)
    tiles = tl.max(tl.where(number <= grove, ends, 0), 0) - first
    slot = tl.arange(0, WIDE)
    total = tl.zeros((BLOCK, WIDE), tl.float32)
    for start in range(0, tiles * together, BLOCK):
        part = start + tl.arange(0, BLOCK)
        group = (first + part // together).to(tl.int64) * (functions * together) + (function - grove * functions) * together + part % together
        mask = (part < tiles * together)[:, None] & (slot < SLOTS)[None, :]
        total += tl.load(table_parts + group[:, None] * SLOTS + slot[None, :], mask=mask, other=0.0)
    tl.store(grad_table + function.to(tl.int64) * SLOTS + slot, tl.sum(total, 0), mask=slot < SLOTS)
