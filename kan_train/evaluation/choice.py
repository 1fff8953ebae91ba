"""Multiple choice by log-likelihood: which continuation is likeliest, and how often it is the right one."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kan_train.evaluation.mmlu import CATEGORIES, category_of
from kan_train.evaluation.questions import EncodingTokenizer, Question, readings
from kan_train.evaluation.score import Advance, continuation_log_probs, require_finite
from kan_train.evaluation.statistics import wilson
from kan_train.model.lm import LanguageModel

METRICS: dict[str, str] = {
    "acc": "log-likelihood of the whole continuation",
    "acc_norm": "divided by the characters of the choice, as lm-evaluation-harness has it",
    "acc_bytes": "divided by the bytes of the choice in UTF-8",
    "acc_tokens": "divided by the tokens of the continuation",
}
"""Metric -> by what the choice is made."""

PORTION = 32
"""Questions of a family that are read together, at most: what a beginning that they share saves is nearly all saved by then."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One question with the log-likelihoods of its choices, in nats."""

    question: Question
    log_likelihoods: tuple[float, ...]
    tokens: tuple[int, ...]
    """Tokens of each continuation."""

    def pick(self, metric: str) -> int:
        """The choice that `metric` makes; the first of equal ones."""
        # The harness divides by the choice as its row has it: a choice's own outer spaces count, the one put before it does not.
        texts = [text.removeprefix(" ") for text in self.question.continuations]
        lengths: dict[str, Sequence[int]] = {
            "acc": [1] * len(texts),
            "acc_norm": [len(text) for text in texts],
            "acc_bytes": [len(text.encode()) for text in texts],
            "acc_tokens": self.tokens,
        }
        values = [value / max(1, length) for value, length in zip(self.log_likelihoods, lengths[metric], strict=True)]
        return max(range(len(values)), key=values.__getitem__)

    def right(self, metric: str) -> bool:
        """Whether that is the answer; never where a model has diverged, whatever NaN is the largest."""
        return all(map(math.isfinite, self.log_likelihoods)) and self.pick(metric) == self.question.answer


def score(
    model: LanguageModel, tokenizer: EncodingTokenizer, questions: Sequence[Question], *, batch_size: int = 32,
    advance: Callable[[int], None] = lambda _: None, finite: bool = True,
) -> list[Scored]:
    """The questions with their log-likelihoods, in order. Those of a portion are read together; `advance` is told of questions done.

    ConfigError at the first log-likelihood that is NaN or infinite, unless `finite` is off.
    """  # fmt: skip
    found: dict[int, Scored] = {}
    for numbers in portions(questions):
        asked = [readings(questions[number], tokenizer) for number in numbers]
        flat = [reading for some in asked for reading in some]
        sums = iter(continuation_log_probs(model, flat, batch_size=batch_size, advance=_in_questions(advance, len(flat) // len(numbers))))
        for number, some in zip(numbers, asked, strict=True):
            # Contexts that differ come in the order of the choices, one each; a common one has all of them.
            values = [value for _ in some for value in next(sums)]
            if finite:
                require_finite(values, "a log-likelihood")
            tokens = [len(continuation) for reading in some for continuation in reading.continuations]
            found[number] = Scored(question=questions[number], log_likelihoods=tuple(values), tokens=tuple(tokens))
    return [found[number] for number in range(len(questions))]


def portions(questions: Sequence[Question]) -> list[list[int]]:
    """Numbers of questions that are read together: up to PORTION of one family. Each by itself makes the same portion, so that to the last bit it
    does not matter which process reads it."""
    found: list[list[int]] = []
    open_portions: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        portion = open_portions.get(question.family, [])
        if not portion or len(portion) == PORTION:
            portion = open_portions[question.family] = []
            found.append(portion)
        portion.append(number)
    return found


def _in_questions(advance: Advance, readings_each: int) -> Advance:
    """`advance`, told of readings of which every question has so many."""
    waiting = 0

    def told(done: int) -> None:
        nonlocal waiting
        questions, waiting = divmod(waiting + done, max(1, readings_each))
        advance(questions)

    return told


def figures(scored: Sequence[Scored]) -> dict[str, Any]:
    """Every metric with its 95% Wilson interval, and what would be reached without a model: {"questions", "acc": {"value", "interval"}, ..., "baselines"}."""
    count = len(scored)
    answers: dict[str, Any] = {"questions": count}
    for metric in METRICS:
        right = sum(one.right(metric) for one in scored)
        answers[metric] = {"value": right / count, "interval": list(wilson(right, count))}
    answers["baselines"] = baselines([one.question for one in scored])
    return answers


def baselines(questions: Sequence[Question]) -> dict[str, float]:
    """Accuracies without a model: "random", of choosing evenly, and "majority", of the answer's place that is most often right."""
    most = Counter(question.answer for question in questions).most_common(1)[0][1]
    return {"random": sum(1 / len(question.continuations) for question in questions) / len(questions), "majority": most / len(questions)}


def summary(scored: Sequence[Scored], main: str) -> dict[str, Any]:
    """`figures` of all questions, of every group and, for MMLU, of every category; "macro" is the mean of `main` over groups."""
    groups: dict[str, list[Scored]] = {}
    for one in scored:
        groups.setdefault(one.question.group, []).append(one)
    found = {"metric": main, **figures(scored)}
    if len(groups) > 1:
        found["groups"] = {group: figures(some) for group, some in groups.items()}
        found["macro"] = sum(each[main]["value"] for each in found["groups"].values()) / len(groups)
    categories = {
        category: some for category in CATEGORIES if (some := [one for one in scored if category_of(one.question.group) == category])
    }  # fmt: skip
    if categories:
        found["categories"] = {category: figures(some) for category, some in categories.items()}
    return found
