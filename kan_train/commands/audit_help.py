"""What `kan audit` can be asked. Nothing heavy is imported before it runs."""

import argparse
from pathlib import Path
from typing import Any

from kan_train.commands.checkpoint_help import AddCommand

AUDIT_TEXT = """\
Look into a trained run: which edge functions matter and what they look like, what the loss is without the others, and which tokens go to which grove.
Everything is measured on held-out text.

  kan audit kan_tiny                         the run runs/kan_tiny, on the held-out text of corpora/stdlib
  kan audit kan_tiny --text corpora/mine -o pictures
  kan audit kan_tiny --sequences 256 --top 24
                                             more text, and more functions drawn
  kan audit kan_tiny --no-prune              without the measurements of the loss, most of the time that it takes
  kan audit kan_tiny.safetensors             a file that `kan checkpoint export` wrote

It writes audit.json and pictures to RUN/audit, where `kan cost report RUN` finds them for its page. docs/audit.md says what the numbers mean.
"""


def add_audit_command(commands: Any, add_command: AddCommand) -> None:
    """Add `audit` to the subparsers `commands`."""
    audit = add_command(commands, "audit", "what edge functions and groves have become", AUDIT_TEXT, _audit)
    audit.add_argument("audited", metavar="RUN", help="run by its name or path, checkpoint, or exported file")
    audit.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="folder to write (default: RUN/audit, or FILE.audit beside an exported file)")
    audit.add_argument("--root", default="runs", metavar="DIR", help="folder of run directories (default: %(default)s)")
    audit.add_argument("--text", default="corpora/stdlib", metavar="FOLDER", help="prepared corpus whose held-out text is read (default: %(default)s)")
    audit.add_argument("--sequences", type=int, default=64, metavar="N", help="sequences of the training's length to read (default: %(default)s)")
    audit.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences read at a time (default: %(default)s)")
    audit.add_argument("--top", type=int, default=12, metavar="N", help="functions of a layer to draw, at most 64 (default: %(default)s)")
    audit.add_argument("--seed", type=int, default=0, metavar="N", help="of the random order, the shuffles and the bootstrap (default: %(default)s)")
    audit.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to compute (default: %(default)s)")
    audit.add_argument("--no-prune", dest="prune", action="store_false", help="do not measure the loss without functions")


def _audit(arguments: argparse.Namespace) -> int:
    from kan_train.commands.audit import run_audit

    called = {name: value for name, value in vars(arguments).items() if name not in ("run", "parser", "audited")}
    return run_audit(arguments.audited, **called)
