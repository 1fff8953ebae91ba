"""Initial weights that do not depend on the layout: every element is a function of (seed, canonical name, global element index).

Philox4x32-10 (Salmon et al., SC 2011) keyed by a hash of (seed, name) and counted by the element index gives the integers, which are the same on
every device; the inverse normal CDF, computed in fp64 and rounded once, gives the normals.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from kan_train.parallel.params import Constant, Initialiser, Normal, PerIndex, initial_buffers, spec_of

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_SLICE = 1 << 20  # counters a pass: bounds the memory of the integer work


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10 of counters (int64 [n], high counter words zero) -> four 32-bit words each, int64 [n, 4]."""
    c0, c1 = counter & _MASK, counter >> 32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product wraps into the sign; the mask after the arithmetic shift restores the unsigned high word.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def normals(seed: int, name: str, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard normals fp32 [count]: elements start .. start+count of the global tensor `name`, read in row-major order."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
    out = torch.empty(count, device=device)
    end = start + count
    for first in range(start // 4, -(-end // 4), _SLICE):
        last = min(first + _SLICE, -(-end // 4))
        words = philox(torch.arange(first, last, device=device), key).flatten()
        uniform = ((words >> 8).double() + 0.5) * 2.0**-24
        values = (torch.erfinv(2 * uniform - 1) * math.sqrt(2)).float()
        low, high = max(start, 4 * first), min(end, 4 * last)
        out[low - start : high - start] = values[low - 4 * first : high - 4 * first]
    return out


def initial_values(init: Initialiser, seed: int, name: str, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """The whole tensor `name` at step 0, fp32 of `shape`."""
    match init:
        case Normal(std):
            return normals(seed, name, 0, math.prod(shape), device).view(shape) * std
        case Constant(value):
            return torch.full(shape, value, device=device)
        case PerIndex(axis, values):
            lengths = [1] * len(shape)
            lengths[axis] = len(values)
            return torch.tensor(values, device=device).view(lengths).expand(shape).contiguous()


@torch.no_grad()
def materialise(
    model: nn.Module, *, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, prefix: str = ""
) -> nn.Module:
    """Give every meta parameter and buffer of `model` memory on `device` and its initial values; returns `model`.

    Parameters become `dtype` (cast last, from fp32), buffers keep the dtype they were declared with.
    """
    for path, module in model.named_modules():
        start = f"{prefix}{path}." if path else prefix
        for name, parameter in list(module.named_parameters(recurse=False)):
            spec = spec_of(start + name, parameter)
            filled = nn.Parameter(initial_values(spec.init, seed, start + name, spec.shape, device).to(dtype))
            filled.spec = spec  # type: ignore[attr-defined]
            module.register_parameter(name, filled)
        for name, value in initial_buffers(module).items():
            meta = getattr(module, name)
            module.register_buffer(name, torch.full(meta.shape, value, dtype=meta.dtype, device=device))
    return model
