"""A tokenizer trained on a little text, small models of which no number is what a fresh one would have, and runs of them."""

from pathlib import Path

import pytest
import torch

from kan_train.checkpoint import Fragment, save
from kan_train.config import AdaConfig, Config, DataConfig, EdgeConfig, GroveConfig, ModelConfig, RunConfig, TokenizerConfig
from kan_train.config.compose import to_yaml
from kan_train.data_tools.tokenizer import train_tokenizer
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel

TEXT = [
    "def main():\n    print('hello world')\n    return 0\n", "the quick brown fox jumps over the lazy dog; " * 3,
    "Grüße aus Köln: naïve café — 你好, мир! ", "for i in range(10):\n\tif i % 2:\n\t\tcontinue\n",
]  # fmt: skip

GROVE = GroveConfig(num_groves=8, active_groves=2, width=16, score_rank=4, edge=EdgeConfig(group_size=8))


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXT * 5, TokenizerConfig(vocab_size=310, character_coverage=0.98), path)
    return path


@pytest.fixture(scope="session")
def model_of():
    """A function: settings of the model that differ -> a model whose every parameter and buffer is drawn."""
    return drawn_model


@pytest.fixture(scope="session")
def write_run(tokenizer_path):
    """A function (run directory, model): the directory as `kan train` leaves it, with one checkpoint of the model."""

    def write(run_dir: Path, model: LanguageModel) -> None:
        save_run(run_dir, model, tokenizer_path)

    return write


@pytest.fixture
def runs(tmp_path, model_of, write_run) -> Path:
    """A folder of runs that has one, `first`."""
    write_run(tmp_path / "runs" / "first", model_of())
    return tmp_path / "runs"


def drawn_model(**changes) -> LanguageModel:
    settings = {"num_layers": 2, "width": 32, "vocab_size": 384, "sequence_length": 64, "ada": AdaConfig(num_heads=2, chunk=8), "grove": GROVE}
    model = materialise(LanguageModel(ModelConfig(**{**settings, **changes})), seed=5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            drawn = torch.rand(tensor.shape, generator=generator)
            tensor += 0.3 * drawn if name.endswith("score_std") else 0.4 * (drawn - 0.5)
    return model


def save_run(run_dir: Path, model: LanguageModel, tokenizer: Path) -> None:
    parameters = dict(model.named_parameters())
    fragments = [Fragment.whole(f"{'param' if name in parameters else 'buffer'}/{name}", tensor) for name, tensor in model.state_dict().items()]
    text = to_yaml(Config(model=model.config, data=DataConfig(blend={"stdlib": 1.0}), run=RunConfig(name=run_dir.name)))
    save(run_dir / "checkpoints", step=20, fragments=fragments, state={"progress": {"tokens": 2560}}, config=text)
    (run_dir / "tokenizer.model").write_bytes(tokenizer.read_bytes())
