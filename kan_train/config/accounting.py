"""What a run's time costs."""

import math
from dataclasses import dataclass
from importlib import resources

from kan_train.config.errors import ConfigError, require_choice


@dataclass(kw_only=True)
class AccountingConfig:
    """What a run's time costs."""

    price: str | None = None
    """What a device costs, recorded at every start: dollars a device-hour, or the name of a file in conf/prices, whose price of the run's device is
    taken. Unset: none is recorded, and `kan cost show --price` says later what it cost."""

    budget_usd: float | None = None
    """Dollars that the run may cost, all its starts; needs a price. The run warns as the forecast of its end crosses it, and is saved and stopped before it
    does. Unset: no limit."""
    budget_hours: float | None = None
    """The same in device-hours."""

    def validate(self) -> None:
        """Raise ConfigError where the price is neither a positive number nor a name, or where a budget is none or cannot be counted.

        Whether the price is one of the run's device is known at its start.
        """
        for setting in ("budget_usd", "budget_hours"):
            value = getattr(self, setting)
            if value is not None and not value > 0:
                raise ConfigError(f"accounting.{setting}={value:g} would end the run before it began; use accounting.{setting}=100, or null for no limit")
        if self.price is None:
            if self.budget_usd is not None:
                raise ConfigError(
                    f"accounting.budget_usd={self.budget_usd:g} needs accounting.price, which says what a device costs an hour; "
                    "use accounting.price=2.35, or accounting.budget_hours in its place"
                )
            return
        try:
            number = float(self.price)
        except ValueError:
            require_choice("accounting.price", self.price, price_names())
            return
        if not math.isfinite(number) or number <= 0:
            raise ConfigError(f"accounting.price={self.price} must be a positive number of dollars a device-hour; use accounting.price=2.35, or null")


def price_names() -> list[str]:
    """Names of the files in conf/prices."""
    folder = resources.files("kan_train.conf").joinpath("prices")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
