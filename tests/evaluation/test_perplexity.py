"""Held-out documents against a plain forward in float64 and against the text itself."""

import math

import numpy as np
import pytest
import torch

from kan_train.config import ConfigError, DataConfig
from kan_train.data import TrainingData
from kan_train.evaluation import score
from kan_train.evaluation.perplexity import (
    DocumentLoss,
    heldout_documents,
    open_corpus,
    packed_batches,
    packed_documents,
    require_a_sequence,
    summary,
    whole_documents,
)

from .conftest import model_config


@pytest.fixture(scope="module")
def corpus(corpus_folder, tokenizer):
    return open_corpus(str(corpus_folder), tokenizer.sha256)


def test_documents_under_a_capacity_do_not_depend_on_the_batch(make_model, corpus):
    model, documents = make_model("capacity"), heldout_documents(corpus, 5)
    alone, together = (whole_documents(model, documents, corpus.bytes_of_tokens, batch_size=size) for size in (1, 5))
    assert [loss.nats for loss in alone] == pytest.approx([loss.nats for loss in together], rel=1e-10)


def plain_nats(model, tokens) -> list[float]:
    """-log P of every token but the first, one forward."""
    with torch.no_grad():
        log_probs = model.logits(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)
    return [-float(log_probs[place, token]) for place, token in enumerate(tokens[1:])]


def test_documents_are_the_texts(corpus, tokenizer):
    documents = heldout_documents(corpus, None)
    assert sum(map(len, documents)) == corpus.stream("heldout").tokens
    assert len(heldout_documents(corpus, 3)) == 3
    for document in documents:
        text = tokenizer.decode(document)
        assert document == [1, *tokenizer.encode(text)]
        assert int(corpus.bytes_of_tokens[document].sum()) == len(text.encode())


@pytest.mark.parametrize("kind", ["ada", "hybrid", "softmax"])
def test_whole_documents_are_plain_forwards(make_model, corpus, monkeypatch, kind):
    """ADA: the whole document after one state, read in pieces; softmax: windows of 64 that begin anew. Every token once, its end too."""
    monkeypatch.setattr(score, "PIECE", 100)
    model, documents = make_model(kind), heldout_documents(corpus, 4)
    documents[1] = documents[1][:30]
    assert max(map(len, documents)) > 200 > 64
    losses = whole_documents(model, documents, corpus.bytes_of_tokens, batch_size=3)
    step = 64 if kind != "ada" else 10**9
    for document, loss in zip(documents, losses, strict=True):
        tokens = [*document, 1]
        expected = [nats for start in range(0, len(document), step) for nats in plain_nats(model, tokens[start : start + step + 1])]
        assert loss.tokens == len(document) == len(expected)
        assert loss.nats == pytest.approx(sum(expected), rel=1e-9)


@pytest.mark.parametrize("resets", [True, False])
def test_packed_is_trainings_validation(make_model, corpus, resets):
    model = make_model("ada")
    losses = packed_documents(model, corpus, 12, resets=resets, batch_size=5)
    blend = DataConfig(root=str(corpus.folder.parent), blend={"tiny": 1.0}, reset_at_documents=resets)
    data = TrainingData(blend, sequence_length=64, seed=9, vocab_size=384)
    nats = tokens = 0.0
    for batch in data.heldout(12, 4, 0, 1):
        with torch.no_grad():
            cross_entropy = float(model(batch.tokens, batch.targets, batch.resets)[1])
        nats, tokens = nats + cross_entropy * batch.targets.numel(), tokens + batch.targets.numel()
    found = summary(losses, seed=0)
    assert found["tokens"] == tokens == 12 * 64
    assert found["loss"]["value"] == pytest.approx(nats / tokens, rel=1e-6)
    assert found["bits_per_byte"]["value"] == pytest.approx(nats / tokens / math.log(2) / data.bytes_per_token_heldout, rel=1e-6)


def test_known_probabilities_give_known_figures(table):
    """Every token with probability 1/4: perplexity 4, two bits a token; of two bytes a token one bit a byte."""
    model = table(torch.full((4, 4), 0.25))
    losses = whole_documents(model, [[1, 2, 3, 2], [1, 3], [1, 2, 2]], np.array([0, 0, 2, 2]))
    found = summary(losses, seed=0)
    assert (found["tokens"], found["bytes"], found["documents"]) == (9, 12, 3)
    assert found["perplexity"]["value"] == pytest.approx(4)
    assert found["loss"]["value"] == pytest.approx(math.log(4))
    assert found["loss"]["interval"] == pytest.approx([math.log(4)] * 2)
    assert found["bits_per_byte"]["value"] == pytest.approx(9 * 2 / 12)
    low, high = found["bits_per_byte"]["interval"]
    assert low < 1.5 < high


def test_one_document_has_no_interval():
    found = summary([DocumentLoss(nats=2.0, tokens=2, bytes=3)], seed=0)
    assert found["perplexity"] == {"value": pytest.approx(math.e), "interval": None}


def test_a_loss_beyond_every_number_has_no_perplexity_and_none_at_all_is_told():
    found = summary([DocumentLoss(nats=1600.0, tokens=2, bytes=3), DocumentLoss(nats=1600.0, tokens=2, bytes=3)], seed=0)
    assert found["perplexity"] == {"value": None, "interval": None}
    assert found["loss"] == {"value": 800.0, "interval": [800.0, 800.0]}
    with pytest.raises(ConfigError, match="a document's loss is nan: the weights have diverged; use an earlier checkpoint"):
        summary([DocumentLoss(nats=math.nan, tokens=2, bytes=3)], seed=0)


def test_too_little_text_for_a_sequence_is_told_in_this_commands_settings(corpus):
    with pytest.raises(ConfigError, match=r"tokens out, too few for one sequence of the training's 9999999; use reading=documents, or prepare it"):
        require_a_sequence(corpus, 9_999_999, "use reading=documents")
    tokens = corpus.stream("heldout").tokens
    with pytest.raises(ConfigError, match="use another corpus with more text"):
        packed_batches(corpus, model_config(sequence_length=tokens), 1, 1, resets=True)
    assert len(packed_batches(corpus, model_config(sequence_length=tokens - 1), 1, 1, resets=True)) == 1


def test_another_tokenizer_is_refused(corpus_folder):
    with pytest.raises(ConfigError, match=r"prepare it again with tokenizer.path=RUN/tokenizer.model"):
        open_corpus(str(corpus_folder), "0" * 64)
