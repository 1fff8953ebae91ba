"""Generated questions are what they say: decidable from their context alone, of their length, the same from the same seed."""

from collections import Counter

import pytest

from kan_train.evaluation.recall import RECALL, associative_recall, needle


@pytest.mark.parametrize("task", RECALL)
@pytest.mark.parametrize("length", [300, 900])
def test_length_number_and_seed(task, length, tokenizer):
    make = RECALL[task]
    questions = make(length, count=20, seed=3, tokenizer=tokenizer)
    assert questions == make(length, count=20, seed=3, tokenizer=tokenizer)
    assert questions != make(length, count=20, seed=4, tokenizer=tokenizer)
    assert len(questions) == 20
    sizes = [len(tokenizer.encode(question.contexts[0])) for question in questions]
    assert all(0.9 * length <= size <= 1.1 * length + 40 for size in sizes)
    assert {question.group for question in questions} == {f"length {length}"}
    # Read together with another length's, a question is read once for every choice from where the shortest ends.
    others = make(length + 64, count=20, seed=3, tokenizer=tokenizer)
    assert not {question.family for question in questions} & {question.family for question in others}


def test_a_reader_finds_every_pair_and_guessing_does_not(tokenizer):
    questions = associative_recall(600, count=200, seed=0, tokenizer=tokenizer)
    for question in questions:
        *lines, key = question.contexts[0].split("\n")
        pairs = dict(line.split(" ") for line in lines)
        assert question.continuations[question.answer] == f" {pairs[key]}"
        words = " ".join(lines).split()
        assert len(set(words)) == len(words), "no word twice"
        assert all(text.strip() in pairs.values() for text in question.continuations)
        assert len(set(question.continuations)) == 8
    assert max(Counter(question.answer for question in questions).values()) < 50
    assert len({question.family for question in questions}) == 25, "eight questions after one list"


def test_a_reader_finds_every_needle_at_any_depth(tokenizer):
    depths = []
    for question in needle(600, count=100, seed=0, tokenizer=tokenizer):
        context = question.contexts[0]
        city = context.removesuffix(" is").rsplit(" ", 1)[1]
        secret = context.split(f"The secret number of {city} is ")[1][:4]
        assert question.continuations[question.answer] == f" {secret}"
        assert all(context.count(text) == 1 for text in question.continuations), "each number stands there once"
        depths.append(context.index(secret) / len(context))
    assert min(depths) < 0.1
    assert max(depths) > 0.85
