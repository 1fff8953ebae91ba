"""What `kan cost plan` prints."""

import shlex
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kan_train.planner.cost import counted
from kan_train.planner.plan import Plan, assumptions
from kan_train.planner.search import NOT_SEARCHED, USABLE, Planned, Result
from kan_train.planner.time import NOT_MODELLED

WIDTH = 160
"""Columns where standard output is no terminal: a table must not be cut for a file."""
SHOWN_REASONS = 12
"""Reasons of rejection that are written out."""


def print_plan(plan: Plan, top: int, picture: Path | None = None, console: Console | None = None) -> None:
    """Everything: assumptions, layouts, front, rejections, the best layout's money, and what to paste."""
    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=WIDTH)
    console.print(_assumptions(plan))
    for result in plan.results:
        console.print(_layouts(plan, result, result.fitting[:top], f"the fastest of {len(result.fitting)} layouts that fit {result.world_size:,} devices"))
        console.print(_layouts(plan, result, result.front()[:top], "front: speed against memory left"))
        console.print(_rejected(result))
    if plan.best is None:
        console.print("nothing fits: use more --devices, or a device with more memory", markup=False)
    else:
        console.print(_money(plan, plan.best))
        console.print("to run it:", markup=False)
        console.print(f"  kan train {shlex.join(plan.overrides(plan.best))}", markup=False, soft_wrap=True)
    if picture is not None:
        console.print(f"written: {picture}", markup=False)
    console.print(f"not modelled: {'; '.join((*NOT_MODELLED, *NOT_SEARCHED))}.", markup=False, style="dim")
    console.print(f"planned in {plan.seconds:.1f} s: {sum(result.looked_at for result in plan.results):,} layouts, {_counted(plan)}", markup=False)


def _counted(plan: Plan) -> str:
    timed, weighed = (sum(getattr(result, name) for result in plan.results) for name in ("timed", "weighed"))
    return f"{timed:,} of them timed, {weighed:,} weighed"


def _assumptions(plan: Plan) -> Table:
    config = plan.config
    batch = config.train.global_batch_size * config.model.sequence_length
    table = Table(title=f"{config.model.name}, {config.train.precision}, {plan.device}, {plan.tokens:.3g} tokens in batches of {batch:,}", title_justify="left")
    for heading in ("it rests on", "value", "interval", "", "source"):
        table.add_column(heading, justify="right" if heading == "value" else "left", overflow="fold")
    for name, one in assumptions(plan).items():
        table.add_row(name, f"{one['value']:.3g}", f"{one['low']:.3g} to {one['high']:.3g}", str(one["status"]), str(one["source"]))
    price = "none: give one with --price" if plan.price is None else plan.price.text()
    table.add_row("price", "", "", "", price)
    if plan.chosen:
        table.add_row("chosen, as not given", "", "", "", " ".join(plan.chosen))
    table.caption_justify = "left"
    return table


def _layouts(plan: Plan, result: Result, shown: list[Planned], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("layout", no_wrap=True)
    for heading in ("step s", "c", "x", "b", "r", "o", "tok/s/dev", "MFU", "memory GB", "days", "$/Mtok", "total"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in shown:
        money, step = plan.money(one), one.step
        mid, slow, fast = money["expected"], money["slow"], money["fast"]
        mfu, waits = plan.mfu(one), (step.communication, step.bubble, step.reduction, step.optimizer)
        table.add_row(
            str(one.candidate), f"{step.total:.3g}", *(f"{seconds:.2g}" for seconds in (step.compute + step.imbalance, *waits)),
            f"{mid.tokens_per_second:,.0f} ({slow.tokens_per_second:,.0f}-{fast.tokens_per_second:,.0f})", "" if mfu is None else f"{mfu:.1%}",
            f"{one.memory.total / 1e9:.1f}" + (f"/{USABLE * plan.memory / 1e9:.0f}" if plan.memory is not None else ""), f"{mid.hours / 24:.1f}",
            "-" if mid.per_million_tokens is None else f"{mid.per_million_tokens:.3f}", "-" if mid.dollars is None else f"${mid.dollars:,.0f}",
        )  # fmt: skip
    return table


def _rejected(result: Result) -> Table:
    table = Table(title=f"{sum(result.rejected.counts.values()):,} layouts not taken on {result.world_size:,} devices", title_justify="left")
    table.add_column("layouts", justify="right")
    table.add_column("reason, and an example", overflow="fold")
    ordered = sorted(result.rejected.counts.items(), key=lambda pair: -pair[1])
    for name, count in ordered[:SHOWN_REASONS]:
        table.add_row(f"{count:,}", result.rejected.examples[name])
    if rest := ordered[SHOWN_REASONS:]:
        table.add_row(f"{sum(count for _, count in rest):,}", f"{len(rest)} other reasons: --json has them all")
    return table


def _money(plan: Plan, one: Planned) -> Table:
    found = plan.money(one)
    table = Table(title=f"the best one: {one.candidate} on {one.candidate.layout.world_size:,} devices", title_justify="left")
    for heading in ("", "expected", "slow end", "fast end"):
        table.add_column(heading, justify="right" if heading else "left")
    ends = [found[end] for end in ("expected", "slow", "fast")]
    rows = {
        "days": [counted(money.hours / 24, "{:.1f}") for money in ends],
        "device-hours": [counted(money.device_hours, "{:,.0f}") for money in ends],
        "goodput": [f"{money.goodput:.1%}" for money in ends],
        "dollars": [counted(money.dollars, "${:,.0f}") for money in ends],
        "dollars a million tokens": [counted(money.per_million_tokens, "${:.3f}") for money in ends],
        "save every": [f"{money.save_every_steps:,} steps ({money.save_every_seconds / 60:.1f} min)" for money in ends],
        "a checkpoint": [f"{money.checkpoint_bytes / 1e9:,.0f} GB, written in {money.write_seconds:.0f} s" for money in ends],
        "expected failures": [f"{money.failures:.1f}" if money.goodput else "faster than restarts" for money in ends],
        "hours saving, replaying, restarting": [
            f"{money.saving_hours:.1f}, {money.replayed_hours:.1f}, {money.restarting_hours:.1f}" if money.goodput else "never done" for money in ends
        ],
    }
    for name, texts in rows.items():
        table.add_row(name, *texts)
    return table
