"""The page: blocks of text, tables and a figure, with the cells' values in their places."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kan_train.config.errors import ConfigError
from kan_train.planner.paper.claims import Judged
from kan_train.planner.paper.sheet import Cell
from kan_train.planner.paper.units import with_interval, written

_PLACE = re.compile(r"\{([a-z0-9_.]+)(~?)\}")


@dataclass(frozen=True)
class Heading:
    """Of a section."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Rows:
    """A table: names of columns, and rows of as many texts."""

    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Figure:
    """The picture's place, and what it shows."""

    caption: str


Block = Heading | Text | Rows | Figure


def filled(template: str, cells: Mapping[str, Cell]) -> str:
    """`template` with {name} replaced by the value of that cell, {name~} by the value with its interval. ConfigError for a cell that is not there."""

    def place(found: re.Match[str]) -> str:
        name, interval = found.groups()
        if name not in cells:
            raise ConfigError(f"conf/table: {template!r} names the cell {name}, which no file there defines")
        cell = cells[name]
        return with_interval(cell) if interval else written(cell.value, cell.unit)

    return _PLACE.sub(place, template)


def blocks(page: dict[str, Any], cells: Mapping[str, Cell], claims: list[Judged]) -> list[Block]:
    """The page of conf/table/page.yaml."""
    made: list[Block] = []
    for section in page["sections"]:
        if "title" in section:
            made.append(Heading(filled(section["title"], cells)))
        for block in section["blocks"]:
            made += _block(block, cells, claims)
    return made


def _block(block: dict[str, Any], cells: Mapping[str, Cell], claims: list[Judged]) -> list[Block]:
    match block:
        case {"text": text}:
            return [Text(filled(text.strip(), cells))]
        case {"table": table}:
            return [Rows(table["columns"], [[filled(str(item), cells) for item in row] for row in table["rows"]])]
        case {"figure": caption}:
            return [Figure(filled(caption, cells))]
        case {"show": "claims"}:
            return [_claims(claims, cells)]
        case {"show": "extrapolations"}:
            return [_extrapolations(cells)]
        case {"show": "cells"}:
            return _every_cell(cells)
    raise ConfigError(f"conf/table/page.yaml: {block!r} is no block; there is text, table, figure, and show: claims, extrapolations or cells")


def _claims(claims: list[Judged], cells: Mapping[str, Cell]) -> Rows:
    rows = []
    for claim in claims:
        evidence = ", ".join(f"`{name}` {with_interval(cells[name])}" for name in claim.evidence)
        rows.append([filled(claim.claim, cells), f"**{claim.verdict}**", filled(claim.because, cells), evidence])
    return Rows(["claim", "verdict", "why", "evidence"], rows)


def _extrapolations(cells: Mapping[str, Cell]) -> Rows:
    rows = []
    for cell in cells.values():
        if cell.extrapolations:
            factors = [cells[name] for extrapolated in cell.extrapolations for name in cells[extrapolated].inputs]
            measured = [factor for factor in factors if "measured" in _statuses(factor, cells)]
            scales = [factor for factor in factors if factor not in measured]
            sources = sorted({source for factor in measured for source in _measured_sources(factor, cells)})
            rows.append([
                f"`{cell.name}`", with_interval(cell), "; ".join(f"`{one.name}` {with_interval(one)}" for one in measured),
                "; ".join(f"`{one.name}` {written(one.value, one.unit)}" for one in scales), "; ".join(sources),
            ])  # fmt: skip
    return Rows(["extrapolated cell", "value (interval)", "measured", "scale factor", "measured source"], rows)


def _every_cell(cells: Mapping[str, Cell]) -> list[Block]:
    groups: dict[str, list[list[str]]] = {}
    for cell in cells.values():
        where = f"`{cell.formula}`" if cell.formula else ""
        notes = "; ".join(text for text in (cell.source, cell.note) if text)
        prices = ", ".join(f"`{name}`" for name in cell.prices if name != cell.name)
        row = [f"`{cell.name}`", with_interval(cell), cell.unit, cell.status, where, notes, prices]
        groups.setdefault(cell.name.partition(".")[0], []).append(row)
    columns = ["cell", "value (interval)", "unit", "status", "formula", "source or remark", "price entry"]
    return [block for name, rows in groups.items() for block in (Text(f"**{name}**"), Rows(columns, rows))]


def _statuses(cell: Cell, cells: Mapping[str, Cell]) -> set[str]:
    """Statuses of the cell and of everything it depends on."""
    return {cell.status}.union(*(_statuses(cells[name], cells) for name in cell.inputs if name in cells))


def _measured_sources(cell: Cell, cells: Mapping[str, Cell]) -> set[str]:
    own = {cell.source} if cell.status == "measured" and cell.source else set()
    return own.union(*(_measured_sources(cells[name], cells) for name in cell.inputs if name in cells))
