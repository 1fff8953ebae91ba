"""Arithmetic over the names of cells: the text that a reader sees is the text that is computed.

    paper.dense_cost / paper.kan_cost            + - * / **, numbers, names of cells, sqrt, ceil, min, max
    low(a.ratio) > high(b.ratio) and known(c)    in conditions also comparisons, and, or, not, the ends of a cell's interval, and whether it has a value
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kan_train.config.errors import ConfigError

_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: operator.pow,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., float]] = {"sqrt": math.sqrt, "ceil": math.ceil, "min": min, "max": max}
_COMPARISONS: dict[type, Callable[[float, float], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_ENDS = ("low", "high", "known")


@dataclass(frozen=True)
class Range:
    """A value and the ends of its interval; all three are the same for a number without one. None where there is no value."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Formula:
    """A parsed formula; ConfigError where the text is none."""

    text: str
    tree: ast.expr = field(init=False, repr=False, compare=False)
    names: tuple[str, ...] = field(init=False)
    """Cells that the formula reads, sorted."""

    def __post_init__(self) -> None:
        try:
            tree = ast.parse(self.text.strip(), mode="eval").body
        except SyntaxError as error:
            raise ConfigError(f"{self.text!r} is not a formula: {error.msg}") from error
        object.__setattr__(self, "tree", tree)
        object.__setattr__(self, "names", tuple(sorted(_names(tree, self.text))))

    def value(self, values: Mapping[str, float]) -> float:
        """The formula's value for the cells' `values`."""
        return float(_number(self.tree, values, self.text))

    def holds(self, ranges: Mapping[str, Range]) -> bool:
        """Whether the condition holds. A comparison with a cell that has no value does not."""
        return _truth(self.tree, ranges, self.text)


def _names(node: ast.expr, text: str) -> set[str]:
    """Names of cells, which have dots: a.b.c is one name, not an attribute of an attribute."""
    if isinstance(node, ast.Name | ast.Attribute):
        return {_dotted(node, text)}
    children = node.args if isinstance(node, ast.Call) else [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    return set().union(*(_names(child, text) for child in children)) if children else set()


def _dotted(node: ast.expr, text: str) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, text)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise _refused(text)


def _number(node: ast.expr, values: Mapping[str, float], text: str) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.Name() | ast.Attribute():
            return values[_dotted(node, text)]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand, values, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_number(left, values, text), _number(right, values, text))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_number(arg, values, text) for arg in args))
    raise _refused(text)


def _truth(node: ast.expr, ranges: Mapping[str, Range], text: str) -> bool:
    match node:
        case ast.BoolOp(op=op, values=parts):
            answers = (_truth(part, ranges, text) for part in parts)
            return all(answers) if isinstance(op, ast.And) else any(answers)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _truth(operand, ranges, text)
        case ast.Compare(left=left, ops=ops, comparators=rights) if all(type(op) in _COMPARISONS for op in ops):
            sides = [_end(side, ranges, text) for side in (left, *rights)]
            pairs = zip(ops, sides, sides[1:], strict=False)
            return all(a is not None and b is not None and _COMPARISONS[type(op)](a, b) for op, a, b in pairs)
        case ast.Call(func=ast.Name(id="known"), args=[cell]):
            return ranges[_dotted(cell, text)].value is not None
        case ast.Constant(value=bool() as answer):
            return answer
    raise _refused(text)


def _end(node: ast.expr, ranges: Mapping[str, Range], text: str) -> float | None:
    match node:
        case ast.Call(func=ast.Name(id="low" | "high" as end), args=[cell]):
            found: Any = getattr(ranges[_dotted(cell, text)], end)
            return found
        case ast.Name() | ast.Attribute():
            return ranges[_dotted(node, text)].value
    return _number(node, {}, text)


def _refused(text: str) -> ConfigError:
    allowed = ", ".join([*_FUNCTIONS, *_ENDS])
    return ConfigError(f"{text!r} is not a formula of this table; it may hold numbers, names of cells, + - * / **, comparisons, and {allowed}")
