"""What is still to be spent until the last step, with a 90% interval: from the steps, saves, validations and starts that the run has had.

    rest = (steps left) x (mean seconds of a step) + (saves left) x (mean of one) + validations alike + (steps left) x (restarts a step) x (mean of one)

What it assumes: that the rest is as what was seen, on as many devices. Steps have no trend, and neighbours may resemble each other; interruptions (single
steps of many times the usual length) and restarts come at a constant rate, independently (a compound Poisson process, whose rate is not known better than
by their number so far). What was never seen is not foreseen: the first restart, the first save, another price, a longer sequence.
"""

import itertools
import math
from dataclasses import dataclass

CONFIDENCE = 0.90
"""Share of the runs whose rest is to lie within the interval."""

LEAST_STEPS = 8
"""Steps after the first of a start that are needed for a forecast."""

LEAST_CHUNKS = 4
"""Sums of steps that are needed to tell how they differ: a start before has told of some steps together."""

INTERRUPTION = 5.0
"""Times the usual length that makes of a step an interruption: a rare event, whose frequency counts, not one of the noise."""

CHUNKS = 64
"""Sums that are kept of all steps; where there are more, neighbours are added up."""

BLOCKS = 16
"""Blocks of neighbouring steps whose means tell how far the mean of all is off, however steps resemble their neighbours (the method of batch means)."""

LARGEST_CORRELATION = 0.8
"""Of neighbouring blocks: what is measured beyond it, of so few, is noise."""


@dataclass(frozen=True)
class Interval:
    """A forecast, in seconds of wall-clock."""

    mean: float
    low: float
    high: float


class Seen:
    """Sums over events of one kind."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, seconds: float, *, more: bool = True) -> None:
        """One event; more=False: more seconds of one that was counted."""
        self.count += more
        self.total += seconds
        self.squares += seconds * seconds

    def so_many(self, left: int) -> tuple[float, float]:
        """Mean of the sum over `left` events to come, whose number is known, and its interval's half width, squared; nothing where none was seen."""
        if not self.count or left <= 0:
            return 0.0, 0.0
        mean = self.total / self.count
        # Of one alone nobody knows how they differ: taken to be as much as its own length.
        spread = max(0.0, self.squares / self.count - mean * mean) * self.count / (self.count - 1) if self.count > 1 else mean * mean
        return left * mean, student(max(2, self.count - 1)) ** 2 * left * spread * (1 + left / self.count)

    def at_this_rate(self, ratio: float) -> tuple[float, float]:
        """The same of the sum over `ratio` times as many steps as those in which these came by chance."""
        if not self.count:
            return 0.0, 0.0
        return ratio * self.total, student(max(2, self.count)) ** 2 * ratio * (1 + ratio) * self.squares


class StepTimes:
    """Lengths of steps, in their order, in constant memory."""

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0
        self.interruptions = Seen()
        self._chunks: list[list[float]] = []  # [steps, seconds]; the last may be growing
        self._size = 1
        self._usual = 0.0

    def add(self, seconds: float, steps: int = 1) -> None:
        """`steps` neighbouring steps that took `seconds` together."""
        each = seconds / steps
        # Several together are told apart no more, and one that is much longer is hidden among them.
        if steps == 1 and self.steps >= LEAST_STEPS and each > INTERRUPTION * self._usual:
            self.interruptions.add(each - self._usual)
            seconds = self._usual
        self.steps += steps
        self.seconds += seconds
        if self._chunks and self._chunks[-1][0] < self._size:
            self._chunks[-1][0] += steps
            self._chunks[-1][1] += seconds
        else:
            self._chunks.append([steps, seconds])
        if self._chunks[-1][0] >= self._size:
            self._chunk_is_full()

    @property
    def enough(self) -> bool:
        """Whether there is something to tell from: LEAST_STEPS steps, not told all in one."""
        return self.steps >= LEAST_STEPS and len(self._chunks) >= LEAST_CHUNKS

    def left(self, steps: int) -> tuple[float, float, int]:
        """Mean and variance of the length of `steps` steps to come, without interruptions, and the degrees of freedom of the variance."""
        blocks = self._blocks()
        mean = self.seconds / self.steps
        deviations = [math.sqrt(count) * (seconds / count - mean) for count, seconds in blocks]
        squares = sum(one * one for one in deviations)
        degrees = len(blocks) - 1
        a_step = squares / degrees
        # Blocks that resemble their neighbours are too short to be independent: the variance of long sums is larger than theirs says.
        together = sum(one * other for one, other in itertools.pairwise(deviations))
        correlation = together / squares + 1 / len(blocks) if squares > 0 else 0.0  # a mean taken out lowers it by so much
        correlation = min(max(correlation, 0.0), LARGEST_CORRELATION)
        a_step *= (1 + correlation) / (1 - correlation)
        return steps * mean, a_step * steps * (1 + steps / self.steps), degrees

    def _blocks(self) -> list[tuple[float, float]]:
        count = min(BLOCKS, len(self._chunks))
        blocks = []
        for number in range(count):
            part = self._chunks[number * len(self._chunks) // count : (number + 1) * len(self._chunks) // count]
            blocks.append((sum(chunk[0] for chunk in part), sum(chunk[1] for chunk in part)))
        return blocks

    def _chunk_is_full(self) -> None:
        if len(self._chunks) == CHUNKS:
            pairs = zip(self._chunks[::2], self._chunks[1::2], strict=True)
            self._chunks = [[one[0] + other[0], one[1] + other[1]] for one, other in pairs]
            self._size *= 2
        ordered = sorted(seconds / count for count, seconds in self._chunks)
        self._usual = ordered[len(ordered) // 2]


class Forecast:
    """Counts what a run does, in seconds of its wall-clock, and tells what is left of it."""

    def __init__(self) -> None:
        self.step_times = StepTimes()
        self.saves, self.validations, self.evaluations, self.restarts = Seen(), Seen(), Seen(), Seen()
        self.retained = 0
        """Steps in which the restarts came."""
        self.between = 0.0
        """Seconds a step that no event names."""

    def rest(self, steps: int, saves: int, validations: int, evaluations: int = 0) -> Interval | None:
        """What `steps` steps, with `saves`, `validations` and `evaluations` among them, will take; None where too few were seen."""
        if not self.step_times.enough:
            return None
        mean, variance, degrees = self.step_times.left(steps)
        parts = [
            self.step_times.interruptions.at_this_rate(steps / self.step_times.steps),
            self.saves.so_many(saves),
            self.validations.so_many(validations),
            self.evaluations.so_many(evaluations),
            self.restarts.at_this_rate(steps / max(1, self.retained)),
        ]
        mean += sum(part[0] for part in parts) + steps * self.between
        width = math.sqrt(student(degrees) ** 2 * variance + sum(part[1] for part in parts))
        return Interval(mean, max(0.0, mean - width), mean + width)


def events_left(every: int, done: int, steps: int) -> int:
    """How many of what comes after every `every` steps (0: never), and after the last of `steps`, are still to come once those of step `done` are done."""
    if done >= steps:
        return 0
    return ((steps - 1) // every - done // every if every else 0) + 1


def student(degrees: int) -> float:
    """Quantile of Student's t that leaves CONFIDENCE in the middle (the expansion of Abramowitz and Stegun 26.7.5)."""
    z = 1.6449  # of the normal distribution
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3
