"""Launchers of the kernels in triton_scan.py and triton_fused.py: tensors in, tensors out, as the functions of reference.py (same arguments).

Operands are contiguous and of one dtype out of fp32, fp16, bf16; log_decay is contiguous; states are contiguous fp32.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kan_train.kernels import backend
from kan_train.kernels.ada_scan import triton_states as kernels
from kan_train.kernels.ada_scan.cases import aot_cases
from kan_train.kernels.ada_scan.tables import CARRY_BLOCK, GRADIENT_ROWS, Tiling, cut, padded, scan_tiling
from kan_train.kernels.ada_scan.triton_scan import scan as scan_kernel

__all__ = ["aot_cases", "last_state", "scan", "scan_backward"]


def _decay_kind(log_decay: Tensor | None) -> int:
    """DECAY of the kernels: 0 none, 1 a head, 2 a token and head."""
    return 0 if log_decay is None else 1 if log_decay.dim() == 1 else 2


@dataclass
class _Sequence:
    """What every launch over the same sequence shares."""

    like: Tensor
    log_decay: Tensor | None
    resets: Tensor | None
    chunk: int

    def __post_init__(self) -> None:
        self.batch, self.time, self.heads, self.width = self.like.shape
        self.segments, self.segment_chunks = self._cut()
        self.sums = self._sums() if self.log_decay is not None and self.log_decay.dim() == 3 else None
        self.starts: Tensor | None = None
        self.ends: Tensor | None = None
        if self.resets is not None:
            self.starts, self.ends = self._documents(self.resets)

    def tiling(self, kind: str) -> Tiling:
        device, precision = self.like.device, backend.dot_precision(self.like)
        return scan_tiling(kind, self.width, self.like.dtype, self.chunk, backend.target(device), precision)

    def _cut(self) -> tuple[int, int]:
        # Alike for every launch, so that the segments of one can read the states of another.
        tiling = self.tiling("o")
        return cut(self.time, tiling.chunk, self.batch * self.heads * tiling.tiles(self.width), backend.processors(self.like.device))

    def _sums(self) -> Tensor:
        """Sums of log a within the chunks, [B, T, H] fp32."""
        tiling, sums = self.tiling("o"), torch.empty_like(self.log_decay, dtype=torch.float32)
        kernels.chunk_sums[(self.batch * triton.cdiv(self.time, tiling.chunk) * self.heads,)](
            self.log_decay, sums, self.time, self.heads, C=tiling.chunk, num_warps=1
        )
        return sums

    def _documents(self, resets: Tensor) -> tuple[Tensor, Tensor]:
        """Where the documents of a chunk's tokens start and end, two [B, T] int32."""
        tiling = self.tiling("o")
        starts, ends = (torch.empty_like(resets, dtype=torch.int32) for _ in range(2))
        kernels.chunk_documents[(self.batch * triton.cdiv(self.time, tiling.chunk),)](
            resets.view(torch.uint8), starts, ends, self.time, C=tiling.chunk, num_warps=4
        )
        return starts, ends

    def constants(self, tiling: Tiling) -> dict[str, Any]:
        return {
            "D": self.width, "BD": padded(self.width), "BC": tiling.columns, "C": tiling.chunk, "TILES": tiling.tiles(self.width),
            "DECAY": _decay_kind(self.log_decay), "HAS_RESETS": self.resets is not None, "FULL": self.time % tiling.chunk == 0,
            "PRECISION": backend.dot_precision(self.like),
            "num_warps": tiling.warps, "num_stages": tiling.stages,
        }  # fmt: skip

    def state(self, *extra: int) -> Tensor:
        return self.like.new_empty(self.batch, *extra, self.heads, self.width, self.width, dtype=torch.float32)

    def added(self, key: Tensor, value: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """What each segment adds to a state [B, S, H, D, D], and how much of it is kept [B, S, H]."""
        tiling = self.tiling("states")
        states, kept = self.state(self.segments), self.like.new_empty(self.batch, self.segments, self.heads, dtype=torch.float32)
        kernels.segment_states[(self.batch * self.segments * self.heads * tiling.tiles(self.width),)](
            key, value, self.log_decay, self.sums, self.starts, self.ends, states, kept, self.time, self.heads, self.segments, self.segment_chunks,
            REVERSE=reverse, **self.constants(tiling),
        )  # fmt: skip
        return states, kept

    def borders(
        self, key: Tensor, value: Tensor, first: Tensor | None, *, reverse: bool, first_scale: float = 1.0, last_scale: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States [B, S, H, D, D] that enter the segments, first_scale * first the first of them; last_scale times the one behind all; and `added`'s kept."""
        states, kept = self.added(key, value, reverse=reverse)
        last = self.state()
        size = self.width**2
        kernels.carry[(self.batch * self.heads * triton.cdiv(size, CARRY_BLOCK),)](
            states, kept, first, last, self.heads, self.segments, first_scale, last_scale,
            SIZE=size, BLOCK=CARRY_BLOCK, HAS_FIRST=first is not None, REVERSE=reverse, num_warps=4,
        )  # fmt: skip
        return states, last, kept

    def launch(
        self, kind: str, operands: tuple[Tensor, ...], twin: tuple[Tensor, ...] | None, scale: float, *,
        other: Tensor | None = None, rows: Tensor | None = None, states: Tensor | None, state_scale: float = 1.0,
        last: Tensor | None = None, last_scale: float = 1.0, silu: int,
    ) -> None:  # fmt: skip
        """One launch of `_scan`; kind is "o", "dq" (whose twin is where silu(q) goes), or "dk_dv" with a twin."""
        tiling = self.tiling(kind)
        grid = (self.batch * self.segments * self.heads * tiling.tiles(self.width) * (2 if kind == "dk_dv" else 1),)
        scan_kernel[grid](
            *operands, *(operands if twin is None else twin), other, rows, self.log_decay, self.sums, self.starts, self.ends, states, last,
            self.time, self.heads, self.segments, self.segment_chunks, scale, state_scale, last_scale,
            TWO=kind == "dk_dv", REVERSE=kind == "dk_dv", TRANSPOSED=kind == "dq", HAS_STATE=states is not None, WRITE_LAST=last is not None,
            SILU=silu, WRITE_ROWS=rows is not None, **self.constants(tiling),
        )  # fmt: skip

    def rows(self, kind: str) -> Tensor:
        """Row products of `_scan`, [B, T, H, tiles, 2] fp32."""
        return self.like.new_empty(*self.like.shape[:3], self.tiling(kind).tiles(self.width), 2, dtype=torch.float32)


def scan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, resets: Tensor | None, state: Tensor | None, chunk: int, scale: float, silu_q: bool
) -> tuple[Tensor, Tensor]:
    """One launch where batch and heads fill the device; three where the sequence is cut into segments."""
    sequence = _Sequence(q, log_decay, resets, chunk)
    o, last, written = torch.empty_like(q), None, None
    if sequence.segments > 1:
        state, last, _ = sequence.borders(k, v, state, reverse=False)
    else:
        last = written = sequence.state()
    sequence.launch("o", (q, k, v, o), None, scale, states=state, last=written, silu=int(silu_q))
    return o, last


def scan_backward(
    grad_o: Tensor,
    grad_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    resets: Tensor | None,
    state: Tensor | None,
    last: Tensor,
    chunk: int,
    scale: float,
    silu_q: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dL/dS is kept divided by scale, so that dL/do enters the products as it comes: two launches, one for dL/d log a, and four more with segments."""
    sequence = _Sequence(q, log_decay, resets, chunk)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    features = torch.empty_like(q) if silu_q else q
    q_rows, k_rows = (sequence.rows(kind) if log_decay is not None else None for kind in ("dq", "dk_dv"))
    cut_up = sequence.segments > 1
    states = sequence.borders(k, v, state, reverse=False)[0] if cut_up else state
    sequence.launch("dq", (grad_o, v, k, grad_q), (grad_o, v, k, features), scale, other=q, rows=q_rows, states=states, silu=2 * silu_q)
    grads, grads_scale, grad_first, written = grad_last, 1 / scale, None, None
    if cut_up:
        grads, grad_first, _ = sequence.borders(features, grad_o, grad_last, reverse=True, first_scale=1 / scale, last_scale=scale)
        grads_scale = 1.0
    else:
        grad_first = written = sequence.state()
    sequence.launch(
        "dk_dv", (k, features, grad_o, grad_v), (v, grad_o, features, grad_k), scale, other=k, rows=k_rows,
        states=grads, state_scale=grads_scale, last=written, last_scale=scale, silu=0,
    )  # fmt: skip
    grad_decay = q.new_empty(0, dtype=torch.float32)
    if log_decay is not None:
        grad_decay = _decay_gradient(sequence, q_rows, k_rows, states, last, grads, scale if cut_up else 1.0)
        grad_decay = (grad_decay.sum(dim=(0, 1)) if log_decay.dim() == 1 else grad_decay).to(log_decay.dtype)
    return grad_q, grad_k, grad_v, grad_decay, grad_first


def _decay_gradient(
    sequence: _Sequence, q_rows: Tensor, k_rows: Tensor, states: Tensor | None, last: Tensor, grads: Tensor | None, grads_scale: float
) -> Tensor:
    tiling = sequence.tiling("dq")
    grad = sequence.like.new_empty(sequence.like.shape[:3], dtype=torch.float32)
    kernels.decay_gradient[(sequence.batch * sequence.segments * sequence.heads,)](
        q_rows, k_rows, last if states is None else states, last, grads, grad,
        sequence.time, sequence.heads, sequence.segments, sequence.segment_chunks, grads_scale,
        D=sequence.width, BR=GRADIENT_ROWS, BD=padded(sequence.width), C=tiling.chunk, TILES=tiling.tiles(sequence.width), HAS_GRADS=grads is not None,
        num_warps=4,
    )  # fmt: skip
    return grad


def last_state(k: Tensor, v: Tensor, log_decay: Tensor | None, resets: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    """What the segments add, combined as the states that enter them are."""
    sequence = _Sequence(k, log_decay, resets, chunk)
    if sequence.segments == 1:
        added, kept = sequence.added(k, v, reverse=False)
        return added[:, 0], kept[:, 0, :, None, None]
    _, last, kept = sequence.borders(k, v, None, reverse=False)
    return last, kept.prod(dim=1)[..., None, None]
