"""Initial weights are a function of (seed, name, global element index), whatever part of them is asked for."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from kan_train.model.init import initial_values, materialise, normals, philox
from kan_train.parallel.params import Constant, Normal, PerIndex, declare, declare_buffer


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


@pytest.mark.parametrize(("start", "count"), [(0, 1), (1, 1), (3, 2), (4, 4), (5, 501), (997, 6), (0, 1003)])
def test_any_piece_equals_the_same_piece_of_the_whole(start: int, count: int):
    """A rank that owns a piece fills it without the rest, bit for bit."""
    whole = normals(7, "layers.3.grove.w_up", 0, 1003)
    assert torch.equal(whole[start : start + count], normals(7, "layers.3.grove.w_up", start, count))


def test_slices_of_the_counter_do_not_show():
    """Integer work is done in slices of a million counters: the seam must not be visible."""
    seam = 4 << 20
    whole = normals(7, "w", seam - 10, 20)
    assert torch.equal(whole[10:], normals(7, "w", seam, 10))


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
