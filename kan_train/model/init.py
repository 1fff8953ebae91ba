"""Initial weights that do not depend on the layout: every element is a function of (seed, canonical name, global element index).

Philox4x32-10 (Salmon et al., SC 2011) keyed by a hash of (seed, name) and counted by the element index gives the integers, which are the same on
every device; the inverse normal CDF, computed in fp64 and rounded once, gives the normals. A rank fills the box of the global tensor that it owns,
a tile at a time: neither the whole tensor nor the whole of its integers ever stand in memory.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kan_train.parallel.params import Box, Constant, Initialiser, Normal, PerIndex, describe, initial_buffers, shard_of, spec_of

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10 of counters (int64 [n], high counter words zero) -> four 32-bit words each, int64 [n, 4]."""
    c0, c1 = counter & _MASK, counter >> 32
    c2, c3, p0, p1 = (torch.zeros_like(c0) for _ in range(4))
    k0, k1 = key
    # Memory traffic is the cost: products go to buffers that are used again, and low words (c1, c3) keep the high half of their product
    # until the word that they are mixed into is masked.
    for _ in range(10):
        torch.mul(c0, _MULTIPLIERS[0], out=p0)
        torch.mul(c2, _MULTIPLIERS[1], out=p1)
        torch.bitwise_right_shift(p1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        torch.bitwise_right_shift(p0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, p1, c3, p0 = p1, c1, p0, c3
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)), dim=-1)


def initial_values(
    init: Initialiser,
    seed: int,
    name: str,
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
    *,
    box: Box | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What `box` (default: all) of the tensor `name` of global `shape` holds at step 0: computed in fp32, cast last to `dtype`.

    Bitwise the same as that part of the whole tensor. Raises ValueError where the box lies outside the tensor.
    """
    box = box if box is not None else Box((0,) * len(shape), shape)
    offset, size = box
    if not len(shape) == len(offset) == len(size) or any(o < 0 or n < 0 or o + n > g for o, n, g in zip(offset, size, shape, strict=True)):
        raise ValueError(f"{name}: box {list(size)} at {list(offset)} lies outside the shape {list(shape)}")
    match init:
        case Normal(std):
            return _normals(std, _key(seed, name), shape, box, device, dtype)
        case Constant(value):
            return _spread(torch.tensor(value, device=device), dtype, size)
        case PerIndex(axis, values):
            lengths = [1] * len(shape)
            lengths[axis] = size[axis]
            own = torch.tensor(values[offset[axis] : offset[axis] + size[axis]], device=device)
            return _spread(own.view(lengths), dtype, size)


def _spread(values: Tensor, dtype: torch.dtype, size: tuple[int, ...]) -> Tensor:
    return values.float().to(dtype).expand(size).clone(memory_format=torch.contiguous_format)


def _key(seed: int, name: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _normals(std: float, key: tuple[int, int], shape: tuple[int, ...], box: Box, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Normals of standard deviation `std` in a box: its runs (consecutive elements of the global tensor) are the rows of a matrix, cut into tiles."""
    out = torch.empty(box.size, dtype=dtype, device=device)
    if not out.numel():
        return out
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    first = sum(o * stride for o, stride in zip(box.offset, strides, strict=True))
    outer = _dimensions_across_runs(shape, box.size)
    rows = out.view(-1, math.prod(box.size[outer:]))
    # One counter gives four elements: where every run begins at the same one of its four, a plain slice finds them.
    phase = first % 4 if all(stride % 4 == 0 for stride in strides[:outer]) else None
    counters = _counters_a_tile(out.device)
    width = min(rows.shape[1], 4 * counters)
    height = max(1, counters // (width // 4 + 2))
    for top in range(0, rows.shape[0], height):
        starts = _run_starts(first, strides[:outer], box.size[:outer], top, min(top + height, rows.shape[0]), device)
        for left in range(0, rows.shape[1], width):
            right = min(left + width, rows.shape[1])
            rows[top : top + height, left:right] = _tile(starts + left, right - left, phase, key).mul_(std)
    return out


def _dimensions_across_runs(shape: tuple[int, ...], size: tuple[int, ...]) -> int:
    """How many leading dimensions step from one run of the box to the next; the others lie inside a run."""
    outer = max(len(shape) - 1, 0)
    while outer and size[outer] == shape[outer]:
        outer -= 1
    return outer


def _counters_a_tile(device: torch.device) -> int:
    """On CPU a tile's integers should stay in the second-level cache; elsewhere a launch should find work for a whole device."""
    return 1 << 15 if device.type == "cpu" else 1 << 20


def _run_starts(first: int, strides: list[int], size: tuple[int, ...], top: int, bottom: int, device: torch.device | str) -> Tensor:
    """Global element index (int64) of the first element of runs top .. bottom; `strides` and `size` are those of the dimensions across runs."""
    run = torch.arange(top, bottom, dtype=torch.int64, device=device)
    starts = torch.full_like(run, first)
    for axis in range(len(strides) - 1, -1, -1):
        is_outermost = axis == 0  # its index is what is left: integer divisions are slow, and most boxes have no other
        starts += (run if is_outermost else run % size[axis]) * strides[axis]
        run = run if is_outermost else run // size[axis]
    return starts


def _tile(starts: Tensor, width: int, phase: int | None, key: tuple[int, int]) -> Tensor:
    """Standard normals fp32 [runs, width]: `width` elements from each of `starts`, of which all are `phase` modulo 4, or (None) any."""
    counters = (width + (3 if phase is None else phase) + 3) // 4
    columns = torch.arange(max(counters, width), device=starts.device)
    words = philox(((starts >> 2)[:, None] + columns[:counters]).flatten(), key).view(len(starts), 4 * counters)
    words = words[:, phase : phase + width] if phase is not None else words.gather(1, (starts & 3)[:, None] + columns[:width])
    # 24 bits of a word, centred in their cell of (-1, 1): exact in fp64, never an end of the interval.
    centred = (words >> 8).double().add_(0.5).mul_(2.0**-23).sub_(1)
    return centred.erfinv_().mul_(math.sqrt(2)).float()


@torch.no_grad()
def materialise(
    model: nn.Module,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    prefix: str = "",
    after_module: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Give every meta parameter and buffer of `model` memory on `device` and its initial values; returns `model`.

    Parameters become `dtype` (cast last, from fp32), buffers keep the dtype they were declared with. Each parameter gets its box of the global
    tensor. after_module(m) is called when the parameters that m itself holds (not its children's) are filled, before the next module's are:
    what partitions or frees them there keeps the peak at one module's parameters.
    """
    for path, module in model.named_modules():
        start = f"{prefix}{path}." if path else prefix
        own = dict(module.named_parameters(recurse=False))
        for name, parameter in own.items():
            module.register_parameter(name, _filled(parameter, start + name, seed, device, dtype))
        for name, value in initial_buffers(module).items():
            meta = getattr(module, name)
            module.register_buffer(name, torch.full(meta.shape, value, dtype=meta.dtype, device=device))
        if own and after_module is not None:
            after_module(module)
    return model


def _filled(parameter: nn.Parameter, name: str, seed: int, device: torch.device | str, dtype: torch.dtype) -> nn.Parameter:
    spec, box = spec_of(name, parameter), shard_of(name, parameter)
    return describe(nn.Parameter(initial_values(spec.init, seed, name, spec.shape, device, box=box, dtype=dtype)), spec, box)
