"""Llama-style checkpoints that transformers makes, of random weights, and a tokenizer such as Llama's."""

import io
import json
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor, nn

TEXT = ["the quick brown fox jumps over the lazy dog", "def main():", "    return 1 + 2", "Grüße aus Köln", "for i in range(10):", "print('hello world')"]
SHAPES = {
    "heads": {"hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 4, "num_key_value_heads": 4},
    "grouped": {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "theta": {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "rope_theta": 5e5},
    "head-width": {"hidden_size": 40, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "padded": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 333},
}


def write_tokenizer(path: Path, **settings) -> None:
    """A byte-pair model with <unk>, <s>, </s> and a space before every text, as Llama 1 and 2 have."""
    model = io.BytesIO()
    options = {
        "model_type": "bpe", "vocab_size": 300, "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "split_digits": True, "allow_whitespace_only_pieces": True, "unk_id": 0, "bos_id": 1, "eos_id": 2, "minloglevel": 2,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXT * 20), model_writer=model, **options | settings)
    path.write_bytes(model.getvalue())


def make_llama(folder: Path, *, seed: int = 0, mistral: bool = False, shard: str = "5GB", dtype: torch.dtype = torch.float32, **shape):
    """A model of transformers, in evaluation mode, and its checkpoint with tokenizer in `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    config_class, model_class = (MistralConfig, MistralForCausalLM) if mistral else (LlamaConfig, LlamaForCausalLM)
    settings = {"num_hidden_layers": 2, "vocab_size": 384, "max_position_embeddings": 96, "initializer_range": 0.15, "attn_implementation": "sdpa"}
    settings |= {"sliding_window": None} if mistral else {}
    torch.manual_seed(seed)
    model = model_class(config_class(**settings | SHAPES["grouped"] | shape)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:  # ones at the start, which would hide a norm that is left out
                weight.uniform_(0.5, 1.5)
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder / "tokenizer.model")
    return model


class _Norm(nn.Module):
    """LlamaRMSNorm without its passage through fp32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class _Rotary(nn.Module):
    """LlamaRotaryEmbedding without fp32."""

    def __init__(self, theta: float, width: int) -> None:
        super().__init__()
        self.theta, self.width = theta, width

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = 1 / self.theta ** (torch.arange(0, self.width, 2, dtype=torch.float64) / self.width)
        angles = position_ids[..., None].double() * frequencies
        return torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()


def in_float64(model):
    """The model of transformers in float64 throughout: it computes norms and rotations in fp32 whatever its weights are."""
    model = model.double()
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    model.model.rotary_emb = _Rotary(config.rope_parameters["rope_theta"], width)
    for layer in model.model.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, _Norm(getattr(layer, name).weight.data, config.rms_norm_eps))
    model.model.norm = _Norm(model.model.norm.weight.data, config.rms_norm_eps)
    return model


def change_config(folder: Path, **settings) -> None:
    """Write other settings into the checkpoint's config.json; None takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps(config))
