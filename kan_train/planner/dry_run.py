"""`kan train run.dry_run=true`: one rank of a run that is not started, on the meta device. Starts no process group, reads no data and writes nothing."""

from rich.console import Console

from kan_train.config import Config
from kan_train.parallel.layout import layout_of
from kan_train.planner.devices import device_memory
from kan_train.planner.footprint import rank_footprint
from kan_train.planner.memory import memory_of
from kan_train.planner.share import share_of
from kan_train.planner.table import print_share
from kan_train.planner.traffic import traffic_of

WIDTH = 140
"""Columns where standard output is no terminal: a table must not be cut for a file."""


def dry_run(config: Config, launched: int, console: Console | None = None) -> None:
    """Print what rank run.rank of run.world_size processes (0: `launched`) holds and sends. ConfigError where the layout does not work."""
    config.validate(launched)
    layout = layout_of(config, config.run.world_size or launched)
    share = share_of(config, layout, config.run.rank)
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDTH)
    print_share(console, share, memory_of(share), rank_footprint(share), traffic_of(share), device_memory(config.cluster.device_name))
