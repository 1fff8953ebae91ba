"""Curves of a report as Plotly's JSON: loss, cost of a token, throughput, share of the peak.

A colour is the name of one of the page's own ("--series-1", "--ink/0.4" with an opacity), which follows light and dark; the page's script puts it in.
Texts are HTML to Plotly, so that every name is escaped here.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kan_train.report import text
from kan_train.report.events import KINDS, Event
from kan_train.report.history import History
from kan_train.report.rows import Column
from kan_train.report.thinning import extremes, medians, running_median, short
from kan_train.report.unit import Unit

Trace = dict[str, Any]

SERIES = 8
"""Colours of runs; more runs begin again."""

MOST_POINTS, LEAST_POINTS = 2000, 400
"""Points of a curve of one run, and of each of many."""

MARKS = 120
"""Marks of one kind on a curve."""

SYMBOLS = {"start": "circle-open", "restart": "triangle-left", "save": "line-ns-open", "validation": "diamond-open", "trouble": "x", "budget": "star"}
"""Kind of an event -> its mark."""

MARK_COLOURS = {"start": "--ink", "restart": "--bad", "save": "--soft", "validation": "--soft", "trouble": "--bad", "budget": "--warn"}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One figure of the page."""

    id: str
    title: str
    caption: str
    """What it shows, in a sentence that stands without it."""
    data: list[Trace]
    layout: dict[str, Any]
    views: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of an x-axis -> its layout, where one can choose; every trace then has "xs": {name: values}."""
    height: int = 340
    wide: bool = False
    """Whether it takes the whole width of the page."""
    fixed: bool = False
    """Whether it keeps its height, and does not grow to that of the card beside it."""


def colour(number: int, opacity: float | None = None) -> str:
    """Of run `number`."""
    return f"--series-{number % SERIES + 1}" + ("" if opacity is None else f"/{opacity}")


def points(histories: Sequence[History]) -> int:
    """Points of each curve, so that a page of many runs stays small."""
    return max(LEAST_POINTS, MOST_POINTS // len(histories))


def named(histories: Sequence[History], history: History, what: str = "") -> str:
    """A label: which run, where there are several, and what of it."""
    if len(histories) == 1:
        return what or history.name
    return f"{history.name}: {what}" if what else history.name


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title."""
    return {"title": {"text": title, "standoff": 10}, "automargin": True, **more}


TOKENS = axis("tokens", exponentformat="B")


def loss(histories: Sequence[History], unit: Unit) -> Picture | None:
    """Training and validation loss against tokens, what was spent, or time."""
    data: list[Trace] = []
    sentences = []
    for number, history in enumerate(histories):
        metrics = history.metrics
        name = "cross_entropy" if metrics.has("cross_entropy") else "loss"
        if not metrics.has(name):
            continue
        xs, values, count = _axes(history, unit), metrics.columns[name], points(histories)
        raw = extremes(values, count)
        data.append(_line(history, number, values[raw], {axis: x[raw] for axis, x in xs.items()}, pale=True))
        smooth = running_median(medians(values, count), _reach(min(count, len(metrics))))
        data.append(_line(history, number, smooth, {axis: medians(x, count) for axis, x in xs.items()}, label=named(histories, history, "training")))
        held_out = np.flatnonzero(np.isfinite(metrics.columns["validation/loss"]))
        if len(held_out):
            validation = metrics.columns["validation/loss"][held_out]
            kept = extremes(validation, count) if len(held_out) > count else np.arange(len(held_out))
            trace = _line(history, number, validation[kept], {axis: x[held_out][kept] for axis, x in xs.items()}, label=named(histories, history, "validation"))
            data.append(trace | {"mode": "lines+markers", "line": {"color": colour(number), "width": 1.5, "dash": "dot"}, "marker": {"size": 6}})
            sentences.append(named(histories, history, f"validation loss {validation[-1]:.4f} at the end"))
        else:
            sentences.append(named(histories, history, f"training loss {smooth[-1]:.4f} at the end"))
        data += _marks(history, number, medians(xs["tokens"], count), smooth, unit, leave_out=("validation",))
    if not data:
        return None
    largest = np.array([unit.total(history) for history in histories])
    views = {"tokens": TOKENS, "spent": axis(unit.name, **unit.axis(largest)), "time": axis("hours since the first start")}
    return Picture(
        id="loss", title="Loss", caption="; ".join(sentences) + ". Nats a token; pale: as measured, strong: a running median.", data=_one_legend(data),
        layout={"yaxis": axis("loss, nats a token", range=_loss_range(data))}, views=views, height=400, wide=True,
    )  # fmt: skip


def cost_of_a_token(histories: Sequence[History], unit: Unit) -> Picture | None:
    """What a million retained tokens had cost by then, everything included, and what the steps alone cost."""
    data: list[Trace] = []
    sentences, ceiling = [], 0.0
    for number, history in enumerate(histories):
        metrics, count = history.metrics, points(histories)
        tokens = metrics.columns["tokens"]
        spent = unit.of(*history.spent[:2])
        with np.errstate(invalid="ignore", divide="ignore"):
            whole = 1e6 * spent / (tokens - history.tokens_before)
        if not np.isfinite(whole).any():
            continue
        x, y = medians(tokens, count), medians(whole, count)
        final = unit.per_million(history)[0]
        if final is not None and len(tokens):
            # The end of the last start, which no step shows.
            x, y = np.append(x, tokens[-1]), np.append(y, final)
        data.append(trace_of(x, y, named(histories, history, "everything"), colour(number)))
        alone = _steps_alone(history, unit, count)
        if alone is not None:
            alone = running_median(alone, _reach(len(alone)))
            data.append(trace_of(medians(tokens, count), alone, named(histories, history, "steps alone"), colour(number), dash="dot", width=1.5))
        data += _marks(history, number, x, y, unit)
        ceiling = max(ceiling, _ceiling(y), _ceiling(alone) if alone is not None else 0.0)
        sentences.append(named(histories, history, f"{unit.text(final)} a million retained tokens at the end"))
    if not data:
        return None
    caption = "; ".join(sentences) + ". Everything that was paid for by then, over the tokens retained; the dotted line is what steps alone cost."
    return Picture(
        id="cost", title="Cost of a million tokens", caption=caption, data=_one_legend(data),
        layout={"xaxis": TOKENS, "yaxis": axis(unit.a_million, range=[0, ceiling], **unit.axis([ceiling]))},
    )  # fmt: skip


def throughput(histories: Sequence[History]) -> Picture | None:
    """Tokens a second of all devices."""
    data, sentences = _curves(histories, {"tokens_per_second": ""}, text.count, "tokens/s")
    if not data:
        return None
    return Picture(
        id="throughput", title="Throughput", caption="; ".join(sentences) + ". Medians over neighbouring steps, all devices together.", data=data,
        layout={"xaxis": TOKENS, "yaxis": axis("tokens a second", rangemode="tozero", exponentformat="B")},
    )  # fmt: skip


def share_of_peak(histories: Sequence[History]) -> Picture | None:
    """MFU and HFU; None where no device's peak is known."""
    data, sentences = _curves(histories, {"mfu": "MFU", "mfu_causal": "MFU, causal", "hfu": "HFU"}, lambda value: f"{value:.1%}", "")
    if not data:
        return None
    caption = "; ".join(sentences) + ". Model FLOPs over the devices' peak; HFU counts recomputation too."
    return Picture(
        id="mfu", title="Share of the peak", caption=caption, data=data,
        layout={"xaxis": TOKENS, "yaxis": axis("share of the peak", rangemode="tozero", tickformat=".1~%")},
    )  # fmt: skip


def forecast(histories: Sequence[History], unit: Unit) -> Picture | None:
    """What the run was thought to cost at its end, with the interval, beside what was spent; None where no row says."""
    name = "cost/forecast_usd" if unit.in_dollars else "cost/forecast_hours"
    data: list[Trace] = []
    sentences = []
    for number, history in enumerate(histories):
        metrics, count = history.metrics, points(histories)
        if not metrics.has(name):
            continue
        tokens = medians(metrics.columns["tokens"], count)
        for suffix, fill in (("_low", None), ("_high", "tonexty")):
            edge = medians(metrics.columns[name + suffix], count)
            band = trace_of(tokens, edge, named(histories, history, "90% interval"), colour(number, 0.0), width=0)
            data.append(band | {"showlegend": fill is not None, "fill": fill, "fillcolor": colour(number, 0.18), "hoverinfo": "skip"})
        data.append(trace_of(tokens, medians(metrics.columns[name], count), named(histories, history, "forecast"), colour(number), dash="dash"))
        data.append(trace_of(tokens, medians(unit.of(*history.spent[:2]), count), named(histories, history, "spent"), colour(number)))
        low, middle, high = (metrics.last(name + suffix) for suffix in ("_low", "", "_high"))
        sentences.append(named(histories, history, f"{unit.text(middle)} at the end, {unit.text(low)} to {unit.text(high)}"))
        left = metrics.last("cost/budget_left_usd" if unit.in_dollars else "cost/budget_left_hours")
        if left is not None:
            sentences.append(f"{unit.text(max(0.0, left))} of the budget left")
    if not data:
        return None
    values = [value for trace in data for value in trace["y"] if value is not None]
    return Picture(
        id="forecast", title="Spent, and forecast of the end", caption="; ".join(sentences) + ". The band is the interval of 90%.", data=data,
        layout={"xaxis": TOKENS, "yaxis": axis(unit.name, rangemode="tozero", **unit.axis(values))},
    )  # fmt: skip


def _axes(history: History, unit: Unit) -> dict[str, Column]:
    device_seconds, dollars, times = history.spent
    began = history.account.starts[0].started
    return {"tokens": history.metrics.columns["tokens"], "spent": unit.of(device_seconds, dollars), "time": (times - began) / 3600}


def trace_of(x: Column, y: Column, name: str, line: str, *, dash: str = "solid", width: float = 2.2) -> Trace:
    """A line: its points, its name in the legend and its colour."""
    return {
        "type": "scatter", "mode": "lines", "x": short(x), "y": short(y), "name": html.escape(name, quote=False),
        "line": {"color": line, "width": width, "dash": dash}, "hovertemplate": "%{y}<extra>%{fullData.name}</extra>",
    }  # fmt: skip


def _line(history: History, number: int, y: Column, xs: dict[str, Column], *, label: str = "", pale: bool = False) -> Trace:
    trace = trace_of(xs["tokens"], y, label, colour(number, 0.28) if pale else colour(number), width=1 if pale else 2.2)
    return trace | {"xs": {name: short(x) for name, x in xs.items()}} | ({"hoverinfo": "skip", "hovertemplate": None, "showlegend": False} if pale else {})


def _marks(history: History, number: int, tokens: Column, curve: Column, unit: Unit, leave_out: Sequence[str] = ()) -> list[Trace]:
    """Events as marks on the curve `curve` over `tokens`."""
    known = np.isfinite(tokens) & np.isfinite(curve)
    began, traces = history.account.starts[0].started, []
    for kind in KINDS:
        events = [event for event in history.events if event.kind == kind and event.tokens is not None and event.device_seconds is not None]
        if kind in leave_out or not events or not known.any():
            continue
        events = events[:: -(-len(events) // MARKS)]
        at = np.array([float(event.tokens or 0) for event in events])
        spent = unit.of(np.array([event.device_seconds for event in events], dtype=float), np.array([event.spent for event in events], dtype=float))
        xs = {"tokens": at, "spent": spent, "time": np.array([event.time - began for event in events]) / 3600}
        traces.append({
            "type": "scatter", "mode": "markers", "x": short(at), "xs": {name: short(x) for name, x in xs.items()},
            "y": short(np.interp(at, tokens[known], curve[known])), "name": KINDS[kind], "legendgroup": kind, "text": [_hover(event) for event in events],
            "hovertemplate": "%{text}<extra></extra>",
            "marker": {
                "symbol": SYMBOLS[kind], "size": 8 if kind == "save" else 10, "color": MARK_COLOURS[kind], "line": {"width": 1.5, "color": MARK_COLOURS[kind]},
            },
        })  # fmt: skip
    return traces


def _hover(event: Event) -> str:
    took = "" if event.seconds is None else f", {text.duration(event.seconds)}"
    detail = event.detail if len(event.detail) < 80 else event.detail[:77] + "..."
    return html.escape(f"step {event.step:,}: {event.name}{took} ({detail})", quote=False)


def _one_legend(data: list[Trace]) -> list[Trace]:
    """A kind of event stands in the legend once, behind the curves."""
    seen: set[str] = set()
    for trace in data:
        if group := trace.get("legendgroup"):
            trace["showlegend"] = group not in seen
            seen.add(group)
    return sorted(data, key=lambda trace: "legendgroup" in trace)


def _curves(histories: Sequence[History], names: dict[str, str], form: Any, what: str) -> tuple[list[Trace], list[str]]:
    data, sentences = [], []
    dashes = ("solid", "dot", "dash")
    for number, history in enumerate(histories):
        count = points(histories)
        for kind, ((name, label), dash) in enumerate(zip(names.items(), dashes, strict=False)):
            values = history.metrics.columns[name]
            if not history.metrics.has(name):
                continue
            tokens, thin, hue = medians(history.metrics.columns["tokens"], count), medians(values, count), number + (kind if len(histories) == 1 else 0)
            if len(names) == 1:
                data.append(trace_of(tokens, thin, "", colour(hue, 0.28), width=1) | {"hoverinfo": "skip", "hovertemplate": None, "showlegend": False})
            data.append(trace_of(tokens, running_median(thin, _reach(len(thin))), named(histories, history, label), colour(hue), dash=dash))
            middle = f"{form(float(np.nanmedian(values)))} {what}".strip()
            sentences.append(f"{named(histories, history, label)} {middle} in the median" if label or len(histories) > 1 else f"{middle} in the median")
    return data, sentences


def _steps_alone(history: History, unit: Unit, count: int) -> Column | None:
    """What a million tokens cost while steps are done, fp64 [points]: devices and price of the row's start over its speed."""
    rates = {}
    for start, price in zip(history.account.starts, history.spending.prices, strict=True):
        if start.segment is not None:
            rates[start.segment] = start.devices * ((0.0 if price is None else price.per_second) if unit.in_dollars else 1 / 3600)
    segments, speed = history.metrics.columns["segment"], history.metrics.columns["tokens_per_second"]
    if not history.metrics.has("tokens_per_second"):
        return None
    a_second = np.array([rates.get(int(segment), np.nan) for segment in segments])
    return medians(1e6 * a_second / speed, count)


def _reach(length: int) -> int:
    """Of the running median over a curve of so many points."""
    return length // 60


def _ceiling(values: Column) -> float:
    """Of what is drawn: the first tenth, in which the start-up is spread over few tokens, would leave nothing to be seen of the rest."""
    later = values[len(values) // 10 :]
    finite = later[np.isfinite(later)]
    return 0.0 if not len(finite) else float(min(1.15 * finite.max(), 4 * finite[-1]))


def _loss_range(data: Sequence[Trace]) -> list[float] | None:
    """From the least loss to the first: a spike to infinity must not flatten the rest."""
    strong = [np.array([value for value in trace["y"] if value is not None]) for trace in data if trace["mode"] != "markers" and trace.get("showlegend", True)]
    strong = [values for values in strong if len(values)]
    if not strong:
        return None
    low, high = min(float(values.min()) for values in strong), max(float(values.max()) for values in strong)
    room = 0.06 * (high - low) or 0.1
    return [low - room, high + room]
