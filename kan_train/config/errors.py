"""The error every bad setting raises: it names the setting and a value that would work."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting is wrong; the message names it and a value that would work. Raised before any device time is spent."""


def require_choice(setting: str, value: str, choices: Iterable[str]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    options = tuple(choices)
    if value not in options:
        guess = difflib.get_close_matches(value, options, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{setting}={value!r} is not known; use {setting}={guess}, or another one of: {', '.join(options)}")


def require_at_least(setting: str, value: float, least: float) -> None:
    """Raise ConfigError unless `value` >= `least`."""
    if value < least:
        raise ConfigError(f"{setting}={value} is too small; use {setting}={least} or more")


def require_between(setting: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless low <= value <= high."""
    if not low <= value <= high:
        raise ConfigError(f"{setting}={value} must lie between {low} and {high}; use {setting}={min(max(value, low), high)}")
