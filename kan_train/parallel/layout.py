"""The layout of a run, and which layers each pipeline stage holds. Sizes and ranks are kan_train.config.layout's, which validation needs too."""

import math
import operator
from collections.abc import Callable, Sequence
from itertools import accumulate

from kan_train.config.layout import GROUPS, Coordinates, Layout, layout_of

__all__ = ["GROUPS", "Coordinates", "Layout", "given_stages", "layout_of", "split_stages"]

_TIE = 1e-9  # relative: sums of costs in another order differ by rounding


def split_stages(costs: Sequence[float], stages: int) -> list[range]:
    """Layers of each stage, in order: the contiguous split whose most expensive stage costs least, every stage with a layer or more.

    costs[i]: what layer i takes, in any unit; costs[0] may include the embedding and costs[-1] the head. Of equally good splits the one with
    the most even numbers of layers is taken, and of those the one that gives the earlier stages less: they hold more micro-batches.
    ValueError where there are fewer layers than stages.
    """
    if not 1 <= stages <= len(costs):
        raise ValueError(f"{len(costs)} layers cannot make {stages} stages")
    until = [0.0, *accumulate(costs)]

    def cost(start: int, end: int) -> float:
        return until[end] - until[start]

    # Two passes: the least bottleneck of a part is not always in the most even of the splits with the least bottleneck of the whole.
    bottleneck, _ = _best_split(len(costs), stages, cost, max)
    allowed = bottleneck * (1 + _TIE)
    _, found = _best_split(len(costs), stages, lambda start, end: (end - start) ** 2 if cost(start, end) <= allowed else math.inf, operator.add)
    return found


def given_stages(stage_layers: Sequence[int], num_layers: int, stages: int) -> list[range]:
    """Layers of each stage where parallel.stage_layers says how many; ValueError unless they are `stages` positive numbers with sum `num_layers`."""
    if len(stage_layers) != stages or sum(stage_layers) != num_layers or min(stage_layers) < 1:
        raise ValueError(f"{list(stage_layers)} does not split {num_layers} layers in {stages} stages")
    ends = list(accumulate(stage_layers))
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _best_split(
    layers: int, stages: int, cost: Callable[[int, int], float], together: Callable[[float, float], float]
) -> tuple[float, list[range]]:
    """The least value of a split of `layers` in `stages`, its stages' costs put together pairwise; of equal ones that with the shortest first stages."""
    best = [(math.inf, list[range]())] * layers + [(0.0, list[range]())]  # best[i]: of the layers from i on, in as many stages as the loop has counted
    for _ in range(stages):
        best = [
            min(
                ((together(cost(i, end), best[end][0]), [range(i, end), *best[end][1]]) for end in range(i + 1, layers + 1)),
                key=operator.itemgetter(0),
                default=(math.inf, list[range]()),
            )
            for i in range(layers + 1)
        ]
    return best[0]
