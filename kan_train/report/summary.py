"""What stands above the figures of a report: a sentence, the totals, and the facts of a run."""

from collections.abc import Sequence
from typing import Any

from kan_train.report import text
from kan_train.report.history import History
from kan_train.report.unit import Unit


def lead_of(histories: Sequence[History], unit: Unit) -> str:
    """The report in a sentence or two."""
    if len(histories) == 1:
        history = histories[0]
        retained, account = unit.per_million(history)[0], history.account
        if retained is None:
            return f"No step is done yet; {unit.text(unit.total(history))} spent so far."
        lost = account.tokens_processed - account.tokens_retained
        thrown = f", {text.count(lost)} more were thrown away" if lost else ""
        return (
            f"{text.count(account.tokens_retained)} tokens for {unit.text(unit.total(history))}: {unit.text(retained)} a million retained tokens{thrown}. "
            f"{text.share(account.buckets['step'], account.device_seconds)} of the device time went into steps that count."
        )
    priced = [(per_million, history.name) for history in histories if (per_million := unit.per_million(history)[0]) is not None]
    if len(priced) < 2:
        return f"{len(histories)} runs, {unit.text(sum(map(unit.total, histories)))} together."
    (low, cheapest), (high, dearest) = min(priced), max(priced)
    return (
        f"{len(histories)} runs, {unit.text(sum(map(unit.total, histories)))} together. A million retained tokens cost {unit.text(low)} in {cheapest}"
        + (f" and {unit.text(high)} in {dearest}, {high / low:.3g} times as much." if high > low else ".")
    )


def tiles_of(histories: Sequence[History], number: int, unit: Unit) -> list[dict[str, str]]:
    """The totals of run `number` of those shown: label, value and a smaller line below it; the same labels for all of them."""
    history = histories[number]
    account, metrics = history.account, history.metrics
    retained, processed = unit.per_million(history)
    hours = f"{text.hours(account.device_seconds)} h"
    speed = _median_speed(history)
    mfu = metrics.last("mfu")
    steps = history.config.train.steps if history.config is not None else None
    tiles = [_tile("spent", text.dollars(history.cost.total), f"{hours} of devices")] if unit.in_dollars and history.cost is not None else []
    tiles += [
        _tile("a million tokens retained", unit.text(retained), f"{unit.text(processed)} processed"),
        _tile("device-hours", hours, f"{history.devices}"),
        _tile("tokens retained", text.count(account.tokens_retained), f"{text.count(account.tokens_processed)} processed"),
        _tile("steps", text.count(account.steps_retained), "" if steps is None else f"of {steps:,}"),
        _tile("goodput", f"{account.goodput:.1%}", "of device time in retained steps"),
        _tile("tokens a second", "-" if speed is None else text.count(speed), "median, all devices" if mfu is None else f"MFU {mfu:.1%}"),
    ]
    loss = metrics.last("validation/loss")
    tiles.append(_tile("validation loss", "-" if loss is None else f"{loss:.4f}", "nats a token" if loss is not None else "none yet"))
    if any(one.metrics.has("energy/joules") for one in histories):
        joules, per_token = metrics.last("energy/joules"), metrics.last("energy/joules_per_token")
        tiles.append(_tile("energy", "-" if joules is None else text.energy(joules), "" if per_token is None else f"{per_token:.3g} J a token"))
    return tiles


def facts_of(history: History) -> list[tuple[str, str]]:
    """What the run is, on what, at which price."""
    account, config = history.account, history.config
    facts = []
    if config is not None:
        model = config.model
        groves = f", {model.grove.num_groves} groves of which a token runs {model.grove.active_groves}" if model.has_groves else ""
        facts.append(("model", f"{model.name}: {model.num_layers} layers, width {model.width}, context {model.sequence_length:,}{groves}"))
        train = config.train
        batch = f"{train.global_batch_size:,} sequences ({text.count(train.global_batch_size * model.sequence_length)} tokens)"
        facts.append(("training", f"{train.steps:,} steps of {batch}, {train.precision}"))
        facts.append(("layout", history.layout))
    facts.append(("devices", history.devices or "none"))
    starts = ", ".join(start.status for start in account.starts[-6:])
    facts.append(("starts", f"{len(account.starts)} ({'... ' if len(account.starts) > 6 else ''}{starts}), {account.rewinds} rewinds"))
    facts.append(("time", f"{text.moment(account.starts[0].started)} to {text.moment(history.last['time'])} UTC"))
    thrown = account.steps_processed - account.steps_retained
    facts.append(("steps", f"{account.steps_retained:,} retained of {account.steps_processed:,} done" + (f", {thrown:,} thrown away" if thrown else "")))
    executed, nominal = history.metrics.last("sparsity/executed_flops_share"), history.metrics.last("sparsity/nominal")
    if executed is not None and nominal is not None:
        facts.append(("sparsity", f"{nominal:.1%} of the groves asleep; {executed:.1%} of the FLOPs of all groves active are executed"))
    if history.cost is None:
        facts.append(("price", "none recorded"))
    facts += [("price", f"{price.text()}; {price.provider}; source: {price.source}") for price in (history.cost.prices if history.cost is not None else ())]
    return facts


def _tile(label: str, value: str, more: str) -> dict[str, Any]:
    return {"label": label, "value": value, "more": more}


def _median_speed(history: History) -> float | None:
    speeds = history.metrics.columns["tokens_per_second"]
    finite = sorted(speeds[speeds == speeds].tolist())
    return finite[len(finite) // 2] if finite else None
