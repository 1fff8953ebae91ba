"""A whole audit: everything that audit.json holds of a model on held-out text."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kan_train.audit.describe import layers_of
from kan_train.audit.functions import functions_of
from kan_train.audit.groves import groves_of
from kan_train.audit.importance import importances_of
from kan_train.audit.prune import measurements, prune
from kan_train.audit.watch import watch
from kan_train.data.index import CorpusIndex
from kan_train.data_tools.tokenizer import Tokenizer
from kan_train.evaluation.score import require_finite
from kan_train.model.lm import LanguageModel

Advance = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is looked at."""

    sequences: int = 64
    """Sequences of the training's length to read, those of its own validation."""
    batch_size: int = 8
    """Sequences that are read at a time."""
    top: int = 12
    """Functions of a layer that come with curves."""
    seed: int = 0
    """Of the random order, the shuffles and the bootstrap."""
    prune: bool = True
    """Whether to measure the loss without functions, which takes most of the time."""
    reset_at_documents: bool = True
    """Whether states begin anew with a document of a sequence, as the run has it (data.reset_at_documents)."""


def audit(model: LanguageModel, tokenizer: Tokenizer, corpus: CorpusIndex, settings: Settings, advance: Advance = lambda: None) -> dict[str, Any]:
    """Functions, pruning and groves; `advance` is told of every reading of the text, of which there are `readings`.

    "pruning" is None where it is not asked for, or nothing was learned: where the groves' activation is plain silu, "functions" has no layers either.
    ConfigError for a dense model, or one that has diverged.
    """
    functions = functions_of(model)
    resets = settings.reset_at_documents
    watched = watch(model, functions, corpus, settings.sequences, settings.batch_size, resets=resets)
    advance()
    importances, grove = importances_of(functions, watched), model.config.grove
    require_finite((float(each.bent.sum()) for each in importances), "the importance of a layer's functions")
    pruning = None
    if settings.prune and functions:
        size = settings.batch_size
        pruning = prune(model, functions, importances, corpus, settings.sequences, batch_size=size, seed=settings.seed, resets=resets, advance=advance)
    return {
        "model": model.config.name, "grove_kind": grove.kind, "num_groves": grove.num_groves, "active_groves": grove.active_groves,
        "edge": dataclasses.asdict(grove.edge), "tokens": len(watched.tokens), "settings": dataclasses.asdict(settings),
        "functions": layers_of(functions, importances, watched.inputs, top=settings.top),
        "pruning": pruning,
        "groves": groves_of(watched, tokenizer, grove.num_groves, seed=settings.seed),
    }  # fmt: skip


def readings(settings: Settings) -> int:
    """How often `audit` calls `advance`, where functions were learned."""
    return 1 + settings.prune * measurements()
