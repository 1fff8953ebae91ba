"""Contexts read once, shared and forked give the log-likelihoods of a plain forward over each whole text."""

import random

import pytest
import torch

from kan_train.evaluation import score
from kan_train.evaluation.questions import Reading, common_prefix
from kan_train.evaluation.score import continuation_log_probs, longest_context

VOCAB = 384


def plainly(model, context, continuation) -> float:
    """One forward over everything, nothing reused."""
    with torch.no_grad():
        log_probs = model.logits(torch.tensor([[*context, *continuation]]))[0].double().log_softmax(-1)
    return sum(float(log_probs[len(context) + place - 1, token]) for place, token in enumerate(continuation))


def drawn(chance, count) -> tuple[int, ...]:
    return tuple(chance.randrange(2, VOCAB) for _ in range(count))


def some_readings(seed: int, shared: int, longest: int = 20) -> list[Reading]:
    """Contexts of any length behind a common beginning; continuations of one token, of several, and one that begins as another does."""
    chance = random.Random(seed)
    beginning = (1, *drawn(chance, shared))
    found = []
    for _ in range(chance.randint(5, 12)):
        first = drawn(chance, 2)
        following = [first, first + drawn(chance, 3), drawn(chance, 1), drawn(chance, 1)][: chance.randint(1, 4)]
        found.append(Reading(beginning + drawn(chance, chance.randint(0, longest)), tuple(following)))
    return found


@pytest.mark.parametrize("kind", ["ada", "hybrid", "softmax"])
@pytest.mark.parametrize("shared", [0, 5, 30])
def test_shared_reading_is_the_whole_forward(make_model, kind, shared):
    model = make_model(kind)
    for seed, batch_size in enumerate((1, 3, 64)):
        asked, done = some_readings(seed, shared, longest=20), []
        found = continuation_log_probs(model, asked, batch_size=batch_size, advance=done.append)
        for reading, sums in zip(asked, found, strict=True):
            expected = [plainly(model, reading.context, continuation) for continuation in reading.continuations]
            assert sums == pytest.approx(expected, rel=1e-10, abs=1e-9)
        assert sum(done) == len(asked)


def test_a_long_context_is_read_in_pieces(make_model, monkeypatch):
    """Longer than a piece, and for ADA longer than the training's sequences: every token counts."""
    monkeypatch.setattr(score, "PIECE", 16)
    model = make_model("ada")
    asked = some_readings(3, shared=90, longest=70)
    found = continuation_log_probs(model, asked, batch_size=8)
    assert longest_context(model) is None
    assert max(len(reading.context) for reading in asked) > model.config.sequence_length
    expected = [[plainly(model, reading.context, one) for one in reading.continuations] for reading in asked]
    assert [value for sums in found for value in sums] == pytest.approx([value for sums in expected for value in sums], rel=1e-10)


def test_softmax_models_read_the_end_of_what_is_too_long(make_model):
    model = make_model("softmax")
    assert longest_context(model) == 64
    asked = [*some_readings(4, shared=40, longest=60), *some_readings(5, shared=0)]
    found = continuation_log_probs(model, asked, batch_size=4)
    cut = 0
    for reading, sums in zip(asked, found, strict=True):
        room = 65 - max(map(len, reading.continuations))
        cut += len(reading.context) > room
        assert sums == pytest.approx([plainly(model, reading.context[-room:], one) for one in reading.continuations], rel=1e-10)
    assert 0 < cut < len(asked)


def test_what_all_begin_with_is_read_once(make_model, monkeypatch):
    """Twenty questions behind 50 common tokens: those are read by one row."""
    model, tokens = make_model("ada"), []
    plain = score._stream
    monkeypatch.setattr(score, "_stream", lambda model, tokens_BT, state: (tokens.append(tokens_BT.numel()), plain(model, tokens_BT, state))[1])
    chance = random.Random(0)
    beginning = (1, *drawn(chance, 49))
    asked = [Reading((*beginning, token, *drawn(chance, 4)), ((5,), (6,), (7,), (8,))) for token in range(20, 40)]
    continuation_log_probs(model, asked, batch_size=80)
    # Of each question its own five tokens, once: choices of one token need no row of their own.
    assert sum(tokens) == 50 + 20 * 5


def test_common_prefix():
    assert common_prefix([(1, 2, 3), (1, 2), (1, 2, 4)]) == 2
    assert common_prefix([(1, 2), (2, 2)]) == 0
    assert common_prefix([(4, 4)]) == 2
    assert common_prefix([]) == 0


def test_a_capacity_drops_nothing_that_is_scored(make_model):
    """Otherwise a figure depends on what is read beside it: one at a time and all together are the same, and the same as without a capacity."""
    model, roomy = make_model("capacity"), make_model("ada")
    roomy.load_state_dict(model.state_dict())
    asked = some_readings(7, shared=5)
    one, many, without = (continuation_log_probs(each, asked, batch_size=size) for each, size in ((model, 1), (model, 64), (roomy, 64)))
    for some, same, expected in zip(one, many, without, strict=True):
        assert some == pytest.approx(same, rel=1e-10)
        assert some == pytest.approx(expected, rel=1e-10)
    assert model.layers[0].ffn.config.capacity_factor == 0.5
