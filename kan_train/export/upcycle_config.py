"""What a Llama-style checkpoint of Hugging Face is, as a model of ours. What our architecture cannot hold is refused by name.

Read is config.json: LlamaForCausalLM and MistralForCausalLM, pre-norm blocks of softmax attention (rotary positions, grouped queries) and SwiGLU.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from kan_train.config import AttentionConfig, ConfigError, EdgeConfig, GroveConfig, ModelConfig
from kan_train.config.model import largest_divisor

CONFIG_JSON = "config.json"
MODEL_TYPES = ("llama", "mistral")

_ABSENT = {"llama": {}, "mistral": {"sliding_window": 4096, "num_key_value_heads": 8}}
"""What transformers takes where a setting is not in config.json, and we would take otherwise."""

_HELD: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention_bias": ((None, False), "the attention's products have no biases here"),
    "mlp_bias": ((None, False), "the groves' products have no biases here"),
    "hidden_act": (("silu",), "a grove's activation is silu and a spline"),
    "sliding_window": ((None,), "attention sees all tokens before; where no context is longer than the window, null in its place is the same function"),
    "quantization_config": ((None,), "weights are read as floating-point numbers; save the checkpoint dequantised"),
    "partial_rotary_factor": ((None, 1, 1.0), "all channels of a head are rotated"),
}
"""Setting -> values that our architecture can hold, and why not others."""


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of the checkpoint in `folder`. ConfigError where there is none, or where one is not what our architecture can hold, with its name."""
    path = folder / CONFIG_JSON
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name the folder of a Hugging Face checkpoint, which holds {CONFIG_JSON} and *.safetensors") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON ({error}); get the checkpoint again") from None
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if kind not in MODEL_TYPES:
        raise ConfigError(f"{path}: model_type={kind} is another architecture; upcycling takes checkpoints of {' and '.join(MODEL_TYPES)}")
    settings = {"hidden_act": "silu", **_ABSENT[kind], **settings}
    for name, (held, why) in _HELD.items():
        if settings.get(name) not in held:
            raise ConfigError(f"{path}: {name}={settings[name]} has no place in the model: {why}; use a checkpoint with {name}={json.dumps(held[0])}")
    _rope(path, settings)
    return settings


def model_of(folder: Path, settings: dict[str, Any], name: str) -> ModelConfig:
    """The model that computes the same: softmax attention everywhere, and N = 0: the feed-forward layers are ungated shared groves.

    ConfigError where a setting is missing, or no model can be built from them.
    """
    path = folder / CONFIG_JSON

    def number(setting: str) -> int:
        if type(value := settings.get(setting)) is not int or value < 1:
            raise ConfigError(f"{path}: {setting}={value} is no number of anything; get the checkpoint's {CONFIG_JSON} again")
        return value

    width, heads = number("hidden_size"), number("num_attention_heads")
    settings = {"num_key_value_heads": heads, "max_position_embeddings": 2048, **{key: value for key, value in settings.items() if value is not None}}
    head_width = number("head_dim") if "head_dim" in settings else None
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=number("num_key_value_heads"),
        head_width=None if head_width is not None and head_width * heads == width else head_width,
        rope_theta=_rope(path, settings),
    )
    model = ModelConfig(
        name=name,
        num_layers=number("num_hidden_layers"),
        width=width,
        vocab_size=-(-number("vocab_size") // 128) * 128,
        sequence_length=number("max_position_embeddings"),
        norm_eps=_positive(path, "rms_norm_eps", settings.get("rms_norm_eps", 1e-6)),
        attention_pattern=1,
        attention=attention,
        grove=GroveConfig(num_groves=0, active_groves=0, shared_width=number("intermediate_size")),
    )
    model.validate()
    return model


def split_model(model: ModelConfig, groves: int, active: int) -> ModelConfig:
    """`model`, whose shared groves become `groves` (N) of which a token runs `active` (K). ConfigError names --split or --active."""
    hidden = model.grove.shared_width
    if groves < 2 or hidden % groves:
        raise ConfigError(f"--split={groves} must be 2 or more, and divide the {hidden} hidden units of a layer; use --split {_split_like(hidden, groves)}")
    if not 1 <= active <= groves:
        raise ConfigError(f"--active={active} must lie between 1 and --split={groves}; use --active {max(1, groves // 4)}")
    width = hidden // groves
    grove = GroveConfig(
        num_groves=groves,
        active_groves=active,
        width=width,
        score_rank=min(GroveConfig().score_rank, model.width, 2 * width),
        edge=EdgeConfig(group_size=largest_divisor(width, EdgeConfig().group_size)),
    )
    split = replace(model, grove=grove)
    split.validate()
    return split


def _rope(path: Path, settings: dict[str, Any]) -> float:
    """Base of the wavelengths. Since transformers 5 it stands in rope_parameters, before in rope_theta, with rope_scaling beside it."""
    for name in ("rope_parameters", "rope_scaling"):
        given = settings.get(name) or {}
        if not isinstance(given, dict):
            raise ConfigError(f"{path}: {name}={given!r} is no mapping of settings; use a checkpoint with {name}=null or {{\"rope_type\": \"default\"}}")
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default":
            raise ConfigError(
                f"{path}: {name} has the type {kind}, which scales the rotary wavelengths; the model has plain ones alone (rope_theta): "
                "use a checkpoint without it"
            )
        if given.get("partial_rotary_factor", 1) != 1:
            raise ConfigError(f"{path}: {name} has partial_rotary_factor={given['partial_rotary_factor']}, but all channels of a head are rotated here")
    theta = (settings.get("rope_parameters") or {}).get("rope_theta", settings.get("rope_theta"))
    return 10000.0 if theta is None else _positive(path, "rope_theta", theta)


def _positive(path: Path, setting: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ConfigError(f"{path}: {setting}={value!r} is no positive number; get the checkpoint's {CONFIG_JSON} again")
    return float(value)


def _split_like(hidden: int, groves: int) -> int:
    """The divisor of `hidden` from 2 on that is nearest to `groves`."""
    divisors = [number for number in range(2, hidden + 1) if hidden % number == 0] or [hidden]
    return min(divisors, key=lambda number: abs(number - groves))
