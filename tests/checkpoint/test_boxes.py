"""A flat range of a tensor, cut into boxes: the same elements, each once, in the same order. The reference is numpy's own indexing."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kan_train.checkpoint.boxes import Box, Fragment, coverage_problem, flat_range_boxes, fragment_boxes

shapes = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


@st.composite
def ranges(draw):
    shape = draw(shapes)
    start, stop = sorted(draw(st.tuples(*[st.integers(0, math.prod(shape))] * 2)))
    return shape, start, stop


def indices(shape: tuple[int, ...], box: Box) -> np.ndarray:
    """Flat indices of the elements of a box, in the box's row-major order."""
    every = np.arange(math.prod(shape)).reshape(shape)
    return every[tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))].ravel()


@given(ranges())
@settings(max_examples=400, deadline=None)
def test_boxes_of_a_flat_range_hold_its_elements_in_order(case):
    """The boxes, read one after the other, are exactly the range; and there are few of them."""
    shape, start, stop = case
    boxes = flat_range_boxes(shape, start, stop)
    found = np.concatenate([np.empty(0, int), *(indices(shape, box) for box in boxes)])
    assert np.array_equal(found, np.arange(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(shapes, st.lists(st.integers(0, 6**4), max_size=5), st.data())
@settings(max_examples=200, deadline=None)
def test_the_ranks_fragments_tile_a_tensor_exactly(shape, cuts, data):
    """However a shard is cut among ranks, every element lies in one box; a box less or a box twice is refused."""
    total = math.prod(shape)
    edges = sorted({0, total, *(min(c, total) for c in cuts)})
    boxes = [box for a, b in pairwise(edges) for box in flat_range_boxes(shape, a, b)]
    counts = np.zeros(total, int)
    for box in boxes:
        counts[indices(shape, box)] += 1
    assert (counts == 1).all()
    assert coverage_problem(shape, boxes) is None
    victim = data.draw(st.integers(0, len(boxes) - 1))
    assert "elements are covered" in coverage_problem(shape, boxes[:victim] + boxes[victim + 1 :])
    assert "overlap" in coverage_problem(shape, [*boxes, boxes[victim]])


@given(st.lists(st.tuples(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.tuples(st.integers(1, 3), st.integers(1, 3))), max_size=6))
@settings(max_examples=300, deadline=None)
def test_coverage_is_judged_as_by_counting(rectangles):
    """Any set of rectangles: accepted if and only if every element is counted once and none lies outside."""
    shape, counts, inside = (4, 4), np.zeros((8, 8), int), True
    boxes = [Box(offset, size) for offset, size in rectangles]
    for (o0, o1), (n0, n1) in rectangles:
        counts[o0 : o0 + n0, o1 : o1 + n1] += 1
        inside &= o0 + n0 <= 4 and o1 + n1 <= 4
    assert (coverage_problem(shape, boxes) is None) == (inside and bool((counts[:4, :4] == 1).all()))


def test_boxes_of_a_shard_lie_at_its_place_in_the_global_tensor():
    """A column shard cut flat: the views hold what the global tensor has at the boxes."""
    whole = torch.arange(60).view(3, 20)
    shard = whole[:, 8:13].contiguous()
    fragment = Fragment(name="w", global_shape=(3, 20), local_offset=(0, 8), local_shape=(3, 5), start=3, flat=shard.view(-1)[3:14])
    pieces = fragment_boxes(fragment)
    assert sum(box.numel for box, _ in pieces) == 11
    for box, view in pieces:
        assert torch.equal(view, whole[tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"local_offset": (0,)}, "differ in dimensions"),
        ({"local_offset": (2, 0)}, "outside the global shape"),
        ({"start": 5}, "elements [5, 9) lie outside the shard"),
        ({"start": -1}, "lie outside the shard"),
        ({"flat": torch.zeros(2, 2)}, "1-D view"),
        ({"flat": torch.zeros(8)[::2]}, "contiguous 1-D view"),
    ],
)
def test_a_fragment_that_does_not_fit_is_refused_by_name(change, words):
    fits = {"name": "w", "global_shape": (3, 4), "local_offset": (0, 0), "local_shape": (2, 4), "start": 0, "flat": torch.zeros(4)}
    assert fragment_boxes(Fragment(**fits))
    with pytest.raises(ValueError, match=r"^w: ") as error:
        fragment_boxes(Fragment(**{**fits, **change}))
    assert words in str(error.value)
