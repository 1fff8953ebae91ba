"""Configurations of the room's kernels for the compile report: a head of 128 (kan_340b) and of 64 (kan_1b), packed documents, a decay a token or a head.

fp16 compiles as bf16 does, narrower heads take fewer registers, and what the small kernels of a chunk's sums need is beyond doubt: they are left out.
Accepted spills are read and written once a chunk by one thread: 64 bytes are 16 KiB a program where the chunk itself moves 40 to 72 KiB.
"""

from collections.abc import Iterator
from typing import Any

import torch

from kan_train.kernels.ada_scan import triton_fused, triton_states
from kan_train.kernels.ada_scan.tables import GRADIENT_ROWS, keys_tokens, padded, rows_tokens, scan_tiling, step_columns
from kan_train.kernels.ada_scan.triton_scan import scan
from kan_train.kernels.backend import AotCase

_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_SPILLS = {"o": 192, "dq": 96, "dk_dv": 96, "states": 0}
"""Accepted spills of a launch of the scan, bytes a thread; the outputs of a head of 128 on sm_90 need most of them (64 without silu(q) in the load)."""


def aot_cases(target: str) -> Iterator[AotCase]:
    """The configurations of `target`."""
    for kind in ("o", "dq", "dk_dv", "states"):
        yield _scan(target, kind, 128, torch.bfloat16, decay=2, full=True)
    for kind in ("dq", "dk_dv"):
        yield _scan(target, kind, 64, torch.bfloat16, decay=1, full=False)
    yield _scan(target, "dk_dv", 128, torch.float32, decay=1, full=True)
    if target.startswith("sm_"):
        yield _scan(target, "dk_dv", 128, torch.float32, decay=1, full=True, precision="tf32")
    yield from _others(target, 128)


def _scan(target: str, kind: str, width: int, dtype: torch.dtype, *, decay: int, full: bool, precision: str = "ieee") -> AotCase:
    tiling, operand = scan_tiling(kind, width, dtype, 64, target, precision), f"*{_NAMES[dtype]}:16"
    constants: dict[str, Any] = {
        "D": width, "BD": padded(width), "BC": tiling.columns, "C": tiling.chunk, "TILES": tiling.tiles(width), "REVERSE": kind in ("dk_dv", "states"),
        "DECAY": decay, "HAS_RESETS": True, "FULL": full, "PRECISION": precision,
    }  # fmt: skip
    names = ["KEY", "VALUE"] if kind == "states" else [f"{name}{i}" for i in (0, 1) for name in ("READ", "KEY", "VALUE", "OUT")]
    signature = dict.fromkeys(names, operand) | {"LOG_DECAY": "*fp32:16", "STARTS": "*i32:16", "ENDS": "*i32:16", "STATES": "*fp32:16"}
    signature |= {"T": "i32:16", "H": "i32:16", "segments": "i32", "segment_chunks": "i32"}
    if decay == 2:
        signature["SUMS"] = "*fp32:16"
    else:
        constants["SUMS"] = None
    if kind == "states":
        signature["KEPT"] = "*fp32:16"
    else:
        constants |= {
            "TWO": kind == "dk_dv", "TRANSPOSED": kind == "dq", "HAS_STATE": True, "WRITE_LAST": kind != "dq", "WRITE_ROWS": kind != "o",
            "SILU": {"o": 1, "dq": 2, "dk_dv": 0}[kind],
        }  # fmt: skip
        signature |= dict.fromkeys(("scale", "state_scale", "last_scale"), "fp32")
        for name, type_, used in (("OTHER", operand, kind != "o"), ("ROWS", "*fp32:16", kind != "o"), ("LAST", "*fp32:16", kind != "dq")):
            if used:
                signature[name] = type_
            else:
                constants[name] = None
    name = f"scan {kind} d {width} {_NAMES[dtype]}{' tf32' if precision == 'tf32' else ''} {tiling.chunk}x{tiling.columns}"
    kernel = triton_states.segment_states if kind == "states" else scan
    # Without TF32, NVIDIA's tensor cores have no product of fp32; AMD's have.
    cores = not (target.startswith("sm_") and dtype == torch.float32 and precision == "ieee")
    return AotCase(name, kernel, signature, constants, tiling.warps, tiling.stages, cores, _SPILLS[kind])


def _others(target: str, width: int) -> Iterator[AotCase]:
    common = {"D": width, "BD": padded(width)}
    sizes = {"H": "i32:16", "T": "i32:16"}
    keys = dict.fromkeys(("GRAD", "KEYS", "BEFORE", "GRAD_KEYS", "GRAD_BEFORE"), "*bf16:16") | dict.fromkeys(("TAPS", "GRAD_TAPS"), "*fp32:16")
    keys |= sizes | {"RESETS": "*u8:16", "eps": "fp32", "programs": "i32", "blocks": "i32"}
    constants = common | {"BT": keys_tokens(width), "W": 4, "BW": 4, "HAS_RESETS": True, "HAS_BEFORE": True, "FEATURE": True}
    yield AotCase(f"diffused keys backward d {width} bf16", triton_fused._diffused_keys_backward, keys, constants, 4, 3, False)
    norm = dict.fromkeys(("GRAD", "O", "GATE", "GRAD_O", "GRAD_GATE"), "*bf16:16") | dict.fromkeys(("WEIGHT", "GRAD_WEIGHT"), "*fp32:16")
    norm |= {"H": "i32:16", "rows": "i32:16", "eps": "fp32", "programs": "i32", "blocks": "i32"}
    constants = common | {"BT": rows_tokens(width), "HAS_WEIGHT": True, "HAS_GATE": True}
    yield AotCase(f"gated norm backward d {width} bf16", triton_fused._gated_norm_backward, norm, constants, 4, 3, False)
    step = dict.fromkeys(("Q", "K", "V", "OUT"), "*bf16:16") | dict.fromkeys(("LOG_DECAY", "STATE", "NEW"), "*fp32:16") | {"H": "i32:16", "scale": "fp32"}
    columns = step_columns(width)
    constants = common | {"BC": columns, "TILES": -(-width // columns), "DECAY": 1, "SILU": True}
    yield AotCase(f"step d {width} bf16", triton_fused._step, step, constants, 4, 3, False)
    tiling = scan_tiling("dq", width, torch.bfloat16, 64, target)
    decay = dict.fromkeys(("Q_ROWS", "K_ROWS", "STATES", "LAST", "GRADS", "OUT"), "*fp32:16") | sizes
    decay |= {"segments": "i32", "segment_chunks": "i32", "grad_scale": "fp32"}
    constants = common | {"BR": GRADIENT_ROWS, "C": tiling.chunk, "TILES": tiling.tiles(width), "HAS_GRADS": True}
    yield AotCase(f"decay gradient d {width}", triton_states.decay_gradient, decay, constants, 4, 3, False)
