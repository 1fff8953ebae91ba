"""What a report counts in: dollars where every run has a price, else device-hours."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kan_train.accounting.account import StartAccount
from kan_train.report import text
from kan_train.report.history import History
from kan_train.report.rows import Column


@dataclass(frozen=True)
class Unit:
    """Dollars or device-hours."""

    in_dollars: bool

    @property
    def name(self) -> str:
        """For axes and headings."""
        return "dollars" if self.in_dollars else "device-hours"

    @property
    def a_million(self) -> str:
        """The unit of what a million tokens cost."""
        return "dollars a million tokens" if self.in_dollars else "device-hours a million tokens"

    def of(self, device_seconds: Column, dollars: Column) -> Column:
        """Either, fp64 [rows]."""
        return dollars if self.in_dollars else device_seconds / 3600

    def total(self, history: History) -> float:
        """Of all that the run had."""
        return history.cost.total if self.in_dollars and history.cost is not None else history.account.device_seconds / 3600

    def buckets(self, history: History) -> dict[str, float]:
        """By bucket, over all starts; they add up to `total`."""
        if self.in_dollars and history.cost is not None:
            return history.cost.buckets
        return {bucket: seconds / 3600 for bucket, seconds in history.account.buckets.items()}

    def start_buckets(self, history: History, start: StartAccount, number: int) -> dict[str, float]:
        """By bucket, of start `number`."""
        price = history.spending.prices[number]
        a_second = price.per_second if self.in_dollars and price is not None else 0.0 if self.in_dollars else 1 / 3600
        return {bucket: start.devices * seconds * a_second for bucket, seconds in start.buckets.items()}

    def per_million(self, history: History) -> tuple[float | None, float | None]:
        """A million tokens retained, and processed; None without any."""
        whole, account = self.total(history), history.account
        retained, processed = account.tokens_retained, account.tokens_processed
        return 1e6 * whole / retained if retained else None, 1e6 * whole / processed if processed else None

    def text(self, value: float | None) -> str:
        """For people."""
        if value is None:
            return "-"
        return text.dollars(value) if self.in_dollars else f"{text.hours(3600 * value)} h"

    def axis(self, values: Column | list[float]) -> dict[str, Any]:
        """How Plotly writes the ticks of an axis that shows `values`."""
        finite = np.asarray(values, dtype=float)
        finite = finite[np.isfinite(finite)]
        largest = float(np.max(np.abs(finite))) if len(finite) else 0.0
        # Plotly's own prefixes would write a small sum as "$120 micro".
        decimals = 0 if not largest else max(0, min(9, 2 - math.floor(math.log10(largest))))
        form = {"tickformat": f",.{decimals}~f"} if largest < 1e5 else {"exponentformat": "B"}
        return form | {"tickprefix": "$" if self.in_dollars else ""}


def unit_of(histories: list[History]) -> Unit:
    """Dollars where all have a price."""
    return Unit(all(history.cost is not None for history in histories))
