"""A run as it goes on, in the terminal; its page is written again beside it. Reads the run's files alone, and may be stopped at any time."""

import contextlib
import time
from pathlib import Path

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kan_train.accounting.account import BUCKETS
from kan_train.config.errors import ConfigError
from kan_train.report import text
from kan_train.report.history import History, HistoryReader
from kan_train.report.page import PAGE, render, write
from kan_train.report.rows import Column
from kan_train.report.thinning import medians
from kan_train.report.unit import Unit, unit_of

BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
WIDTH = 48
"""Characters of curves and bars."""

EVENTS = 6
"""Last events that are shown."""

PAGE_SHARE = 20
"""A page is written at most so often that it takes one part in so many of the time: that of a long run takes seconds."""

STYLES = {
    "start-up": "grey70", "compile": "medium_purple", "step": "green", "data": "yellow", "saving": "dodger_blue1", "validation": "slate_blue1",
    "replayed": "dark_orange", "hang": "red", "idle": "grey42", "shutdown": "grey54",
}  # fmt: skip
"""Bucket -> its colour."""

STATUS_STYLES = {"running": "bold green", "finished": "bold green", "killed": "bold red", "failed": "bold red", "hung": "bold red"}


def watch(run_dir: Path, *, price: str | None = None, every: float = 10.0, once: bool = False, console: Console | None = None) -> int:
    """Show the run in `run_dir` every so many seconds until it is finished, and write its page; `once`: what there is now. Returns the exit status.

    A run that has not begun, or that may be started again, is waited for; in a folder that cannot be written there is no page.
    ConfigError where a file of the run is damaged, or the price is of other devices.
    """
    console = console or Console(highlight=False)
    reader = HistoryReader(run_dir, price)
    if once:
        console.print(frame(reader.read(), run_dir, console))
        return 0
    live = Live(console=console, auto_refresh=False, vertical_overflow="crop") if console.is_terminal else None
    with live or contextlib.nullcontext(), contextlib.suppress(KeyboardInterrupt):
        page_due, written = 0.0, True
        while True:
            history = reader.read()
            if live is not None:
                live.update(frame(history, run_dir, console), refresh=True)
            else:
                console.print(frame(history, run_dir, console))
            finished = history is not None and history.status == "finished"
            if history is not None and written and (finished or time.monotonic() >= page_due):
                began = time.monotonic()
                page = render([history], refresh=0 if finished else max(5, round(every)))
                try:
                    write(page, run_dir / PAGE, f"`kan cost report {run_dir} -o FILE` for a page elsewhere")
                except ConfigError as error:
                    written = False
                    console.print(f"no page is written: {error}", markup=False)
                page_due = time.monotonic() + PAGE_SHARE * (time.monotonic() - began)
            if finished:
                break
            time.sleep(every)
    return 0


def frame(history: History | None, run_dir: Path, console: Console) -> Panel:
    """What the terminal shows of a run."""
    if history is None:
        return Panel(Text(f"waiting for {run_dir} to begin: `kan train run.name={run_dir.name}` starts it"), title=Text(run_dir.name), title_align="left")
    unit = unit_of([history])
    blocks = BLOCKS if console.encoding.lower().startswith("utf") else PLAIN_BLOCKS
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for name, value in (*_progress(history, blocks), *_money(history, unit)):
        grid.add_row(name, value)
    grid.add_row("where it went", _bucket_bar(history, blocks))
    grid.add_row("", _bucket_names(history))
    shown = Group(grid, Text("last events", style="dim"), _events(history, unit))
    title = Text.assemble((history.name, "bold"), "  ", (history.status, STATUS_STYLES.get(history.status, "yellow")))
    return Panel(shown, title=title, title_align="left", subtitle=Text(f"{history.devices}  {history.layout}".strip()), subtitle_align="right")


def sparkline(values: Column, blocks: str = BLOCKS, width: int = WIDTH) -> str:
    """A curve in one line of text, from its least to its greatest value; empty of nothing."""
    middle = medians(values, width)
    finite = middle[np.isfinite(middle)]
    if not len(finite):
        return ""
    low, high = float(finite.min()), float(finite.max())
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((value - low) * scale)] if np.isfinite(value) else " " for value in middle.tolist())


def _progress(history: History, blocks: str) -> list[tuple[str, Text]]:
    metrics, account = history.metrics, history.account
    step = int(max(metrics.last("step") or 0, history.last["step"]))
    steps = history.config.train.steps if history.config is not None else 0
    bar = f"  {blocks[-1] * round(24 * min(1.0, step / steps))}{blocks[0] * (24 - round(24 * min(1.0, step / steps)))} {step / steps:.1%}" if steps else ""
    rows = [
        ("step", Text(f"{step:,}{f' of {steps:,}' if steps else ''}{bar}")),
        ("tokens", Text(f"{text.count(account.tokens_retained)} retained of {text.count(account.tokens_processed)} processed")),
    ]
    name = "cross_entropy" if metrics.has("cross_entropy") else "loss"
    if metrics.has(name):
        validation = metrics.last("validation/loss")
        told = "" if validation is None else f", validation {validation:.4f}"
        rows.append(("loss", Text(f"{sparkline(metrics.columns[name], blocks)}  {metrics.last(name):.4f}{told}")))
    if metrics.has("tokens_per_second"):
        recent = metrics.columns["tokens_per_second"][-50:]
        peak = "".join(f", {label} {value:.1%}" for label in ("mfu", "hfu") if (value := metrics.last(label)) is not None)
        rows.append(("tokens/s", Text(f"{sparkline(metrics.columns['tokens_per_second'], blocks)}  {np.nanmedian(recent):,.0f}{peak}")))
    return rows


def _money(history: History, unit: Unit) -> list[tuple[str, Text]]:
    metrics, kind = history.metrics, "usd" if unit.in_dollars else "hours"
    hours = f" ({text.hours(history.account.device_seconds)} device-hours)" if unit.in_dollars else ""
    retained, processed = unit.per_million(history)
    rows = [
        ("spent", Text(f"{unit.text(unit.total(history))}{hours}, goodput {history.account.goodput:.1%}")),
        ("a million tokens", Text(f"{unit.text(retained)} retained, {unit.text(processed)} processed")),
    ]
    forecast = metrics.last(f"cost/forecast_{kind}")
    if forecast is not None:
        low, high = (metrics.last(f"cost/forecast_{kind}_{end}") for end in ("low", "high"))
        rows.append(("at the end", Text(f"{unit.text(forecast)} ({unit.text(low)} to {unit.text(high)})")))
    for kind, one in (("usd", Unit(True)), ("hours", Unit(False))):
        left = metrics.last(f"cost/budget_left_{kind}")
        if left is not None:
            rows.append(("budget left", Text(one.text(max(0.0, left)), style="bold red" if left <= 0 else "")))
    if not unit.in_dollars:
        rows.append(("price", Text("none recorded: --price 2.35 shows dollars", style="dim")))
    return rows


def _bucket_bar(history: History, blocks: str) -> Text:
    whole, bar, until, drawn = history.account.device_seconds, Text(), 0.0, 0
    for bucket, seconds in history.account.buckets.items():
        until += seconds
        reach = round(WIDTH * until / whole) if whole else 0
        bar.append(blocks[-1] * (reach - drawn), style=STYLES[bucket])
        drawn = reach
    return bar


def _bucket_names(history: History) -> Text:
    whole = history.account.device_seconds
    named = [(bucket, history.account.buckets[bucket]) for bucket in BUCKETS if whole and history.account.buckets[bucket] >= 0.005 * whole]
    return Text(", ").join(Text(f"{bucket} {text.share(seconds, whole)}", style=STYLES[bucket]) for bucket, seconds in named)


def _events(history: History, unit: Unit) -> Table:
    table = Table.grid(padding=(0, 2))
    for event in history.events[-EVENTS:]:
        took = "" if event.seconds is None else text.duration(event.seconds)
        cost = "" if event.dollars is None or not unit.in_dollars else text.dollars(event.dollars)
        step, detail = "" if event.step is None else f"{event.step:,}", Text(event.detail, overflow="ellipsis", no_wrap=True)
        table.add_row(text.moment(event.time)[11:], step, event.name, took, cost, detail)
    return table
