"""A report as one HTML page that needs nothing else: the page, its script, Plotly and the data in one file, and a policy that forbids it to load more."""

import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from kan_train import __version__
from kan_train.accounting.account import BUCKETS
from kan_train.audit.results import audit_of
from kan_train.audit.section import section_of
from kan_train.config.errors import ConfigError
from kan_train.report import evaluations, figures, shares, text
from kan_train.report.events import KINDS, counted, shown
from kan_train.report.figures import SERIES, Picture
from kan_train.report.history import History
from kan_train.report.summary import facts_of, lead_of, tiles_of
from kan_train.report.unit import Unit, unit_of

PAGE = "report.html"
"""The page's name in a run directory."""

VIEWS = {"tokens": "tokens", "spent": "{unit}", "time": "time"}
"""X-axis of a figure -> its button."""


def pictures_of(histories: Sequence[History], unit: Unit) -> list[Picture]:
    """The figures of a report that there is something to draw for, in the order of the page."""
    made = [
        figures.loss(histories, unit),
        figures.cost_of_a_token(histories, unit),
        shares.buckets(histories, unit),
        evaluations.accuracy(histories),
        figures.forecast(histories, unit),
        shares.starts(histories, unit),
        figures.throughput(histories),
        figures.share_of_peak(histories),
        *(picture for number in range(len(histories)) for picture in shares.load(histories, number)),
    ]
    pictures = [picture for picture in made if picture is not None]
    if sum(not picture.wide for picture in pictures) % 2:
        pictures[-1] = replace(pictures[-1], wide=True)  # it has no neighbour
    return pictures


def render(histories: Sequence[History], *, refresh: int = 0) -> str:
    """The page of one run, or of several side by side. refresh: seconds after which a browser is to read it again; 0: never."""
    unit = unit_of(list(histories))
    pictures = pictures_of(histories, unit)
    environment = Environment(loader=FunctionLoader(_template), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html").render(
        version=__version__,
        refresh=refresh,
        title=", ".join(history.name for history in histories),
        css=Markup(environment.from_string(_template("page.css")).render()),
        lead=lead_of(histories, unit),
        columns=next((columns for columns in (5, 4) if len(tiles_of(histories, 0, unit)) % columns == 0), 3),
        in_dollars=unit.in_dollars,
        unpriced=_unpriced(histories),
        command=" ".join(shlex.quote(str(history.run_dir)) for history in histories),
        runs=[_run(histories, number, unit) for number in range(len(histories))],
        audits=_audits(histories),
        several=len(histories) > 1,
        pictures=[_figure(picture, unit, len(histories) == 1) for picture in pictures],
        evaluations=evaluations.table_of(histories),
        kinds=list(KINDS.items()),
        meanings=list(BUCKETS.items()),
        made=text.moment(time.time()),
        data=_json([history.as_json() for history in histories]),
        figures=_json([_drawn(picture) for picture in pictures]),
        plotly=Markup(_plotly()),
        script=Markup(_template("page.js")),
    )


def write(page: str, path: Path, instead: str = "-o with a file in a folder that you may write") -> None:
    """Write a page in the place of an older one, never half of it. ConfigError where it cannot be written, which says what to use `instead`."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(page, encoding="utf-8", errors="surrogateescape")
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written ({error.strerror}); use {instead}") from error


def _run(histories: Sequence[History], number: int, unit: Unit) -> dict[str, Any]:
    history = histories[number]
    whole, dollars = history.account.device_seconds, history.cost.buckets if history.cost is not None else {}
    account = history.account.buckets
    rows = [_bucket(bucket, seconds, whole, dollars.get(bucket), BUCKETS[bucket]) for bucket, seconds in account.items()]
    rows.append(_bucket("all", whole, whole, history.cost.total if history.cost is not None else None))
    listed = shown(history.events)
    return {
        "name": history.name,
        "series": number % SERIES + 1,
        "status": history.status,
        "tiles": tiles_of(histories, number, unit),
        "facts": facts_of(history),
        "buckets": rows,
        "happened": counted(history.events) or "nothing besides steps",
        "left_out": len(listed) < len(history.events),
        "events": [
            {
                "kind": event.kind,
                "time": text.moment(event.time),
                "name": event.name,
                "step": "" if event.step is None else f"{event.step:,}",
                "tokens": "" if event.tokens is None else text.count(event.tokens),
                "took": "" if event.seconds is None else text.duration(event.seconds),
                "cost": "" if event.dollars is None else text.dollars(event.dollars),
                "detail": event.detail,
            }
            for event in listed
        ],
    }


def _audits(histories: Sequence[History]) -> list[tuple[int, dict[str, Any]]]:
    """What `kan audit` has left of each run, under its number."""
    found = [(number, history.name, audit_of(history.run_dir)) for number, history in enumerate(histories)]
    return [(number, section_of(audit) | {"run": name}) for number, name, audit in found if audit is not None]


def _bucket(name: str, seconds: float, whole: float, dollars: float | None, meaning: str = "") -> dict[str, Any]:
    shown = {"hours": text.hours(seconds), "share": text.share(seconds, whole), "dollars": text.dollars(dollars)}
    return shown | {"name": name, "meaning": meaning, "nothing": not seconds}


def _figure(picture: Picture, unit: Unit, alone: bool) -> dict[str, Any]:
    return {name: getattr(picture, name) for name in ("id", "title", "height", "wide", "fixed")} | {
        "caption": picture.caption[:1].upper() + picture.caption[1:] if alone else picture.caption,
        "views": [(view, VIEWS[view].format(unit=unit.name)) for view in picture.views],
    }


def _drawn(picture: Picture) -> dict[str, Any]:
    """What the page's script draws."""
    view = next(iter(picture.views), None)
    return {name: getattr(picture, name) for name in ("id", "data", "layout", "views")} | {"view": view}


def _unpriced(histories: Sequence[History]) -> str:
    without = [history.name for history in histories if history.cost is None]
    if len(without) == len(histories):
        return "The run recorded" if len(histories) == 1 else "The runs recorded"
    return f"{', '.join(without)} recorded"


def _json(value: Any) -> Markup:
    """Within a script element: an end tag in a name must not end it."""
    return Markup(json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026"))


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).replace("</script", "<\\/script")


def _template(name: str) -> str:
    return resources.files("kan_train.report").joinpath("templates", name).read_text(encoding="utf-8")
