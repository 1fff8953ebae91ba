"""Numbers and times as people read them."""

import math
from datetime import UTC, datetime

UNITS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))


def dollars(value: float | None) -> str:
    """$1,234.56, or four digits below $100: a cent of a small run is as telling as a dollar of a large one."""
    if value is None:
        return "-"
    if value >= 1e6:
        return f"${value / 1e6:,.2f}M"
    return f"${value:,.2f}" if value >= 100 or value == 0 else f"${_plain(value)}"


def hours(device_seconds: float) -> str:
    """Device-hours with four digits."""
    value = device_seconds / 3600
    return f"{value:,.0f}" if value >= 1000 or value == 0 else _plain(value)


def count(value: float) -> str:
    """1.2M, 834."""
    for unit, size in UNITS:
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:,.0f}"


def share(part: float, whole: float) -> str:
    """83%, 0.4%; empty of nothing."""
    if not whole:
        return ""
    percent = 100 * part / whole
    return f"{percent:.0f}%" if percent >= 10 or percent == 0 else f"{percent:.1f}%" if percent >= 0.1 else "<0.1%"


def duration(seconds: float) -> str:
    """0.42 s, 12.3 s, 5 min 20 s, 3 h 12 min, 4 d 3 h."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    if seconds < 86400:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
    return f"{int(seconds // 86400)} d {int(seconds % 86400 // 3600)} h"


def moment(seconds: float) -> str:
    """2026-11-28 09:12:03, UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def energy(joules: float) -> str:
    """1.25 kWh, 340 kJ, 12 J."""
    if joules >= 3.6e6:
        return f"{joules / 3.6e6:,.4g} kWh"
    return f"{joules / 1e3:.3g} kJ" if joules >= 1e3 else f"{joules:.3g} J"


def _plain(value: float) -> str:
    """Four significant digits of a positive number without an exponent, from a millionth on."""
    if value < 1e-6:
        return f"{value:.1e}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(value)))}f}" if value >= 0.01 else f"{value:.{2 - math.floor(math.log10(value))}f}"
