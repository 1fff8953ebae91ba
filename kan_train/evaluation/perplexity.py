"""Perplexity and bits per byte of held-out documents.  B sequences, T time.

Whatever the reading, the end of a document is predicted too (the boundary token that begins the next), as in training's validation; it has no bytes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kan_train.config import ConfigError, DataConfig, ModelConfig
from kan_train.data import TrainingData
from kan_train.data.index import CorpusIndex
from kan_train.data.loader import Batch
from kan_train.evaluation.score import PIECE, Advance, log_probs_at, longest_context, require_finite
from kan_train.evaluation.statistics import bootstrap_ratio
from kan_train.inference.engine import dropless, evaluating
from kan_train.model.lm import LanguageModel
from kan_train.model.norm import at_least_fp32


@dataclass
class DocumentLoss:
    """What one document, or the part of it that was read, cost."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    """UTF-8 bytes of the tokens that were predicted."""


def open_corpus(folder: str, tokenizer_sha256: str) -> CorpusIndex:
    """The prepared corpus, whose tokenizer must be that of the run. ConfigError where it is not, or the corpus is missing."""
    corpus = CorpusIndex(Path(folder), verify=False)
    if corpus.tokenizer_sha256 != tokenizer_sha256:
        raise ConfigError(f"text={folder} was prepared with another tokenizer than the run's; prepare it again with tokenizer.path=RUN/tokenizer.model")
    return corpus


def heldout_documents(corpus: CorpusIndex, limit: int | None) -> list[list[int]]:
    """Tokens of every held-out document, each beginning with the boundary, in the order of the corpus; the first `limit`."""
    stream = corpus.stream("heldout")
    tokens = np.empty(stream.tokens, dtype=np.int64)
    stream.read(0, tokens)
    starts = np.flatnonzero(tokens == corpus.boundary).tolist()
    if not starts:
        raise ConfigError(f"text={corpus.folder} holds no document out; prepare it again with heldout=0.01")
    return [tokens[start:end].tolist() for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True)][:limit]


def whole_documents(
    model: LanguageModel, documents: Sequence[Sequence[int]], bytes_of_tokens: np.ndarray, *, batch_size: int = 32, advance: Advance = lambda _: None
) -> list[DocumentLoss]:
    """Each document alone, from its start: in a model of ADA layers all of it after one state, however long; with softmax layers in windows of the
    training's length, each of which begins anew and predicts the token behind it too. `advance` is told of tokens read."""
    window = longest_context(model)
    losses = [DocumentLoss(bytes=int(bytes_of_tokens[list(document)].sum())) for document in documents]
    rows: list[tuple[int, list[int]]] = []  # document, tokens with the last target
    for number, document in enumerate(documents):
        tokens = [*document, document[0]]
        step = window or len(document)
        rows += [(number, tokens[start : start + step + 1]) for start in range(0, len(document), step)]
    rows.sort(key=lambda row: len(row[1]))
    with evaluating(model), dropless(model):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            wanted = [(row, time, token) for row, (_, tokens) in enumerate(batch) for time, token in enumerate(tokens[1:])]
            log_probs, _ = log_probs_at(model, [tokens[:-1] for _, tokens in batch], model.init_state(len(batch)), wanted)
            first = 0
            for number, tokens in batch:
                count = len(tokens) - 1
                losses[number].nats -= float(log_probs[first : first + count].sum())
                losses[number].tokens += count
                first += count
            advance(len(wanted))
    return losses


def packed_documents(
    model: LanguageModel, corpus: CorpusIndex, limit: int | None, *, resets: bool = True, batch_size: int = 32, advance: Advance = lambda _: None
) -> list[DocumentLoss]:
    """The sequences of training's own validation (the first `limit` of its order): documents end to end, cut at the training's length, the state reset
    where one begins if training did so (`resets`). The part of a document in one sequence counts as a document."""
    losses: list[DocumentLoss] = []
    device = model.embedding.weight.device
    with evaluating(model):
        for batch in packed_batches(corpus, model.config, limit or 1 << 60, batch_size, resets=resets):
            moved = batch.to(device)
            x_BTD = model.final_norm(model.stream(moved.tokens, moved.resets))
            for tokens_T, targets_T, x_TD in zip(batch.tokens, batch.targets, x_BTD, strict=True):
                if targets_T[0] < 0:  # a row that fills up the last batch
                    continue
                nats_T = torch.cat([
                    -at_least_fp32(model.head(x_TD[None, some]))[0].log_softmax(-1).gather(-1, targets_T[some, None].to(device))[:, 0].double().cpu()
                    for some in _slices(len(targets_T))
                ])  # fmt: skip
                losses += _by_document(tokens_T, targets_T, nats_T, corpus)
            advance(int((batch.targets >= 0).sum()))
    return losses


def packed_batches(corpus: CorpusIndex, config: ModelConfig, sequences: int, batch_size: int, *, resets: bool) -> list[Batch]:
    """The first `sequences` sequences of training's own validation on `corpus`. ConfigError where it holds too little text out."""
    require_a_sequence(corpus, config.sequence_length, "use another corpus with more text")
    blend = DataConfig(root=str(corpus.folder.parent), blend={corpus.folder.name: 1.0}, verify=False, reset_at_documents=resets)
    return TrainingData(blend, sequence_length=config.sequence_length, seed=0, vocab_size=config.vocab_size).heldout(sequences, batch_size, 0, 1)


def require_a_sequence(corpus: CorpusIndex, length: int, advice: str) -> None:
    """ConfigError where `corpus` holds less text out than one sequence of `length` tokens and what is predicted last."""
    tokens = corpus.stream("heldout").tokens
    if tokens < length + 1:
        raise ConfigError(
            f"text={corpus.folder} holds {tokens} tokens out, too few for one sequence of the training's {length}; {advice}, "
            "or prepare it again with a larger share, such as heldout=0.1"
        )


def _slices(length: int) -> list[slice]:
    return [slice(start, start + PIECE) for start in range(0, length, PIECE)]


def _by_document(tokens_T: torch.Tensor, targets_T: torch.Tensor, nats_T: torch.Tensor, corpus: CorpusIndex) -> list[DocumentLoss]:
    part_T = (tokens_T == corpus.boundary).cumsum(0)
    sizes_T = torch.from_numpy(corpus.bytes_of_tokens[targets_T.numpy()].astype(np.int64))
    return [
        DocumentLoss(nats=float(nats_T[here].sum()), tokens=int(here.sum()), bytes=int(sizes_T[here].sum()))
        for part in part_T.unique().tolist() if (here := part_T == part).any()
    ]  # fmt: skip


def summary(losses: Sequence[DocumentLoss], *, seed: int) -> dict[str, Any]:
    """Loss (nats a token), perplexity and bits per byte over all, each with its 95% bootstrap interval over documents; and the baseline without a model.

    The interval is None for a single document, a perplexity beyond floating point None. Baseline: log2(256) = 8 bits a byte, bytes drawn evenly.
    ConfigError where a loss is NaN or infinite.
    """
    nats, tokens, sizes = ([getattr(loss, name) for loss in losses] for name in ("nats", "tokens", "bytes"))
    require_finite(nats, "a document's loss")
    bits = [each / math.log(2) for each in nats]
    loss, of_loss = sum(nats) / sum(tokens), bootstrap_ratio(nats, tokens, seed=seed)
    return {
        "metric": "bits_per_byte",
        "documents": len(losses), "tokens": sum(tokens), "bytes": sum(sizes),
        "loss": _with_interval(loss, of_loss, float),
        "perplexity": _with_interval(loss, of_loss, _exp),
        "bits_per_byte": _with_interval(sum(bits) / max(1, sum(sizes)), bootstrap_ratio(bits, sizes, seed=seed), float),
        "baselines": {"random": 8.0},
    }  # fmt: skip


def _with_interval(value: float, interval: tuple[float, float], of: Callable[[float], float | None]) -> dict[str, Any]:
    ends = [None if math.isnan(end) else of(end) for end in interval]
    return {"value": of(value), "interval": None if None in ends else ends}


def _exp(loss: float) -> float | None:
    try:
        return math.exp(loss)
    except OverflowError:
        return None
