"""What a run cost in dollars, from its account and a price: the recorded one, or any other, without running again."""

from dataclasses import dataclass
from typing import Any

from kan_train.accounting.account import BUCKETS, Account
from kan_train.accounting.prices import Price, chosen_price
from kan_train.config.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Dollars of a run."""

    prices: tuple[Price, ...]
    """Those that were used, each once."""
    buckets: dict[str, float]
    """Dollars by bucket."""
    total: float
    """Dollars of all device-seconds."""
    per_million_processed: float | None
    """Dollars a million tokens of all steps that were done; None without any."""
    per_million_retained: float | None
    """Dollars a million tokens of the steps that were not thrown away: what the model cost; None without any."""

    def as_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        names = ("buckets", "total", "per_million_processed", "per_million_retained")
        return {"prices": [price.as_row() for price in self.prices]} | {name: getattr(self, name) for name in names}


def cost_of(account: Account, choice: str | None = None) -> Cost:
    """What `account` cost: at `choice`, a number of dollars a device-hour or the name of a group of prices, or at what each start recorded.

    ConfigError where a start recorded none, or where the group has no price of its device.
    """
    used: list[Price] = []
    buckets = dict.fromkeys(BUCKETS, 0.0)
    total = 0.0
    for start in account.starts:
        if not start.device_seconds:
            continue  # nothing to pay for, whatever the price
        price = start.price if choice is None else chosen_price(choice, start.device, setting="--price")
        if price is None:
            raise ConfigError(
                f"start {start.segment} of the run recorded no price; use --price with a name or a number of dollars a device-hour, "
                "and accounting.price for runs to come"
            )
        if price not in used:
            used.append(price)
        total += start.device_seconds * price.per_second
        for bucket, seconds in start.buckets.items():
            buckets[bucket] += start.devices * seconds * price.per_second
    processed, retained = account.tokens_processed, account.tokens_retained
    return Cost(
        prices=tuple(used),
        buckets=buckets,
        total=total,
        per_million_processed=1e6 * total / processed if processed else None,
        per_million_retained=1e6 * total / retained if retained else None,
    )
