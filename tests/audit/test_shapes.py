"""Planted shapes are found with their numbers; what has no shape is said to have none."""

import re

import numpy as np
import pytest

from kan_train.audit import shapes
from kan_train.audit.shapes import summary_of

X = np.linspace(-5.9, 5.9, 96)
INPUTS = np.exp(-((X - 0.3) ** 2) / 2.5)

PLANTED = {
    "line": lambda x: 2 * x + 1,
    "square": lambda x: -1.5 * (x - 0.7) ** 2 + 2,
    "cube": lambda x: 0.4 * (x + 0.2) ** 3,
    "bend": lambda x: 3 * np.abs(x - 0.5),
    "ramp": lambda x: -2 * np.maximum(0, x + 0.4) + 1,
    "exp": lambda x: 0.3 * np.exp(-0.9 * x),
    "silu": lambda x: 1.7 * x / (1 + np.exp(-x)),
    "tanh": lambda x: 2 * np.tanh(2.5 * x - 1),
    "bell": lambda x: np.exp(-((1.2 * x - 0.5) ** 2)) - 0.2,
    "sin": lambda x: 2 * np.sin(1.9 * x + 0.4) + 0.5,
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_shape_is_found_with_its_numbers(name):
    y = PLANTED[name](X)
    found = summary_of(X, y, INPUTS)
    assert found.shape == name
    assert found.r2 > 0.999
    names = {"x": X, "sin": np.sin, "tanh": np.tanh, "exp": np.exp, "abs": np.abs, "max": np.maximum, "silu": lambda x: x / (1 + np.exp(-x))}
    factor, _, rest = re.sub(r"\|(.*)\|", r"abs(\1)", found.formula).partition(" ")
    rest = re.sub(r"(?<=\d) x", " * x", rest.replace("^", "**"))
    weights = INPUTS / INPUTS.sum()
    error = weights @ (eval(f"{factor} * {rest}", names) - y) ** 2 / (weights @ (y - weights @ y) ** 2)
    assert error < 0.005, found.formula


def test_the_simpler_of_two_nearly_equal_shapes_is_named():
    """A sine over a fifth of its period is a straight line as far as anyone can tell."""
    near = np.exp(-(X**2) / 0.02)
    found = summary_of(X, np.sin(X), near)
    assert found.shape == "line"
    assert found.line_r2 == found.r2


def test_what_has_no_shape_is_said_to_have_none():
    found = summary_of(X, np.random.default_rng(0).standard_normal(96), INPUTS)
    assert (found.shape, found.formula) == ("none", "")
    assert found.line_r2 <= found.r2 < 0.95


def made_of(line: float, silu: float, sin: float, monkeypatch):
    """The summary of a function to which these shapes have these R^2, all others 0."""
    found = {("line", 2): line, ("silu", 4): silu, ("sin", 4): sin}
    monkeypatch.setattr(shapes, "_fit", lambda shape, *_: shapes._Fit(shape, found.get((shape.name, shape.numbers), 0.0), 1.0, 0.0))
    return summary_of(X, X, INPUTS)


def test_a_simpler_shape_that_is_not_good_hides_none_that_is(monkeypatch):
    found = made_of(0.9485, 0.9534, 0.2, monkeypatch)
    assert (found.shape, found.r2, found.line_r2) == ("silu", 0.9534, 0.9485)
    assert made_of(0.951, 0.9534, 0.2, monkeypatch).shape == "line"


def test_where_none_is_named_the_best_is_told_and_the_next_of_all(monkeypatch):
    found = made_of(0.93, 0.934, 0.2, monkeypatch)
    assert (found.shape, found.r2, found.next_shape, found.next_r2) == ("none", 0.934, "line", 0.93)


def test_a_constant_is_flat():
    assert summary_of(X, np.full(96, 3.0), INPUTS).shape == "flat"


def test_only_where_inputs_lie_counts():
    y = np.where(X > 0, np.sin(40 * X), 2 * X)
    assert summary_of(X, y, INPUTS * (X < 0)).shape == "line"
