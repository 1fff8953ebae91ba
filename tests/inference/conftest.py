"""A tokenizer trained on a little text, and a small untrained model in float64."""

from pathlib import Path

import pytest
import torch

from kan_train.checkpoint import Fragment, save
from kan_train.config import AdaConfig, Config, DataConfig, EdgeConfig, GroveConfig, ModelConfig, RunConfig, TokenizerConfig
from kan_train.config.compose import to_yaml
from kan_train.data_tools.tokenizer import Tokenizer, train_tokenizer
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel

TEXT = [
    "def main():\n    print('hello world')\n    return 0\n", "the quick brown fox jumps over the lazy dog; " * 3,
    "Grüße aus Köln: naïve café — 你好, мир! ", "for i in range(10):\n\tif i % 2:\n\t\tcontinue\n",
]  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXT * 5, TokenizerConfig(vocab_size=310, character_coverage=0.98), path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path) -> Tokenizer:
    return Tokenizer(tokenizer_path)


def model_config(**changes) -> ModelConfig:
    """Two small layers over a vocabulary that is larger than the tokenizer's, as a padded one is."""
    grove = GroveConfig(num_groves=8, active_groves=2, width=16, edge=EdgeConfig(group_size=8))
    ada = AdaConfig(num_heads=2, chunk=8)
    settings = {"num_layers": 2, "width": 32, "vocab_size": 512, "sequence_length": 64, "ada": ada, "grove": grove}
    return ModelConfig(**{**settings, **changes})


@pytest.fixture(scope="session")
def make_config():
    return model_config


@pytest.fixture(scope="session")
def make_model():
    """A model of `model_config(**changes)`; its logits are scaled up, so that choices are not all alike."""

    def make(dtype: torch.dtype = torch.float64, **changes) -> LanguageModel:
        model = materialise(LanguageModel(model_config(**changes)), seed=5, dtype=dtype)
        with torch.no_grad():
            model.head.weight *= 6
        return model.train()

    return make


@pytest.fixture
def run_root(tmp_path, make_model, tokenizer_path) -> Path:
    """A folder of runs with one finished run, "first", of two checkpoints (fp32): what `kan train` leaves, without training."""
    model = make_model(torch.float32)
    run_dir = tmp_path / "runs" / "first"
    config = Config(model=model.config, data=DataConfig(blend={"stdlib": 1.0}), run=RunConfig(name="first"))
    for step in (10, 20):
        fragments = [Fragment.whole(f"param/{name}", tensor) for name, tensor in model.named_parameters()]
        buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in dict(model.named_parameters())}
        fragments += [Fragment.whole(f"buffer/{name}", tensor) for name, tensor in buffers.items()]
        fragments += [Fragment.whole("exp_avg/head.weight", torch.zeros_like(model.head.weight))]
        save(run_dir / "checkpoints", step=step, fragments=fragments, state={"step": step}, config=to_yaml(config))
    (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (run_dir / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    return run_dir.parent
