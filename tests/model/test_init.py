"""Initial weights are a function of (seed, name, global element index), whatever part of them is asked for."""

import hashlib
import itertools
import math
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from torch import Tensor, nn

from kan_train.model import init
from kan_train.model.init import initial_values, materialise, philox
from kan_train.parallel.params import Box, Constant, Normal, PerIndex, declare, declare_buffer
from kan_train.parallel.place import Axis, Place, at


def normals(seed: int, name: str, start: int, count: int) -> Tensor:
    """Elements start .. start + count of a vector of standard normals."""
    return initial_values(Normal(1.0), seed, name, (start + count,), box=Box((start,), (count,)))


def philox_reference(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers, after Salmon et al. (SC 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_reference_gives_the_published_answers():
    """The known-answer vectors that come with Random123."""
    assert philox_reference([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert philox_reference(pi, [0xA4093822, 0x299F31D0]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_philox_equals_the_reference():
    counters = [0, 1, 2, 12345, 2**31, 2**32 - 1, 2**32, 2**45 + 17]
    words = philox(torch.tensor(counters), (0xA4093822, 0x299F31D0))
    for counter, row in zip(counters, words.tolist(), strict=True):
        assert row == philox_reference([counter & 0xFFFFFFFF, counter >> 32, 0, 0], [0xA4093822, 0x299F31D0])


def normal_reference(seed: int, name: str, element: int) -> float:
    """One element: Philox in Python's integers, the inverse normal CDF of scipy."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    key = [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")]
    counter = element // 4
    word = philox_reference([counter & 0xFFFFFFFF, counter >> 32, 0, 0], key)[element % 4]
    return special.ndtri(((word >> 8) + 0.5) / 2**24)


GOLDEN_BITS = {
    (7, "layers.3.grove.w_up", 0): [3216152913, 3204118467, 1063955598, 3223828023, 1060938237, 3220531334, 1046622450, 3134640369],
    (7, "w", 4 * 2**20 - 3): [1054448593, 1066396672, 1037602871, 1052915644, 3219792378, 1062126818],
    (0, "layers.71.ffn.groves.up", 2**32 - 2): [1057583642, 3202366379, 3220405668, 3192660113, 3207854381],
    (123456789, "embedding.weight", 2**35 + 17): [3205509462, 1058287784, 1062471111, 1064405789],
}
GOLDEN_DIGESTS = {
    ("layers.0.mixer.query.weight", 0, 300001): "58f0ff7c1e887b61abcb4ce6a82783504e48f7e705f519db146ec34f6186fb9c",
    ("head.weight", 2**34 - 7, 100003): "b3cbfa750ee7697e5e6b82e84bb56eea0a084cca74653631b6dda50d4ca03b38",
}


def test_values_are_those_of_every_earlier_version():
    """A seed names the same weights for good: bits written down when they were first drawn, across word, counter and slice boundaries."""
    for (seed, name, start), bits in GOLDEN_BITS.items():
        assert [value & 0xFFFFFFFF for value in normals(seed, name, start, len(bits)).view(torch.int32).tolist()] == bits
    for (name, start, count), digest in GOLDEN_DIGESTS.items():
        assert hashlib.sha256(normals(3, name, start, count).numpy().tobytes()).hexdigest() == digest


@st.composite
def boxes(draw):
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple))
    ends = [sorted(draw(st.tuples(st.integers(0, length), st.integers(0, length)))) for length in shape]
    return shape, tuple(low for low, _ in ends), tuple(high - low for low, high in ends)


@given(boxes(), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
@settings(max_examples=200, deadline=None)
def test_any_box_equals_the_same_box_of_the_whole(case, tile, dtype):
    """A rank that owns a box fills it without the rest, bit for bit, whatever tiles the work is done in."""
    shape, offset, size = case
    window = tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
    first, last = (PerIndex(axis, tuple(math.sin(i) for i in range(shape[axis]))) for axis in (0, -1))
    for kind in (Normal(0.37), Constant(0.1), first, last):
        whole = initial_values(kind, 11, "w", shape).to(dtype)
        with mock.patch.object(init, "_counters_a_tile", return_value=tile):
            part = initial_values(kind, 11, "w", shape, box=Box(offset, size), dtype=dtype)
        assert part.dtype == dtype
        assert part.is_contiguous()
        assert torch.equal(part, whole[window])


@given(boxes())
@settings(max_examples=60, deadline=None)
def test_an_element_is_the_normal_of_its_global_row_major_index(case):
    shape, offset, size = case
    part = initial_values(Normal(2.0), 11, "w", shape, box=Box(offset, size))
    every = np.arange(math.prod(shape)).reshape(shape)[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
    expected = [2 * normal_reference(11, "w", int(element)) for element in every.ravel()[:20]]
    np.testing.assert_allclose(part.flatten()[:20].numpy(), expected, rtol=2e-7, atol=1e-7)


def test_global_indices_beyond_32_bits_are_exact():
    """A tensor of 2^37 elements and more: the far corner of it, strided and not, one element at a time in Python's integers."""
    shape, offset, size = (128, 6143, 262147), (126, 6140, 262141), (2, 3, 6)
    for extent in (size, (2, 3, 1), (1, 1, 6)):
        part = initial_values(Normal(1.0), 5, "layers.9.ffn.groves.up", shape, box=Box(offset, extent))
        elements = [
            ((offset[0] + i) * shape[1] + offset[1] + j) * shape[2] + offset[2] + k for i, j, k in itertools.product(*(range(length) for length in extent))
        ]
        assert min(elements) > 2**37
        expected = [normal_reference(5, "layers.9.ffn.groves.up", element) for element in elements]
        np.testing.assert_allclose(part.flatten().numpy(), expected, rtol=2e-7, atol=1e-7)


def test_the_seam_between_tiles_does_not_show():
    """The box is wider than a tile: its end equals the same elements asked for alone."""
    seam = 4 * init._counters_a_tile(torch.device("cpu"))
    whole = normals(7, "w", 0, seam + 10)
    assert torch.equal(whole[seam - 10 :], normals(7, "w", seam - 10, 20))


def test_a_box_that_does_not_fit_is_refused():
    for offset, size in (((0, 3), (2, 1)), ((-1, 0), (1, 1)), ((0,), (2,)), ((0, 0), (2, -1))):
        with pytest.raises(ValueError, match=r"w: box .* lies outside the shape \[2, 3\]"):
            initial_values(Constant(0.0), 0, "w", (2, 3), box=Box(offset, size))


def test_values_are_standard_normal_and_independent_between_names_and_seeds():
    a, b, c = normals(1, "a", 0, 200_000), normals(1, "b", 0, 200_000), normals(2, "a", 0, 200_000)
    for sample in (a, b, c):
        assert stats.kstest(sample.numpy(), "norm").pvalue > 1e-3
    for other in (b, c):
        assert abs(np.corrcoef(a.numpy(), other.numpy())[0, 1]) < 5 / math.sqrt(200_000)


def test_initialisers_give_what_they_say():
    assert torch.equal(initial_values(Constant(0.5), 0, "x", (2, 3)), torch.full((2, 3), 0.5))
    assert torch.equal(initial_values(PerIndex(-1, (1.0, 0.0)), 0, "x", (2, 3, 2)), torch.tensor([1.0, 0.0]).expand(2, 3, 2))
    assert torch.equal(initial_values(PerIndex(0, (3.0, 4.0)), 0, "x", (2, 3)), torch.tensor([[3.0], [4.0]]).expand(2, 3))
    assert torch.equal(initial_values(Normal(0.1), 5, "x", (4, 5)).flatten(), normals(5, "x", 0, 20) * 0.1)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = declare(self, "weight", (6, 5), init=Normal(1.0), axes=("hidden", None), matrix=True, decay=True)
        declare_buffer(self, "mean", (3,), 2.0)


def test_materialise_fills_by_global_name_and_casts_last():
    """The layer number in the name makes equal layers differ; bf16 weights are the rounded fp32 ones, buffers keep their dtype."""
    full = materialise(nn.Sequential(Layer(), Layer()), seed=3)
    half = materialise(nn.Sequential(Layer(), Layer()), seed=3, dtype=torch.bfloat16)
    assert not torch.equal(full[0].weight, full[1].weight)
    assert torch.equal(full[1].weight.bfloat16(), half[1].weight)
    assert torch.equal(full[1].weight.flatten(), normals(3, "1.weight", 0, 30))
    assert half[0].mean.dtype == torch.float32
    assert torch.equal(half[0].mean, torch.full((3,), 2.0))
    assert full[0].weight.spec.axes == ("hidden", None)


def test_an_undeclared_parameter_is_refused_by_name():
    with pytest.raises(KeyError, match=r"0\.weight was not declared"):
        materialise(nn.Sequential(nn.Linear(2, 2)), seed=0)


def test_materialise_fills_the_shard_that_a_place_holds():
    """The shards of three ranks, put together, are the whole; names have their prefix, and the facts move to the new parameters."""
    whole = normals(3, "layers.7.weight", 0, 30).view(6, 5).bfloat16()
    parts = []
    for rank in range(3):
        with at(Place(tensor=Axis(size=3, rank=rank))):
            model = nn.ModuleDict({"7": Layer()})
        weight = materialise(model, seed=3, prefix="layers.", dtype=torch.bfloat16)["7"].weight
        assert weight.spec.shape == (6, 5)
        assert weight.shard == Box((2 * rank, 0), (2, 5))
        parts.append(weight)
    assert torch.equal(torch.cat(parts), whole)


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator held at once during `work` (itself in small tiles), above what it held before."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with mock.patch.object(init, "_counters_a_tile", return_value=1 << 11), torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        kept = work()
    events = sorted((event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"), key=lambda event: event.start_ns())
    del kept
    return max(itertools.accumulate(event.nbytes() for event in events))


TILE_BYTES = 512 * 1024  # the integers and fp64 values of a tile of 2^11 counters


class Wide(nn.Module):
    """Parameters of its own and of children: both must be offered, each once."""

    def __init__(self, children: int) -> None:
        super().__init__()
        declare(self, "scale", (1000, 64), init=Normal(1.0))
        self.layers = nn.ModuleList(Wide(0) for _ in range(children))


def test_after_module_keeps_the_peak_at_one_module():
    """Modules freed as soon as they are filled: the allocator's peak stays near one module's bytes plus a tile of work, far below the model's."""
    modules, module_bytes = 13, 1000 * 64 * 4
    offered: list[nn.Module] = []

    def free(module: nn.Module) -> None:
        assert not module.scale.is_meta
        offered.append(module)
        module.scale.data = torch.empty(0)

    assert peak_bytes(lambda: materialise(Wide(modules - 1), seed=0)) > modules * module_bytes
    assert peak_bytes(lambda: materialise(Wide(modules - 1), seed=0, after_module=free)) < module_bytes + TILE_BYTES
    assert len(offered) == len(set(map(id, offered))) == modules


@pytest.mark.parametrize(("offset", "size"), [((0, 512), (4096, 16)), ((100, 0), (16, 4096))], ids=["columns", "rows"])
def test_a_shard_never_builds_the_tensor_that_it_is_cut_from(offset, size):
    """A shard of a 64 MB tensor: peak bytes are the shard's and a tile of work."""
    peak = peak_bytes(lambda: initial_values(Normal(1.0), 0, "w", (4096, 4096), box=Box(offset, size)))
    assert peak < 4 * math.prod(size) + TILE_BYTES
