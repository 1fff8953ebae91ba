"""Where cells that are not numbers of their own come from: prices, peaks, configurations, plans, and files of benchmark results."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from kan_train.accounting.flops import flops_per_token, parameter_counts
from kan_train.accounting.peaks import PEAKS, peak_flops
from kan_train.accounting.prices import price_of
from kan_train.config import ModelConfig
from kan_train.config.compose import compose_train
from kan_train.config.errors import require_choice
from kan_train.planner.paper.sheet import Found, Lookups

RESULTS = Path("benchmarks/results")
"""Where the results of benchmarks lie in a clone."""


def lookups(shapes: Mapping[str, dict[str, Any]], results: Path) -> Lookups:
    """What the sheet looks up. shapes: published models that are no configurations of the project; results: folder of benchmark results."""
    return {"price": _price, "peak": _peak, "model": lambda what: _model(what, shapes), "plan": _plan, "result": lambda what: _result(what, results)}


def _price(what: dict[str, str]) -> Found:
    price = price_of(what["device"], name=what["name"])
    source = f"conf/prices/{price.name}.yaml: {price.device}, {price.kind}, {price.provider}, {price.date}: {price.source}"
    return Found(status="assumed" if price.kind == "assumed" else "cited", value=price.per_device_hour, source=source)


def _peak(what: dict[str, str]) -> Found:
    device, precision = what["device"], what["precision"]
    return Found(status="cited", value=peak_flops(device, precision), source=f"{PEAKS[device].source}, dense {precision}")


FIGURES: dict[str, tuple[str, Callable[[ModelConfig], float]]] = {
    "training_flops": ("flops_per_token(model).training", lambda model: flops_per_token(model).training),
    "ffn_parameters": ("flops_per_token(model).by_part['ffn'] / 2", lambda model: flops_per_token(model).by_part["ffn"] / 2),
    "grove_parameters": (
        "flops_per_token(model).by_part['groves'] / 2 / K * N",
        lambda model: flops_per_token(model).by_part["groves"] / 2 / model.grove.active_groves * model.grove.num_groves,
    ),
    "parameters": ("parameter_counts(model), all", lambda model: _counts(model)[0]),
    "active_parameters": ("parameter_counts(model), active", lambda model: _counts(model)[1]),
    "num_groves": ("model.grove.num_groves", lambda model: model.grove.num_groves),
    "active_groves": ("model.grove.active_groves", lambda model: model.grove.active_groves),
    "num_layers": ("model.num_layers", lambda model: model.num_layers),
    "width": ("model.width", lambda model: model.width),
    "sequence_length": ("model.sequence_length", lambda model: model.sequence_length),
}
"""Figures of a model by name: how they are computed, in words and as code."""


def _model(what: dict[str, Any], shapes: Mapping[str, dict[str, Any]]) -> Found:
    name, figure = what["name"], what["figure"]
    require_choice("figure", figure, tuple(FIGURES))
    text, compute = FIGURES[figure]
    if name in shapes:
        config, where, source = _published(name, shapes[name]), f"shape {name}", shapes[name]["source"]
    else:
        config, where, source = _shipped(name), f"conf/model/{name}.yaml", f"conf/model/{name}.yaml"
    if "sequence_length" in what:
        config = dataclasses.replace(config, sequence_length=what["sequence_length"])
        source += f", model.sequence_length={what['sequence_length']}"
    code = f"{text}, model={name}"
    return Found(status="derived", value=float(compute(config)), source=source, formula=code, inputs=(where,))


@cache
def _shipped(name: str) -> ModelConfig:
    return compose_train([f"model={name}"], world_size=1).model


def _plan(what: dict[str, Any]) -> Found:
    """Tokens a second of the first model over those of the second, each planned on its layout; the ends are the slow and the fast one of both alike."""
    from kan_train.planner.ratio import planned_ratio  # plans published runs too, whose speeds are cells

    layouts = tuple((name, tuple(sorted(layout.items()))) for name, layout in what["layouts"].items())
    value, low, high = planned_ratio(layouts, what["device"], what["devices"], what["batch"])
    names = tuple(f"conf/model/{name}.yaml" for name, _ in layouts)
    text = " over ".join(f"{name} ({', '.join(f'{key} {size}' for key, size in layout)})" for name, layout in layouts)
    source = f"kan_train.planner.time on {what['devices']:,} {what['device']}, {what['batch']:,} sequences a step; "
    source += "products at a share of the peak fitted on published runs"
    return Found(status="derived", value=value, low=low, high=high, source=source, formula=f"planned tokens a second, {text}", inputs=names)


def _published(name: str, shape: dict[str, Any]) -> ModelConfig:
    settings = {key: value for key, value in shape.items() if key not in ("source", "attention")}
    model = ModelConfig(name=name, attention=dataclasses.replace(ModelConfig().attention, **shape.get("attention", {})), **settings)
    model.validate()
    return model


_COUNTED: dict[str, tuple[int, int]] = {}


def _counts(model: ModelConfig) -> tuple[int, int]:
    key = repr(model)
    if key not in _COUNTED:
        _COUNTED[key] = parameter_counts(model)
    return _COUNTED[key]


def _result(what: dict[str, Any], results: Path) -> Found:
    """A figure of the newest file `<date>-<file>.json`: `at` in the rows called `row`, the median where there are several, and `low` and `high` alike."""
    wanted, path = f"benchmarks/results/*-{what['file']}.json, row {what['row']!r}", f"{what['at']} of the row"
    files = sorted(results.glob(f"????-??-??-{what['file']}.json"))
    if not files:
        return Found(status="measured", value=None, source=wanted, formula=path)
    record = json.loads(files[-1].read_text(encoding="utf-8"))
    rows = [row for row in record["rows"] if row["name"] == what["row"]]
    figures = {end: [found for row in rows if (found := _at(row, what[end])) is not None] for end in ("at", "low", "high") if end in what}
    if not figures["at"]:
        return Found(status="measured", value=None, source=wanted, formula=path)
    source = f"benchmarks/results/{files[-1].name}, row {what['row']!r}"
    low, high = figures.get("low"), figures.get("high")
    value, ends = statistics.median(figures["at"]), (min(low) if low else None, max(high) if high else None)
    return Found(status="measured", value=value, low=ends[0], high=ends[1], source=source, formula=path)


def _at(row: Any, path: str) -> float | None:
    """What lies at a dotted path of names and positions; None where there is nothing."""
    for step in path.split("."):
        try:
            row = row[int(step)] if isinstance(row, list) else row[step]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return float(row) if isinstance(row, int | float) else None
