"""The one command: `kan train | data | launch | generate | evaluate | serve | checkpoint | cost`. Each lives in its own room, imported only when called."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kan_train import __version__
from kan_train.commands.audit_help import add_audit_command
from kan_train.commands.checkpoint_help import add_checkpoint_commands
from kan_train.commands.cost_help import add_cost_commands
from kan_train.commands.evaluate_help import add_evaluate_command
from kan_train.commands.export_help import add_export_commands
from kan_train.commands.launch_help import add_launch_commands
from kan_train.commands.serve_help import add_serve_command
from kan_train.config import ConfigError

OVERRIDES_HELP = "settings as Hydra overrides: group=choice, group.setting=value, +new.key=value, ~removed.key"

TRAIN_TEXT = """\
Train a language model. With no settings: the default model on the default corpus, on this machine.

  kan train                                        the default run
  kan train model=dense_tiny_total run.name=dense  another model, under another name
  kan train run.name=dense train.steps=600         the same name resumes: 300 more steps
  kan train init_from=runs/dense run.name=tuned    a new run from another run's weights alone
  kan train branch_from=runs/dense run.name=decay  a new run from another run's whole state
  kan train --cfg job                              print the effective configuration and stop
  kan train --settings                             print every setting with its type, default and meaning
  kan train profile=on                             also a trace of three steps, for Perfetto
  torchrun --nproc-per-node 2 -m kan_train train parallel.zero_stage=2
                                                   the same training, sharded over two processes
  kan train parallel=tensor train.global_batch_size=256 run.dry_run=true run.world_size=64 run.rank=37
                                                   train nothing: what one process of 64 would hold and send

The run directory runs/<run.name> holds config.yaml, metrics.jsonl, ledger.jsonl, loss.png and the checkpoints.
"""

PREPARE_TEXT = """\
Turn documents into a corpus to train on: text shards, a tokenizer, token shards with an index, a held-out split.

  kan data prepare                                             the standard library's sources (no network)
  kan data prepare corpus=debian_docs tokenizer.vocab_size=8192
  kan data prepare corpus=directory corpus.path=texts corpus.name=mine
  kan data prepare corpus=huggingface corpus.dataset=NAME corpus.name=web corpus.max_documents=10000

Interrupted, it continues when it is called again. The result lies in <root>/<corpus.name>; train on it with
`kan train '+data.blend.mine=1.0'`, or data=debian_docs.
"""

INSPECT_TEXT = """\
Show what a prepared corpus holds: documents, bytes, tokens, bytes a token, the largest documents, and a decoded sample.

  kan data inspect                 the default corpus
  kan data inspect corpora/mine    another one, by its folder
"""

GENERATE_TEXT = """\
Continue a prompt with a trained run: recurrent decoding, whose cost a token does not depend on the context for ADA layers.

  kan generate run=kan_tiny prompt='def main():'
  kan generate run=runs/first prompt='import os' temperature=0.6 top_p=0.95 seed=7 samples=3
  kan generate run=first.safetensors prompt='x = '     a file that `kan checkpoint export` wrote
  kan generate run=kan_tiny prompt='def f' 'stop=["\\n\\n"]' repetition_penalty=1.1
  kan generate run=kan_tiny prompts=prompts.jsonl samples=4 > texts.jsonl
                                                       many prompts at once, each a line of JSON
  kan generate run=kan_tiny prompt='def f' active_groves=1 dtype=bf16
                                                       fewer groves a token than in training, in half the bytes
  torchrun --nproc-per-node 2 -m kan_train generate run=kan_tiny prompt='def f' parallel.tensor_parallel=2
                                                       two processes, each with its share of the weights
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 when a setting is wrong, or 130 after Ctrl-C."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    _take_overrides_after_options(arguments, rest)
    run: Callable[[argparse.Namespace], int] | None = getattr(arguments, "run", None)
    if run is None:
        arguments.parser.print_help()
        return 2
    try:
        status = run(arguments)
        sys.stdout.flush()
        return status
    except ConfigError as error:
        print(f"kan: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kan: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`head`, say) has what it wanted; the interpreter's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _take_overrides_after_options(arguments: argparse.Namespace, rest: list[str]) -> None:
    # argparse ends a list of positional arguments at the first option: in `kan train a=1 --cfg job b=2` it would not know b=2.
    if rest and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest)):
        arguments.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest


def _parser() -> argparse.ArgumentParser:
    description = "Pretraining of KalmaGrove-Arnold Network language models, and the true cost of every token."
    parser = argparse.ArgumentParser(prog="kan", description=description)
    parser.add_argument("--version", action="version", version=f"kan-train {__version__}")
    parser.set_defaults(parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    train = _command(commands, "train", "train a language model", TRAIN_TEXT, _train)
    train.add_argument("--cfg", choices=["job"], help="print the effective configuration as YAML and stop")
    train.add_argument("--settings", action="store_true", help="print every setting with its type, default and meaning, and stop")
    _add_overrides(train)

    data = commands.add_parser("data", help="prepare and inspect corpora", description="Prepare and inspect corpora.")
    data.set_defaults(parser=data)
    data_commands = data.add_subparsers(title="commands", metavar="COMMAND")
    prepare = _command(data_commands, "prepare", "turn documents into token shards", PREPARE_TEXT, _prepare)
    prepare.add_argument("--cfg", choices=["job"], help="print the effective configuration as YAML and stop")
    _add_overrides(prepare)
    inspect = _command(data_commands, "inspect", "show what a prepared corpus holds", INSPECT_TEXT, _inspect)
    where = "folder of a prepared corpus (default: %(default)s)"
    inspect.add_argument("corpus", nargs="?", type=Path, default=Path("corpora/stdlib"), help=where)

    generate = _command(commands, "generate", "continue a prompt with a trained run", GENERATE_TEXT, _generate)
    _add_overrides(generate)
    add_evaluate_command(commands, _command, _add_overrides)
    add_audit_command(commands, _command)
    add_serve_command(commands, _command, _add_overrides)
    add_launch_commands(commands, _command)
    add_checkpoint_commands(commands, _command)
    add_export_commands(commands, _command)
    add_cost_commands(commands, _command)
    return parser


def _command(commands, name: str, help_line: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
    parser = commands.add_parser(name, help=help_line, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(run=run, parser=parser)
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config-dir", action="append", type=Path, default=[], metavar="DIR",
        help="folder with configuration groups of your own (DIR/model/mine.yaml gives model=mine); may be repeated",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="setting=value", help=OVERRIDES_HELP)


def _train(arguments: argparse.Namespace) -> int:
    from kan_train.config import compose, describe

    if arguments.settings:
        print(describe.settings_text())
        return 0
    config = compose.compose_train(arguments.overrides, arguments.config_dir)
    if arguments.cfg:
        print(compose.to_yaml(config), end="")
        return 0
    from kan_train.commands.train import run_train

    return run_train(config)


def _prepare(arguments: argparse.Namespace) -> int:
    from kan_train.config import PrepareConfig, compose

    config = compose.compose_settings(PrepareConfig, arguments.overrides, arguments.config_dir)
    if arguments.cfg:
        print(compose.to_yaml(config), end="")
        return 0
    from kan_train.data_tools.commands import run_prepare

    return run_prepare(config)


def _inspect(arguments: argparse.Namespace) -> int:
    from kan_train.data_tools.commands import run_inspect

    return run_inspect(arguments.corpus)


def _generate(arguments: argparse.Namespace) -> int:
    from kan_train.config import GenerateConfig, compose

    config = compose.compose_settings(GenerateConfig, arguments.overrides, arguments.config_dir)
    from kan_train.inference.commands import run_generate

    return run_generate(config)
