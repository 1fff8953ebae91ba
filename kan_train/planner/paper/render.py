"""The page as Markdown and as one HTML file, and the cells as JSON. The same cells always give the same bytes."""

import html
import json
import re
from collections.abc import Mapping

from kan_train.planner.paper.claims import Judged
from kan_train.planner.paper.page import Block, Figure, Heading, Rows, Text, filled
from kan_train.planner.paper.sheet import NOT_MEASURED, Cell

MADE_BY = "Made by `kan cost table --write docs` from conf/table; a change by hand would be overwritten, and a test compares."
FIGURES = 10
"""Significant figures of a number in JSON: what the last bits of a float are may depend on the machine's mathematical library."""

_STYLE = """\
:root { color-scheme: light dark; --line: #c8c8c8; --head: #f1f1f1; }
@media (prefers-color-scheme: dark) { :root { --line: #484848; --head: #262626; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 0 auto; padding: 16px; }
.wide { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-size: 13px; }
th, td { border: 1px solid var(--line); padding: 4px 8px; text-align: left; vertical-align: top; }
th { background: var(--head); }
code { font-size: 12px; }
figure { margin: 12px 0; overflow-x: auto; }
figure svg { background: #ffffff; max-width: 100%; height: auto; min-width: 640px; }
"""


def markdown(title: str, blocks: list[Block], picture: str) -> str:
    """The page as Markdown; picture: the figure's file, relative to the page."""
    parts = [f"# {title}", f"<!-- {MADE_BY} -->"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"## {text}")
            case Text(text):
                parts.append(text)
            case Figure(caption):
                parts.append(f"![{caption}]({picture})")
            case Rows(columns, rows):
                lines = [columns, ["---"] * len(columns), *([item.replace("|", "\\|") for item in row] for row in rows)]
                parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def page_html(title: str, blocks: list[Block], picture: str) -> str:
    """The page as one HTML file that needs nothing else; picture: the figure as SVG."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"<h2>{_inline(text)}</h2>")
            case Text(text):
                parts.append(f"<p>{_inline(text)}</p>")
            case Figure(caption):
                parts.append(f"<figure>{picture}<figcaption>{_inline(caption)}</figcaption></figure>")
            case Rows(columns, rows):
                head = "".join(f"<th>{_inline(column)}</th>" for column in columns)
                body = "\n".join("<tr>" + "".join(f"<td>{_inline(item)}</td>" for item in row) + "</tr>" for row in rows)
                parts.append(f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>')
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>\n{_STYLE}</style></head>\n<body><h1>{_inline(title)}</h1>\n{body}\n</body></html>\n'


def as_json(cells: Mapping[str, Cell], claims: list[Judged]) -> str:
    """Cells and verdicts for programs."""
    tree = {
        "made_by": "kan cost table --write docs",
        "claims": [
            {
                "name": claim.name, "claim": filled(claim.claim, cells), "verdict": claim.verdict, "condition": claim.condition,
                "because": filled(claim.because, cells), "evidence": list(claim.evidence),
            }
            for claim in claims
        ],
        "cells": {name: cell_as_row(cell, cells) for name, cell in cells.items()},
    }  # fmt: skip
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def cell_as_row(cell: Cell, cells: Mapping[str, Cell]) -> dict[str, object]:
    """A cell as JSON holds it: value, unit, status, formula, inputs, price entries, source; interval, extrapolation and what is missing where there are."""
    row: dict[str, object] = {
        "value": NOT_MEASURED if cell.value is None else _rounded(cell.value),
        "unit": cell.unit,
        "status": cell.status,
        "formula": cell.formula,
        "inputs": list(cell.inputs),
        "price": [cells[name].source for name in cell.prices],
        "source": cell.source,
    }
    if cell.low is not None and cell.high is not None:
        row["interval"] = [_rounded(cell.low), _rounded(cell.high)]
    if cell.extrapolations:
        row["extrapolated_from"] = list(cell.extrapolations)
    if cell.missing:
        row["missing"] = list(cell.missing)
    if cell.note:
        row["note"] = cell.note
    return row


def _rounded(number: float) -> float:
    return float(f"{number:.{FIGURES}g}")


def _inline(text: str) -> str:
    """The few marks that the page uses: `code`, **bold**, [text](address)."""
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', text)
