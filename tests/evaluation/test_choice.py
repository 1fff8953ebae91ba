"""A model of chosen probabilities gives answers that were worked out by hand."""

import math

import pytest
import torch

from kan_train.config import ConfigError
from kan_train.evaluation.choice import Scored, score, summary
from kan_train.evaluation.questions import Question, readings

SIZE = 258


def after(**changes) -> torch.Tensor:
    """P(next | last): even, but where `changes` says otherwise: a_b=0.5 gives byte b after byte a; the rest shares what is left."""
    table = torch.full((SIZE, SIZE), 1 / SIZE, dtype=torch.float64)
    for pair, probability in changes.items():
        last, following = (ord({"space": " "}.get(name, name)) + 2 for name in pair.split("_"))
        table[last] = (1 - probability) / (SIZE - 1)
        table[last, following] = probability
    return table


def asked(context, *choices, answer=0, **more) -> Question:
    return Question(contexts=(context,), continuations=tuple(f" {choice}" for choice in choices), answer=answer, **more)


def test_log_likelihoods_by_hand(table, byte_tokenizer):
    """P(" ab" | "x") = P(space | x) P(a | space) P(b | a)."""
    model = table(after(space_a=0.5, a_b=0.25))
    (scored,) = score(model, byte_tokenizer, [asked("x", "ab", "b")])
    assert scored.log_likelihoods == pytest.approx((math.log(1 / SIZE * 0.5 * 0.25), math.log(1 / SIZE * 0.5 / (SIZE - 1))), rel=1e-12)
    assert scored.tokens == (3, 2)


def test_each_normalisation_chooses_by_its_own_length():
    """Nats by one, characters, bytes and tokens: each prefers another choice, and the space before it has no length."""
    question = asked("x", "b", "éé", "bcdcd", "abc", answer=2)
    scored = Scored(question=question, log_likelihoods=(-3.0, -5.0, -9.5, -9.0), tokens=(2, 5, 6, 30))
    assert [scored.pick(metric) for metric in ("acc", "acc_norm", "acc_bytes", "acc_tokens")] == [0, 2, 1, 3]
    found = summary([scored], "acc_norm")
    assert [found[metric]["value"] for metric in ("acc", "acc_norm", "acc_bytes", "acc_tokens")] == [0, 1, 0, 0]


def test_accuracy_groups_and_baselines_by_hand(table, byte_tokenizer):
    model = table(after(space_a=0.9))
    questions = [
        asked("1", "a", "b", answer=0, group="one"), asked("2", "b", "a", answer=0, group="one"), asked("3", "b", "a", answer=1, group="two"),
        asked("4", "a", "b", "c", "d", answer=0, group="two"), asked("5", "b", "a", answer=0, group="two"),
    ]  # fmt: skip
    found = summary(score(model, byte_tokenizer, questions), "acc")
    assert (found["questions"], found["acc"]["value"]) == (5, 3 / 5)
    assert found["baselines"] == {"random": pytest.approx((4 / 2 + 1 / 4) / 5), "majority": 4 / 5}
    assert {name: (each["questions"], each["acc"]["value"]) for name, each in found["groups"].items()} == {"one": (2, 1 / 2), "two": (3, 2 / 3)}
    assert found["macro"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    low, high = found["acc"]["interval"]
    assert low < 3 / 5 < high
    assert "categories" not in found


def test_mmlus_categories_gather_their_subjects(table, byte_tokenizer):
    subjects = {"abstract_algebra": 1, "anatomy": 0, "virology": 0, "sociology": 1}
    model = table(after(space_A=0.9))
    questions = [asked("?", *"ABCD", answer=1 - right, group=subject) for subject, right in subjects.items()]
    found = summary(score(model, byte_tokenizer, questions), "acc")
    assert {name: each["acc"]["value"] for name, each in found["categories"].items()} == {"stem": 0.5, "social_sciences": 1.0, "other": 0.0}


def test_options_in_the_blank_are_told_apart_by_what_follows(table, byte_tokenizer):
    """WinoGrande: the same suffix behind each option; the option itself does not count, however unlikely it is."""
    model = table(after(n_space=0.9, z_space=0.1))
    question = Question(contexts=("the z", "the n"), continuations=(" was", " was"), answer=1)
    (scored,) = score(model, byte_tokenizer, [question])
    assert scored.log_likelihoods[1] - scored.log_likelihoods[0] == pytest.approx(math.log(0.9 / 0.1))
    assert scored.right("acc")


def test_spaces_before_a_choice_are_counted_once(byte_tokenizer):
    """At the context's end or at the choice's beginning, the same tokens; none of them is the context's."""
    one, other = (readings(question, byte_tokenizer) for question in (
        Question(contexts=("ab",), continuations=("  c", "  d"), answer=0), Question(contexts=("ab ",), continuations=(" c", " d"), answer=0),
    ))  # fmt: skip
    assert one == other
    assert one[0].context == (1, *byte_tokenizer.encode("ab"))
    assert one[0].continuations == (tuple(byte_tokenizer.encode("  c")), tuple(byte_tokenizer.encode("  d")))


def test_outer_spaces_of_a_choice_are_characters_of_it():
    """As in lm-evaluation-harness: 8 characters are likelier by character than 2 of half the nats."""
    scored = Scored(question=asked("x", "ab", " abcde  ", answer=1), log_likelihoods=(-2.0, -5.0), tokens=(2, 9))
    assert [scored.right(metric) for metric in ("acc", "acc_norm", "acc_bytes")] == [False, True, True]


def test_a_diverged_model_is_told_and_has_nothing_right(table, byte_tokenizer):
    model = table(after(space_a=math.nan))
    with pytest.raises(ConfigError, match="a log-likelihood is nan: the weights have diverged; use an earlier checkpoint, RUN/checkpoints/step-NUMBER"):
        score(model, byte_tokenizer, [asked("x", "a", "b")])
    for answer in (0, 1):
        (scored,) = score(model, byte_tokenizer, [asked("x", "a", "b", answer=answer)], finite=False)
        assert not scored.right("acc")
