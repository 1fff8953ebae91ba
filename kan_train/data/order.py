"""The global order of sequences, as arithmetic: it needs no memory, no state but a number, and knows nothing of ranks."""

import hashlib
import math
from fractions import Fraction

import numpy as np

_ROUNDS = 6
_FINEST_BLEND = 2**20


class Permutation:
    """A keyed bijection of 0 .. size-1: a Feistel network on the next even power of two, walked until it falls below `size` (Black, Rogaway 2002)."""

    def __init__(self, size: int, *key: object) -> None:
        self.size = size
        self.half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
        self.keys = np.frombuffer(digest, dtype="<u4")[:_ROUNDS].astype(np.uint64)

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Images (int64) of the given numbers below `size`."""
        value = self._feistel(index.astype(np.uint64))
        while (outside := value >= self.size).any():
            value[outside] = self._feistel(value[outside])
        return value.astype(np.int64)

    def _feistel(self, value: np.ndarray) -> np.ndarray:
        mask, shift = np.uint64((1 << self.half_bits) - 1), np.uint64(self.half_bits)
        left, right = value >> shift, value & mask
        for key in self.keys:
            left, right = right, left ^ (_mix(right, key) & mask)
        return (left << shift) | right


def _mix(value: np.ndarray, key: np.uint64) -> np.ndarray:
    """A 64-bit finaliser (the constants of splitmix64) as round function."""
    value = (value + np.uint64(0x9E3779B97F4A7C15)) ^ (key << np.uint64(17))
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class Blend:
    """Samples 0, 1, 2, .. dealt to corpora in exact proportion to their weights: after n samples corpus j has had n w_j, give or take one a corpus."""

    def __init__(self, weights: list[float]) -> None:
        whole = _whole(weights)
        self.shares = [(weight, sum(whole[number:])) for number, weight in enumerate(whole[:-1])]
        """For each corpus but the last: its share of what the corpora before it left, as numerator and denominator."""
        self.corpora = len(whole)

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(corpus, number within the corpus) of each sample, int64."""
        corpus = np.full(len(samples), self.corpora - 1, dtype=np.int64)
        within = samples.astype(np.int64).copy()
        undealt = np.ones(len(samples), dtype=bool)
        for number, (numerator, denominator) in enumerate(self.shares):
            before, after = _scaled(within, numerator, denominator), _scaled(within + 1, numerator, denominator)
            taken = undealt & (after > before)
            corpus[taken] = number
            within = np.where(taken, before, np.where(undealt, within - before, within))
            undealt &= ~taken
        return corpus, within


def _whole(weights: list[float]) -> list[int]:
    """The smallest integers in the weights' proportion; where their sum is beyond 2^20, the nearest with about that sum, none of them 0.

    The bound keeps every product of the interleaving within 64 bits.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    whole = [weight // math.gcd(*whole) for weight in whole]
    return whole if sum(whole) <= _FINEST_BLEND else [max(1, round(weight * _FINEST_BLEND / sum(exact))) for weight in exact]


def _scaled(value: np.ndarray, numerator: int, denominator: int) -> np.ndarray:
    """floor(value * numerator / denominator) without overflow for values up to 2^40 or so."""
    whole, part = np.divmod(value, denominator)
    return whole * numerator + part * numerator // denominator


class SampleOrder:
    """Which sequence of which corpus is sample i of a run: a blend of permutations, a new one for every epoch of a corpus."""

    def __init__(self, sizes: list[int], weights: list[float], *, seed: int, shuffle: bool) -> None:
        self.sizes, self.seed, self.shuffle = sizes, seed, shuffle
        self.blend = Blend(weights)
        self.permutations: dict[tuple[int, int], Permutation] = {}

    def __call__(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(corpus, sequence) of the samples start .. start+count, int64."""
        corpus, within = self.blend(np.arange(start, start + count))
        sequence = np.empty(count, dtype=np.int64)
        for number, size in enumerate(self.sizes):
            mine = np.flatnonzero(corpus == number)
            epoch, index = np.divmod(within[mine], size)
            for turn in np.unique(epoch):
                chosen = epoch == turn
                sequence[mine[chosen]] = self._permutation(number, int(turn))(index[chosen]) if self.shuffle else index[chosen]
        return corpus, sequence

    def _permutation(self, corpus: int, epoch: int) -> Permutation:
        key = (corpus, epoch)
        if key not in self.permutations:
            self.permutations[key] = Permutation(self.sizes[corpus], self.seed, corpus, epoch)
        return self.permutations[key]
