"""What `kan checkpoint` can be asked, and the texts that teach it. Nothing heavy is imported before a command runs."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kan_train.commands.upcycle import add_upcycle_command

AddCommand = Callable[[Any, str, str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]
"""(subparsers, name, line of help, text, what runs) -> the command's parser."""

LIST_TEXT = """\
List the checkpoints of a run: step, tokens, validation loss, size, date, the layout that wrote it, and whether it is complete.

  kan checkpoint list first              the run runs/first
  kan checkpoint list /mnt/runs/first    a run elsewhere
  kan checkpoint list                    the newest checkpoint of every run in runs/

Complete means that the manifest is intact and every file there with its size; `kan checkpoint verify` reads what is in them.
"""

VERIFY_TEXT = """\
Read every byte of a checkpoint and compare it with the SHA-256 of its manifest; see that the boxes of every tensor tile it.

  kan checkpoint verify first                                    the newest checkpoint of runs/first
  kan checkpoint verify first --all                              every one of them
  kan checkpoint verify runs/first/checkpoints/step-00000100     this one
  kan checkpoint verify model.safetensors                        an exported file

The exit status is 0 where all is as it was written, and 1 where anything is not; everything that is wrong is printed.
"""

INSPECT_TEXT = """\
Show what a checkpoint holds: step, tokens, code version, layout, how its configuration differs from the defaults, and its tensors.

  kan checkpoint inspect first                              the newest checkpoint of runs/first
  kan checkpoint inspect first --config                     the whole configuration, as YAML
  kan checkpoint inspect first --tensors 'param/*router*'   statistics of the matching tensors

Statistics are of the finite elements: least, largest, mean, root mean square, the share of zeros; and how many elements are not finite.
"""

PRUNE_TEXT = """\
Delete checkpoints of a run, but for those that a policy keeps: the newest, those of every so many steps, and the best.

  kan checkpoint prune first --keep 2 --dry-run              say what would be deleted
  kan checkpoint prune first --keep 2                        keep the two newest
  kan checkpoint prune first --keep 1 --every 1000 --best 3  and those of steps 1000, 2000, ..., and the three of least validation loss

A checkpoint that is not complete is left for a person to look at. A run that is being trained is refused: it prunes itself, by
checkpoint.keep, checkpoint.keep_every and checkpoint.keep_best.
"""

EXPORT_TEXT = """\
Write a checkpoint's weights, with configuration and tokenizer, to one safetensors file that `kan generate` and any program read.

  kan checkpoint export first first.safetensors               the newest checkpoint of runs/first, in fp32
  kan checkpoint export first first.safetensors --dtype bf16  half the size
  kan generate run=first.safetensors prompt='def main():'     decode with it

The same checkpoint always gives the same bytes. docs/checkpoints.md has ten lines of plain Python that read the file.
"""

REFINE_TEXT = """\
Start a finer model from a trained one: every spline on a grid of twice as many cells, and the same functions on it.

  kan checkpoint refine first --run fine                      runs/fine: the weights of runs/first, refined
  kan generate run=fine prompt='def main():'                  it writes what runs/first would
  kan train init_from=fine run.name=finer model.grove.edge.grid=10
                                                              train the new coefficients (the settings of runs/first, but for the grid)

B-splines are refined by knot insertion, piecewise polynomials by splitting cells. The result holds weights alone: an optimizer starts anew.
"""

AVERAGE_TEXT = """\
Average the weights of several checkpoints of one run (in float64): often better than the last one of a run at a constant rate.

  kan checkpoint average first --last 4 --run mean            the mean of the four newest of runs/first
  kan checkpoint average first --last 4 --ema 0.5 --run mean  each counts half of the one after it
  kan checkpoint average runs/first/checkpoints/step-00000100 runs/first/checkpoints/step-00000200 --weights 1,3 --run mean
  kan train init_from=mean run.name=tuned                     go on from it (the settings of runs/first)

The result is a run with weights alone, for `kan generate`, `kan checkpoint export` and init_from; keep enough to average with checkpoint.keep.
"""


def add_checkpoint_commands(commands: Any, add_command: AddCommand) -> None:
    """Add `checkpoint` with all its commands to the subparsers `commands`."""
    description = "List, verify, inspect, prune and export checkpoints, and make new weights from them."
    checkpoint = commands.add_parser("checkpoint", help="look after checkpoints", description=description)
    checkpoint.set_defaults(parser=checkpoint)
    group = checkpoint.add_subparsers(title="commands", metavar="COMMAND")

    def add(name: str, help_line: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        parser = add_command(group, name, help_line, text, run)
        parser.add_argument("--root", type=Path, default=Path("runs"), metavar="DIR", help="folder of run directories (default: %(default)s)")
        return parser

    listed = add("list", "the checkpoints of a run", LIST_TEXT, _list)
    listed.add_argument("run_name", nargs="?", metavar="RUN", help="run, by its name or path (default: every run)")

    verify = add("verify", "compare every byte with its hash", VERIFY_TEXT, _verify)
    verify.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="run (its newest checkpoint), checkpoint or exported file")
    verify.add_argument("--all", action="store_true", help="every checkpoint of the run")

    inspect = add("inspect", "what a checkpoint holds", INSPECT_TEXT, _inspect)
    inspect.add_argument("source", metavar="CHECKPOINT", help="checkpoint, or run (its newest)")
    inspect.add_argument("--config", action="store_true", help="print the configuration as YAML and stop")
    inspect.add_argument("--tensors", metavar="PATTERN", help="statistics of the tensors whose names match, such as 'param/*.score'")

    prune = add("prune", "delete checkpoints by a policy", PRUNE_TEXT, _prune)
    prune.add_argument("run_name", metavar="RUN", help="run, by its name or path")
    prune.add_argument("--keep", type=int, required=True, metavar="K", help="newest checkpoints to keep, at least 1")
    prune.add_argument("--every", type=int, default=0, metavar="N", help="also keep those of every N steps")
    prune.add_argument("--best", type=int, default=0, metavar="B", help="also keep the B of least validation loss")
    prune.add_argument("--dry-run", action="store_true", help="delete nothing, say what would be")
    prune.add_argument("--force", action="store_true", help="also while the run is being trained")

    export = add("export", "one safetensors file for decoding", EXPORT_TEXT, _export)
    export.add_argument("source", metavar="CHECKPOINT_OR_RUN", help="checkpoint, or run (its newest)")
    export.add_argument("file", type=Path, metavar="FILE.safetensors", help="file to write")
    export.add_argument("--dtype", default="fp32", metavar="fp32|bf16", help="type of the parameters (default: %(default)s)")
    export.add_argument("--overwrite", action="store_true", help="replace FILE where it exists")

    refine = add("refine", "splines on a grid twice as fine", REFINE_TEXT, _refine)
    refine.add_argument("source", metavar="CHECKPOINT", help="checkpoint, or run (its newest)")
    refine.add_argument("--run", dest="new_run", required=True, metavar="NEWNAME", help="name of the new run")

    average = add("average", "the mean of several checkpoints", AVERAGE_TEXT, _average)
    average.add_argument("sources", nargs="+", metavar="CHECKPOINT", help="checkpoints; or one run, with --last")
    average.add_argument("--run", dest="new_run", required=True, metavar="NEWNAME", help="name of the new run")
    average.add_argument("--last", type=int, metavar="K", help="the K newest complete checkpoints of the run")
    average.add_argument("--weights", metavar="W,W,...", help="weight of each, in the order given, or from oldest to newest with --last")
    average.add_argument("--ema", type=float, metavar="DECAY", help="each counts DECAY times the next newer one, between 0 and 1")
    add_upcycle_command(add)


def _list(arguments: argparse.Namespace) -> int:
    from kan_train.commands.checkpoint import run_list

    return run_list(arguments.run_name, arguments.root)


def _verify(arguments: argparse.Namespace) -> int:
    from kan_train.commands.checkpoint import run_verify

    return run_verify(arguments.source, arguments.root, every=arguments.all)


def _inspect(arguments: argparse.Namespace) -> int:
    from kan_train.commands.checkpoint_inspect import run_inspect

    return run_inspect(arguments.source, arguments.root, config=arguments.config, tensors=arguments.tensors)


def _prune(arguments: argparse.Namespace) -> int:
    from kan_train.commands.checkpoint import run_prune

    a = arguments
    return run_prune(a.run_name, a.root, keep=a.keep, every=a.every, best=a.best, dry_run=a.dry_run, force=a.force)


def _export(arguments: argparse.Namespace) -> int:
    from kan_train.commands.checkpoint_make import run_export

    return run_export(arguments.source, arguments.root, arguments.file, dtype=arguments.dtype, overwrite=arguments.overwrite)


def _refine(arguments: argparse.Namespace) -> int:
    from kan_train.commands.checkpoint_make import run_refine

    return run_refine(arguments.source, arguments.root, arguments.new_run)


def _average(arguments: argparse.Namespace) -> int:
    from kan_train.commands.checkpoint_make import run_average

    a = arguments
    return run_average(a.sources, a.root, a.new_run, last=a.last, weights=a.weights, ema=a.ema)
