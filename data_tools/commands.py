"""What `kan data` runs."""

from pathlib import Path

from kan_train.config import PrepareConfig
from kan_train.data_tools.inspect import inspect
from kan_train.data_tools.prepare import prepare


def run_prepare(config: PrepareConfig) -> int:
    """Prepare a corpus and show what came of it. Returns the exit status."""
    inspect(prepare(config))
    return 0


def run_inspect(folder: Path) -> int:
    """Show what a prepared corpus holds. Returns the exit status."""
    inspect(folder)
    return 0
