"""One number for the weights of a run, the same on every layout: each rank adds up what it owns, and the sums are added over the ranks.

An element adds a 64-bit hash of its parameter's name, its global index and its bits, modulo 2^64: no order matters, and every element, wherever it
lies, is mixed with where it belongs in the whole tensor.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from kan_train.checkpoint.boxes import Fragment, fragment_boxes
from kan_train.checkpoint.errors import CheckpointError
from kan_train.parallel.params import Box

_PREFIX = "param/"
_WEYL = 0x9E3779B97F4A7C15 - 2**64  # constants of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), as int64
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))
_SLICE = 1 << 16  # elements a pass: bounds the memory of the integer work


def weights_checksum(
    fragments: Iterable[Fragment],
    shapes: Mapping[str, tuple[int, ...]],
    sum_over_ranks: Callable[[Tensor], Tensor],
    *,
    device: torch.device | str = "cpu",
) -> str:
    """Checksum of a run's weights, 16 hexadecimal digits: the same on every rank and on every layout that holds the same fp32 bits.

    fragments: what this rank holds; those named "param/NAME" that it writes count, others are passed over. shapes: canonical name -> global shape of
    every parameter of the model, those of other ranks too, in the canonical order (`kan_train.model.lm.parameter_table`). sum_over_ranks: sums an
    int64 tensor [3, parameters] on `device` over all ranks of the run, which all call this. CheckpointError where a fragment is of another model, or
    where the ranks together do not hold every element once.
    """
    row = {name: number for number, name in enumerate(shapes)}
    totals = torch.zeros(3, len(row), dtype=torch.int64, device=device)
    for fragment in fragments:
        name = fragment.name.removeprefix(_PREFIX)
        if not fragment.write or name == fragment.name:
            continue
        if tuple(fragment.global_shape) != tuple(shapes.get(name, ())) or name not in shapes:
            raise CheckpointError(f"parameter {name} {list(fragment.global_shape)} is not in the model of this configuration: {_expected(name, shapes)}")
        for index, values in _elements(fragment):
            hashed = _hash(name, index, values)
            # The last two show holes and overlaps: how many elements there are, and the sum of their squared indices.
            part = torch.stack((hashed.sum(), torch.full_like(hashed[0], len(index)), (index * index).sum()))
            totals[:, row[name]] += part.to(totals.device)
    hashes, counts, squares = sum_over_ranks(totals).tolist()
    for (name, shape), count, square in zip(shapes.items(), counts, squares, strict=True):
        _check_coverage(name, math.prod(shape), count, square % 2**64)
    lines = (f"{name} {list(shape)} {value % 2**64:016x}\n" for (name, shape), value in zip(shapes.items(), hashes, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _elements(fragment: Fragment) -> Iterator[tuple[Tensor, Tensor]]:
    """Slices of a fragment: global element indices (int64) and the elements (any dtype), both 1-D."""
    for box, values in fragment_boxes(fragment):
        first, (run, *outer) = _loops(fragment.global_shape, box)
        rows = values.view(-1, run[0])
        height, width = max(1, _SLICE // run[0]), min(run[0], _SLICE)
        for top in range(0, len(rows), height):
            part = rows[top : top + height]
            # Only what steps from run to run is divided: an integer division an element would cost more than its hash.
            number = torch.arange(top, top + len(part), device=values.device)
            starts = torch.full_like(number, first)
            for length, stride in outer:
                starts += number % length * stride
                number = number // length
            for left in range(0, run[0], width):
                piece = part[:, left : left + width]
                columns = torch.arange(left, left + piece.shape[1], device=values.device)
                yield (starts[:, None] + columns).flatten(), piece.flatten()


def _loops(shape: tuple[int, ...], box: Box) -> tuple[int, list[tuple[int, int]]]:
    """Index of the first element of `box` in a row-major tensor of `shape`, and the (length, stride) of the loops over the others, innermost first.

    The innermost is a run of consecutive elements: dimensions that are whole go into one loop with the dimension before them.
    """
    first, stride, loops = 0, 1, [(1, 1)]
    for whole, offset, length in zip(reversed(shape), reversed(box.offset), reversed(box.size), strict=True):
        first += offset * stride
        if math.prod(loops[-1]) == stride:
            loops[-1] = (loops[-1][0] * length, loops[-1][1])
        else:
            loops.append((length, stride))
        stride *= whole
    return first, loops


def _hash(name: str, index: Tensor, values: Tensor) -> Tensor:
    """int64 hashes of (name, global index, fp32 bits): for a given name and index, other bits always give another hash."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)
    mixed = (index * _WEYL).add_(seed).bitwise_xor_(values.detach().float().view(torch.int32).long())
    for shift, multiplier in _ROUNDS:
        # int64 shifts bring in the sign: the mask makes the shift a logical one, without which x and ~x would hash alike.
        mixed = mixed.bitwise_xor_((mixed >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(multiplier)
    return mixed


def _check_coverage(name: str, elements: int, count: int, square: int) -> None:
    if count != elements:
        found = f"{count} elements of {name} are written, it has {elements}"
    elif square != (elements * (elements - 1) * (2 * elements - 1) // 6) % 2**64:
        found = f"of the {elements} elements of {name} some are written twice and others never"
    else:
        return
    raise CheckpointError(f"{found}; every element must be written by one rank: see which ranks hold its fragments with write=True")


def _expected(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    if name in shapes:
        return f"there its shape is {list(shapes[name])}; compare model.* with the run's saved configuration"
    return "no parameter there has that name; compare model.* with the run's saved configuration"
