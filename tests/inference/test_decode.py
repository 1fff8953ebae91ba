"""Decoding gives the tokens that the whole sequence's logits give, and text that never breaks inside a character."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kan_train.config import ConfigError
from kan_train.inference.decode import generate
from kan_train.inference.engine import Engine, Speed
from kan_train.inference.requests import Request
from kan_train.inference.sample import Sampling
from kan_train.inference.text import TextStream
from kan_train.model.decoder import Decoder

MODELS = {
    "ada": {},
    "softmax every second layer": {"attention_pattern": 2},
    "dense baseline": {"attention_pattern": 1, "ffn": "swiglu", "ffn_width": 48},
}


def tokens_of(model, tokenizer, prompt: str, *, samples: int = 1, seed: int = 0, **settings) -> list[list[int]]:
    """The tokens of each continuation, decoded together."""
    engine = Engine(model, tokenizer)
    rows = [engine.add(Request(prompt=prompt, sample=sample, seed=seed, **settings)) for sample in range(samples)]
    while not engine.idle:
        engine.step()
    return [row.tokens for row in rows]


def greedy_by_whole_sequences(model, tokenizer, prompt: str, count: int) -> list[int]:
    """No state, no decoding: after every token the logits of the whole sequence are computed again."""
    sequence = [tokenizer.boundary, *tokenizer.encode(prompt)]
    given = []
    model.eval()
    with torch.no_grad():
        for _ in range(count):
            logits = model.logits(torch.tensor([sequence]))[0, -1]
            allowed = range(1, tokenizer.vocab_size)
            token = max(allowed, key=lambda t: (float(logits[t]), -t))
            if token == tokenizer.boundary:
                break
            given.append(token)
            sequence.append(token)
    model.train()
    return given


@pytest.mark.parametrize("name", MODELS)
def test_greedy_decoding_is_argmax_over_the_growing_sequence(make_model, tokenizer, name):
    """In float64, prompt longer and shorter than a chunk: the recurrent form chooses what the parallel form does."""
    model, seen = make_model(**MODELS[name]), set()
    for prompt in ("", "def main():\n    print('hello"):
        expected = greedy_by_whole_sequences(model, tokenizer, prompt, 24)
        assert tokens_of(model, tokenizer, prompt, max_tokens=24, sampling=Sampling(temperature=0)) == [expected]
        seen |= set(expected)
        assert generate(model, tokenizer, prompt, max_tokens=24, sampling=Sampling(temperature=0)) == [tokenizer.decode(expected)]
    assert len(seen) > 3, "a model that repeats one token would prove nothing"


def test_the_same_seed_gives_the_same_text(make_model, tokenizer):
    model = make_model()
    settings = {"max_tokens": 30, "sampling": Sampling(temperature=1.0, top_k=40, top_p=0.95)}
    first = generate(model, tokenizer, "for i", seed=3, samples=2, **settings)
    assert generate(model, tokenizer, "for i", seed=3, samples=2, **settings) == first
    assert generate(model, tokenizer, "for i", seed=3, samples=1, **settings) == first[:1]
    assert generate(model, tokenizer, "for i", seed=4, samples=2, **settings) != first
    assert first[0] != first[1]


def test_it_streams_what_it_returns_and_says_how_fast(make_model, tokenizer):
    pieces: list[list[str]] = [[], []]
    speed = Speed()
    settings = {"max_tokens": 40, "sampling": Sampling(temperature=1.2), "samples": 2}
    texts = generate(make_model(), tokenizer, "the", **settings, on_text=lambda i, piece: pieces[i].append(piece), speed=speed)
    assert ["".join(found) for found in pieces] == texts
    assert all(all(found) for found in pieces)
    assert len(pieces[0]) > 5
    assert speed.prompt_tokens == 1 + len(tokenizer.encode("the"))
    assert speed.tokens <= 80
    assert speed.tokens_per_second > 0


def test_a_document_ends_at_the_boundary(make_model, tokenizer, monkeypatch):
    """With the boundary certain after some token, a sample ends there, the boundary is not given, and the others go on."""
    model = make_model()
    settings = {"max_tokens": 12, "samples": 3, "sampling": Sampling(temperature=1.0), "seed": 1}
    with torch.no_grad():
        free = tokens_of(model, tokenizer, "a", **settings)
        # The first tokens differ between samples: a bias by the last token read makes one sample end early.
        stop = free[1][3]
        assert stop not in free[0][:4] + free[1][:3]
        original = Decoder.step

        def step(decoder, tokens_B, state):
            logits_BV, state = original(decoder, tokens_B, state)
            logits_BV[tokens_B == stop, tokenizer.boundary] = 1e6
            return logits_BV, state

        monkeypatch.setattr(Decoder, "step", step)
        found = tokens_of(model, tokenizer, "a", **settings)
    assert found[1] == free[1][:4]
    assert found[0][:5] == free[0][:5]


def test_tokens_that_are_no_text_are_never_given(make_model, tokenizer):
    """Rows of the padded vocabulary and the unknown token, though the model likes them best."""
    model = make_model()
    with torch.no_grad():
        model.head.weight[tokenizer.vocab_size :] *= 50
        model.head.weight[0] *= 50
    tokens = {token for row in tokens_of(model, tokenizer, "x", max_tokens=60, samples=2, sampling=Sampling(temperature=2.0)) for token in row}
    assert tokens
    assert all(1 < token < tokenizer.vocab_size for token in tokens)


def test_a_model_in_training_is_in_training_afterwards(make_model, tokenizer):
    """Decoding between two training steps changes neither the mode nor the routing statistics."""
    model = make_model()
    before = model.pending_statistics()
    generate(model, tokenizer, "x", max_tokens=3)
    assert model.training
    assert all(module.training for module in model.modules())
    assert torch.equal(model.pending_statistics(), before)


def test_another_models_tokenizer_is_refused(make_model, tokenizer):
    with pytest.raises(ConfigError, match="310 tokens and the model only 256"):
        generate(make_model(vocab_size=256), tokenizer, "x")


@given(st.text(max_size=30), st.data())
@settings(max_examples=150, deadline=None)
def test_streamed_text_is_the_decoded_text(tokenizer, text, data):
    """Any text, also with characters spelled in bytes and the tokenizer's own escape: the pieces join to it, none with half of one."""
    text = text + data.draw(st.sampled_from(["", "你好", "\u2581\ue001", "e\ue001s", "🦊", "\ue001"]))
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokenizer.encode(text)]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == text


@given(st.lists(st.one_of(st.integers(2, 309), st.integers(2, 258)), max_size=25))
@settings(max_examples=400, deadline=None)
def test_any_tokens_are_streamed_as_they_are_decoded(tokenizer, tokens):
    """Tokens that no text gives, such as broken byte sequences: still exactly the decoding of all of them."""
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.add, tokens), stream.finish()]) == tokenizer.decode(tokens)
