"""What the model cannot hold, or what a checkpoint lacks, is refused by its name; nothing is left of such a run."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from upcycle_llamas import change_config, make_llama, write_tokenizer  # noqa: E402

from kan_train.cli import main  # noqa: E402
from kan_train.config import ConfigError, GroveConfig, ModelConfig  # noqa: E402
from kan_train.export.upcycle import upcycle  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_llama(tmp_path / "hf")
    return tmp_path / "hf"


def refused(folder: Path, pattern: str, **options) -> None:
    with pytest.raises(ConfigError, match=pattern):
        upcycle(folder, folder.parent / "runs" / "new", **options)
    assert not list(folder.parent.glob("runs/*"))


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"model_type": "qwen2"}, "model_type=qwen2 .* llama and mistral"),
        ({"attention_bias": True}, "attention_bias=True .* use a checkpoint with attention_bias=null"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, 'hidden_act=gelu .* hidden_act="silu"'),
        ({"sliding_window": 64}, "sliding_window=64 .* null in its place"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_parameters has the type llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling has the type linear"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' is no mapping"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\] is no mapping"),
        ({"rope_parameters": {"rope_theta": [1]}}, r"rope_theta=\[1\] is no positive number"),
        ({"rope_parameters": None, "rope_theta": 0}, "rope_theta=0 is no positive number"),
        ({"rope_parameters": None, "rope_theta": -1.0}, "rope_theta=-1.0 is no positive number"),
        ({"max_position_embeddings": "4k"}, "max_position_embeddings=4k is no number"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps='x' is no positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is no positive number"),
        ({"num_key_value_heads": 4}, "num_kv_heads=4 must divide"),
        ({"head_dim": 7}, "even head width"),
        ({"hidden_size": 64}, r"q_proj.weight is torch.float32 \[48, 48\]|embed_tokens.weight is torch.float32"),
        ({"num_hidden_layers": 1}, "has the tensor model.layers.1.input_layernorm.weight, with 8 others"),
        ({"num_hidden_layers": 3}, "no tensor model.layers.2"),
    ],
    ids=str,
)
def test_a_setting_that_has_no_place(settings: dict, pattern: str, folder: Path):
    change_config(folder, **settings)
    refused(folder, pattern)


def test_a_mistral_without_a_word_on_its_window_has_one(folder: Path):
    change_config(folder, model_type="mistral")
    config = json.loads((folder / "config.json").read_text())
    config.pop("sliding_window", None)
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "sliding_window=4096")


def test_weights_that_would_be_left_out(folder: Path):
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, file)
    refused(folder, "q_norm.weight, which has no place")


def test_pickled_weights_are_not_read(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"pickled \(pytorch_model.bin\).*save_pretrained")


def test_a_damaged_file(folder: Path):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, "cannot be read as safetensors")


@pytest.mark.parametrize("name", ["../model.safetensors", "model.bin", "missing.safetensors"])
def test_an_index_names_files_of_its_folder(name: str, folder: Path):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    refused(folder, "model.safetensors.index.json names")


def test_a_fast_tokenizer_alone(folder: Path):
    kept = (folder / "tokenizer.model").rename(folder.parent / "other.model")
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, "sentencepiece tokenizers alone .tokenizer.json alone.* --tokenizer FILE")
    assert upcycle(folder, folder.parent / "runs" / "new", tokenizer=kept).is_dir()


@pytest.mark.parametrize(
    "settings",
    [{"normalization_rule_name": "nmt_nfkc"}, {"bos_id": -1}, {"byte_fallback": False, "vocab_size": 180}, {"remove_extra_whitespaces": True}],
    ids=str,
)
def test_a_tokenizer_that_cannot_be_a_runs(settings: dict, folder: Path):
    write_tokenizer(folder / "tokenizer.model", **settings)
    refused(folder, "cannot be the tokenizer of a run")


def test_a_tokenizer_of_more_tokens(folder: Path):
    write_tokenizer(folder / "tokenizer.model", vocab_size=310)
    change_config(folder, vocab_size=305)
    refused(folder, "310 tokens .* 305")


def test_a_split_that_does_not_divide(folder: Path):
    refused(folder, "--split=7 .* use --split 8", split=7)
    refused(folder, "--active=9 .* --active 2", split=8, active=9)


def test_the_command_says_why(folder: Path, capsys):
    command = ["checkpoint", "upcycle", str(folder), "--root", str(folder.parent / "runs"), "--run"]
    assert main([*command, "new", "--active", "2"]) == 2
    assert "--split 8" in capsys.readouterr().err
    assert main([*command, "new"]) == 0
    assert main([*command, "new"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["checkpoint", "upcycle", str(folder.parent / "nosuch"), *command[3:], "other"]) == 2
    assert "name the folder of a Hugging Face checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("grove", "pattern"),
    [
        (GroveConfig(num_groves=0, shared_width=8), "active_groves=4, but model.grove.num_groves=0"),
        (GroveConfig(num_groves=0, active_groves=0), "shared_width=0 is none"),
    ],
)
def test_a_model_without_groves_says_so(grove: GroveConfig, pattern: str):
    with pytest.raises(ConfigError, match=pattern):
        ModelConfig(grove=grove).validate()
