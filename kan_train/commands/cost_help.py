"""What `kan cost` can be asked, and the texts that teach it. Nothing heavy is imported before a command runs."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kan_train.commands.checkpoint_help import AddCommand
from kan_train.commands.cost_plan import add_plan_command
from kan_train.commands.cost_report_help import add_report_commands
from kan_train.commands.cost_table import add_table_command

SHOW_TEXT = """\
Show where every device-second of a run went, and what it cost: buckets that add up to the allocation, dollars, dollars a million tokens.

  kan cost show first                       runs/first, at the price that it recorded (accounting.price)
  kan cost show first --price 2.35          at $2.35 a device-hour
  kan cost show first --price spot          at the price of its device in conf/prices/spot.yaml
  kan cost show first second --json         two runs, for a program

A run that recorded no price is shown without dollars. What was thrown away by restarts and rewinds costs too, but adds no retained tokens.
docs/cost.md says what is in each bucket. `kan cost reprice` sets several prices side by side.
"""

REPRICE_TEXT = """\
Say what a run would have cost at other prices, side by side, without running again. Nothing in the run is changed.

  kan cost reprice first --price spot --price 2.35    beside what it recorded, if it did
  kan cost reprice first second --price on_demand --json

A price is a number of dollars a device-hour, or a name in conf/prices, of which the price of the run's device counts, the newest one.
"""


def add_cost_commands(commands: Any, add_command: AddCommand) -> None:
    """Add `cost` with all its commands to the subparsers `commands`."""
    cost = commands.add_parser("cost", help="what a run cost", description="Where a run's time went, and what its tokens cost.")
    cost.set_defaults(parser=cost)
    group = cost.add_subparsers(title="commands", metavar="COMMAND")

    show = _add(group, add_command, "show", "where the time went, and what it cost", SHOW_TEXT, _show)
    show.add_argument("--price", metavar="NAME|NUMBER", help="price of a device-hour (default: what the run recorded)")
    reprice = _add(group, add_command, "reprice", "what it would have cost at other prices", REPRICE_TEXT, _reprice)
    reprice.add_argument("--price", action="append", required=True, metavar="NAME|NUMBER", help="price of a device-hour; may be repeated")
    add_table_command(group, add_command)
    add_plan_command(group, add_command)
    add_report_commands(group, add_command)


def _add(group: Any, add_command: AddCommand, name: str, help_line: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    parser = add_command(group, name, help_line, text, run)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run, by its name or path")
    parser.add_argument("--root", type=Path, default=Path("runs"), metavar="DIR", help="folder of run directories (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="JSON on standard output instead of tables")
    return parser


def _show(arguments: argparse.Namespace) -> int:
    from kan_train.commands.cost import run_show

    return run_show(arguments.runs, arguments.root, price=arguments.price, as_json=arguments.json)


def _reprice(arguments: argparse.Namespace) -> int:
    from kan_train.commands.cost import run_reprice

    return run_reprice(arguments.runs, arguments.root, prices=arguments.price, as_json=arguments.json)
