"""A model that is a table of chosen probabilities, a tokenizer of bytes, and a small untrained run with its corpus."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kan_train.checkpoint import Fragment, save
from kan_train.config import AdaConfig, Config, DataConfig, EdgeConfig, GroveConfig, ModelConfig, RunConfig
from kan_train.config.compose import to_yaml
from kan_train.data_tools.tokenizer import Tokenizer
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel

GROVE = {"num_groves": 8, "active_groves": 2, "width": 16, "edge": EdgeConfig(group_size=8)}
KINDS = {
    "ada": {}, "hybrid": {"attention_pattern": 2}, "capacity": {"grove": GroveConfig(**GROVE, capacity_factor=0.5)},
    "softmax": {"attention_pattern": 1, "ffn": "swiglu", "ffn_width": 48},
}  # fmt: skip


class Bytes:
    """Token 1 begins a document, every byte b is token b + 2."""

    boundary = 1

    def encode(self, text: str) -> list[int]:
        return [byte + 2 for byte in text.encode()]


@dataclass
class _Nothing:
    rows: torch.Tensor


class _Passes(nn.Module):
    def prefill(self, x_BTD, state):
        return x_BTD, state


class Table(nn.Module):
    """P(next | last) as a table [V, V] has it: what a language model is to evaluation, without one."""

    def __init__(self, probabilities: torch.Tensor) -> None:
        super().__init__()
        size = len(probabilities)
        self.config = SimpleNamespace(num_layers=1, is_softmax_layer=lambda layer: False, sequence_length=8, vocab_size=size, grove=GroveConfig(num_groves=0))
        self.embedding = nn.Embedding.from_pretrained(torch.eye(size, dtype=torch.float64))
        self.layers = nn.ModuleList([_Passes()])
        self.final_norm = nn.Identity()
        self.head = nn.Linear(size, size, bias=False, dtype=torch.float64)
        self.head.weight = nn.Parameter(probabilities.double().log().T)

    def init_state(self, batch: int) -> list:
        return [_Nothing(torch.zeros(batch))]


@pytest.fixture(scope="session")
def table():
    return Table


@pytest.fixture(scope="session")
def byte_tokenizer() -> Bytes:
    return Bytes()


def model_config(vocab_size: int = 384, **changes) -> ModelConfig:
    ada, grove = AdaConfig(num_heads=2, chunk=16), GroveConfig(**GROVE)
    settings = {"num_layers": 2, "width": 32, "vocab_size": vocab_size, "sequence_length": 64, "ada": ada, "grove": grove}
    return ModelConfig(**{**settings, **changes})


@pytest.fixture(scope="session")
def make_model():
    """A model of a kind, its logits scaled up so that what is likely differs from what is not."""

    def make(kind: str = "ada", dtype: torch.dtype = torch.float64) -> LanguageModel:
        model = materialise(LanguageModel(model_config(**KINDS[kind])), seed=5, dtype=dtype)
        with torch.no_grad():
            model.head.weight *= 6
        return model.eval()

    return make


@pytest.fixture(scope="session")
def corpus_folder(corpora) -> Path:
    return corpora / "tiny"


@pytest.fixture(scope="session")
def tokenizer(corpus_folder) -> Tokenizer:
    return Tokenizer(corpus_folder / "tokenizer" / "tokenizer.model")


def write_run(run_dir: Path, corpus_folder: Path, *, seed: int, **data) -> None:
    """An untrained run as `kan train` leaves it; `data`: settings of its data."""
    model = materialise(LanguageModel(model_config()), seed=seed, dtype=torch.float32)
    config = Config(model=model.config, data=DataConfig(blend={"tiny": 1.0}, **data), run=RunConfig(name=run_dir.name))
    parameters = dict(model.named_parameters())
    fragments = [Fragment.whole(f"param/{name}", tensor) for name, tensor in parameters.items()]
    fragments += [Fragment.whole(f"buffer/{name}", tensor) for name, tensor in model.state_dict().items() if name not in parameters]
    save(run_dir / "checkpoints", step=20, fragments=fragments, state={"step": 20}, config=to_yaml(config))
    (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (run_dir / "tokenizer.model").write_bytes((corpus_folder / "tokenizer" / "tokenizer.model").read_bytes())


@pytest.fixture
def run_root(tmp_path, corpus_folder) -> Path:
    """A folder of two untrained runs, "first" and "second"."""
    for seed, name in enumerate(("first", "second"), start=5):
        write_run(tmp_path / "runs" / name, corpus_folder, seed=seed)
    return tmp_path / "runs"
