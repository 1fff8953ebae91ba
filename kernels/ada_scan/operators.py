"""torch.ops.kan_train.ada_*: kernels where there are any for the device, type and width, reference.py elsewhere; shapes for meta tensors; gradients.

Operators take contiguous tensors and expect them checked (`kan_train.kernels.ada_scan` does both). Each is differentiable once; backward passes are
operators too. An absent optional gradient is an empty tensor, because an operator cannot return None.
"""

from typing import Any

import torch
from torch import Tensor

from kan_train.kernels import backend
from kan_train.kernels.ada_scan import reference
from kan_train.kernels.ada_scan.tables import WIDEST

_KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def _launches(x: Tensor) -> bool:
    return backend.runs_triton(x.device) and x.dtype in _KERNEL_TYPES and x.shape[-1] <= WIDEST and x.numel() > 0


@torch.library.custom_op("kan_train::ada_scan", mutates_args=())
def ada_scan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, resets: Tensor | None, state: Tensor | None, chunk: int, scale: float, silu_q: bool
) -> tuple[Tensor, Tensor]:
    if not _launches(q):
        return reference.scan(q, k, v, log_decay, resets, state, chunk, scale, silu_q)
    from kan_train.kernels.ada_scan import triton as launch

    with backend.on(q.device):
        return launch.scan(q, k, v, log_decay, resets, state, chunk, scale, silu_q)


@torch.library.custom_op("kan_train::ada_scan_backward", mutates_args=())
def ada_scan_backward(
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
    arguments = (grad_o, grad_last, q, k, v, log_decay, resets, state, last, chunk, scale, silu_q)
    if not _launches(q):
        return reference.scan_backward(*arguments)
    from kan_train.kernels.ada_scan import triton as launch

    with backend.on(q.device):
        return launch.scan_backward(*arguments)


@torch.library.custom_op("kan_train::ada_last_state", mutates_args=())
def ada_last_state(k: Tensor, v: Tensor, log_decay: Tensor | None, resets: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    if not _launches(k):
        return reference.last_state(k, v, log_decay, resets)
    from kan_train.kernels.ada_scan import triton as launch

    with backend.on(k.device):
        return launch.last_state(k, v, log_decay, resets, chunk)


@torch.library.custom_op("kan_train::ada_last_state_backward", mutates_args=())
def ada_last_state_backward(
    grad_added: Tensor, grad_kept: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    # Two products with one state and a few sums over rows: the vendor's matrix product is the kernel for that.
    return reference.last_state_backward(grad_added, grad_kept, k, v, log_decay, resets)


@torch.library.custom_op("kan_train::ada_step", mutates_args=())
def ada_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float, silu_q: bool) -> tuple[Tensor, Tensor]:
    if not (_launches(q) and state.dtype == torch.float32):
        return reference.step(q, k, v, log_decay, state, scale, silu_q)
    from kan_train.kernels.ada_scan import triton_rows as launch

    new = torch.empty_like(state)
    with backend.on(q.device):
        return launch.step(q, k, v, log_decay, state, scale, silu_q, new), new


@torch.library.custom_op("kan_train::ada_step_", mutates_args={"state"})
def ada_step_(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float, silu_q: bool) -> Tensor:
    if not (_launches(q) and state.dtype == torch.float32):
        o, new = reference.step(q, k, v, log_decay, state, scale, silu_q)
        state.copy_(new)
        return o
    from kan_train.kernels.ada_scan import triton_rows as launch

    with backend.on(q.device):
        return launch.step(q, k, v, log_decay, state, scale, silu_q, state)


@torch.library.custom_op("kan_train::ada_diffused_keys", mutates_args=())
def ada_diffused_keys(keys: Tensor, kernel: Tensor, resets: Tensor | None, before: Tensor | None, feature: bool) -> Tensor:
    if not _launches(keys):
        return reference.diffused_keys(keys, kernel, resets, before, feature)
    from kan_train.kernels.ada_scan import triton_rows as launch

    with backend.on(keys.device):
        return launch.diffused_keys(keys, kernel, resets, before, feature)


@torch.library.custom_op("kan_train::ada_diffused_keys_backward", mutates_args=())
def ada_diffused_keys_backward(
    grad_phi: Tensor, keys: Tensor, kernel: Tensor, resets: Tensor | None, before: Tensor | None, feature: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not _launches(keys):
        return reference.diffused_keys_backward(grad_phi, keys, kernel, resets, before, feature)
    from kan_train.kernels.ada_scan import triton_rows as launch

    with backend.on(keys.device):
        return launch.diffused_keys_backward(grad_phi, keys, kernel, resets, before, feature)


@torch.library.custom_op("kan_train::ada_gated_norm", mutates_args=())
def ada_gated_norm(o: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float) -> Tensor:
    if not _launches(o):
        return reference.gated_norm(o, weight, gate, eps)
    from kan_train.kernels.ada_scan import triton_rows as launch

    with backend.on(o.device):
        return launch.gated_norm(o, weight, gate, eps)


@torch.library.custom_op("kan_train::ada_gated_norm_backward", mutates_args=())
def ada_gated_norm_backward(grad: Tensor, o: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if not _launches(o):
        return reference.gated_norm_backward(grad, o, weight, gate, eps)
    from kan_train.kernels.ada_scan import triton_rows as launch

    with backend.on(o.device):
        return launch.gated_norm_backward(grad, o, weight, gate, eps)


def _state_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[-2], x.shape[-1], x.shape[-1], dtype=reference.wide_dtype(x.dtype))


def _like(x: Tensor | None, other: Tensor) -> Tensor:
    """The shape of an optional gradient."""
    return other.new_empty(0) if x is None else torch.empty_like(x)


@ada_scan.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Any, resets: Any, state: Any, chunk: int, scale: float, silu_q: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), _state_like(q)


@ada_scan_backward.register_fake
def _(grad_o: Tensor, grad_last: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Any, *_: Any) -> tuple[Tensor, ...]:
    decay = q.new_empty(0, dtype=reference.wide_dtype(q.dtype)) if log_decay is None else torch.empty_like(log_decay)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), decay, _state_like(q)


@ada_last_state.register_fake
def _(k: Tensor, v: Tensor, log_decay: Any, resets: Any, chunk: int) -> tuple[Tensor, Tensor]:
    added = _state_like(k)
    return added, added.new_empty(*added.shape[:2], 1, 1)


@ada_last_state_backward.register_fake
def _(grad_added: Tensor, grad_kept: Tensor, k: Tensor, v: Tensor, log_decay: Any, resets: Any) -> tuple[Tensor, Tensor, Tensor]:
    decay = k.new_empty(0, dtype=reference.wide_dtype(k.dtype)) if log_decay is None else torch.empty_like(log_decay)
    return torch.empty_like(k), torch.empty_like(v), decay


@ada_step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Any, state: Tensor, scale: float, silu_q: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(state)


@ada_step_.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Any, state: Tensor, scale: float, silu_q: bool) -> Tensor:
    return torch.empty_like(q)


@ada_diffused_keys.register_fake
def _(keys: Tensor, kernel: Tensor, resets: Any, before: Any, feature: bool) -> Tensor:
    return torch.empty_like(keys)


@ada_diffused_keys_backward.register_fake
def _(grad_phi: Tensor, keys: Tensor, kernel: Tensor, resets: Any, before: Any, feature: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(keys), torch.empty_like(kernel), _like(before, keys)


@ada_gated_norm.register_fake
def _(o: Tensor, weight: Any, gate: Any, eps: float) -> Tensor:
    return torch.empty_like(o)


@ada_gated_norm_backward.register_fake
def _(grad: Tensor, o: Tensor, weight: Any, gate: Any, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(o), _like(weight, o), _like(gate, o)


def _given(x: Tensor | None, grad: Tensor) -> Tensor | None:
    return None if x is None else grad


def _scan_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.chunk, ctx.scale, ctx.silu_q = inputs
    ctx.save_for_backward(*tensors, output[1])


def _scan_gradient(ctx: Any, grad_o: Tensor, grad_last: Tensor) -> tuple:
    q, k, v, log_decay, resets, state, last = ctx.saved_tensors
    grad_q, grad_k, grad_v, grad_decay, grad_state = torch.ops.kan_train.ada_scan_backward(
        grad_o.contiguous(), grad_last.contiguous(), q, k, v, log_decay, resets, state, last, ctx.chunk, ctx.scale, ctx.silu_q
    )
    return grad_q, grad_k, grad_v, _given(log_decay, grad_decay), None, _given(state, grad_state), None, None, None


def _last_state_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:4])


def _last_state_gradient(ctx: Any, grad_added: Tensor, grad_kept: Tensor) -> tuple:
    k, v, log_decay, resets = ctx.saved_tensors
    grad_k, grad_v, grad_decay = torch.ops.kan_train.ada_last_state_backward(grad_added.contiguous(), grad_kept.contiguous(), k, v, log_decay, resets)
    return grad_k, grad_v, _given(log_decay, grad_decay), None, None


def _keys_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.feature = inputs
    ctx.save_for_backward(*tensors)


def _keys_gradient(ctx: Any, grad_phi: Tensor) -> tuple:
    keys, kernel, resets, before = ctx.saved_tensors
    grads = torch.ops.kan_train.ada_diffused_keys_backward(grad_phi.contiguous(), keys, kernel, resets, before, ctx.feature)
    return grads[0], grads[1], None, _given(before, grads[2]), None


def _norm_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _norm_gradient(ctx: Any, grad: Tensor) -> tuple:
    o, weight, gate = ctx.saved_tensors
    grads = torch.ops.kan_train.ada_gated_norm_backward(grad.contiguous(), o, weight, gate, ctx.eps)
    return grads[0], _given(weight, grads[1]), _given(gate, grads[2]), None


ada_scan.register_autograd(_scan_gradient, setup_context=_scan_context)
ada_last_state.register_autograd(_last_state_gradient, setup_context=_last_state_context)
ada_diffused_keys.register_autograd(_keys_gradient, setup_context=_keys_context)
ada_gated_norm.register_autograd(_norm_gradient, setup_context=_norm_context)
