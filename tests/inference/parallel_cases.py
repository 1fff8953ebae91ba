"""What the processes of test_parallel.py decode, and one process for comparison: models, layouts, requests, and what is seen of each."""

import random
from typing import Any

import torch

from kan_train.config import AdaConfig, AttentionConfig, EdgeConfig, GroveConfig, ModelConfig
from kan_train.config.generate import DecodeParallelConfig
from kan_train.inference.engine import Engine, evaluating
from kan_train.inference.lockstep import ALONE, Lockstep
from kan_train.inference.requests import Request
from kan_train.inference.sample import Sampling
from kan_train.inference.states import bytes_of, joined, rows_of
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel
from kan_train.parallel.place import ALONE as ONE_PLACE
from kan_train.parallel.place import Place, at

SEED = 5
PROMPTS = ["", "def main():\n    print('hello world')", "for", "the quick brown fox jumps over the lazy dog; the quick"]
MODELS: dict[str, dict[str, Any]] = {
    "gated": {},
    "reuse": {"grove": {"kind": "reuse"}},
    "edge": {"grove": {"kind": "edge", "edge": EdgeConfig(sharing="per_edge", group_size=4)}},
    "shared grove": {"grove": {"shared_width": 32}, "ada": {"decay": "data", "mixture": 2}},
    "capacity": {"grove": {"capacity_factor": 1.0}},
    "hybrid": {"attention_pattern": 2},
    "dense": {"attention_pattern": 1, "ffn": "swiglu", "ffn_width": 48},
}
LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"tensor_parallel": 2},
    "ep2": {"expert_parallel": 2},
    "tp2 ep2": {"tensor_parallel": 2, "expert_parallel": 2},
    "ep4": {"expert_parallel": 4},
    "tp2 etp1": {"tensor_parallel": 2, "expert_tensor_parallel": 1},
}
CASES: dict[int, list[tuple[str, str]]] = {
    2: [
        *((model, "tp2") for model in MODELS),
        *((model, "ep2") for model in MODELS if model != "dense"),
        *((model, "tp2 ep2") for model in ("gated", "edge", "hybrid")), ("gated", "tp2 etp1"),
    ],
    4: [*((model, "tp2 ep2") for model in ("gated", "edge", "shared grove", "hybrid")), ("capacity", "ep4"), ("reuse", "ep4")],
}  # fmt: skip
"""Processes -> models and how they are shared. Of 8 groves a token runs 2: with 4 ranks of one row two at least have nothing to run."""


def model_config(name: str) -> ModelConfig:
    changes = dict(MODELS[name])
    grove = GroveConfig(**{"num_groves": 8, "active_groves": 2, "width": 16, "edge": EdgeConfig(group_size=4), **changes.pop("grove", {})})
    ada = AdaConfig(**{"num_heads": 4, "chunk": 8, **changes.pop("ada", {})})
    settings = {"num_layers": 2, "width": 32, "vocab_size": 512, "sequence_length": 64, "ada": ada, "grove": grove}
    return ModelConfig(**settings, attention=AttentionConfig(num_heads=4, num_kv_heads=2), **changes)


def parallel(layout: str) -> DecodeParallelConfig:
    return DecodeParallelConfig(**LAYOUTS[layout])


def build(name: str, place: Place = ONE_PLACE, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """The model, or the share of it that `place` holds; its logits are scaled up, so that choices are not all alike."""
    with at(place):
        model = materialise(LanguageModel(model_config(name)), seed=SEED, dtype=dtype)
    with torch.no_grad():
        model.head.weight *= 6
    return model.eval()


def seen(model: LanguageModel, tokenizer: Any, lockstep: Lockstep = ALONE) -> dict[str, Any]:
    """What comes of a model: logits of rows of several lengths, also after a fork, texts of requests that come and go, and bytes held."""
    logits, state_bytes = _logits(model)
    return {
        "logits": logits,
        "texts": _texts(model, tokenizer, lockstep),
        "parameter_bytes": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        "state_bytes": state_bytes,
    }


def _logits(model: LanguageModel) -> tuple[torch.Tensor, int]:
    chance, found, states = torch.Generator().manual_seed(3), [], []
    with evaluating(model):
        for length in (1, 7, 4):  # no number that two ranks could share evenly
            read = torch.randint(0, 300, (1, length), generator=chance)
            logits_1V, state = model.prefill(read, model.init_state(1))
            found.append(logits_1V)
            states.append(state)
        state = joined(states)
        for rows in (3, 3, 5, 1):
            state = state if rows == 3 else rows_of(state, [number % 3 for number in range(rows)])
            logits_BV, state = model.step(torch.randint(0, 300, (rows,), generator=chance), state)
            found.append(logits_BV)
    return torch.cat(found), bytes_of(states[0])


def _texts(model: LanguageModel, tokenizer: Any, lockstep: Lockstep) -> list[tuple[str, list[int], str | None]]:
    """Greedy and sampled requests of several lengths, with stop texts, three at a time, and kept prefixes."""
    engine, chance = Engine(model, tokenizer, max_rows=3, prefix_bytes=1 << 20, lockstep=lockstep), random.Random(1)
    rows = [
        engine.add(Request(
            prompt=chance.choice(PROMPTS), max_tokens=chance.randint(1, 8), seed=number, stop=("e", "th"),
            sampling=Sampling(temperature=[0, 1.0][number % 2], top_k=chance.choice([0, 5]), repetition_penalty=chance.choice([1.0, 1.3])),
        ))
        for number in range(8)
    ]  # fmt: skip
    while not engine.idle:
        engine.step()
    return [(row.text, row.tokens, row.finish) for row in rows]
