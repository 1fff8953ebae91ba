"""A small model of each kind, batches drawn from a seed, and a corpus prepared from a few written files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kan_train.config import AttentionConfig, Config, GroveConfig, ModelConfig, RunConfig, TrainConfig
from kan_train.data import Batch

VOCABULARY, LENGTH = 128, 24


@pytest.fixture(params=["kan", "dense"])
def config(request: pytest.FixtureRequest) -> Config:
    """fp32, one process, two micro-batches of two sequences, clipping active."""
    common = {"num_layers": 2, "width": 32, "vocab_size": VOCABULARY, "sequence_length": LENGTH, "attention": AttentionConfig(num_heads=2, num_kv_heads=1)}
    if request.param == "kan":
        model = ModelConfig(grove=GroveConfig(num_groves=8, active_groves=2, width=16), **common)
    else:
        model = ModelConfig(ffn="swiglu", ffn_width=48, attention_pattern=1, **common)
    made = Config(model=model, train=TrainConfig(global_batch_size=4, micro_batch_size=2), run=RunConfig(seed=3, threads=1, device="cpu"))
    made.optimizer.clip_norm = 0.5
    return made


@pytest.fixture
def draw() -> Callable[..., list[Batch]]:
    """draw(step, micro_batch): the micro-batches of a step, from the same four sequences whatever their size."""

    def batches(step: int, micro_batch: int = 2) -> list[Batch]:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, VOCABULARY, (4, LENGTH + 1), generator=generator)
        resets = torch.rand(4, LENGTH, generator=generator) < 0.1
        parts = [slice(start, start + micro_batch) for start in range(0, 4, micro_batch)]
        return [Batch(tokens[part, :-1].contiguous(), tokens[part, 1:].contiguous(), resets[part].contiguous()) for part in parts]

    return batches


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of prepared corpora with one of them, "tiny": a vocabulary of 320 pieces, some ten thousand tokens."""
    from kan_train.config import CorpusConfig, PrepareConfig, TokenizerConfig
    from kan_train.data_tools.commands import run_prepare

    texts, root = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("corpora")
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        drawn = torch.randint(0, len(words), (150,), generator=generator).tolist()
        (texts / f"{number}.txt").write_text(" ".join(f"{words[index]}{number % 7}" for index in drawn))
    corpus = CorpusConfig(kind="directory", name="tiny", path=str(texts))
    tokenizer = TokenizerConfig(vocab_size=320)
    run_prepare(PrepareConfig(root=str(root), corpus=corpus, tokenizer=tokenizer, heldout=0.2, workers=1))
    return root
