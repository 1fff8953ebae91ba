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

    def validate(self) -> None:
        """Raise ConfigError where the price is neither a positive number nor a name; whether it is one of the run's device is known at its start."""
        if self.price is None:
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
