"""Upcycling: a Llama-style checkpoint of Hugging Face becomes a run of ours with the same logits, to decode with, to evaluate and to train on.

Its softmax attention is kept in every layer; its SwiGLU becomes an ungated shared grove whose spline coefficients are zero, so that F = silu exactly (N = 0).
With `split` the same hidden units become N groves of which a token runs K: with K = N the function is the same, with fewer it is another one, to be
trained. Every tensor is read when its turn comes and goes straight to disk. D width, V vocabulary, F hidden units.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from torch import Tensor

from kan_train.checkpoint.stream import Advance, ignore
from kan_train.checkpoint.transforms import Shapes, write_run
from kan_train.config import Config, ConfigError, ModelConfig, RunConfig
from kan_train.export.upcycle_config import model_of, read_config, split_model
from kan_train.export.upcycle_source import Weights, carried_tokenizer
from kan_train.export.upcycle_split import Scoring, inputs_of_groves, outputs_of_groves, scoring
from kan_train.model.lm import LanguageModel
from kan_train.parallel.params import initial_buffers
from kan_train.parallel.place import ALONE, at

SETTINGS = "conf/model/{}.yaml"
"""Where in the run directory the model's settings are, for `kan train --config-dir RUN/conf model=NAME`."""

_MIXER = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
_FFN = {"up": "gate_proj", "value": "up_proj", "out": "down_proj"}
_NORM = {"mixer_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def upcycle(folder: Path, new_dir: Path, *, split: int = 0, active: int = 0, tokenizer: Path | None = None, advance: Advance | None = None) -> Path:
    """A run at `new_dir` with the weights of the Hugging Face checkpoint in `folder`; returns its checkpoint (step 0, fp32).

    split: N groves a layer, 0: none (the shared grove). active: K, 0: all. tokenizer: a sentencepiece model in the place of the folder's. advance: called
    with the bytes that were made. ConfigError names what of the checkpoint the model cannot hold, what is missing, or a `new_dir` that exists.
    """
    settings = read_config(folder)
    whole = model_of(folder, settings, new_dir.name)
    model = split_model(whole, split, active or split) if split else whole
    content, tokens = carried_tokenizer(folder, tokenizer)
    if tokens > settings["vocab_size"]:
        raise ConfigError(f"the tokenizer has {tokens} tokens and {folder} {settings['vocab_size']}: they do not belong together; name the right --tokenizer")
    made = _Made(model, whole.grove.shared_width, int(settings["vocab_size"]), bool(settings.get("tie_word_embeddings", False)), Weights(folder))
    made.require_all_used()
    state = {"model": asdict(model), "transform": {"kind": "upcycle", "of": [str(folder)], "split": split, "active": model.grove.active_groves}}

    def make(name: str) -> Tensor:
        tensor = made.tensor(name)
        (advance or ignore)(4 * tensor.numel())
        return tensor

    config = asdict(Config(model=model, run=RunConfig(name=new_dir.name)))
    text = yaml.safe_dump(asdict(model), sort_keys=False, width=140)
    return write_run(new_dir, config, content, state, made.shapes, make, files={SETTINGS.format(new_dir.name): text.encode()}, step=0)


def bytes_to_make(folder: Path) -> int:
    """About the bytes that `upcycle` makes: the folder's numbers in fp32."""
    return 4 * Weights(folder).numbers()


class _Made:
    """The tensors of a model, made from a checkpoint's by their names."""

    def __init__(self, model: ModelConfig, hidden: int, vocabulary: int, tied: bool, weights: Weights) -> None:
        self.model, self.hidden, self.vocabulary, self.weights = model, hidden, vocabulary, weights
        self.head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        with at(ALONE):
            built = LanguageModel(model)
        parameters = dict(built.named_parameters())
        named = {("param/" if name in parameters else "buffer/") + name: tensor for name, tensor in built.state_dict().items()}
        self.shapes: Shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in named.items()}
        self.initial = {f"buffer/{path}.{name}": value for path, module in built.named_modules() for name, value in initial_buffers(module).items()}
        # A layer's scoring is three tensors of the result, which come one after the other.
        self.scoring = functools.lru_cache(maxsize=1)(self._scoring)

    def require_all_used(self) -> None:
        """ConfigError where the checkpoint has a tensor that no parameter of the model comes from: leaving it out would be another function."""
        used = {"model.embed_tokens.weight", "model.norm.weight", self.head, "lm_head.weight"}  # a tied head may be stored, and is not read
        for layer in range(self.model.num_layers):
            used |= {f"model.layers.{layer}.{name}.weight" for name in _NORM.values()}
            used |= {f"model.layers.{layer}.self_attn.{name}.weight" for name in _MIXER.values()}
            used |= {f"model.layers.{layer}.mlp.{name}.weight" for name in _FFN.values()}
        # Wavelengths, which old checkpoints kept beside the weights.
        left = sorted(name for name in self.weights.files.keys() - used if not name.endswith("rotary_emb.inv_freq"))
        if left:
            more = f", with {len(left) - 1} others" if len(left) > 1 else ""
            raise ConfigError(f"{self.weights.folder} has the tensor {left[0]}{more}, which has no place in the model; use a plain Llama-style checkpoint")

    def tensor(self, name: str) -> Tensor:
        """The tensor `name` ("param/..." or "buffer/..."), of the type and shape in `shapes` but for a last cast."""
        path = name.partition("/")[2].split(".")
        match path:
            case ["embedding", "weight"]:
                return self._padded(self._read("model.embed_tokens.weight", self.vocabulary, self.model.width), mean=False)
            case ["head", "weight"]:
                return self._padded(self._read(self.head, self.vocabulary, self.model.width), mean=True)
            case ["final_norm", "weight"]:
                return self._read("model.norm.weight", self.model.width)
            case ["layers", layer, norm, "weight"]:
                return self._read(f"model.layers.{layer}.{_NORM[norm]}.weight", self.model.width)
            case ["layers", layer, "mixer", part, "weight"]:
                return self._read(f"model.layers.{layer}.self_attn.{_MIXER[part]}.weight", *self.shapes[name][1])
            case ["layers", layer, "ffn", "shared", part, "weight"]:
                return self._ffn(layer, part)
            case ["layers", layer, "ffn", "groves", part] if part in _FFN:
                cut: Callable[[Tensor, int], Tensor] = outputs_of_groves if part == "out" else inputs_of_groves
                return cut(self._ffn(layer, part), self.model.grove.num_groves)
            case ["layers", layer, "ffn", "router", "score"]:
                return self.scoring(layer).projection
            case ["layers", layer, "ffn", "router", "score_mean"]:
                return self.scoring(layer).mean
            case ["layers", layer, "ffn", "router", "score_std"]:
                return self.scoring(layer).std
            case [*_, ("coefficients" | "gate" | "gate_bias" | "gate_score")]:
                # Splines that are zero leave silu; gates that do not see the token are softmax(0) K = 1 for every chosen grove.
                return torch.zeros(self.shapes[name][1])
            case _ if name in self.initial:
                return torch.full(self.shapes[name][1], self.initial[name])
        raise ConfigError(f"{name} has no source in a Llama-style checkpoint; upcycle with the kan-train version that this one is")

    def _read(self, name: str, *shape: int) -> Tensor:
        return self.weights.read(name, shape)

    def _ffn(self, layer: str, part: str) -> Tensor:
        shape = (self.model.width, self.hidden) if part == "out" else (self.hidden, self.model.width)
        return self._read(f"model.layers.{layer}.mlp.{_FFN[part]}.weight", *shape)

    def _scoring(self, layer: str) -> Scoring:
        norm = self._read(f"model.layers.{layer}.{_NORM['ffn_norm']}.weight", self.model.width)
        grove = self.model.grove
        return scoring(self._ffn(layer, "up"), self._ffn(layer, "value"), norm, grove.num_groves, grove.score_rank)

    def _padded(self, rows_VD: Tensor, *, mean: bool) -> Tensor:
        """Rows up to the padded vocabulary: zero, or the mean of all.

        A head's mean row gives the mean of the logits, whose exponential is at most the mean of theirs: the padding takes at most its share of the rows
        from the probabilities of tokens, whatever the logits are. A row of zeros has no such bound.
        """
        missing = self.model.vocab_size - len(rows_VD)
        if not missing:
            return rows_VD
        row = rows_VD.double().mean(0) if mean else torch.zeros(rows_VD.shape[1])
        return torch.cat((rows_VD, row.to(rows_VD.dtype).expand(missing, -1)))
