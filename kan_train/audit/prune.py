"""What the loss becomes when functions lose their learned part: the least important first, and in other orders beside it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kan_train.audit.functions import Functions, zeroed
from kan_train.audit.importance import Importance
from kan_train.data.index import CorpusIndex
from kan_train.evaluation.perplexity import DocumentLoss, packed_documents
from kan_train.evaluation.score import require_finite
from kan_train.evaluation.statistics import bootstrap_ratio
from kan_train.model.lm import LanguageModel

SHARES = (0.25, 0.5, 0.75, 0.9)
"""Shares of all functions of the model that lose their learned part, besides all of them."""

ORDERS = {
    "importance": "least important first",
    "size": "smallest first, the straight part counted too",
    "random": "in a random order",
}


def prune(
    model: LanguageModel, functions: Sequence[Functions], importances: Sequence[Importance], corpus: CorpusIndex, sequences: int, *,
    batch_size: int, seed: int, resets: bool = True, advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Loss (nats a token) with all functions whole, and its rise for every order and share, each with a 95% bootstrap interval over the documents, in pairs.

    Silu, weights and routing stay as they are; nothing is trained again. `advance` is told of every measurement.
    """  # fmt: skip
    whole = packed_documents(model, corpus, sequences, resets=resets, batch_size=batch_size)
    advance()
    loss = sum(each.nats for each in whole) / sum(each.tokens for each in whole)
    require_finite([loss], f"the loss on {corpus.folder}")
    total = sum(each.count for each in functions)
    rows = []
    for order, share in [*((order, share) for order in ORDERS for share in SHARES), ("all", 1.0)]:
        count = round(share * total)
        with zeroed(functions, masks_of(functions, _ranking(order, importances, seed), count)):
            pruned = packed_documents(model, corpus, sequences, resets=resets, batch_size=batch_size)
        advance()
        rows.append({"order": order, "share": share, "functions": count} | _rise(whole, pruned, seed))
    return {"loss": loss, "documents": len(whole), "tokens": sum(each.tokens for each in whole), "functions": total, "rows": rows}


def measurements() -> int:
    """How often `prune` calls `advance`."""
    return len(ORDERS) * len(SHARES) + 2


def masks_of(functions: Sequence[Functions], ranking: np.ndarray, count: int) -> list[np.ndarray]:
    """The first `count` of all functions in the order of `ranking` (fp64, all functions end to end) as one bool [N, I, O] for each entry."""
    flat = np.zeros(len(ranking), dtype=bool)
    flat[np.argsort(ranking, kind="stable")[:count]] = True
    ends = np.cumsum([each.count for each in functions])
    return [part.reshape(each.shape) for part, each in zip(np.split(flat, ends[:-1]), functions, strict=True)]


def _ranking(order: str, importances: Sequence[Importance], seed: int) -> np.ndarray:
    bent = np.concatenate([each.bent.ravel() for each in importances])
    if order == "size":
        return np.concatenate([each.size.ravel() for each in importances])
    return np.random.default_rng(seed).random(len(bent)) if order == "random" else bent


def _rise(before: Sequence[DocumentLoss], after: Sequence[DocumentLoss], seed: int) -> dict[str, Any]:
    """Of the same documents: in pairs the interval is not blurred by how hard each of them is."""
    rises, tokens = [new.nats - old.nats for old, new in zip(before, after, strict=True)], [each.tokens for each in before]
    interval = bootstrap_ratio(rises, tokens, seed=seed)
    return {"rise": sum(rises) / sum(tokens), "interval": None if np.isnan(interval[0]) else list(interval)}
