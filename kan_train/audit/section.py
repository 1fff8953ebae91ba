"""An audit as one section of a report page: small pictures as paths of SVG, and rows of tables, ready for templates/audit.html."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

SHOWN = 12
"""Functions that are drawn: the most important ones of all layers."""

WIDTH, HEIGHT, MARGIN = 200.0, 110.0, 6.0

ORDERS = (("importance", "least important first"), ("size", "smallest first"), ("random", "random order"))


def section_of(audit: dict[str, Any]) -> dict[str, Any]:
    """What the template writes of one audit."""
    functions = [one | {"layer": layer["layer"]} for layer in audit["functions"] for one in layer["most"] if "x" in one]
    functions.sort(key=lambda one: -one["importance"])
    return {
        "lead": _lead(audit), "pictures": [_picture(one, audit["edge"]) for one in functions[:SHOWN]],
        "pruning": _pruning(audit["pruning"]), "layers": _layers(audit), "typical": _typical(audit), "orders": ORDERS,
    }  # fmt: skip


def _lead(audit: dict[str, Any]) -> str:
    count = sum(layer["functions"] for layer in audit["functions"])
    told = f"Step {audit['step']:,} on {audit['tokens']:,} held-out tokens of {audit['corpus']}: "
    if not count:
        return told + "the groves' activation is plain silu, and there are no learned functions."
    told += f"{count:,} functions, each w silu(x) + s(x)."
    if audit["pruning"] is not None:
        everything = audit["pruning"]["rows"][-1]
        told += f" Without any s, and nothing trained again, the loss of {audit['pruning']['loss']:.4f} nats a token moves by {_rise(everything)}."
    return told


def _rise(row: dict[str, Any]) -> str:
    interval = "" if row["interval"] is None else " ({} to {})".format(*map(_signed, row["interval"]))
    return f"{_signed(row['rise'])}{interval}"


def _signed(value: float) -> str:
    return f"{round(value, 4) + 0.0:+.4f}"  # no -0.0000


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "<1%"


def _picture(one: dict[str, Any], edge: dict[str, Any]) -> dict[str, Any]:
    x, summary = one["x"], one["summary"]
    values = [*one["y"], *one["silu"]]
    across, up = _scale(x[0], x[-1], MARGIN, WIDTH - MARGIN), _scale(min(values), max(values), HEIGHT - MARGIN, MARGIN)
    shade = _scale(0.0, 1.6, HEIGHT, 0.0)
    knots = [edge["low"] + (edge["high"] - edge["low"]) * number / edge["grid"] for number in range(edge["grid"] + 1)]
    looks = "no shape of the dictionary" if summary["shape"] == "none" else summary["formula"] or summary["shape"]
    place = f"layer {one['layer']}, grove {one['grove']}, {one['input']}" + (f" to {one['output']}" if one["output"] is not None else "")
    return {
        "place": place, "looks": looks, "r2": f"{summary['r2']:.3f}", "line_r2": f"{summary['line_r2']:.3f}",
        "whole": _path(map(across, x), map(up, one["y"])), "silu": _path(map(across, x), map(up, one["silu"])),
        "inputs": _path([across(x[0]), *map(across, x), across(x[-1])], [HEIGHT, *map(shade, one["density"]), HEIGHT]) + "Z",
        "knots": [f"{across(knot):.1f}" for knot in knots],
    }  # fmt: skip


def _scale(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    span = high - low or 1.0
    return lambda value: first + (last - first) * (value - low) / span


def _path(xs: Iterable[float], ys: Iterable[float]) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))


def _pruning(pruning: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A row a share, with the rise of every order; the whole model's is the same in all of them."""
    if pruning is None:
        return []
    found = {(row["order"], row["share"]): row for row in pruning["rows"]}
    shares = sorted({row["share"] for row in pruning["rows"]})
    return [{
        "share": f"{share:.0%}", "functions": f"{round(share * pruning['functions']):,}",
        "rises": [_rise(found.get((order, share), found["all", 1.0])) for order, _ in ORDERS],
    } for share in shares]  # fmt: skip


def _layers(audit: dict[str, Any]) -> list[dict[str, Any]]:
    functions = {layer["layer"]: layer for layer in audit["functions"]}
    rows = []
    for number in sorted({*functions, *(layer["layer"] for layer in audit["groves"])}):
        learned, groves = functions.get(number), next((layer for layer in audit["groves"] if layer["layer"] == number), None)
        row = {"layer": number, "importance": "", "holds": "", "outside": "", "shapes": "", "unused": "", "cv": "", "bits": ["", "", ""], "most": ""}
        if learned is not None:
            shapes = ", ".join(f"{count} {name}" for name, count in learned["shapes"].items()) or "none has any importance"
            row |= {"importance": f"{learned['importance']:.3g}", "holds": f"{learned['holds_90_percent']:.0%}", "outside": f"{learned['outside_grid']:.1%}"}
            row["shapes"] = shapes
        if groves is not None:
            known = groves["mutual_information"]
            row |= {"unused": str(len(groves["unused"])), "cv": f"{groves['load_cv']:.2f}", "most": f"{groves['load_bits']:.2f}"}
            row["bits"] = [f"{known[name]['excess']:.2f}" for name in ("token", "byte class", "document")]
        rows.append(row)
    return rows


def _typical(audit: dict[str, Any], groves: int = 4) -> list[dict[str, Any]]:
    """For a layer near the middle, the groves that are told from the rest best, with their tokens."""
    if not audit["groves"]:
        return []
    layer = audit["groves"][len(audit["groves"]) // 2]
    ranked = sorted(range(len(layer["typical"])), key=lambda grove: -_told(layer["typical"][grove]))
    return [{
        "layer": layer["layer"], "grove": grove,
        "tokens": [(one["token"], _percent(one["of_grove"]), f"{one['lift']:.1f}") for one in layer["typical"][grove]],
    } for grove in ranked[:groves] if layer["typical"][grove]]  # fmt: skip


def _told(tokens: Sequence[dict[str, Any]]) -> float:
    return sum(one["of_grove"] for one in tokens)
