"""Plain text for people and for pipes: aligned columns, sizes, and a progress bar where standard error is a terminal."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Lines of aligned columns, two spaces apart; those numbered in `right` are aligned to the right. The last is never padded."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) if index in right else cell.ljust(width) for index, (cell, width) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def size_text(count: float) -> str:
    """Bytes in the unit that reads best, decimal."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


@contextlib.contextmanager
def progress_bar(task: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the bytes that were done; on a terminal it moves a bar on standard error, elsewhere nothing is shown."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    parts = (TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*parts, console=console, transient=True) as progress:
        number = progress.add_task(task, total=total)
        yield lambda count: progress.advance(number, count)
