"""The table as a whole: conf/table read, every cell evaluated, every claim judged, and the files that come of it."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from kan_train.config.errors import ConfigError
from kan_train.planner.paper.claims import Judged, judged
from kan_train.planner.paper.facts import RESULTS, lookups
from kan_train.planner.paper.figure import draw
from kan_train.planner.paper.page import blocks, filled
from kan_train.planner.paper.render import as_json, markdown, page_html
from kan_train.planner.paper.sheet import Cell, Sheet

CELL_FILES = ("paper", "models", "sets", "sparsity", "ours", "inference", "runs")
"""Files of conf/table that define cells, in the order of the page."""
NAME = "cost-table"
"""Stem of the files that are written."""


@dataclass(frozen=True)
class Table:
    """Evaluated cells, verdicts, and the page they go into."""

    sheet: Sheet
    cells: dict[str, Cell]
    claims: list[Judged]
    page: dict[str, Any]


def build_table(*, results: Path = RESULTS, changes: Mapping[str, float] | None = None) -> Table:
    """The table of conf/table.

    results: folder of benchmark results; what is not there reads "not measured". changes: other values for cited or assumed numbers, by cell.
    """
    tree = copy.deepcopy(_files())
    definitions: dict[str, dict[str, Any]] = {}
    for file in CELL_FILES:
        for name, definition in tree[file].items():
            if name in definitions:
                raise ConfigError(f"conf/table/{file}.yaml: cell {name} is defined twice")
            definitions[name] = definition
    for name, value in (changes or {}).items():
        if "value" not in definitions.get(name, {}):
            raise ConfigError(f"{name} is no cited or assumed number of conf/table; those are {', '.join(_numbers(definitions))}")
        definitions[name]["value"] = value
    sheet = Sheet(definitions, lookups(tree["shapes"], results))
    cells = sheet.evaluated()
    return Table(sheet, cells, judged(tree["claims"], cells), tree["page"])


def cells_of(names: Iterable[str]) -> dict[str, Cell]:
    """The named cells of conf/table that rest on no benchmark result, evaluated alone: for those who need a published number and not the page."""
    tree = _files()
    definitions = {name: definition for file in CELL_FILES for name, definition in tree[file].items()}
    sheet, wanted = Sheet(definitions, lookups(tree["shapes"], RESULTS)), set(names)
    while more := {other for name in wanted if name in sheet.formulas for other in sheet.formulas[name].names} - wanted:
        wanted |= more
    return Sheet({name: definition for name, definition in definitions.items() if name in wanted}, sheet.lookups).evaluated()


def published_rows() -> tuple[dict[str, Any], dict[str, Any]]:
    """conf/table/published.yaml and shapes.yaml: published runs with their layouts, and shapes that they name."""
    return copy.deepcopy(_files()["published"]), copy.deepcopy(_files()["shapes"])


def table_files(table: Table) -> dict[str, str]:
    """Name -> text of the files of a table: Markdown, JSON, the figure, and all in one HTML file."""
    title, made = filled(table.page["title"], table.cells), blocks(table.page, table.cells, table.claims)
    picture = draw(table.page["panels"], table.cells)
    return {
        f"{NAME}.md": markdown(title, made, f"{NAME}.svg"),
        f"{NAME}.json": as_json(table.cells, table.claims),
        f"{NAME}.svg": picture,
        f"{NAME}.html": page_html(title, made, picture),
    }


def _numbers(definitions: Mapping[str, dict[str, Any]]) -> list[str]:
    return [name for name, definition in definitions.items() if "value" in definition]


@cache
def _files() -> dict[str, Any]:
    folder = resources.files("kan_train.conf").joinpath("table")
    found = {}
    for file in (*CELL_FILES, "shapes", "claims", "page", "published"):
        try:
            found[file] = yaml.safe_load(folder.joinpath(f"{file}.yaml").read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ConfigError(f"conf/table/{file}.yaml is not YAML: {error}") from error
    return found
