"""Mutual information of planted dependence and of none; byte classes; what is typical."""

import numpy as np
import pytest

from kan_train.audit.groves import BYTE_CLASSES, byte_class, counts_of, groves_of, mutual_information, plug_in, text_of
from kan_train.audit.watch import Watched


def test_planted_dependence_is_found_to_the_bit():
    """A label decides between two of eight groves: 3 bits of entropy, 2 of them known."""
    generator = np.random.default_rng(0)
    label = generator.integers(0, 4, 40_000)
    choices = (2 * label + generator.integers(0, 2, 40_000))[:, None]
    found = mutual_information(choices, label, 8, seed=0)
    assert found["excess"] == pytest.approx(2, abs=0.01)
    assert found["share"] == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.parametrize("labels", [4, 300])
def test_independence_has_no_excess_though_the_plug_in_has_bits(labels):
    generator = np.random.default_rng(1)
    choices, label = np.argsort(generator.random((3000, 16)), axis=1)[:, :2].astype(np.int32), generator.integers(0, labels, 3000)
    found = mutual_information(choices, label, 16, seed=0, shuffles=20)
    assert found["bits"] > 0.7 * found["first_order"] > 0
    assert abs(found["excess"]) < 5 * found["chance_deviation"]
    assert found["chance"] == pytest.approx(found["first_order"], rel=0.3)


def test_plug_in_of_tables_known_in_closed_form():
    assert plug_in(np.array([[1, 0], [0, 1]])) == 1
    assert plug_in(np.array([[2, 2], [2, 2]])) == 0
    assert plug_in(np.array([[3, 1], [1, 3]])) == pytest.approx(1 + 0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))


def test_choices_without_room_do_not_count():
    choices, label = np.array([[0, -1], [1, 0]]), np.array([1, 0])
    assert counts_of(choices, label, 2, 2).tolist() == [[1, 1], [1, 0]]


def test_shares_of_the_load_add_up_under_a_capacity():
    """Half of the choices had no room: the rest is one load, of one bit between two groves."""
    watched = Watched(
        tokens=np.full(4, 4), documents=np.zeros(4, dtype=int), layers=[0], choices=[np.array([[0, -1], [-1, 1], [0, -1], [-1, 1]])], inputs=[]
    )  # fmt: skip
    (layer,) = groves_of(watched, Letters(), 2, seed=0)
    assert layer["load"] == [0.5, 0.5]
    assert (layer["load_bits"], layer["dropped"]) == (1.0, 0.5)


class Letters:
    """Token 1 begins a document, token 2 + n is text n."""

    boundary = 1
    texts = (" ", "\n    ", " def", "word", "42", "):", " +=", "naïve", "a1", "\t\t", "x y")
    vocab_size = 2 + len(texts) + 2

    def byte_of(self, token: int) -> int | None:
        return {2 + len(self.texts): 0x0A, 3 + len(self.texts): 0xE2}.get(token)

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.texts[token - 2] for token in tokens if 2 <= token < 2 + len(self.texts))


def test_byte_classes():
    letters = Letters()
    classes = [byte_class(letters, token) for token in range(1, letters.vocab_size)]
    assert classes == [
        "document start", "spaces", "line break", "space + letters", "letters", "digits", "punctuation", "punctuation", "not ASCII", "mixed", "spaces", "mixed",
        "line break", "not ASCII",
    ]  # fmt: skip
    assert [text_of(letters, token) for token in (1, 4, 3, 13, 14)] == ["<document>", "␣def", "↵␣␣␣␣", "↵", "<E2>"]


def test_a_grove_of_its_own_kind_of_tokens_is_told():
    """Grove 0 takes the digits, grove 1 the rest, grove 2 nothing."""
    letters = Letters()
    tokens = np.random.default_rng(0).choice([4, 5, 6], 500)
    watched = Watched(tokens=tokens, documents=np.arange(500) // 50, layers=[3], choices=[np.where(tokens == 6, 0, 1)[:, None]], inputs=[])
    (layer,) = groves_of(watched, letters, 3, seed=0)
    assert (layer["layer"], layer["unused"]) == (3, [2])
    assert layer["mutual_information"]["byte class"]["share"] == pytest.approx(1, abs=0.02)
    assert abs(layer["mutual_information"]["document"]["excess"]) < 0.02
    (typical,) = layer["typical"][0]
    assert (typical["token"], typical["of_grove"], typical["lift"]) == ("42", 1.0, pytest.approx(500 / (tokens == 6).sum()))
    assert {one["token"] for one in layer["typical"][1]} == {"␣def", "word"}
    assert layer["typical"][2] == []
    assert np.array(layer["byte_classes"])[0].tolist() == [(tokens == 6).sum() if name == "digits" else 0 for name in BYTE_CLASSES]
