"""`kan train`: train, then say what came of it, with a sample of what the model writes; or, in a dry run, say what one process would hold and send."""

import os
import shlex
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kan_train.config import Config, ConfigError, GenerateConfig
from kan_train.engine.examination import Evaluator
from kan_train.engine.trainer import RunResult, train
from kan_train.parallel.runtime import launch_size

SAMPLE_TOKENS = 96


def run_train(config: Config) -> int:
    """Train as `config` says, in every process of the job; the first one prints the summary. Returns the exit status.

    With run.dry_run nothing is trained: the first process describes process run.rank.
    """
    if config.run.dry_run:
        return _describe(config)
    result = train(config, make_evaluator=_evaluator)
    if result.finished and int(os.environ.get("RANK", "0")) == 0:
        _print_summary(result, Console())
    return result.exit_code


def _evaluator(config: Config, tokenizer: Path) -> Evaluator:
    from kan_train.evaluation.during import task_evaluator  # loaded only where a run evaluates

    return task_evaluator(config, tokenizer)


def _describe(config: Config) -> int:
    from kan_train.planner.dry_run import dry_run

    if int(os.environ.get("RANK", "0")) == 0:
        dry_run(config, launch_size())
    return 0


def _print_summary(result: RunResult, console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    if result.validation_loss is not None:
        table.add_row("validation loss", f"{result.validation_loss:.4f} nats a token, {result.bits_per_byte:.4f} bits a byte")
    table.add_row("steps", f"{result.steps:,} ({result.tokens:,} tokens)")
    if result.tokens_per_second is not None:
        table.add_row("throughput", f"{result.tokens_per_second:,.0f} tokens/s")
    table.add_row("run directory", str(result.run_dir))
    console.print()
    console.print(table)
    console.rule("sample", align="left")
    console.print(_sample(result.run_dir), markup=False, highlight=False)
    console.rule()
    console.print(f"more of it: kan generate run={result.run_dir} prompt='def '", markup=False, highlight=False)
    console.print(f"what it cost, as a page: kan cost report {shlex.quote(str(result.run_dir))}", markup=False, highlight=False)


def _sample(run_dir: Path) -> str:
    # Decoding reads the checkpoint that was just written: the sample shows what the run directory holds, not what is in memory.
    from kan_train.inference.commands import samples

    try:
        return samples(GenerateConfig(run=str(run_dir), prompt="", max_tokens=SAMPLE_TOKENS, device="cpu"))[0]
    except ConfigError as error:
        return f"(no sample: {error})"
