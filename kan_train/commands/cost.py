"""`kan cost show` and `kan cost reprice`: a run's account as tables for people, or as JSON for programs."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kan_train.accounting.account import Account, account_as_json, read_account
from kan_train.accounting.ledger import LEDGER
from kan_train.accounting.money import Cost, cost_of
from kan_train.config.errors import ConfigError

RECORDED = "recorded"
"""What the prices that a run recorded are called beside others."""


def run_show(runs: Sequence[str], root: Path, *, price: str | None, as_json: bool) -> int:
    """Print the account of every run, and a comparison where there are several. Returns the exit status."""
    accounts = {run_directory_of(run, root): None for run in runs}
    found = {run_dir: read_account(run_dir) for run_dir in accounts}
    costs = {run_dir: _cost(account, price) for run_dir, account in found.items()}
    if as_json:
        _print_json([_json(run_dir, account) | {"cost": None if (cost := costs[run_dir]) is None else cost.as_json()} for run_dir, account in found.items()])
        return 0
    console = Console(highlight=False)
    for run_dir, account in found.items():
        console.print(_buckets(run_dir.name, account, costs[run_dir]))
        _print_totals(console, account, costs[run_dir])
    if len(found) > 1:
        console.print(_comparison({run_dir.name: (found[run_dir], costs[run_dir]) for run_dir in found}))
    return 0


def run_reprice(runs: Sequence[str], root: Path, *, prices: Sequence[str], as_json: bool) -> int:
    """Print what every run would have cost at each of `prices`, beside what it recorded. Returns the exit status."""
    report = []
    tables = []
    for run_dir in {run_directory_of(run, root): None for run in runs}:
        account = read_account(run_dir)
        recorded = _cost(account, None)
        costs = ({RECORDED: recorded} if recorded is not None else {}) | {price: cost_of(account, price) for price in prices}
        report.append(_json(run_dir, account) | {"costs": {name: cost.as_json() for name, cost in costs.items()}})
        tables.append(_prices(run_dir.name, costs))
    if as_json:
        _print_json(report)
        return 0
    console = Console(highlight=False)
    for table in tables:
        console.print(table)
    return 0


def run_directory_of(run: str, root: Path) -> Path:
    """The directory of `run`, its path or its name below `root`; ConfigError, with the runs there are, where it is none."""
    for path in (Path(run), root / run):
        if (path / LEDGER).is_file():
            return path
    there = ", ".join(sorted(path.parent.name for path in root.glob(f"*/{LEDGER}"))) or "none: `kan train` makes one"
    raise ConfigError(f"{run!r} is not a run with a {LEDGER}; use the path of a run directory, --root DIR, or one of the runs in {root} ({there})")


def _cost(account: Account, price: str | None) -> Cost | None:
    """At `price`, or at what was recorded; None where nothing was."""
    if price is None and any(start.price is None for start in account.starts if start.device_seconds):
        return None
    return cost_of(account, price)


def _json(run_dir: Path, account: Account) -> dict[str, object]:
    return {"run": str(run_dir)} | account_as_json(account)


def _print_json(report: object) -> None:
    print(json.dumps(report, indent=1))


def _buckets(name: str, account: Account, cost: Cost | None) -> Table:
    table = Table(title=f"run {name}", title_justify="left")
    for heading, right in (("bucket", False), ("device-hours", True), ("share", True), ("dollars", True)):
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    whole = account.device_seconds
    for bucket, seconds in account.buckets.items():
        share = seconds / whole if whole else 0.0
        table.add_row(bucket, _hours(seconds), f"{share:.2%}", _dollars(None if cost is None else cost.buckets[bucket]))
    table.add_section()
    table.add_row("all", _hours(whole), "100.00%" if whole else "", _dollars(None if cost is None else cost.total), style="bold")
    return table


def _print_totals(console: Console, account: Account, cost: Cost | None) -> None:
    grid = Table.grid(padding=(0, 2))
    kinds = sorted({f"{start.devices} x {start.device or 'unknown'}" for start in account.starts})
    grid.add_row("devices", ", ".join(kinds))
    grid.add_row("starts", f"{len(account.starts)} ({', '.join(start.status for start in account.starts[-8:])}), {account.rewinds} rewinds")
    grid.add_row("steps", f"{account.steps_retained:,} retained of {account.steps_processed:,} done")
    grid.add_row("tokens", f"{account.tokens_retained:,} retained of {account.tokens_processed:,} processed")
    grid.add_row("goodput", f"{account.goodput:.2%} of the device-seconds in steps that were retained")
    if cost is None:
        grid.add_row("price", "none recorded; give one with --price NAME or a number of dollars a device-hour")
    else:
        grid.add_row("price", "; ".join(price.text() for price in cost.prices))
        grid.add_row("dollars", f"{_dollars(cost.total)} in all")
        grid.add_row("a million tokens", f"{_dollars(cost.per_million_retained)} retained, {_dollars(cost.per_million_processed)} processed")
    console.print(grid, markup=False)
    console.print()


def _comparison(runs: dict[str, tuple[Account, Cost | None]]) -> Table:
    table = _money_table("run", "device-hours", "goodput")
    for name, (account, cost) in runs.items():
        table.add_row(name, _hours(account.device_seconds), f"{account.goodput:.2%}", *_money(cost))
    return table


def _prices(name: str, costs: dict[str, Cost]) -> Table:
    table = _money_table("price", "a device-hour", title=f"run {name}")
    for choice, cost in costs.items():
        hourly = sorted({price.per_device_hour for price in cost.prices})
        table.add_row(choice, ", ".join(f"${number:g}" for number in hourly), *_money(cost))
    return table


def _money_table(first: str, *others: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for heading in (*others, "dollars", "$/M retained", "$/M processed"):
        table.add_column(heading, justify="right")
    return table


def _money(cost: Cost | None) -> tuple[str, str, str]:
    return ("-", "-", "-") if cost is None else (_dollars(cost.total), _dollars(cost.per_million_retained), _dollars(cost.per_million_processed))


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.4f}"


def _dollars(value: float | None) -> str:
    if value is None:
        return "-"
    # A cent of a small run is as telling as a dollar of a large one.
    return f"${value:,.2f}" if value >= 100 or value == 0 else f"${value:.4g}"
