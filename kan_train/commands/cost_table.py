"""`kan cost table`: the paper's table of a 340B model, every number with where it comes from."""

import argparse
import sys
from pathlib import Path
from typing import Any

from kan_train.commands.checkpoint_help import AddCommand

TABLE_TEXT = """\
Print the paper's table of a 340B model: what its numbers rest on, where they contradict each other, and a verdict on each claim.

  kan cost table                          the page, as Markdown
  kan cost table --cell set_b.kan.cost    one number: formula, inputs, price entry, source
  kan cost table --set dense.mfu=0.38     with another value of a cited or assumed number; may be repeated
  kan cost table --write docs             docs/cost-table.md, .json, .svg and .html, byte for byte the same each time
  kan cost table --check docs             whether those are what would be written; the exit status is 1 if not

Measured numbers come from the files in --results; without the file a number reads "not measured", and so does what depends on it.
"""


def add_table_command(group: Any, add_command: AddCommand) -> None:
    """Add `table` to the subparsers `group` of `kan cost`."""
    table = add_command(group, "table", "the 340B table, and what holds of it", TABLE_TEXT, _table)
    what = table.add_mutually_exclusive_group()
    what.add_argument("--cell", metavar="NAME", help="one cell, with all it depends on")
    what.add_argument("--write", type=Path, metavar="DIR", help="write the files of the table into DIR")
    what.add_argument("--check", type=Path, metavar="DIR", help="compare the files of the table in DIR")
    table.add_argument("--set", action="append", default=[], metavar="CELL=NUMBER", help="another value of a cited or assumed number; may be repeated")
    where = "folder of benchmark results (default: %(default)s)"
    table.add_argument("--results", type=Path, default=Path("benchmarks/results"), metavar="DIR", help=where)


def _table(arguments: argparse.Namespace) -> int:
    a = arguments
    if a.set and a.write:
        a.parser.error("--set is for looking: what --write leaves must be what conf/table says")
    return run_table(cell=a.cell, write=a.write, check=a.check, settings=a.set, results=a.results)


def run_table(*, cell: str | None, write: Path | None, check: Path | None, settings: list[str], results: Path) -> int:
    """Print, write or compare the table; returns the exit status."""
    from kan_train.config import ConfigError
    from kan_train.planner.paper import build_table, table_files

    if write is not None and not next(folder for folder in (write, *write.parents) if folder.exists()).is_dir():
        raise ConfigError(f"--write {write} must be a folder, and there is a file; use --write docs")
    table = build_table(results=results, changes=dict(_setting(setting) for setting in settings))
    if cell is not None:
        return _print_cell(table, cell)
    files = table_files(table)
    if write is not None:
        write.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (write / name).write_text(text, encoding="utf-8", newline="\n")
            print(f"written: {write / name}")
        return 0
    if check is not None:
        return _compare(files, check)
    print(next(text for name, text in files.items() if name.endswith(".md")), end="")
    return 0


def _setting(text: str) -> tuple[str, float]:
    from kan_train.config import ConfigError

    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise ConfigError(f"--set {text} must be a cell and a number, for example --set dense.mfu=0.38") from error


def _print_cell(table: Any, name: str) -> int:
    from kan_train.config.errors import require_choice
    from kan_train.planner.paper.units import with_interval

    require_choice("--cell", name, tuple(table.cells))
    shown: set[str] = set()

    def show(name: str, depth: int) -> None:
        cell = table.cells[name]
        origin = "; ".join(text for text in (cell.formula, cell.source) if text)
        print(f"{'  ' * depth}{name} = {with_interval(cell)}, {cell.status}: {origin}")
        if name not in shown:
            shown.add(name)
            for other in (other for other in cell.inputs if other in table.cells):
                show(other, depth + 1)

    show(name, 0)
    return 0


def _compare(files: dict[str, str], folder: Path) -> int:
    wrong = [name for name, text in files.items() if not (folder / name).is_file() or (folder / name).read_bytes() != text.encode()]
    for name in wrong:
        print(f"{folder / name} is not what conf/table and the results give; run `kan cost table --write {folder}`", file=sys.stderr)
    return 1 if wrong else 0
