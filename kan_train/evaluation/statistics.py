"""How sure a measured figure is: intervals for a share and for a ratio of sums, and whether two runs differ on the same questions."""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054
"""Two-sided 95% point of the normal distribution."""


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95% interval of a probability after `successes` of `trials` (E. B. Wilson, 1927); (0, 1) after none."""
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, Z * Z
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_ratio(above: Sequence[float], below: Sequence[float], *, seed: int, draws: int = 2000) -> tuple[float, float]:
    """95% percentile interval of sum(above) / sum(below) over units (documents) drawn again with replacement (Efron, 1979).

    Units whose `below` is 0 alone can be drawn: such draws are left out. (nan, nan) for fewer than two units, which say nothing about each other.
    """
    if len(above) < 2:
        return math.nan, math.nan
    numerator, denominator = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    generator = np.random.default_rng(seed)
    ratios = []
    for _ in range(draws):
        drawn = generator.integers(0, len(numerator), len(numerator))
        if (total := denominator[drawn].sum()) > 0:
            ratios.append(numerator[drawn].sum() / total)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p value of McNemar's test (1947): of the questions that one of two runs alone answers, each is as likely the one's as the other's."""
    trials, fewer = only_first + only_second, min(only_first, only_second)
    if trials == 0:
        return 1.0
    # In logarithms: 2^-trials would underflow after a thousand questions.
    logs = [math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) - trials * math.log(2) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))
