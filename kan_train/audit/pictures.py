"""The pictures of an audit, drawn from audit.json's own numbers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kan_train.audit.groves import BYTE_CLASSES
from kan_train.audit.prune import ORDERS
from kan_train.audit.results import in_place

WHOLE, SILU, DENSITY, GRID = "#2466c8", "#9aa2ad", "#c8581a", "#e3e6ea"
LINES = ("#2466c8", "#c8581a", "#15805c", "#9a3fa0")
COLUMNS = 4


def draw_all(folder: Path, audit: dict[str, Any]) -> list[str]:
    """Draw every picture that there is something for into `folder`; their names."""
    pictures: dict[str, Callable[[], Figure]] = {}
    for layer in audit["functions"]:
        if layer["most"]:
            pictures[f"functions-{layer['layer']}.png"] = partial(functions_figure, layer, audit["edge"])
    if audit["functions"]:
        pictures["importance.png"] = partial(importance_figure, audit["functions"])
    if audit["pruning"] is not None:
        pictures["pruning.png"] = partial(pruning_figure, audit["pruning"])
    if audit["groves"]:
        pictures["specialisation.png"] = partial(specialisation_figure, audit["groves"])
    for layer in audit["groves"]:
        pictures[f"groves-{layer['layer']}.png"] = partial(groves_figure, layer)
    for name, draw in pictures.items():
        in_place(folder / name, partial(draw().savefig, format="png"))
    return list(pictures)


def title_of(one: dict[str, Any]) -> str:
    """Which function it is and what it looks like."""
    place = f"grove {one['grove']}, {one['input']}" + (f" to {one['output']}" if one["output"] is not None else "")
    summary = one["summary"]
    looks = "no shape of the dictionary" if summary["shape"] == "none" else summary["shape"]
    return f"{place}\n{looks}, R² {summary['r2']:.3f}"


def functions_figure(layer: dict[str, Any], edge: dict[str, Any]) -> Figure:
    """The most important functions of a layer: whole, their silu part, where their inputs lay; ticks are the grid's ends and knots."""
    drawn = [one for one in layer["most"] if "x" in one]
    rows = -(-len(drawn) // COLUMNS)
    figure = _figure(11, 0.9 + 2.25 * rows)
    figure.suptitle(f"Layer {layer['layer']}: the {len(drawn)} most important of {layer['functions']:,} functions", fontsize=12)
    knots = np.linspace(edge["low"], edge["high"], edge["grid"] + 1)
    for number, one in enumerate(drawn):
        axes = figure.add_subplot(rows, COLUMNS, number + 1)
        shade = axes.twinx()
        shade.fill_between(one["x"], one["density"], color=DENSITY, alpha=0.16, linewidth=0)
        shade.set(ylim=(0, 1.6), yticks=[])
        shade.spines[:].set_visible(False)
        axes.set_zorder(shade.get_zorder() + 1)
        axes.patch.set_visible(False)
        axes.plot(one["x"], one["silu"], color=SILU, linewidth=1.1, linestyle="--", label="silu part")
        axes.plot(one["x"], one["y"], color=WHOLE, linewidth=1.7, label="whole function")
        axes.set_xticks([knots[0], knots[-1]])
        axes.set_xticks(knots[1:-1], minor=True)
        axes.tick_params(which="both", labelsize=7, length=4)
        axes.tick_params(which="minor", length=2.5)
        axes.grid(axis="x", which="both", color=GRID, linewidth=0.6)
        axes.set_title(title_of(one), fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend([*handles, shade.collections[0]], [*labels, "inputs"], loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def importance_figure(layers: list[dict[str, Any]]) -> Figure:
    """Quantiles of importance, a line a layer."""
    figure = _figure(7.2, 4.2)
    axes = figure.add_subplot()
    for number, layer in enumerate(layers):
        shade = number / max(1, len(layers) - 1)
        quantiles = np.array(layer["quantiles"])
        label = f"layer {layer['layer']}" if len(layers) <= 8 or number in (0, len(layers) - 1) else None
        colour = (0.14 + 0.6 * shade, 0.4 - 0.05 * shade, 0.78 - 0.6 * shade)
        axes.plot(np.linspace(0, 100, len(quantiles)), np.where(quantiles > 0, quantiles, np.nan), color=colour, label=label)
    axes.set(title="Importance of the functions", xlabel="percent of a layer's functions that are less important", ylabel="importance")
    if any(quantile > 0 for layer in layers for quantile in layer["quantiles"]):
        axes.set_yscale("log")
    return _finished(figure, axes)


def pruning_figure(pruning: dict[str, Any]) -> Figure:
    """Rise of the loss against the share of functions that lost their learned part."""
    figure = _figure(7.2, 4.2)
    axes = figure.add_subplot()
    everything = next(row for row in pruning["rows"] if row["order"] == "all")
    for colour, (order, label) in zip(LINES, ORDERS.items(), strict=False):
        rows = [{"share": 0.0, "rise": 0.0, "interval": [0.0, 0.0]}, *(row for row in pruning["rows"] if row["order"] == order), everything]
        below, above = zip(*(row["interval"] or (row["rise"], row["rise"]) for row in rows), strict=True)
        shares = [100 * row["share"] for row in rows]
        axes.fill_between(shares, below, above, color=colour, alpha=0.13, linewidth=0)
        axes.plot(shares, [row["rise"] for row in rows], color=colour, marker="o", markersize=4, label=label)
    title = f"Loss without the learned parts (whole: {pruning['loss']:.4f} nats a token)"
    axes.set(title=title, xlabel="percent of the functions without their learned part", ylabel="rise of the loss, nats a token")
    return _finished(figure, axes)


def specialisation_figure(groves: list[dict[str, Any]]) -> Figure:
    """Mutual information of a choice and what its token is, above what chance shows in a sample of this size."""
    figure = _figure(7.2, 4.2)
    axes = figure.add_subplot()
    x = np.arange(len(groves))
    names = list(groves[0]["mutual_information"])
    for number, (name, colour) in enumerate(zip(names, LINES, strict=False)):
        found = [layer["mutual_information"][name] for layer in groves]
        place = x + (number - (len(names) - 1) / 2) * 0.26
        axes.bar(place, [one["excess"] for one in found], 0.24, color=colour, label=name)
        axes.bar(place, [one["chance"] for one in found], 0.24, bottom=[max(0.0, one["excess"]) for one in found], color=colour, alpha=0.22)
    axes.plot(x, [layer["load_bits"] for layer in groves], "k_", markersize=26, label="entropy of the load: the most there can be")
    axes.set(title="What a grove knows of its tokens (pale: as much as chance shows)", xlabel="layer", ylabel="mutual information, bits")
    axes.set_xticks(x[:: max(1, len(x) // 12)], [str(layer["layer"]) for layer in groves[:: max(1, len(x) // 12)]])
    axes.set_ylim(0, 1.3 * max(layer["load_bits"] for layer in groves))
    return _finished(figure, axes)


def groves_figure(layer: dict[str, Any]) -> Figure:
    """Load of every grove, and which byte classes it has more or less of than the text."""
    counts = np.array(layer["byte_classes"], dtype=float)
    there = counts.sum(0) > 0
    shares = counts[:, there] / np.maximum(1, counts.sum(1, keepdims=True))
    overall = counts[:, there].sum(0) / max(1.0, counts.sum())
    with np.errstate(divide="ignore"):
        lift = np.where(counts.sum(1, keepdims=True) > 0, np.log2(shares / overall), np.nan)
    figure = _figure(max(7.2, 3 + 0.2 * len(counts)), 5)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.4))
    load = 100 * np.array(layer["load"])
    above.bar(np.arange(len(load)), load, color=WHOLE)
    above.axhline(100 / len(load), color=SILU, linewidth=1, linestyle="--")
    above.set(title=f"Layer {layer['layer']}: groves and what the tokens are made of", ylabel="% of the load")
    above.spines[["top", "right"]].set_visible(False)
    image = below.imshow(lift.T.clip(-3, 3), cmap="RdBu_r", vmin=-3, vmax=3, aspect="auto", interpolation="nearest")
    below.set_facecolor(GRID)
    names = [f"{name} ({100 * part:.2g}%)" for name, part in zip(np.array(BYTE_CLASSES)[there], overall, strict=True)]
    below.set_yticks(range(len(names)), names, fontsize=8)
    below.set(xlabel="grove")
    bar = figure.colorbar(image, ax=below, ticks=[-3, -1, 0, 1, 3], pad=0.01)
    bar.ax.set_yticklabels(["1/8", "1/2", "1", "2", "8"])
    bar.set_label("times its share of the text", fontsize=8)
    return figure


def _figure(width: float, height: float) -> Figure:
    # Not pyplot: it keeps figures in global state and may open a window.
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finished(figure: Figure, axes: Axes) -> Figure:
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure
