"""The checksum of the weights is a fact of the weights: no layout shows in it, every change of them does. The reference is Python's integers."""

import hashlib
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kan_train.checkpoint import CheckpointError, Fragment
from kan_train.checkpoint import checksum as module
from kan_train.checkpoint.checksum import weights_checksum
from kan_train.model.init import materialise
from kan_train.parallel.params import Normal, declare, named_specs
from kan_train.parallel.place import Axis, Place, at

SHAPES = {"groves.up": (4, 6, 8), "head.weight": (12, 10), "scale": (7,), "temperature": ()}


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def whole(tensors: dict[str, Tensor]) -> list[Fragment]:
    return [Fragment.whole(f"param/{name}", tensor) for name, tensor in tensors.items()]


def cut(tensors: dict[str, Tensor], axis: int, parts: int, pieces: int) -> list[Fragment]:
    """Shards along `axis` where it can be split, each cut flat into `pieces` uneven ranges, as tensor parallelism and ZeRO cut them."""
    fragments = []
    for name, tensor in tensors.items():
        split = tensor.dim() > axis and tensor.shape[axis] >= parts
        position = 0
        for shard in tensor.chunk(parts, axis) if split else [tensor]:
            offset = [position if dimension == axis and split else 0 for dimension in range(tensor.dim())]
            position += shard.shape[axis] if split else 0
            flat, start = shard.reshape(-1).clone(), 0
            for piece in range(1, pieces + 1):
                stop = flat.numel() * piece**2 // pieces**2
                place = {"global_shape": tuple(tensor.shape), "local_offset": tuple(offset), "local_shape": tuple(shard.shape)}
                fragments.append(Fragment(name=f"param/{name}", **place, start=start, flat=flat[start:stop]))
                start = stop
    return fragments


def alone(totals: Tensor) -> Tensor:
    return totals


class _SumsTakenError(Exception):
    pass


def over_ranks(ranks: list[list[Fragment]], shapes: dict[str, tuple[int, ...]] = SHAPES) -> set[str]:
    """What ranks that hold these fragments answer when their sums are added as an all-reduce would add them."""
    sums: list[Tensor] = []

    def take(totals: Tensor) -> Tensor:
        sums.append(totals.clone())
        raise _SumsTakenError

    for fragments in ranks:
        with pytest.raises(_SumsTakenError):
            weights_checksum(fragments, shapes, take)
    return {weights_checksum(fragments, shapes, lambda totals: torch.stack(sums).sum(0)) for fragments in ranks}


def reference(tensors: dict[str, Tensor]) -> str:
    """The definition, one element at a time."""
    lines = ""
    for name, tensor in tensors.items():
        seed, total = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"), 0
        for index, value in enumerate(tensor.reshape(-1).tolist()):
            (bits,) = struct.unpack("<i", struct.pack("<f", value))
            x = (index * 0x9E3779B97F4A7C15 + seed) % 2**64 ^ bits % 2**64
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
            total += x ^ x >> 31
        lines += f"{name} {list(tensor.shape)} {total % 2**64:016x}\n"
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def test_the_whole_weights_give_what_the_definition_says():
    """A second program computes it from the definition alone; the value stands here, for logs of different versions to be compared."""
    assert weights_checksum(whole(weights()), SHAPES, alone) == reference(weights())
    ramp = {name: torch.arange(math.prod(shape), dtype=torch.float32).view(shape) - 3 for name, shape in SHAPES.items()}
    assert weights_checksum(whole(ramp), SHAPES, alone) == reference(ramp) == "69635b7bbd37eb89"


@pytest.mark.parametrize("slice_elements", [1 << 16, 5])
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize(("axis", "parts"), [(0, 1), (0, 2), (1, 2), (1, 5), (2, 4)])
def test_no_layout_shows(axis, parts, pieces, slice_elements, monkeypatch):
    """Whole, rows, columns, groves, flat ranges of them, in any order, on one rank or dealt out to three: one value."""
    monkeypatch.setattr(module, "_SLICE", slice_elements)
    expected = reference(weights())
    fragments = cut(weights(), axis, parts, pieces)
    assert weights_checksum(fragments, SHAPES, alone) == expected
    assert weights_checksum(reversed(fragments), SHAPES, alone) == expected
    assert over_ranks([fragments[rank::3] for rank in range(3)]) == {expected}


def test_what_counts_are_the_written_parameters():
    """Replicas, moments and buffers beside them change nothing; bf16 weights count as the fp32 numbers that they are."""
    expected = weights_checksum(whole(weights()), SHAPES, alone)
    replica = Fragment.whole("param/scale", torch.zeros(7), write=False)
    others = [replica, Fragment.whole("exp_avg/scale", torch.ones(7)), Fragment.whole("buffer/steps", torch.ones(2))]
    assert weights_checksum([*others, *whole(weights())], SHAPES, alone) == expected
    half = {name: tensor.bfloat16() for name, tensor in weights().items()}
    wide = {name: tensor.float() for name, tensor in half.items()}
    assert weights_checksum(whole(half), SHAPES, alone) == weights_checksum(whole(wide), SHAPES, alone) != expected


@given(st.sampled_from(sorted(set(SHAPES) - {"temperature"})), st.data())
@settings(max_examples=100, deadline=None)
def test_every_change_shows(name, data):
    """One bit, a sign (of zero too), two elements exchanged, in one parameter or between two, two parameters of one shape exchanged."""
    before = weights_checksum(whole(weights()), SHAPES, alone)
    elements = math.prod(SHAPES[name])
    one, other = data.draw(st.lists(st.integers(0, elements - 1), min_size=2, max_size=2, unique=True))
    bit = data.draw(st.integers(0, 31))

    changed = weights()
    changed[name].view(-1).view(torch.int32)[one] ^= 1 << bit if bit < 31 else -(2**31)
    assert weights_checksum(whole(changed), SHAPES, alone) != before

    changed = weights()
    changed[name].view(-1)[[one, other]] = changed[name].view(-1)[[other, one]]
    assert weights_checksum(whole(changed), SHAPES, alone) != before

    between = weights()
    between[name].view(-1)[one], between["temperature"] = between["temperature"].clone(), between[name].view(-1)[one].clone()
    assert weights_checksum(whole(between), SHAPES, alone) != before


def test_the_sign_of_zero_and_the_names_count():
    shapes = {"a": (3,), "b": (3,)}
    a, b = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])
    values = [{"a": a, "b": b}, {"a": b, "b": a}, {"a": torch.tensor([-0.0, 1.0, 2.0]), "b": b}]
    assert len({weights_checksum(whole(tensors), shapes, alone) for tensors in values}) == 3


def test_indices_beyond_32_bits_reach_the_hash():
    """Elements 2^32 apart in a tensor too large to hold: their sums differ, and their squared indices are the exact ones modulo 2^64."""
    shape, sums = (2**20, 2**14), []

    def take(totals: Tensor) -> Tensor:
        sums.append(totals[:, 0].tolist())
        raise _SumsTakenError

    for row in (1, 1 + 2**18, 2**20 - 1):
        fragment = Fragment(name="param/w", global_shape=shape, local_offset=(row, 0), local_shape=(1, 2**14), start=5, flat=torch.ones(2))
        with pytest.raises(_SumsTakenError):
            weights_checksum([fragment], {"w": shape}, take)
        first = row * 2**14 + 5
        assert sums[-1][1:] == [2, int(np.uint64((first**2 + (first + 1) ** 2) % 2**64).astype(np.int64))]
    assert len({hashed for hashed, _, _ in sums}) == 3


def test_an_element_that_is_not_held_once_is_refused():
    """A hole, an overlap, and both at once with the right number of elements."""
    fragments = cut(weights(), 1, 2, 3)
    head = [fragment for fragment in fragments if fragment.name == "param/head.weight" and fragment.flat.numel()]
    rest = [fragment for fragment in fragments if fragment is not head[0]]
    with pytest.raises(CheckpointError, match=r"114 elements of head\.weight are written, it has 120; every element must be written by one rank"):
        weights_checksum(rest, SHAPES, alone)
    with pytest.raises(CheckpointError, match=r"126 elements of head\.weight are written, it has 120"):
        weights_checksum([*fragments, head[0]], SHAPES, alone)
    twin = next(fragment for fragment in head[1:] if fragment.flat.numel() == head[0].flat.numel())
    with pytest.raises(CheckpointError, match=r"of the 120 elements of head\.weight some are written twice and others never"):
        weights_checksum([*rest, twin], SHAPES, alone)
    with pytest.raises(CheckpointError, match=r"0 elements of temperature are written, it has 1"):
        weights_checksum([fragment for fragment in fragments if fragment.name != "param/temperature"], SHAPES, alone)


def test_a_parameter_of_another_model_is_refused():
    stranger = Fragment.whole("param/tail", torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"parameter tail \[2\] is not in the model .* no parameter there has that name"):
        weights_checksum([*whole(weights()), stranger], SHAPES, alone)
    scalar = Fragment.whole("param/tail", torch.zeros(()))
    with pytest.raises(CheckpointError, match=r"parameter tail \[\] is not in the model"):
        weights_checksum([*whole(weights()), scalar], SHAPES, alone)
    longer = Fragment.whole("param/scale", torch.zeros(8))
    with pytest.raises(CheckpointError, match=r"parameter scale \[8\] is not in the model .* there its shape is \[7\]"):
        weights_checksum([longer], SHAPES, alone)


class Layers(nn.Module):
    """A dense matrix, the groves of a layer and a replicated vector."""

    def __init__(self) -> None:
        super().__init__()
        declare(self, "query", (8, 6), init=Normal(1.0), axes=("heads", None))
        declare(self, "up", (4, 6, 10), init=Normal(1.0), axes=("grove", None, "hidden"), grove=True)
        declare(self, "scale", (6,), init=Normal(1.0))


def test_step_zero_is_the_same_on_every_layout():
    """Initialised by four ranks, tensor 2 x expert 2, each filling its own: the checksum is that of one process, and another seed's is not."""
    shapes = {name: spec.shape for name, spec in named_specs(Layers())}
    expected = weights_checksum(whole(dict(materialise(Layers(), seed=5).named_parameters())), shapes, alone)

    def rank(tensor: int, expert: int, seed: int) -> list[Fragment]:
        with at(Place(tensor=Axis(2, tensor), expert_tensor=Axis(2, tensor), expert=Axis(2, expert))):
            model = materialise(Layers(), seed=seed)
        return [
            Fragment(
                name=f"param/{name}",
                global_shape=parameter.spec.shape,
                local_offset=parameter.shard.offset,
                local_shape=parameter.shard.size,
                start=0,
                flat=parameter.detach().view(-1),
                write={"query": expert == 0, "up": True, "scale": tensor == expert == 0}[name],
            )
            for name, parameter in model.named_parameters()
        ]

    assert over_ranks([rank(tensor, expert, 5) for tensor in range(2) for expert in range(2)], shapes) == {expected}
    assert over_ranks([rank(tensor, expert, 6) for tensor in range(2) for expert in range(2)], shapes) != {expected}
