"""The models of benchmarks/kernels/model.py: kan_1b and its dense twin of equal total size as they are shipped, and what they remember of a context.

Of ADA a context leaves a state of constant size, of the twin a cache of keys and values. The twin writes its cache in place here, where `model.step`
would copy it.  B batch, D width, V vocabulary.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_train.config.model import ModelConfig
from kan_train.model.ada import AdaState
from kan_train.model.attention import SoftmaxAttention, rotary_tables
from kan_train.model.cache import KeyValueCache
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel

KAN, TWIN = "kan_1b", "dense_1b_total"
_MODELS = Path(__file__).resolve().parent.parent / "conf" / "model"


def shipped(name: str) -> ModelConfig:
    """conf/model/<name>.yaml, read without a YAML parser: its lines are comments, `key: value`, and `key:` above an indented section."""
    sections: list[dict[str, Any]] = [{}]
    for line in (_MODELS / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        content = line.partition("#")[0].rstrip()
        if not content:
            continue
        del sections[(len(content) - len(content.lstrip())) // 2 + 1 :]
        key, _, value = (part.strip() for part in content.partition(":"))
        sections[-1][key] = _literal(value) if value else {}
        if not value:
            sections.append(sections[-1][key])
    return overlaid(ModelConfig(), sections[0])


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def overlaid(config: Any, values: dict[str, Any]) -> Any:
    """`config` with `values` in its place, section by section; TypeError for a setting that there is not."""
    return dataclasses.replace(config, **{key: overlaid(getattr(config, key), value) if isinstance(value, dict) else value for key, value in values.items()})


TINY: dict[str, Any] = {
    "num_layers": 2,
    "width": 32,
    "vocab_size": 128,
    "sequence_length": 20,
    "ffn_width": 48,
    "ada": {"num_heads": 2, "chunk": 8},
    "attention": {"num_heads": 2, "num_kv_heads": 2},
    "grove": {"num_groves": 4, "width": 16, "edge": {"group_size": 8}},
}
SMALL: dict[str, Any] = {
    "num_layers": 2,
    "width": 256,
    "vocab_size": 512,
    "sequence_length": 333,
    "ffn_width": 384,
    "ada": {"num_heads": 4},
    "attention": {"num_heads": 4, "num_kv_heads": 4},
    "grove": {"num_groves": 8, "width": 64},
}


def config_of(name: str, dry: bool) -> ModelConfig:
    """The shipped model, or in a dry run one of its kind that a CPU runs at once."""
    return overlaid(shipped(name), TINY) if dry else shipped(name)


@functools.cache
def model_of(name: str, kernels: str, device: torch.device, dry: bool) -> LanguageModel:
    """The model in bf16 with the weights of seed 0, built once."""
    config = dataclasses.replace(config_of(name, dry), kernels=kernels)
    return materialise(LanguageModel(config), seed=0, device=device, dtype=torch.bfloat16)


def step_in_place(twin: LanguageModel, tokens_B: Tensor, caches: list[KeyValueCache]) -> Tensor:
    """Logits [B, V] of the token after S - 1 others, whose keys and values are in caches [B, G, S, d]: its own are written into their last place.

    What `twin.step` computes, as a decoder would that is made for speed: no cache is copied, and the positions' rotation is computed once for all layers.
    """
    mixer, places = twin.layers[0].mixer, caches[0].keys.shape[2]
    position = torch.tensor([places - 1], device=tokens_B.device)
    cosine, sine = (table.to(caches[0].keys.dtype) for table in rotary_tables(position, mixer.head_width, mixer.rope_theta))
    rotation = torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)
    x_BD = twin.embedding(tokens_B)
    for layer, cache in zip(twin.layers, caches, strict=True):
        x_BD = x_BD + _attend_in_place(layer.mixer, layer.mixer_norm(x_BD), cache, rotation)
        x_BD = x_BD + layer.ffn(layer.ffn_norm(x_BD))
    return twin.head(twin.final_norm(x_BD))


def _attend_in_place(mixer: SoftmaxAttention, x_BD: Tensor, into: KeyValueCache, rotation: tuple[Tensor, Tensor]) -> Tensor:
    q, k, v = (linear(x_BD).unflatten(-1, (-1, mixer.head_width)) for linear in (mixer.query, mixer.key, mixer.value))
    both = torch.stack((q, k))
    q, k = torch.addcmul(both * rotation[0], both.roll(mixer.head_width // 2, dims=-1), rotation[1])
    into.keys[:, :, -1], into.values[:, :, -1] = k, v
    return mixer.out(F.scaled_dot_product_attention(q[:, :, None], into.keys, into.values).flatten(1))


@torch.no_grad()


def random_states(kan: LanguageModel, batch: int, seed: int) -> list[AdaState]:
    """States as after some context: what ADA keeps of any is of one size."""
    generator = torch.Generator(kan.embedding.weight.device).manual_seed(seed)
    states = kan.init_state(batch)
    for state in states:
        for field in dataclasses.fields(state):
            getattr(state, field.name).normal_(generator=generator)
    return states


def random_caches(twin: LanguageModel, batch: int, context: int, seed: int) -> list[KeyValueCache]:
    """Keys and values of `context` tokens, and a place for those of one more."""
    weight = twin.embedding.weight
    generator = torch.Generator(weight.device).manual_seed(seed)

    def grown(empty: Tensor) -> Tensor:
        return torch.empty(batch, empty.shape[1], context + 1, empty.shape[3], device=empty.device, dtype=empty.dtype).normal_(generator=generator)

    return [KeyValueCache(grown(state.keys), grown(state.values)) for state in twin.init_state(batch)]


def without_last(caches: list[KeyValueCache]) -> list[KeyValueCache]:
    """Without the place that `random_caches` leaves for one more token."""
    return [KeyValueCache(cache.keys[:, :, :-1], cache.values[:, :, :-1]) for cache in caches]


def random_tokens(seed: int, shape: tuple[int, ...], vocabulary: int, device: torch.device) -> Tensor:
    """int64, uniform over the vocabulary."""
    return torch.randint(0, vocabulary, shape, generator=torch.Generator(device).manual_seed(seed), device=device)
