"""`kan checkpoint upcycle`: a Llama-style checkpoint of Hugging Face becomes a run."""

import argparse
from collections.abc import Callable
from pathlib import Path

UPCYCLE_TEXT = """\
Make a run from a Llama-style checkpoint of Hugging Face (a folder with config.json, *.safetensors and tokenizer.model): the same logits.

  kan checkpoint upcycle ~/models/TinyLlama --run tinyllama   attention as it is, each feed-forward layer one shared grove
  kan generate run=tinyllama prompt=' The forest'
  kan data prepare corpus=directory corpus.path=texts corpus.name=mine tokenizer.path=runs/tinyllama/tokenizer.model
  kan train --config-dir runs/tinyllama/conf model=tinyllama init_from=tinyllama run.name=tuned '+data.blend.mine=1.0' '~data.blend.stdlib'
                                                              train it, splines too, on a corpus of its tokenizer
  kan checkpoint upcycle ~/models/TinyLlama --run sparse --split 16 --active 4
                                                              its hidden units in 16 groves, of which a token runs 4: a start to train from

Biases, scaled rotary wavelengths, sliding windows and other norms are refused by name. docs/upcycling.md says what --split keeps and what not.
"""


def add_upcycle_command(add: Callable[[str, str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]) -> None:
    """Add `upcycle` with `add`(name, line of help, text, what runs) to the commands of `kan checkpoint`."""
    parser = add("upcycle", "a run from a Hugging Face Llama", UPCYCLE_TEXT, _upcycle)
    parser.add_argument("folder", type=Path, metavar="HF_FOLDER", help="folder of the checkpoint")
    parser.add_argument("--run", dest="new_run", required=True, metavar="NEWNAME", help="name of the new run")
    parser.add_argument("--split", type=int, default=0, metavar="N", help="split each feed-forward layer into N groves")
    parser.add_argument("--active", type=int, default=0, metavar="K", help="groves that a token runs (default: all, the same logits)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="sentencepiece model in the place of the folder's tokenizer.model")


def _upcycle(arguments: argparse.Namespace) -> int:
    a = arguments
    return run_upcycle(a.folder, a.root, a.new_run, split=a.split, active=a.active, tokenizer=a.tokenizer)


def run_upcycle(folder: Path, root: Path, new_run: str, *, split: int = 0, active: int = 0, tokenizer: Path | None = None) -> int:
    """Make the run `new_run` below `root`, and say how to go on. Returns the exit status."""
    from kan_train.checkpoint import read_manifest
    from kan_train.commands.checkpoint_make import new_directory
    from kan_train.commands.output import progress_bar
    from kan_train.config import ConfigError
    from kan_train.export.upcycle import bytes_to_make, upcycle
    from kan_train.export.upcycle_config import read_config

    if active and not split:
        raise ConfigError(f"--active={active} is of the groves that --split makes; add --split {4 * active}, or leave it out")
    new_dir = new_directory(root, new_run)
    read_config(folder)  # what is no checkpoint at all is said before what its weights lack
    with progress_bar("upcycling", bytes_to_make(folder)) as advance:
        made = upcycle(folder, new_dir, split=split, active=active, tokenizer=tokenizer, advance=advance)
    grove = read_manifest(made).state["model"]["grove"]
    what = f"each layer in {grove['num_groves']} groves, of which a token runs {grove['active_groves']}" if split else "each layer one shared grove"
    same = grove["active_groves"] == grove["num_groves"]
    print(f"{made}: the weights of {folder}, {what}; {'the same logits' if same else 'not the same logits: train it'}")
    print(f"prepare a corpus: kan data prepare corpus=... tokenizer.path={new_dir / 'tokenizer.model'}")
    settings = f"--config-dir {new_dir / 'conf'} model={new_run} init_from={new_dir} run.name={new_run}-trained"
    print(f"go on: kan train {settings} '+data.blend.NAME=1.0' '~data.blend.stdlib'")
    return 0
