"""Bars and heat maps of a report: where the money went, by run and by start, and how the groves were loaded, by layer."""

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from kan_train.accounting.account import BUCKETS
from kan_train.report import text
from kan_train.report.figures import TOKENS, Picture, Trace, axis
from kan_train.report.history import History
from kan_train.report.thinning import short
from kan_train.report.unit import Unit

STARTS = 24
"""Bars of starts; of more, the first ones are put together."""

COLOURS = {bucket: f"--bucket-{bucket}" for bucket in BUCKETS}
"""Bucket -> its colour on the page."""


def buckets(histories: Sequence[History], unit: Unit) -> Picture:
    """Where the money of every run went."""
    bars = [(history.name, unit.buckets(history)) for history in histories]
    sentences = []
    for name, parts in bars:
        whole = sum(parts.values())
        largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
        told = ", ".join(f"{bucket} {text.share(value, whole)}" for bucket, value in largest if value)
        sentences.append(told if len(bars) == 1 else f"{name}: {told}")
    return Picture(
        id="buckets", title="Where the money went" if unit.in_dollars else "Where the time went", caption="; ".join(sentences) + ".", data=_bars(bars, unit),
        layout=_bar_layout(bars, unit) | {"showlegend": len(bars) > 1}, height=(170 if len(bars) > 1 else 84) + 46 * len(bars), fixed=True,
    )  # fmt: skip


def starts(histories: Sequence[History], unit: Unit) -> Picture | None:
    """The same by start; None where no run was started twice."""
    bars: list[tuple[str, dict[str, float]]] = []
    for history in histories:
        own = [
            (f"{number + 1}: {start.status}", unit.start_buckets(history, start, number)) for number, start in enumerate(history.account.starts)
        ]
        if len(own) > STARTS:
            early = own[: len(own) - STARTS + 1]
            own = [(f"1 to {len(early)}", {bucket: sum(parts[bucket] for _, parts in early) for bucket in BUCKETS}), *own[len(early) :]]
        bars += [(f"{history.name}, {name}" if len(histories) > 1 else name, parts) for name, parts in own]
    if len(bars) == len(histories):
        return None
    caption = "; ".join(f"{history.name} was started {len(history.account.starts)} times" for history in histories) + ". Each start by what its time went into."
    return Picture(
        id="starts", title="Start by start", caption=caption, data=_bars(bars, unit), layout=_bar_layout(bars, unit), height=150 + 34 * len(bars)
    )


def load(histories: Sequence[History], number: int) -> list[Picture]:
    """Heat maps of the groves of run `number`, layer by layer; none of a model without groves."""
    history = histories[number]
    metrics = history.metrics
    found = []
    tokens = metrics.columns["tokens"][metrics.sampled]
    for name, title, what, most in (
        ("load/cv", "Load of the groves", "standard deviation over mean of the groves' token counts: 0 where all are chosen as often", None),
        ("sparsity/touched", "Groves touched by a step", "share of the groves that any token of the step chose", 1.0),
    ):
        if name not in metrics.layers or len(tokens) == 0:
            continue
        values = metrics.layers[name]
        trace: Trace = {
            "type": "heatmap", "x": short(tokens), "y": list(range(values.shape[1])), "z": [short(layer) for layer in values.T],
            "zmin": 0, "zmax": most if most is not None else max(1e-3, float(np.nanpercentile(values, 99))),
            "colorbar": {"thickness": 10, "outlinewidth": 0, "len": 1, "tickformat": ".0%" if most else ".2~f"},
            "hovertemplate": "layer %{y}, %{x} tokens: %{z:.3f}<extra></extra>",
        }  # fmt: skip
        last = values[-1][np.isfinite(values[-1])]
        told = f"at the end {last.mean():.3f} in the mean of {len(last)} layers, {last.max():.3f} at most" if len(last) else ""
        nominal = metrics.last("sparsity/nominal")
        if most is not None and nominal is not None:
            told += f"; a token runs {1 - nominal:.1%} of them"
        found.append(
            Picture(
                id=f"{name.replace('/', '-')}-{number}", title=title if len(histories) == 1 else f"{title}: {history.name}",
                caption=f"By layer and tokens: {what}; {told}.", data=[trace],
                layout={"xaxis": TOKENS, "yaxis": axis("layer", dtick=max(1, values.shape[1] // 8), showgrid=False), "hovermode": "closest"},
                height=min(520, 200 + 14 * values.shape[1]),
            )
        )  # fmt: skip
    return found


def _bars(bars: Sequence[tuple[str, dict[str, float]]], unit: Unit) -> list[Trace]:
    traces = []
    wholes = [sum(parts.values()) for _, parts in bars]
    for bucket, meaning in BUCKETS.items():
        values = [parts[bucket] for _, parts in bars]
        if not any(values):
            continue
        told = [f"{bucket}: {unit.text(value)}, {text.share(value, whole)}" for value, whole in zip(values, wholes, strict=True)]
        traces.append({
            "type": "bar", "orientation": "h", "x": short(values), "y": list(range(len(bars))), "name": bucket, "text": told, "textposition": "none",
            "hovertemplate": f"%{{text}}<br>{html.escape(meaning, quote=False)}<extra></extra>",
            "marker": {"color": COLOURS[bucket], "line": {"width": 1, "color": "--card"}},
        })  # fmt: skip
    return traces


def _bar_layout(bars: Sequence[tuple[str, dict[str, float]]], unit: Unit) -> dict[str, Any]:
    # Numbers with texts, not texts: two bars of one name would be one.
    names = [html.escape(name if len(name) < 28 else name[:25] + "...", quote=False) for name, _ in bars]
    values = [sum(parts.values()) for _, parts in bars]
    return {
        "barmode": "stack", "bargap": 0.35, "hovermode": "closest", "xaxis": axis(unit.name, **unit.axis(values)),
        "yaxis": {"tickvals": list(range(len(bars))), "ticktext": names, "autorange": "reversed", "automargin": True, "showgrid": False},
        "legend": {"traceorder": "normal"},
    }  # fmt: skip
