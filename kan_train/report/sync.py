"""metrics.jsonl, the ledger's events and the results of `kan evaluate` replayed into W&B, once: RUN/wandb_sync.json says how far it came.

W&B keeps what it was sent. So a row is sent only when no restart can throw it away any more: all of a finished run, else those up to the newest
checkpoint. W&B's step is the number of the row's line, as in accounting/sinks/wandb.py, whose names and run id are used here.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kan_train.accounting.lines import Row, read_lines
from kan_train.accounting.sinks.jsonl import METRICS
from kan_train.accounting.sinks.wandb import RUN_ID, begin, count_event, end, log, logged_lines, set_logged_lines, shown_row
from kan_train.config import Config, ConfigError
from kan_train.evaluation.results import digest_of, evaluations_of, shown
from kan_train.report.history import History, read_history
from kan_train.report.rows import LINEAGE, Column, counting

MARKER = "wandb_sync.json"
"""How far the last call came, in the run directory."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """How far a run is in W&B."""

    lines: int = 0
    """Lines of metrics.jsonl that are done with, sent or not."""
    rows: int = 0
    """Rows that were sent."""
    events: int = 0
    """Events of the ledger that the summary has."""
    evaluations: str = ""
    """Digest of the results of `kan evaluate` that it has."""
    pending: str | None = None
    """Folder of an offline run that is not whole: a call was broken off, and its rows are sent again from the beginning of that call."""


@dataclass(frozen=True, kw_only=True)
class Sending:
    """What a call has to do."""

    rows: list[tuple[int, Row]]
    """Number of the line, and what is to be added to its row."""
    lines: int
    """Lines of metrics.jsonl that are done with then."""
    held_back: int
    """Rows that a restart could still throw away."""
    thrown_away: int
    """Rows that were sent, and have been thrown away since."""


def sync(run_dir: Path, *, online: bool, project: str | None = None, entity: str | None = None) -> str:
    """Send what W&B does not have of the run in `run_dir`; returns a line that says what was done.

    online: to the server (raises what W&B does where it cannot); else into RUN/wandb, for `wandb sync`. project, entity: instead of the run's settings.
    ConfigError where the run has not begun, or where it was trained with W&B, which has its rows.
    """
    history = read_history(run_dir)
    sent = _sent(run_dir, online)
    if sent.pending is not None:
        shutil.rmtree(run_dir / "wandb" / sent.pending, ignore_errors=True)
        sent = replace(sent, pending=None)
    sending, results = _sending(history, sent), evaluations_of(run_dir)
    digest = digest_of(results) if results else ""
    told = _told(sending)
    if not sending.rows and sent.events == len(history.ledger) and sent.evaluations == digest:
        return f"{history.name}: nothing new{told}"
    config = history.config or Config()
    config.logging.wandb_project, config.logging.wandb_entity = project or config.logging.wandb_project, entity or config.logging.wandb_entity
    run = begin(run_dir, history.name, config, online=online)
    # The server knows better than a file here what it has: of a call that was broken off, or of a training that logged by itself.
    first = run.step if online else 0
    folder = Path(run.dir).parent
    _write(run_dir, replace(sent, pending=None if online else folder.name))
    count, whole = 0, False
    try:
        for line, row in _rows(history, sending):
            if line >= first:
                log(run, row, line)
                count += 1
        run.summary.update(_totals(history) | {name: value for result in results for name, value in shown(result).items()})
        whole = True
    finally:
        end(run, exit_code=0 if whole else 1)
    set_logged_lines(run_dir, max(logged_lines(run_dir) or 0, sending.lines))
    _write(run_dir, Sent(lines=sending.lines, rows=sent.rows + len(sending.rows), events=len(history.ledger), evaluations=digest))
    where = run.url if online else f"into {folder}; to upload it: wandb sync {folder}"
    return f"{history.name}: {count:,} rows {where}{told}"


def _sent(run_dir: Path, online: bool) -> Sent:
    path = run_dir / MARKER
    if path.exists():
        try:
            return Sent(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} is damaged ({error}); remove it together with {run_dir / RUN_ID} to send the run anew, under another id") from error
    if not online and logged_lines(run_dir) != 0:
        raise ConfigError(
            f"{run_dir} was trained with logging.wandb, and W&B has its rows: `wandb sync {run_dir / 'wandb'}/offline-run-*` uploads what is offline; "
            f"to send it anew under another id remove {run_dir / RUN_ID}"
        )
    return Sent()


def _write(run_dir: Path, sent: Sent) -> None:
    draft = run_dir / f".{MARKER}"
    draft.write_text(json.dumps(asdict(sent)) + "\n")
    draft.replace(run_dir / MARKER)


def _sending(history: History, sent: Sent) -> Sending:
    columns = _lineage(history.run_dir / METRICS)
    counts = counting(columns)
    lines = np.flatnonzero(counts)
    device_seconds, dollars, _ = history.spending.at_steps(*(columns[name][counts] for name in ("segment", "rewinds", "step")))
    last = np.inf if history.status == "finished" else max((row["saved_step"] for row in history.ledger if row["event"] == "saved"), default=0)
    # Steps that were saved by a start which was killed before it could write them down are never told: they cost what was spent before them.
    told = np.isfinite(device_seconds) | (columns["segment"][counts] < history.last["segment"])
    device_seconds, dollars = (np.maximum.accumulate(np.nan_to_num(spent)) for spent in (device_seconds, dollars))
    final = (columns["step"][counts] <= last) & told
    until = int(final.argmin()) if not final.all() else len(final)
    events = _events(history, device_seconds[:until])
    rows = []
    for number in range(until):
        if lines[number] < sent.lines:
            continue
        cost: Row = {"cost/device_hours": device_seconds[number] / 3600}
        if history.spending.has_dollars:
            cost["cost/spent_usd"] = dollars[number]
        rows.append((int(lines[number]), cost | events[number]))
    done = len(counts) if until == len(lines) else int(lines[until])
    return Sending(
        rows=rows, lines=max(done, sent.lines), held_back=len(lines) - until, thrown_away=max(0, sent.rows - int((lines < sent.lines).sum()))
    )


def _lineage(path: Path) -> dict[str, Column]:
    columns: dict[str, list[float]] = {name: [] for name in LINEAGE}
    for row in read_lines(path):
        for name, column in columns.items():
            column.append(row.get(name, 0))
    return {name: np.array(column, dtype=float) for name, column in columns.items()}


def _events(history: History, device_seconds: Column) -> list[Row]:
    """What is told beside each row: the events since the row before."""
    told: list[Row] = [{} for _ in device_seconds]
    for event in history.ledger:
        if event["event"] == "steps":
            continue
        place = int(np.searchsorted(device_seconds, history.spending.at_event(event)[0]))
        if place < len(told):
            count_event(told[place], event["event"], event.get("seconds"))
    return told


def _rows(history: History, sending: Sending) -> Iterator[tuple[int, Row]]:
    """The rows themselves, read one by one: those of a long run fill the memory."""
    wanted = iter(sending.rows)
    line, more = next(wanted, (None, {}))
    for number, row in enumerate(read_lines(history.run_dir / METRICS)):
        if line is None:
            return
        if number < line:
            continue
        own = row["tokens"] - history.tokens_before
        if "cost/spent_usd" in more and own > 0:
            more = more | {"cost/usd_per_million_tokens": 1e6 * more["cost/spent_usd"] / own}
        yield number, shown_row(more | row)
        line, more = next(wanted, (None, {}))


def _totals(history: History) -> dict[str, Any]:
    """The account by now, for W&B's table of runs."""
    account, cost = history.account, history.cost
    totals: dict[str, Any] = {f"cost/bucket/{bucket}_hours": seconds / 3600 for bucket, seconds in account.buckets.items()}
    totals |= {"cost/device_hours": account.device_seconds / 3600, "cost/goodput": account.goodput}
    totals |= {"cost/tokens_retained": account.tokens_retained, "cost/tokens_processed": account.tokens_processed}
    totals |= {f"events/{kind}": number for kind, number in Counter(event["event"] for event in history.ledger if event["event"] != "steps").items()}
    if cost is not None:
        totals |= {"cost/spent_usd": cost.total, "cost/usd_per_million_tokens": cost.per_million_retained}
    return totals


def _told(sending: Sending) -> str:
    held = f"; {sending.held_back:,} rows wait for the next checkpoint, or the end" if sending.held_back else ""
    thrown = f"; {sending.thrown_away:,} rows were thrown away after they were sent, and stay in W&B" if sending.thrown_away else ""
    return held + thrown
