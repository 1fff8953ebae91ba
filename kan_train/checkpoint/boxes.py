"""What a rank owns of a tensor, and how it is cut into rectangles that any other layout can read.

A layout cuts the global tensor into rectangular shards, and ZeRO cuts the rank's shard into flat ranges. A flat range of a row-major shard
is a few rectangular boxes of the global tensor (at most 2n - 1 in n dimensions), and boxes are what torch.distributed.checkpoint reshards.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from kan_train.parallel.params import Box


@dataclass(frozen=True, kw_only=True, eq=False)
class Fragment:
    """Elements [start, start + len(flat)) of a rank's row-major shard of a global tensor."""

    name: str
    """Name of the global tensor, such as "param/blocks.0.mixer.query.weight"; names below "rank/" are kept for the ranks' own tensors."""
    global_shape: tuple[int, ...]
    """Shape of the global tensor."""
    local_offset: tuple[int, ...]
    """Where the shard begins in the global tensor."""
    local_shape: tuple[int, ...]
    """Shape of the shard."""
    start: int
    """First element of the fragment, counted in the shard's row-major order."""
    flat: Tensor
    """1-D contiguous view of the elements: read by a save, filled in place by a load. May be empty."""
    write: bool = True
    """Whether this rank writes them; False for a replica that another rank writes. A load always fills them."""

    @classmethod
    def whole(cls, name: str, tensor: Tensor, *, write: bool = True) -> "Fragment":
        """All of a contiguous `tensor` that is not sharded."""
        shape, flat = tuple(tensor.shape), tensor.detach().view(-1)
        return cls(name=name, global_shape=shape, local_offset=(0,) * len(shape), local_shape=shape, start=0, flat=flat, write=write)


def flat_range_boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Cut elements [start, stop) of a row-major tensor of `shape` into boxes, in flat order; each box is contiguous in that order."""
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [Box((start,), (stop - start,)) if shape else Box((), ())]
    row = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        return _within_row(shape, first, head, tail)
    boxes = []
    if head:
        boxes += _within_row(shape, first, head, row)
        first += 1
    if last > first:
        boxes.append(Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])))
    return boxes + _within_row(shape, last, 0, tail)


def _within_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[Box]:
    return [Box((row, *box.offset), (1, *box.size)) for box in flat_range_boxes(shape[1:], start, stop)]


def fragment_boxes(fragment: Fragment) -> list[tuple[Box, Tensor]]:
    """Boxes of the global tensor that `fragment` covers, each with the view of `fragment.flat` that holds it (of the box's shape).

    Raises ValueError where the fragment does not fit its shard, or the shard its tensor.
    """
    problem = _misfit(fragment)
    if problem:
        raise ValueError(f"{fragment.name}: {problem}")
    pieces, position = [], 0
    for box in flat_range_boxes(fragment.local_shape, fragment.start, fragment.start + fragment.flat.numel()):
        view = fragment.flat[position : position + box.numel].view(box.size)
        offset = tuple(inner + outer for inner, outer in zip(box.offset, fragment.local_offset, strict=True))
        pieces.append((Box(offset, box.size), view))
        position += box.numel
    return pieces


def _misfit(fragment: Fragment) -> str | None:
    shard = f"shard {list(fragment.local_shape)} at {list(fragment.local_offset)}"
    if not len(fragment.global_shape) == len(fragment.local_offset) == len(fragment.local_shape):
        return f"{shard} and the global shape {list(fragment.global_shape)} differ in dimensions"
    if any(o < 0 or n < 0 or o + n > g for o, n, g in zip(fragment.local_offset, fragment.local_shape, fragment.global_shape, strict=True)):
        return f"{shard} lies outside the global shape {list(fragment.global_shape)}"
    if fragment.flat.dim() != 1 or not fragment.flat.is_contiguous():
        return f"flat must be a contiguous 1-D view, and is {list(fragment.flat.shape)} with strides {list(fragment.flat.stride())}"
    stop = fragment.start + fragment.flat.numel()
    if fragment.start < 0 or stop > math.prod(fragment.local_shape):
        return f"elements [{fragment.start}, {stop}) lie outside the {shard}"
    return None


def coverage_problem(shape: tuple[int, ...], boxes: list[Box]) -> str | None:
    """Say why `boxes` do not tile a tensor of `shape` exactly (every element once), or None if they do."""
    for box in boxes:
        if len(box.offset) != len(shape) or any(o < 0 or o + n > g for o, n, g in zip(box.offset, box.size, shape, strict=True)):
            return f"box {list(box.size)} at {list(box.offset)} lies outside the shape {list(shape)}"
    twice = _overlap(boxes)
    if twice:
        return f"box {list(twice[0].size)} at {list(twice[0].offset)} and box {list(twice[1].size)} at {list(twice[1].offset)} overlap"
    covered, total = sum(box.numel for box in boxes), math.prod(shape)
    return None if covered == total else f"only {covered} of {total} elements are covered"


def _overlap(boxes: list[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share an element, or None: a sweep along dimension 0, so that only boxes that meet there are compared."""
    active: list[Box] = []
    for box in sorted((b for b in boxes if b.numel), key=lambda b: b.offset):
        low = box.offset[0] if box.offset else 0
        active = [other for other in active if not other.offset or other.offset[0] + other.size[0] > low]
        for other in active:
            if all(a < b + m and b < a + n for a, n, b, m in zip(box.offset, box.size, other.offset, other.size, strict=True)):
                return other, box
        active.append(box)
    return None

