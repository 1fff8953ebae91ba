"""Numbers as people read them, by unit."""

from collections.abc import Callable

from kan_train.config.errors import require_choice
from kan_train.planner.paper.sheet import NOT_MEASURED, Cell

_SI = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SHORT = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def _digits(number: float, count: int = 3) -> str:
    """`count` significant digits and never an exponent, thousands separated, zeros at the end kept: 0.316, 2.10, 1,760."""
    if number == 0:
        return "0"
    rounded = float(f"{number:.{count - 1}e}")
    magnitude = int(f"{abs(rounded):e}".partition("e")[2])
    return f"{rounded:,.{max(0, count - 1 - magnitude)}f}"


def _scaled(number: float, steps: tuple[tuple[float, str], ...], gap: str = "") -> str:
    for size, letter in steps:
        if abs(number) >= size * 0.9995:
            return f"{_digits(number / size)}{gap}{letter}"
    return f"{_digits(number)}{gap}"


def _dollars(number: float) -> str:
    return f"${_scaled(number, _SHORT)}"


UNITS: dict[str, Callable[[float], str]] = {
    "USD": _dollars,
    "USD/h": lambda number: f"${number:.2f}/h",
    "USD/Mtok": lambda number: f"${_digits(number)}/Mtok",
    "tokens": lambda number: _scaled(number, _SHORT),
    "parameters": lambda number: _scaled(number, _SHORT),
    "tokens/s": lambda number: f"{_digits(number, 4 if number >= 1000 else 3)} tok/s",
    "FLOP/token": lambda number: f"{_scaled(number, _SI, ' ')}FLOP",
    "FLOP/s": lambda number: f"{_scaled(number, _SI, ' ')}FLOP/s",
    "bytes": lambda number: f"{_scaled(number, _SI, ' ')}B",
    "bytes/s": lambda number: f"{_scaled(number, _SI, ' ')}B/s",
    "h": lambda number: f"{_scaled(number, _SHORT)} h",
    "s": lambda number: f"{_digits(number)} s",
    "ms": lambda number: f"{_digits(number)} ms",
    "days": lambda number: f"{number:g} days",
    "x": lambda number: f"{_digits(number)}x",
    "share": lambda number: f"{_digits(100 * number)}%",
    "count": lambda number: f"{number:,.0f}",
    "number": lambda number: _digits(number),
}
"""Unit -> how a number of it is written. USD/Mtok: dollars a million tokens; x: a ratio; share: 1 is 100%; tokens/s: of one device."""


def written(number: float | None, unit: str) -> str:
    """A number with its unit, or "not measured"."""
    require_choice("unit", unit, tuple(UNITS))
    return NOT_MEASURED if number is None else UNITS[unit](number)


def with_interval(cell: Cell) -> str:
    """The value, and its interval where it has one."""
    text = written(cell.value, cell.unit)
    if cell.value is None or cell.low is None:
        return text
    low, high = written(cell.low, cell.unit), written(cell.high, cell.unit)
    return text if low == text == high else f"{text} ({low} to {high})"
