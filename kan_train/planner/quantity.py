"""A number that a plan rests on: its value, how far it may be off, and who says so."""

from dataclasses import dataclass

ENDS = ("slow", "expected", "fast")
"""What a plan is computed at: every quantity at the end that makes training slow, as expected, and at the other end."""
STATUSES = ("measured", "cited", "assumed", "given")
"""measured: by a benchmark of the project; cited: published; assumed: supposed, for a reason that is said; given: by the user."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A value with its interval and its source."""

    value: float
    """As expected."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""
    status: str
    """One of STATUSES."""
    source: str
    """Where it comes from, with a file or a publication."""

    def rate(self, end: str) -> float:
        """Of something that is faster where it is more, such as a bandwidth: the value at one of ENDS."""
        return {"slow": self.low, "expected": self.value, "fast": self.high}[end]

    def burden(self, end: str) -> float:
        """Of something that is slower where it is more, such as a latency: the value at one of ENDS."""
        return {"slow": self.high, "expected": self.value, "fast": self.low}[end]

    def times(self, factor: float) -> "Quantity":
        """In another unit, or of several."""
        return Quantity(value=self.value * factor, low=self.low * factor, high=self.high * factor, status=self.status, source=self.source)

    def as_json(self) -> dict[str, object]:
        """As JSON can hold it."""
        return dict(vars(self))


def given(value: float, source: str) -> Quantity:
    """A number that the user is sure of."""
    return Quantity(value=value, low=value, high=value, status="given", source=source)


def assumed(value: float, low: float, high: float, source: str) -> Quantity:
    """A number that nobody measured here."""
    return Quantity(value=value, low=low, high=high, status="assumed", source=source)
