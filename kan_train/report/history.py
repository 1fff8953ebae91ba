"""A run directory as what its report shows: facts, account, cost, columns of metrics and events."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kan_train.accounting.account import Account, account_as_json, account_of
from kan_train.accounting.allocation import read_attempts
from kan_train.accounting.ledger import LEDGER, read_ledger
from kan_train.accounting.lines import Row
from kan_train.accounting.money import Cost, cost_of
from kan_train.accounting.sinks.jsonl import METRICS
from kan_train.config import Config, ConfigError
from kan_train.config.layout import layout_of
from kan_train.report.events import Event, events_of
from kan_train.report.rows import Column, Metrics, MetricsReader
from kan_train.report.spending import Spending

SILENT_SECONDS = 120.0
"""A run without an end whose ledger is silent for longer counts as killed: it writes every 10 s while it steps."""


@dataclass(frozen=True, kw_only=True)
class History:
    """All of a run by now."""

    run_dir: Path
    name: str
    config: Config | None
    """As it was started the last time; None where config.yaml is missing or of another version."""
    ledger: Sequence[Row]
    attempts: Sequence[Row]
    account: Account
    spending: Spending
    cost: Cost | None
    """At the price asked for, else at those recorded; None where a start recorded none."""
    metrics: Metrics

    @cached_property
    def events(self) -> list[Event]:
        """What happened, oldest first."""
        return events_of(self.ledger, self.attempts, self.spending)

    @cached_property
    def spent(self) -> tuple[Column, Column, Column]:
        """Device-seconds, dollars and time when each row of `metrics` was done; NaN where the ledger does not know it yet."""
        columns = self.metrics.columns
        return self.spending.at_steps(columns["segment"], columns["rewinds"], columns["step"])

    @cached_property
    def tokens_before(self) -> int:
        """Tokens that the run had when it began: those of the run that it branched from, which paid for them."""
        beginnings = [row for row in self.ledger if row["event"] == "segment_start" and not row["origin"].startswith("resumed")]
        return beginnings[-1]["tokens"] if beginnings else 0

    @property
    def last(self) -> Row:
        """The newest event of the ledger."""
        return self.ledger[-1]

    @property
    def status(self) -> str:
        """starting, running, or what the account says of the last start: finished, interrupted, failed, hung, killed or never began."""
        status = self.account.starts[-1].status
        if status == "never began" and self.attempts[-1]["event"] in ("started", "submitted"):
            return "starting"
        return "running" if status == "killed" and time.time() - self.last["time"] < SILENT_SECONDS else status

    @property
    def layout(self) -> str:
        """tp2-dp2-zero1, as tables of layouts write it; empty where the configuration is not there."""
        return "" if self.config is None else str(layout_of(self.config, self.last["world_size"]))

    @property
    def devices(self) -> str:
        """8 x NVIDIA H200; several where starts had others."""
        kinds = dict.fromkeys(f"{start.devices} x {start.device or 'unknown'}" for start in self.account.starts if start.devices)
        return ", ".join(kinds)

    def as_json(self) -> dict[str, Any]:
        """What `kan cost show --json` says of the run."""
        return {"run": str(self.run_dir)} | account_as_json(self.account) | {"cost": None if self.cost is None else self.cost.as_json()}


class HistoryReader:
    """Reads a run directory as often as it is asked to; of metrics.jsonl only what is new."""

    def __init__(self, run_dir: Path, price: str | None = None) -> None:
        """price: a number of dollars a device-hour or a name in conf/prices, instead of what the run recorded."""
        self.run_dir, self.price = run_dir, price
        self._metrics = MetricsReader(run_dir / METRICS)

    def read(self) -> History | None:
        """The run by now; None where it has not begun. ConfigError where a file of it is damaged, or the price is of other devices."""
        ledger = read_ledger(self.run_dir / LEDGER)
        if not ledger:
            return None
        attempts = read_attempts(self.run_dir)
        account = account_of(ledger, attempts)
        spending = Spending(account, ledger, attempts, self.price)
        return History(
            run_dir=self.run_dir,
            name=self.run_dir.resolve().name,
            config=_config(self.run_dir),
            ledger=ledger,
            attempts=attempts,
            account=account,
            spending=spending,
            cost=cost_of(account, self.price) if spending.has_dollars else None,
            metrics=self._metrics.read(),
        )


def read_history(run_dir: Path, price: str | None = None) -> History:
    """The run in `run_dir`; ConfigError where it has no ledger, or the price is of other devices."""
    history = HistoryReader(run_dir, price).read()
    if history is None:
        raise ConfigError(f"{run_dir / LEDGER} has no events yet: the run has not begun to train; `kan train run.name={run_dir.name}` starts it")
    return history


def _config(run_dir: Path) -> Config | None:
    from kan_train.config.compose import from_yaml

    try:
        return from_yaml((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ConfigError, UnicodeDecodeError):
        return None
