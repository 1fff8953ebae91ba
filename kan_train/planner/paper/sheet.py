"""Cells and their evaluation. A cell is defined in one of these ways, which is also its status:

    value, source        cited: a number that somebody published          value, because    assumed: a number that a calculation supposes
    price                an entry of conf/prices; assumed if it is of that kind, else cited
    peak                 a device's peak from accounting/peaks.py; cited
    model                a figure of a configuration (FLOPs, parameters); derived by the project's own code
    plan                 a figure of the planner for one layout; derived, its interval from those of all that the planner assumes
    result               a figure of a file in benchmarks/results; measured
    formula              derived from other cells
    extrapolated         derived: a measured cell times a scale factor; without an interval of the measured one there is no number

Intervals: `within` of a cited number is what rounding hides (half of its last digit); a measured one has its quartiles. The interval of a derived cell spans
the values of its formula at all ends of its inputs' intervals, as if they moved independently: never too narrow where the formula rises or falls in each input.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kan_train.config.errors import ConfigError
from kan_train.planner.paper.formula import Formula, Range

KINDS = ("value", "price", "peak", "model", "plan", "result", "formula", "extrapolated")
FIELDS = {*KINDS, "unit", "source", "because", "within", "note"}
NOT_MEASURED = "not measured"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number, and all that is needed to argue with it."""

    name: str
    """Its name in formulas, dotted."""
    unit: str
    """See units.py."""
    status: str
    """cited, assumed, derived or measured."""
    value: float | None
    """None: not measured, or derived from what was not."""
    low: float | None = None
    """Lower end of its interval; None where there is none."""
    high: float | None = None
    """Upper end of its interval; None where there is none."""
    formula: str | None = None
    """How it was computed, of a derived cell; where it stands in its file, of a measured one."""
    inputs: tuple[str, ...] = ()
    """Cells that the formula reads, or the files and settings it comes from."""
    source: str | None = None
    """Who says so, of a cited or measured cell; why, of an assumed one."""
    prices: tuple[str, ...] = ()
    """Price cells that the value depends on."""
    extrapolations: tuple[str, ...] = ()
    """Extrapolated cells that the value depends on, itself included."""
    missing: tuple[str, ...] = ()
    """Measured cells without a value that keep this one from having one."""
    note: str | None = None
    """What a reader should know besides."""

    @property
    def range(self) -> Range:
        """The value with the ends of its interval, both the value itself where there is none."""
        return Range(self.value, self.value if self.low is None else self.low, self.value if self.high is None else self.high)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a price, a peak, a model, a plan or a result turned out to be."""

    status: str
    value: float | None
    source: str
    low: float | None = None
    high: float | None = None
    formula: str | None = None
    inputs: tuple[str, ...] = ()


Lookups = Mapping[str, Callable[[Any], Found]]
"""How the kinds price, peak, model, plan and result are looked up."""


@dataclass(frozen=True)
class Sheet:
    """Definitions of cells by name, and the lookups that they may use."""

    definitions: Mapping[str, dict[str, Any]]
    lookups: Lookups
    formulas: dict[str, Formula] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name, definition in self.definitions.items():
            _check(name, definition)
            text = formula_text(definition)
            if text is not None:
                self.formulas[name] = formula = Formula(text)
                for other in formula.names:
                    if other not in self.definitions:
                        raise ConfigError(f"conf/table: cell {name} reads {other}, which no file there defines")

    def evaluated(self) -> dict[str, Cell]:
        """Every cell, in the order of the definitions; ConfigError where cells depend on themselves."""
        done: dict[str, Cell] = {}
        for name in self.definitions:
            self._evaluate(name, done, ())
        return {name: done[name] for name in self.definitions}

    def dependents(self, name: str) -> set[str]:
        """The cell itself and every one that depends on it, directly or not."""
        reached = {name}
        while new := {cell for cell, formula in self.formulas.items() if reached & set(formula.names)} - reached:
            reached |= new
        return reached

    def _evaluate(self, name: str, done: dict[str, Cell], path: tuple[str, ...]) -> Cell:
        if name in path:
            raise ConfigError(f"conf/table: cells depend on themselves: {' <- '.join((*path[path.index(name) :], name))}")
        if name not in done:
            definition = self.definitions[name]
            if name in self.formulas:
                inputs = [self._evaluate(other, done, (*path, name)) for other in self.formulas[name].names]
                done[name] = _derived(name, definition, self.formulas[name], inputs)
            else:
                done[name] = _given(name, definition, self.lookups)
        return done[name]


def kind_of(definition: Mapping[str, Any]) -> str:
    """Which of KINDS defines a cell."""
    return next(kind for kind in KINDS if kind in definition)


def formula_text(definition: Mapping[str, Any]) -> str | None:
    """The formula of a derived or extrapolated cell."""
    if "extrapolated" in definition:
        return f"{definition['extrapolated']['measured']} * {definition['extrapolated']['factor']}"
    return str(definition["formula"]) if "formula" in definition else None


def _check(name: str, definition: Any) -> None:
    where = f"conf/table: cell {name}"
    if not isinstance(definition, dict) or sum(kind in definition for kind in KINDS) != 1 or "unit" not in definition:
        raise ConfigError(f"{where} must have a unit and exactly one of {', '.join(KINDS)}")
    if unknown := set(definition) - FIELDS:
        raise ConfigError(f"{where} has {', '.join(sorted(unknown))}, which is not known; there is {', '.join(sorted(FIELDS))}")
    if "value" in definition:
        if ("source" in definition) == ("because" in definition):
            raise ConfigError(f"{where} is a number: give its `source` if it is cited, or `because` if it is assumed")
        if isinstance(definition["value"], bool) or not isinstance(definition["value"], int | float):
            raise ConfigError(f"{where}: value={definition['value']!r} must be a number; YAML reads 2.1e6 as text, write 2_100_000")
    elif "source" in definition or "because" in definition or "within" in definition:
        raise ConfigError(f"{where} is not a cited or assumed number: its source comes from what defines it; use `note` for remarks")


def _given(name: str, definition: dict[str, Any], lookups: Lookups) -> Cell:
    kind = kind_of(definition)
    if kind == "value":
        value, within = float(definition["value"]), definition.get("within")
        found = Found(
            status="cited" if "source" in definition else "assumed",
            value=value,
            source=definition.get("source") or definition["because"],
            low=None if within is None else value - within,
            high=None if within is None else value + within,
        )
    else:
        found = lookups[kind](definition[kind])
    missing = (name,) if found.value is None else ()
    return Cell(
        name=name, unit=definition["unit"], status=found.status, value=found.value, low=found.low, high=found.high, formula=found.formula,
        inputs=found.inputs, source=found.source, prices=(name,) if kind == "price" else (), missing=missing, note=definition.get("note"),
    )  # fmt: skip


def _derived(name: str, definition: dict[str, Any], formula: Formula, inputs: list[Cell]) -> Cell:
    missing = _merged(cell.missing for cell in inputs)
    extrapolations = _merged(cell.extrapolations for cell in inputs)
    note = definition.get("note")
    value = low = high = None
    if not missing:
        value = formula.value({cell.name: cell.value for cell in inputs if cell.value is not None})
        low, high = _interval(formula, inputs)
    if "extrapolated" in definition:
        extrapolations = tuple(sorted({*extrapolations, name}))
        if value is not None and low is None:
            # An extrapolation that cannot say how far it may be off is not given at all.
            value, missing, note = None, (name,), "left out: what was measured has no interval"
    return Cell(
        name=name, unit=definition["unit"], status="derived", value=value, low=low, high=high, formula=formula.text.strip(), inputs=formula.names,
        prices=_merged(cell.prices for cell in inputs), extrapolations=extrapolations, missing=missing, note=note,
    )  # fmt: skip


def _interval(formula: Formula, inputs: list[Cell]) -> tuple[float | None, float | None]:
    ends = {cell.name: (cell.value,) if cell.low is None else (cell.low, cell.high) for cell in inputs}
    if all(len(end) == 1 for end in ends.values()):
        return None, None
    values = [formula.value(dict(zip(ends, corner, strict=True))) for corner in itertools.product(*ends.values())]  # type: ignore[arg-type]
    return min(values), max(values)


def _merged(groups: Any) -> tuple[str, ...]:
    return tuple(sorted(set().union(*groups)))
