"""Recall, generated from a seed: what stood before, asked for again, at a chosen length.

Every wrong choice stood in the context too, in the same form: how often something occurs says nothing, which of them belongs to the question does.
"""

import random
from collections.abc import Callable

from kan_train.evaluation.questions import EncodingTokenizer, Question

CHOICES = 8
"""Choices of associative recall."""
QUERIES = 8
"""Questions that are asked after one list of pairs."""
NEEDLES = 4
"""Facts in a haystack, and so choices."""

_SENTENCES = (
    "The river was wide and slow that year.", "Nobody in the village remembered a colder winter.", "A train passed the station without stopping.",
    "The children played near the old wall until it was dark.", "She closed the window and went back to her letters.",
    "In the afternoon the wind came from the sea.", "The market opened early and closed late.", "He had read the same page three times.",
    "Two birds sat on the roof of the school.", "The road to the hills was closed for repairs.",
)  # fmt: skip
_CITIES = ("Paris", "London", "Madrid", "Vienna", "Oslo", "Athens", "Dublin", "Warsaw", "Lisbon", "Prague", "Berlin", "Rome")


def associative_recall(length: int, *, count: int, seed: int, tokenizer: EncodingTokenizer) -> list[Question]:
    """`count` questions after lists of pairs of made-up words, of about `length` tokens each (Arora et al., arXiv:2312.04927, as text).

    A list is read once for QUERIES questions, each of which is asked behind the list alone.
    """
    questions: list[Question] = []
    while len(questions) < count:
        chance = random.Random(f"{seed}/associative_recall/{length}/{len(questions)}")
        pairs = _pairs(length, chance, tokenizer)
        listed = "".join(f"{key} {value}\n" for key, value in pairs)
        for key, value in chance.sample(pairs, min(QUERIES, len(pairs), count - len(questions))):
            others = chance.sample([other for _, other in pairs if other != value], min(CHOICES, len(pairs)) - 1)
            choices = chance.sample([value, *others], len(others) + 1)
            questions.append(Question(
                contexts=(f"{listed}{key}",), continuations=tuple(f" {choice}" for choice in choices), answer=choices.index(value),
                group=f"length {length}", family=listed,
            ))  # fmt: skip
    return questions


def needle(length: int, *, count: int, seed: int, tokenizer: EncodingTokenizer) -> list[Question]:
    """`count` questions for one of NEEDLES facts of one form, at depths drawn evenly, in about `length` tokens; the facts and the question
    are there however short that is."""
    questions = []
    for number in range(count):
        chance = random.Random(f"{seed}/needle/{length}/{number}")
        facts = dict(zip(chance.sample(_CITIES, NEEDLES), (str(one) for one in chance.sample(range(1000, 10000), NEEDLES)), strict=True))
        told = [f"The secret number of {city} is {secret}." for city, secret in facts.items()]
        asked = chance.choice(list(facts))
        ask = f"The secret number of {asked} is"
        room, hay = length - sum(len(tokenizer.encode(f" {one}")) for one in [*told, ask]), []
        while room > 0:
            hay.append(chance.choice(_SENTENCES))
            room -= len(tokenizer.encode(f" {hay[-1]}"))
        for fact in told:
            hay.insert(chance.randint(0, len(hay)), fact)
        choices = sorted(facts.values())
        questions.append(Question(
            contexts=(f"{' '.join(hay)} {ask}",), continuations=tuple(f" {choice}" for choice in choices), answer=choices.index(facts[asked]),
            group=f"length {length}", family=f"needle {length}",
        ))  # fmt: skip
    return questions


def _pairs(length: int, chance: random.Random, tokenizer: EncodingTokenizer) -> list[tuple[str, str]]:
    """Pairs of words, none twice, until they fill `length` tokens; at least two."""
    pairs: list[tuple[str, str]] = []
    used: set[str] = set()
    tokens = 0
    while tokens < length or len(pairs) < 2:
        key, value = _word(chance, used), _word(chance, used)
        pairs.append((key, value))
        tokens += len(tokenizer.encode(f"{key} {value}\n"))
    return pairs


def _word(chance: random.Random, used: set[str]) -> str:
    """A word of two or more syllables that was not used."""
    word = ""
    while len(word) < 4 or word in used:
        word += chance.choice("bdfgklmnprstvz") + chance.choice("aeiou")
    used.add(word)
    return word


RECALL: dict[str, Callable[..., list[Question]]] = {"associative_recall": associative_recall, "needle": needle}
"""Task -> its questions at one length."""
