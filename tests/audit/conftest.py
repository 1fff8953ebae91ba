"""Small models of every kind of grove, with functions and routing planted in them, and runs of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kan_train.audit.functions import Functions
from kan_train.checkpoint import Fragment, save
from kan_train.config import AdaConfig, Config, DataConfig, EdgeConfig, GroveConfig, ModelConfig, RunConfig
from kan_train.config.compose import to_yaml
from kan_train.data.index import CorpusIndex
from kan_train.data_tools.tokenizer import Tokenizer
from kan_train.model.edge import edge_basis
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel

KINDS = ("gated", "reuse", "edge")


def model_config(kind: str = "gated", function: str = "bspline", grove: dict | None = None, **changes) -> ModelConfig:
    sharing = "per_edge" if kind == "edge" else "grouped"
    edge = EdgeConfig(kind=function, order=3, grid=10, group_size=4, sharing=sharing)
    groves = GroveConfig(**{"num_groves": 6, "active_groves": 2, "width": 8, "score_rank": 6, "kind": kind, "edge": edge, **(grove or {})})
    settings = {"num_layers": 2, "width": 24, "vocab_size": 384, "sequence_length": 64, "ada": AdaConfig(num_heads=2, chunk=16), "grove": groves}
    return ModelConfig(**{**settings, **changes})


def make_model(*arguments, seed: int = 5, dtype: torch.dtype = torch.float64, **changes) -> LanguageModel:
    """Its coefficients are drawn at random, so that every learned part is there."""
    model = materialise(LanguageModel(model_config(*arguments, **changes)), seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("coefficients"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def plant(functions: Functions, where: tuple[int, int, int], learned) -> None:
    """Make s of function `where` the best approximation of learned(x) that its basis has on [-4, 4]."""
    grove, i, o = where
    x = torch.linspace(-4, 4, 801, dtype=torch.float64)
    best = torch.linalg.lstsq(edge_basis(x, functions.config), learned(x)[:, None]).solution[:, 0]
    coefficients = functions.module.coefficients
    if functions.shape[2] > 1:
        coefficients[grove].view(functions.shape[1], -1, functions.shape[2])[i, :, o] = best.to(coefficients)
    else:
        coefficients[grove, i] = best.to(coefficients)


@torch.no_grad()
def never_choose(model: LanguageModel, layer: int, grove: int) -> None:
    model.layers[layer].ffn.router.balance[grove] = -1e9


@pytest.fixture(scope="session")
def corpus(corpora: Path) -> CorpusIndex:
    return CorpusIndex(corpora / "tiny", verify=False)


@pytest.fixture(scope="session")
def tokenizer(corpus: CorpusIndex) -> Tokenizer:
    return Tokenizer(corpus.tokenizer_path)


def write_run(run_dir: Path, model: LanguageModel, corpus: CorpusIndex, **data) -> Path:
    """What `kan train` leaves of a run, without training; `data`: settings of its data."""
    config = Config(model=model.config, data=DataConfig(blend={"tiny": 1.0}, **data), run=RunConfig(name=run_dir.name))
    parameters = dict(model.named_parameters())
    fragments = [Fragment.whole(f"param/{name}", tensor.detach()) for name, tensor in parameters.items()]
    fragments += [Fragment.whole(f"buffer/{name}", tensor) for name, tensor in model.state_dict().items() if name not in parameters]
    save(run_dir / "checkpoints", step=20, fragments=fragments, state={"step": 20}, config=to_yaml(config))
    (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (run_dir / "tokenizer.model").write_bytes(corpus.tokenizer_path.read_bytes())
    return run_dir


def close(left, right, tolerance: float = 1e-9) -> bool:
    return bool(np.allclose(np.asarray(left), np.asarray(right), rtol=tolerance, atol=tolerance))
