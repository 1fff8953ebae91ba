"""A prepared corpus of 28,000 tokens, made in a few seconds."""

import io
from contextlib import redirect_stdout
from pathlib import Path

import torch

NAME = "tiny"
"""The corpus, below the root that `prepare` is given."""

PIECES = 320
"""Of its tokenizer."""

VOCABULARY = 384
"""Of a model that is trained on it: a multiple of 128 that has room for the pieces."""


def prepare(root: Path) -> Path:
    """Prepare the corpus in `root`, where it is not there yet; returns `root`."""
    from kan_train.config import CorpusConfig, PrepareConfig, TokenizerConfig
    from kan_train.data_tools.commands import run_prepare

    texts = root / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    generator = torch.Generator().manual_seed(0)
    for number in range(60):
        drawn = torch.randint(0, len(words), (300,), generator=generator).tolist()
        (texts / f"{number}.txt").write_text(" ".join(f"{words[index]}{number % 7}" for index in drawn))
    corpus = CorpusConfig(kind="directory", name=NAME, path=str(texts))
    with redirect_stdout(io.StringIO()):
        run_prepare(PrepareConfig(root=str(root), corpus=corpus, tokenizer=TokenizerConfig(vocab_size=PIECES), heldout=0.2, workers=1))
    return root
