"""Verdicts on claims, decided by conditions on cells: a verdict changes where its evidence does."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kan_train.config.errors import ConfigError, require_choice
from kan_train.planner.paper.formula import Formula
from kan_train.planner.paper.sheet import Cell

VERDICTS = ("supported", "contradicted", "not testable here")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A claim and what became of it."""

    name: str
    """Short name."""
    claim: str
    """The claim, as a template with names of cells in braces."""
    verdict: str
    """One of VERDICTS."""
    condition: str
    """What decided: the first of the claim's conditions that holds."""
    because: str
    """The reason, as a template."""
    evidence: tuple[str, ...]
    """Cells that the verdict rests on."""


def judged(claims: list[dict[str, Any]], cells: Mapping[str, Cell]) -> list[Judged]:
    """The verdict on each claim: that of the first `when` that holds. ConfigError where none does, or a cell is not there."""
    return [_judge(claim, cells) for claim in claims]


def _judge(claim: dict[str, Any], cells: Mapping[str, Cell]) -> Judged:
    ranges = {name: cell.range for name, cell in cells.items()}
    evidence = list(claim["evidence"])
    if unknown := [name for name in evidence if name not in cells]:
        raise ConfigError(f"conf/table/claims.yaml: the evidence of {claim['name']} names {', '.join(unknown)}, which no file there defines")
    for rule in claim["verdicts"]:
        require_choice("verdict", rule["verdict"], VERDICTS)
        condition = Formula(str(rule["when"]))
        if condition.holds(ranges):
            # What decides is evidence, whether the claim lists it or not.
            names = tuple(dict.fromkeys([*(name for name in condition.names if name in cells), *evidence]))
            return Judged(
                name=claim["name"], claim=claim["claim"], verdict=rule["verdict"], condition=condition.text, because=rule["because"], evidence=names
            )
    raise ConfigError(f"conf/table/claims.yaml: no condition of {claim['name']} holds; end its verdicts with `when: True`")
