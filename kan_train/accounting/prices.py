"""What an hour of a device costs: dated entries in conf/prices, each with its provider and source. A price is never guessed.

conf/prices/NAME.yaml is a group of entries that belong together, one a device and date; `accounting.price=NAME` and `--price NAME` take from it the
one of the run's device. Prices there are snapshots: what you pay is a number, accounting.price=2.35.
"""

import itertools
import math
from dataclasses import dataclass, fields
from datetime import date
from functools import lru_cache
from importlib import resources
from typing import Any

from kan_train.config.accounting import price_names
from kan_train.config.errors import ConfigError, require_choice

KINDS = ("on_demand", "reserved", "spot", "assumed")
"""assumed: nobody's offer, but what a calculation supposes."""

CURRENCIES = ("USD",)

OWN = "your own"
"""Name of the group of a price that was given as a number."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """What one device costs an hour, as of a day."""

    name: str
    """The group: the file's name in conf/prices, or `OWN`."""
    device: str
    """As the driver reports it (see accounting/peaks.py)."""
    provider: str
    """Who offers it."""
    kind: str
    """One of KINDS."""
    currency: str
    """One of CURRENCIES."""
    per_device_hour: float
    """Units of the currency for one device and one hour; positive."""
    date: date
    """Day from which on it is used: of the offer, or of the note where the source names no day."""
    source: str
    """Where the number comes from."""

    def __post_init__(self) -> None:
        where = f"price {self.name!r} of {self.device!r}"
        for name in ("device", "provider", "source"):
            if not isinstance(value := getattr(self, name), str) or not value.strip():
                raise ConfigError(f"{where}: {name}={value!r} must be text")
        require_choice(f"{where}: kind", self.kind, KINDS)
        require_choice(f"{where}: currency", self.currency, CURRENCIES)
        if type(self.date) is not date:
            raise ConfigError(f"{where}: date={self.date!r} must be a day such as 2026-11-28")
        number = self.per_device_hour
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number) or number <= 0:
            raise ConfigError(f"{where}: per_device_hour={number!r} must be a positive number such as 2.95")

    @property
    def per_second(self) -> float:
        """Units of the currency for one device and one second."""
        return self.per_device_hour / 3600

    def text(self) -> str:
        """In a line, for people."""
        if self.name == OWN:
            return f"${self.per_device_hour:g} a device-hour ({self.source})"
        return f"${self.per_device_hour:g} a device-hour ({self.name}: {self.kind.replace('_', ' ')}, {self.date})"

    def as_row(self) -> dict[str, Any]:
        """As JSON can hold it; `price_from_row` gives it back."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"date": self.date.isoformat()}


def price_from_row(row: dict[str, Any]) -> Price:
    """The price that `Price.as_row` told of, for example in a ledger."""
    return Price(**row | {"date": date.fromisoformat(row["date"])})


@lru_cache(maxsize=1)
def prices() -> tuple[Price, ...]:
    """Every shipped entry, by group, device and date; ConfigError naming the file of one that is wrong."""
    found: list[Price] = []
    folder = resources.files("kan_train.conf").joinpath("prices")
    for name in price_names():
        found += parse_prices(name, folder.joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    return tuple(found)


def parse_prices(name: str, text: str) -> list[Price]:
    """The entries of a file conf/prices/`name`.yaml, sorted by device and date; ConfigError that names the file where one is wrong."""
    import yaml

    where, known = f"conf/prices/{name}.yaml", {field.name for field in fields(Price)} - {"name"}
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from error
    if not isinstance(tree, dict) or set(tree) != {"entries"} or not isinstance(tree["entries"], list) or not tree["entries"]:
        raise ConfigError(f"{where} must hold one list, `entries:`, with at least one entry")
    found = []
    for number, entry in enumerate(tree["entries"], start=1):
        names = set(entry) if isinstance(entry, dict) else set()
        if names != known:
            wrong = ", ".join(sorted(str(one) for one in names ^ known))
            raise ConfigError(f"{where}, entry {number}: what is missing or not known is {wrong}; an entry has {', '.join(sorted(known))}")
        try:
            found.append(Price(name=name, **entry))
        except ConfigError as error:
            raise ConfigError(f"{where}, entry {number}: {error}") from error
    found.sort(key=lambda price: (price.device, price.date))
    for one, other in itertools.pairwise(found):
        if (one.device, one.date) == (other.device, other.date):
            raise ConfigError(f"{where} has two entries of {one.device} on {one.date}; put the second into a file of its own")
    return found


def price_of(device: str, *, kind: str | None = None, name: str | None = None, on: date | None = None) -> Price:
    """The newest shipped price of a device, by `kind`, by the group's `name`, or both, as of the day `on` (unset: the newest there is).

    ConfigError, with what there is, where none fits, or where several of one day do and only a name can tell them apart.
    """
    if kind is not None:
        require_choice("kind", kind, KINDS)
    if name is not None:
        require_choice("price", name, price_names())
    of_device = [price for price in prices() if price.device == device]
    fitting = [price for price in of_device if kind in (None, price.kind) and name in (None, price.name) and (on is None or price.date <= on)]
    asked = "".join([f" of kind {kind}" if kind else "", f" in {name}" if name else "", f" as of {on}" if on else ""])
    if not fitting:
        raise ConfigError(f"there is no price of {device!r}{asked}; {_what_there_is(device, of_device)}")
    newest = [price for price in fitting if price.date == max(other.date for other in fitting)]
    if len(newest) > 1:
        raise ConfigError(f"several prices of {device!r}{asked} are of one day; choose by name: {_listed(newest)}")
    return newest[0]


def chosen_price(text: str, device: str, *, on: date | None = None, setting: str = "price") -> Price:
    """What a user's choice means for a device: a number of dollars a device-hour, or the name of a group in conf/prices.

    setting: where the choice was made, for the error; on: the day whose price counts.
    """
    number = _number(text)
    if number is None:
        try:
            return price_of(device, name=text, on=on)
        except ConfigError as error:
            raise ConfigError(f"{setting}={text}: {error}") from error
    if not math.isfinite(number) or number <= 0:
        raise ConfigError(f"{setting}={text} must be a positive number of dollars a device-hour, or one of {', '.join(price_names())}; use {setting}=2.35")
    return Price(
        name=OWN, device=device, provider=OWN, kind="assumed", currency="USD", per_device_hour=number, date=on or date.today(), source=f"{setting}={text}"
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _what_there_is(device: str, of_device: list[Price]) -> str:
    if of_device:
        return f"there is {_listed(of_device)}; or give a number of dollars a device-hour"
    devices = ", ".join(sorted({price.device for price in prices()}))
    return f"give a number of dollars a device-hour; conf/prices knows {devices}"


def _listed(found: list[Price]) -> str:
    return ", ".join(f"{price.name} ({price.kind}, ${price.per_device_hour:g}, {price.date})" for price in found)
