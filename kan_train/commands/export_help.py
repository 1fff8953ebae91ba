"""What `kan export` can be asked, and the texts that teach it. Nothing heavy is imported before a command runs."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

AddCommand = Callable[[Any, str, str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]
"""(subparsers, name, line of help, text, what runs) -> the command's parser."""

HF_TEXT = """\
Write a trained model as a folder that Hugging Face's transformers loads by itself: weights, configuration, tokenizer and the model's code.

  kan export hf first first-hf               the newest checkpoint of runs/first, in fp32
  kan export hf first first-hf --dtype bf16  half the size
  kan export hf first.safetensors first-hf   a file that `kan checkpoint export` wrote

and then, where torch, transformers and sentencepiece are installed, without kan-train:

  AutoModelForCausalLM.from_pretrained("first-hf", trust_remote_code=True)
  AutoTokenizer.from_pretrained("first-hf", trust_remote_code=True)

Its logits, its tokens and what it generates are those of kan-train. docs/export.md has what else it does, and what not.
"""


def add_export_commands(commands: Any, add_command: AddCommand) -> None:
    """Add `export` with all its commands to the subparsers `commands`."""
    export = commands.add_parser("export", help="models for, and from, other programs", description="Models for, and from, other programs.")
    export.set_defaults(parser=export)
    group = export.add_subparsers(title="commands", metavar="COMMAND")
    _add_hf(group, add_command)


def _add_hf(group: Any, add_command: AddCommand) -> None:
    hf = add_command(group, "hf", "a folder for Hugging Face's transformers", HF_TEXT, _hf)
    hf.add_argument("source", metavar="RUN", help="run (its newest checkpoint), checkpoint, or exported file")
    hf.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write")
    hf.add_argument("--root", type=Path, default=Path("runs"), metavar="DIR", help="folder of run directories (default: %(default)s)")
    hf.add_argument("--dtype", default="fp32", metavar="fp32|bf16", help="type of the parameters (default: %(default)s)")
    hf.add_argument("--overwrite", action="store_true", help="replace FOLDER where it was written by this command")


def _hf(arguments: argparse.Namespace) -> int:
    from kan_train.commands.export import run_export_hf

    a = arguments
    return run_export_hf(a.source, a.root, a.folder, dtype=a.dtype, overwrite=a.overwrite)
