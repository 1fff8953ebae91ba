"""The figure: panels of horizontal bars, written as SVG by hand so that the same cells always give the same bytes."""

from collections.abc import Mapping
from html import escape
from typing import Any

from kan_train.planner.paper.page import filled
from kan_train.planner.paper.sheet import NOT_MEASURED, Cell
from kan_train.planner.paper.units import with_interval

WIDTH, LABELS, RIGHT = 900, 330, 220
"""Pixels: the picture, the labels on the left, and the values to the right of the longest bar."""
ROW, BAR, GAP, HEAD = 26, 16, 22, 30
COLORS = {"cited": "#8c8c8c", "assumed": "#d9a441", "derived": "#4878a8", "measured": "#4f9d69", "extrapolated": "#c44e52"}
"""By status; extrapolated numbers are derived ones that look like no other."""
_INK = "#222222"


def draw(panels: list[dict[str, Any]], cells: Mapping[str, Cell]) -> str:
    """The SVG of the panels of conf/table/page.yaml: {title, bars: [[label, cell], ...]}, each on a scale of its own that begins at 0."""
    parts, top = [], 12
    for panel in panels:
        parts.append(_text(12, top + 14, filled(panel["title"], cells), "start", weight="600"))
        top += HEAD
        bars = [(filled(label, cells), cells[name]) for label, name in panel["bars"]]
        longest = max([cell.range.high or 0.0 for _, cell in bars], default=0.0)
        for label, cell in bars:
            parts += _bar(label, cell, top, (WIDTH - LABELS - RIGHT) / longest if longest else 0.0)
            top += ROW
        top += GAP
    parts += _legend(top)
    height = top + 26
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="13">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>', *parts, "</svg>"]) + "\n"


def _bar(label: str, cell: Cell, top: int, scale: float) -> list[str]:
    parts = [_text(LABELS - 10, top + 13, label, "end")]
    if cell.value is None:
        return [*parts, _text(LABELS + 4, top + 13, NOT_MEASURED, "start", style="italic")]
    color = COLORS["extrapolated" if cell.extrapolations else cell.status]
    parts.append(f'<rect x="{LABELS}" y="{top}" width="{cell.value * scale:.1f}" height="{BAR}" fill="{color}"/>')
    end = cell.value
    if cell.low is not None and cell.high is not None:
        low, high, middle = LABELS + cell.low * scale, LABELS + cell.high * scale, top + BAR / 2
        path = f"M{low:.1f} {middle - 4}v8M{low:.1f} {middle}H{high:.1f}M{high:.1f} {middle - 4}v8"
        parts.append(f'<path d="{path}" stroke="{_INK}" fill="none"/>')
        end = cell.high
    return [*parts, _text(LABELS + end * scale + 8, top + 13, with_interval(cell), "start")]


def _legend(top: int) -> list[str]:
    parts, left = [], 12
    for name, color in COLORS.items():
        parts += [f'<rect x="{left}" y="{top}" width="12" height="12" fill="{color}"/>', _text(left + 18, top + 11, name, "start")]
        left += 124
    return [*parts, _text(left, top + 11, "whiskers: interval", "start")]


def _text(x: float, y: float, text: str, anchor: str, *, weight: str = "400", style: str = "normal") -> str:
    look = f'text-anchor="{anchor}" font-weight="{weight}" font-style="{style}" fill="{_INK}"'
    return f'<text x="{x:.1f}" y="{y}" {look}>{escape(text)}</text>'
