"""What a dry run prints: where a rank stands, what it holds, and what it sends."""

from itertools import pairwise

from rich.console import Console
from rich.table import Table

from kan_train.config import Config
from kan_train.parallel.layout import Layout
from kan_train.planner.devices import ALLOWANCE, usable_memory
from kan_train.planner.footprint import Footprint
from kan_train.planner.memory import NOT_COUNTED, Memory
from kan_train.planner.message import Message, merged
from kan_train.planner.share import Share
from kan_train.planner.traffic import NOT_MODELLED

SHOWN_RANKS = 8
"""Ranks of a group that are written out."""
GIB = 2**30


def print_share(
    console: Console, share: Share, memory: Memory, footprint: Footprint, messages: list[Message], device_bytes: int | None
) -> None:
    """Everything about one rank. device_bytes: of the device's memory, where it is known."""
    console.print(_place(share))
    console.print(_parameters(share))
    console.print(_memory(memory))
    console.print(_peak(footprint))
    _notes(console, NOT_COUNTED, "not counted")
    console.print(_traffic(share, messages))
    _notes(console, NOT_MODELLED, "not modelled")
    console.print(verdict(share.config, footprint, device_bytes), markup=False, highlight=False)


def verdict(config: Config, footprint: Footprint, device_bytes: int | None) -> str:
    """One line: whether the peak of a step fits the device, with an allowance for what is not counted."""
    held = f"tensors take {footprint.total / GIB:.2f} GiB of the device at the peak of a step"
    if device_bytes is None:
        return f"{held}; its memory is not known"
    name, left = config.cluster.device_name, usable_memory(device_bytes) - footprint.total
    if left < 0:
        return f"{held}: more than the {device_bytes / GIB:.1f} GiB of {name} have room for ({ALLOWANCE})"
    return f"{held}: {footprint.total / device_bytes:.0%} of the {device_bytes / GIB:.1f} GiB of {name}, which leaves {left / GIB:.2f} GiB ({ALLOWANCE})"


def _place(share: Share) -> Table:
    layout = share.layout
    table = Table(title=f"rank {share.rank} of {layout.world_size} in {_title(layout, share.config)}", title_justify="left", box=None, padding=(0, 2))
    for heading in ("group", "ranks", "place", "global ranks"):
        table.add_column(heading, justify="right" if heading in ("ranks", "place") else "left")
    for group in ("tensor", "context", "data", "pipeline", "expert", "expert_tensor", "expert_data", "data_and_context", "tensor_and_data", "model"):
        ranks = share.ranks(group)
        if len(ranks) > 1:
            table.add_row(group, f"{len(ranks)}", f"{ranks.index(share.rank)}", _ranks(ranks))
    return table


def _title(layout: Layout, config: Config) -> str:
    return f"{layout}: {config.model.name}, {config.train.precision}"


def _ranks(ranks: list[int]) -> str:
    """All of a small group; of a large one the first and the last, and their distance where it is one."""
    if len(ranks) <= SHOWN_RANKS:
        return " ".join(map(str, ranks))
    steps = {later - earlier for earlier, later in pairwise(ranks)}
    every = "" if len(steps) > 1 else f", every {step}" if (step := steps.pop()) > 1 else ", each"
    return f"{' '.join(map(str, ranks[:3]))} .. {ranks[-1]}{every}"


def _parameters(share: Share) -> Table:
    table = _table("parameters")
    for part, elements in share.by_part().items():
        table.add_row(part, f"{elements:,}")
    table.add_row("together", f"{share.elements:,}", style="bold")
    layers = " and ".join(_layers(model.part.layers) for model in share.models)
    table.caption = f"layers {layers} of {share.config.model.num_layers}"
    table.caption_justify = "left"
    return table


def _layers(layers: range) -> str:
    return f"{layers.start} to {layers.stop - 1}" if len(layers) > 1 else f"{layers.start}"


def _memory(memory: Memory) -> Table:
    table = _table("memory, GiB")
    where = " (host)" if memory.offloaded else ""
    for name, size in (
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        (f"fp32 masters{where}", memory.masters),
        (f"moments{where}", memory.moments),
    ):
        table.add_row(name, f"{size / GIB:.3f}")
    table.add_row("on the device", f"{memory.device / GIB:.3f}", style="bold")
    return table


def _peak(footprint: Footprint) -> Table:
    table = _table(f"peak of a step, GiB: {footprint.moment}, {footprint.path}")
    for part, size in footprint.parts.items():
        table.add_row(part, f"{size / GIB:.3f}")
    table.add_row("on the device", f"{footprint.total / GIB:.3f}", style="bold")
    return table


def _traffic(share: Share, messages: list[Message]) -> Table:
    step = f"{_count(share.micro_batches, 'micro-batch', 'es')} of {_count(share.config.train.micro_batch_size, 'sequence')}"
    title = f"sent in a step of {step}" + ("" if messages else ": nothing")
    if not messages:
        return Table(title=title, title_justify="left", box=None)
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2))
    for heading in ("group", "ranks", "what", "operation", "calls", "a call", "this rank sends"):
        table.add_column(heading, justify="right" if heading in ("ranks", "calls", "a call", "this rank sends") else "left")
    for one in sorted(merged(messages), key=lambda one: one.group):
        table.add_row(one.group, f"{one.ranks}", one.purpose, one.operation, f"{one.calls:,}", _bytes(one.each), _bytes(one.sent))
    for group in sorted({one.group for one in messages}):
        table.add_row(group, "", "together", "", "", "", _bytes(sum(one.sent for one in messages if one.group == group)), style="bold")
    table.add_row("all groups", "", "together", "", "", "", _bytes(sum(one.sent for one in messages)), style="bold")
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    return table


def _count(number: int, of: str, plural: str = "s") -> str:
    return f"{number} {of}{plural if number != 1 else ''}"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"


def _notes(console: Console, lines: tuple[str, ...], heading: str) -> None:
    console.print(f"{heading}: {'; '.join(lines)}.", markup=False, highlight=False, style="dim")
    console.print()
