"""Cases of ADA for benchmarks/gpu.py: the scan, what is fused around it, and the decode step.  B batch, T time, H heads, d head width."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_train.kernels import ada_scan
from kan_train.kernels.ada_scan import reference

_CHUNK, _TAPS, _EPS = 64, 4, 1e-5


def cases(device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """32,768 tokens of 16 heads of 128 in bf16 as sequences of 2k to 32k, forward alone and with the backward pass, and decode steps."""
    heads, width, tokens = (2, 16, 64) if dry else (16, 128, 32768)
    found = []
    for time in (32, 64) if dry else (2048, 4096, 8192, 16384, 32768):
        for backward in (False, True):
            found.append(_scan(tokens // time, time, heads, width, torch.bfloat16, "head", device, backward=backward))
    found.append(_scan(tokens // time, time, heads, width, torch.bfloat16, "token", device, backward=True))
    for backward in (False, True):
        found.append(_keys(1, tokens, heads, width, torch.bfloat16, device, backward=backward))
        found.append(_norm(1, tokens, heads, width, torch.bfloat16, device, backward=backward))
    for batch in (1, 2) if dry else (1, 64):
        for context in (8,) if dry else (1024, 4096, 16384, 65536):
            if batch * context <= 64 * 16384:
                found.append(_step(batch, context, heads, width, device))
    return found


def checks(device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """Odd lengths and widths, packed documents, and segments (one sequence of few heads) in three types, with all gradients."""
    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        shapes = ((1, 20, 2, 16),) if dry else ((2, 1, 3, 64), (2, 333, 3, 80), (1, 1024, 4, 128), (1, 5000, 2, 64), (3, 700, 2, 32))
        for batch, time, heads, width in shapes:
            for decay in ("none", "head", "token"):
                found.append(_scan(batch, time, heads, width, dtype, decay, device, backward=True, packed=True))
            found.append(_keys(batch, time, heads, width, dtype, device, backward=True))
            found.append(_norm(batch, time, heads, width, dtype, device, backward=True))
        found.append(_step(3, 8, 2, 16 if dry else 80, device, dtype))
    return found


def _scan(
    batch: int, time: int, heads: int, width: int, dtype: torch.dtype, decay: str, device: torch.device, *, backward: bool, packed: bool = False
) -> dict[str, Any]:
    scale = width**-0.5

    def make(seed: int) -> tuple[Tensor, ...]:
        random = _random(seed, device)
        shape = (batch, time, heads, width)
        q, k, v, grad = (random(*shape).to(dtype) for _ in range(4))
        k = F.normalize(k.float(), dim=-1).to(dtype)
        lives = torch.logspace(0, 9, heads, base=2.0, device=device)  # half-lives of 1 to 512 tokens
        log_decay = -0.6931 / lives if decay != "token" else -0.6931 / lives * (0.5 + random(batch, time, heads).sigmoid())
        resets = torch.zeros(batch, time, dtype=torch.bool, device=device)
        if packed:
            resets[:, :: max(2, time // 3)] = True
        return q, k, v, log_decay, resets, grad

    def arguments(log_decay: Tensor, resets: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return None if decay == "none" else log_decay, resets if packed else None

    def kernel(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, resets: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        leaves = _leaves(q, k, v, *([] if decay == "none" else [log_decay])) if backward else [q, k, v, log_decay]
        o, last = ada_scan.scan(*leaves[:3], *arguments(leaves[-1], resets), chunk=_CHUNK, scale=scale, silu_q=True)
        return torch.autograd.grad(o, leaves, grad) if backward else (o, last)

    def wide(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, resets: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        given = (q.double(), k.double(), v.double(), *arguments(log_decay.double(), resets), None)
        o, last = reference.scan(*given, _CHUNK, scale, True)
        if not backward:
            return o, last
        grads = reference.scan_backward(grad.double(), None, *given, last, _CHUNK, scale, True)[:4]
        return grads[:3] if decay == "none" else grads

    def attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, resets: Tensor, grad: Tensor) -> Any:
        leaves = _leaves(q, k, v) if backward else [q, k, v]
        o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), is_causal=True)
        return torch.autograd.grad(o, leaves, grad.transpose(1, 2)) if backward else o

    def linear_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, resets: Tensor, grad: Tensor) -> Any:
        from fla.ops.simple_gla import chunk_simple_gla

        leaves = _leaves(q, k, v, log_decay) if backward else [q, k, v, log_decay]
        gates = leaves[3].expand(batch, time, heads)
        o, _ = chunk_simple_gla(F.silu(leaves[0]), *leaves[1:3], g=gates.float(), scale=scale, output_final_state=True)
        return torch.autograd.grad(o, leaves, grad) if backward else o

    rows, size = batch * time * heads, torch.empty(0, dtype=dtype).element_size()
    # One sum reads three operands and writes one; with its gradients, seven more: q, k, v, do in, dq, dk, dv out.
    tensors, sums = (4 + 7, 4) if backward else (4, 1)
    per_token = 4 * width**2 + 2 * min(_CHUNK, time) * width  # through the state, and half of the square of a chunk
    return {
        "name": f"scan {'forward + backward' if backward else 'forward'}, B {batch} T {time} H {heads} d {width} decay a {decay}"
        f"{' packed' if packed else ''} {_name(dtype)}",
        "make": make,
        "kernel": kernel,
        "reference": wide,
        "rivals": {} if packed else {"softmax attention (SDPA)": attention, "flash-linear-attention (simple GLA)": linear_attention},
        "bytes": size * tensors * rows * width,
        "flops": sums * rows * per_token,
        "tokens": batch * time,
        "check": batch * time * heads * width <= 2**24,
        # dL/d log a is a difference of sums over all tokens, in the type that the products are rounded to.
        "tolerance": {torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}[dtype],
    }


def _keys(batch: int, time: int, heads: int, width: int, dtype: torch.dtype, device: torch.device, *, backward: bool) -> dict[str, Any]:
    def make(seed: int) -> tuple[Tensor, ...]:
        random = _random(seed, device)
        keys, grad = (random(batch, time, heads, width).to(dtype) for _ in range(2))
        return keys, random(heads, width, _TAPS), grad

    def kernel(keys: Tensor, taps: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        leaves = _leaves(keys, taps) if backward else [keys, taps]
        phi = ada_scan.diffused_keys(*leaves)
        return torch.autograd.grad(phi, leaves, grad) if backward else (phi,)

    def wide(keys: Tensor, taps: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        if not backward:
            return (reference.diffused_keys(keys.double(), taps.double(), None, None, True),)
        return reference.diffused_keys_backward(grad.double(), keys.double(), taps.double(), None, None, True)[:2]

    def eager(keys: Tensor, taps: Tensor, grad: Tensor) -> Any:
        leaves = _leaves(keys, taps) if backward else [keys, taps]
        rows = leaves[0].flatten(2).transpose(1, 2)
        filters = leaves[1].flip(-1).flatten(0, 1)[:, None].to(keys.dtype)
        y = F.conv1d(F.pad(rows, (_TAPS - 1, 0)), filters, groups=heads * width).transpose(1, 2).unflatten(-1, (heads, width))
        phi = F.normalize(F.silu(y), dim=-1, eps=1e-3)
        return torch.autograd.grad(phi, leaves, grad) if backward else phi

    tensors = 2 + 3 if backward else 2
    return _rows_case("diffused keys", (batch, time, heads, width), dtype, backward, make, kernel, wide, {"conv1d, silu, normalize": eager}, tensors)


def _norm(batch: int, time: int, heads: int, width: int, dtype: torch.dtype, device: torch.device, *, backward: bool) -> dict[str, Any]:
    def make(seed: int) -> tuple[Tensor, ...]:
        random = _random(seed, device)
        o, gate, grad = (random(batch, time, heads, width).to(dtype) for _ in range(3))
        return o, random(heads, width), gate, grad

    def kernel(o: Tensor, weight: Tensor, gate: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        leaves = _leaves(o, weight, gate) if backward else [o, weight, gate]
        y = ada_scan.gated_norm(*leaves, _EPS)
        return torch.autograd.grad(y, leaves, grad) if backward else (y,)

    def wide(o: Tensor, weight: Tensor, gate: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        given = (o.double(), weight.double(), gate.double(), _EPS)
        return reference.gated_norm_backward(grad.double(), *given) if backward else (reference.gated_norm(*given),)

    def eager(o: Tensor, weight: Tensor, gate: Tensor, grad: Tensor) -> Any:
        leaves = _leaves(o, weight, gate) if backward else [o, weight, gate]
        y = F.rms_norm(leaves[0], (width,), None, _EPS) * leaves[1].to(o.dtype) * F.silu(leaves[2])
        return torch.autograd.grad(y, leaves, grad) if backward else y

    tensors = 3 + 5 if backward else 3
    return _rows_case("gated norm", (batch, time, heads, width), dtype, backward, make, kernel, wide, {"rms_norm, silu, products": eager}, tensors)


def _rows_case(
    name: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    backward: bool,
    make: Callable[[int], tuple[Tensor, ...]],
    kernel: Callable[..., tuple[Tensor, ...]],
    wide: Callable[..., tuple[Tensor, ...]],
    rivals: dict[str, Callable[..., Any]],
    tensors: int,
) -> dict[str, Any]:
    batch, time, heads, width = shape
    return {
        "name": f"{name} {'forward + backward' if backward else 'forward'}, B {batch} T {time} H {heads} d {width} {_name(dtype)}",
        "make": make,
        "kernel": kernel,
        "reference": wide,
        "rivals": rivals,
        "bytes": torch.empty(0, dtype=dtype).element_size() * tensors * batch * time * heads * width,
        "flops": 0,
        "tokens": batch * time,
        # A weight's gradient is a sum over all tokens of both signs.
        "tolerance": {torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype],
        "check": batch * time * heads * width <= 2**26,
    }


def _step(batch: int, context: int, heads: int, width: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """One token; its cost does not depend on the context, that of softmax attention over a cache of keys and values does."""
    scale = width**-0.5

    def make(seed: int) -> tuple[Tensor, ...]:
        random = _random(seed, device)
        q, k, v = (random(batch, heads, width).to(dtype) for _ in range(3))
        keys, values = (random(batch, heads, context, width).to(dtype) for _ in range(2))
        return q, k, v, -random(heads).abs(), random(batch, heads, width, width), keys, values

    def kernel(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return ada_scan.step(q, k, v, log_decay, state, scale=scale)

    def wide(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return reference.step(q.double(), k.double(), v.double(), log_decay.double(), state.double(), scale, False)

    def attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q[:, :, None], keys, values)

    return {
        "name": f"decode step, B {batch} context {context} H {heads} d {width} {_name(dtype)}",
        "make": make,
        "kernel": kernel,
        "reference": wide,
        "rivals": {f"softmax attention over a cache of {context}": attention},
        "bytes": batch * heads * (2 * 4 * width**2 + 4 * width * torch.empty(0, dtype=dtype).element_size()),
        "flops": 0,
        "tokens": batch,
    }


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


def _random(seed: int, device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device)


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
