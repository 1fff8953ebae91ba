"""Launchers of the kernels around the scan (triton_fused.py): the functions of reference.py with the same arguments. Operands are contiguous."""

import torch
import triton
from torch import Tensor

from kan_train.kernels import backend
from kan_train.kernels.ada_scan import triton_fused as kernels
from kan_train.kernels.ada_scan.reference import UNIT_EPS
from kan_train.kernels.ada_scan.tables import keys_tokens, padded, rows_programs, rows_tokens, step_columns


def diffused_keys(keys: Tensor, kernel: Tensor, resets: Tensor | None, before: Tensor | None, feature: bool) -> Tensor:
    batch, time, heads, width = keys.shape
    tokens, phi = rows_tokens(width), torch.empty_like(keys)
    kernels._diffused_keys[(batch * triton.cdiv(time, tokens) * heads,)](
        keys, kernel, before, _marks(resets), phi, time, heads, UNIT_EPS,
        D=width, BD=padded(width), BT=tokens, W=kernel.shape[-1], HAS_RESETS=resets is not None, HAS_BEFORE=before is not None, FEATURE=feature,
        num_warps=4,
    )  # fmt: skip
    return phi


def diffused_keys_backward(
    grad_phi: Tensor, keys: Tensor, kernel: Tensor, resets: Tensor | None, before: Tensor | None, feature: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, heads, width = keys.shape
    tokens, taps = keys_tokens(width), kernel.shape[-1]
    blocks = triton.cdiv(time + taps - 1, tokens)
    programs = rows_programs(blocks, batch * heads, backend.processors(keys.device))
    grad_keys = torch.empty_like(keys)
    grad_before = keys.new_empty(0) if before is None else torch.empty_like(before)
    partial = keys.new_empty(batch, programs, heads, taps, width, dtype=torch.float32)
    kernels._diffused_keys_backward[(batch * programs * heads,)](
        grad_phi, keys, kernel, before, _marks(resets), grad_keys, None if before is None else grad_before, partial,
        time, heads, UNIT_EPS, programs, blocks,
        D=width, BD=padded(width), BT=tokens, W=taps, BW=triton.next_power_of_2(taps), HAS_RESETS=resets is not None, HAS_BEFORE=before is not None,
        FEATURE=feature, num_warps=4,
    )  # fmt: skip
    return grad_keys, partial.sum(dim=(0, 1)).transpose(1, 2).contiguous().to(kernel.dtype), grad_before


def gated_norm(o: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float) -> Tensor:
    batch, time, heads, width = o.shape
    tokens, out = rows_tokens(width), torch.empty_like(o)
    kernels._gated_norm[(triton.cdiv(batch * time, tokens) * heads,)](
        o, weight, gate, out, batch * time, heads, eps,
        D=width, BD=padded(width), BT=tokens, HAS_WEIGHT=weight is not None, HAS_GATE=gate is not None, num_warps=4,
    )  # fmt: skip
    return out


def gated_norm_backward(grad: Tensor, o: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, heads, width = o.shape
    tokens = rows_tokens(width)
    blocks = triton.cdiv(batch * time, tokens)
    programs = rows_programs(blocks, heads, backend.processors(o.device)) if weight is not None else blocks
    grad_o = torch.empty_like(o)
    grad_gate = o.new_empty(0) if gate is None else torch.empty_like(gate)
    partial = None if weight is None else o.new_empty(programs, heads, width, dtype=torch.float32)
    kernels._gated_norm_backward[(programs * heads,)](
        grad, o, weight, gate, grad_o, partial, None if gate is None else grad_gate, batch * time, heads, eps, programs, blocks,
        D=width, BD=padded(width), BT=tokens, HAS_WEIGHT=weight is not None, HAS_GATE=gate is not None, num_warps=4,
    )  # fmt: skip
    grad_weight = o.new_empty(0) if weight is None or partial is None else partial.sum(dim=0).to(weight.dtype)
    return grad_o, grad_weight, grad_gate


def step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float, silu_q: bool, new: Tensor) -> Tensor:
    """Writes the new state into `new`, which may be `state`; returns o."""
    batch, heads, width = q.shape
    columns, o = step_columns(width), torch.empty_like(q)
    tiles = triton.cdiv(width, columns)
    kernels._step[(batch * heads * tiles,)](
        q, k, v, log_decay, state, new, o, heads, scale,
        D=width, BD=padded(width), BC=columns, TILES=tiles, DECAY=0 if log_decay is None else log_decay.dim(), SILU=silu_q, num_warps=4,
    )  # fmt: skip
    return o


def _marks(resets: Tensor | None) -> Tensor | None:
    return None if resets is None else resets.view(torch.uint8)
