"""A folder that Hugging Face's transformers loads by itself: weights, configuration, tokenizer, and the code of the model (docs/export.md)."""

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from kan_train.checkpoint.errors import CheckpointError, writing
from kan_train.checkpoint.export import EXPORT_DTYPES
from kan_train.checkpoint.files import sync_directory, write_tensors
from kan_train.checkpoint.stream import TOKENIZER, Advance, ignore
from kan_train.config.errors import require_choice
from kan_train.data_tools.tokenizer import Tokenizer
from kan_train.export.source import Source
from kan_train.inference.engine import not_text

SHARD_BYTES = 5 * 10**9
CODE = ("configuration_kan.py", "modeling_kan.py", "mixers_kan.py", "groves_kan.py", "tokenization_kan.py")
"""The code that goes with the weights, in `remote`."""
_PENDING = ".pending"  # routing statistics of a training step that is not finished: no part of the model
_NEW_TOKENS = 128
_WRITTEN = (*CODE, TOKENIZER, "README.md", "config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json")
_WEIGHTS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A KalmaGrove-Arnold Network language model: {parameters:,} parameters, step {step:,}, trained with kan-train {code_version}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
inputs = tokenizer("def main():", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True))
```

It needs torch, transformers and sentencepiece; the model's code is in this folder.
"""


def write_folder(
    source: Source, folder: Path, *, dtype: str = "fp32", overwrite: bool = False, shard_bytes: int = SHARD_BYTES, advance: Advance = ignore
) -> list[str]:
    """Write `source` as a folder for `AutoModelForCausalLM` and `AutoTokenizer`, whole or not at all; returns the names of its weight files.

    overwrite: replace a folder that holds what this function wrote, and nothing else.
    dtype: of the parameters, fp32 or bf16; buffers keep theirs. A file of weights has at most `shard_bytes` bytes of tensors, or one tensor: memory holds
    one file's. advance: called with the bytes that were written. Raises CheckpointError where `folder` exists (and not overwrite, or it is not as it was
    written) or cannot be written; ConfigError for an unknown dtype, or a tokenizer that is not the model's.
    """
    require_choice("--dtype", dtype, EXPORT_DTYPES)
    _check_target(folder, overwrite)
    folder = folder.resolve()  # a link stays, and what it leads to is replaced
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "replaced"))
    with writing(folder):
        for rest in (partial, old):  # of an export that was cut off
            shutil.rmtree(rest, ignore_errors=True)
        partial.mkdir()
    try:
        with writing(folder):
            (partial / TOKENIZER).write_bytes(source.tokenizer)
            for name in CODE:
                shutil.copyfile(Path(__file__).parent / "remote" / name, partial / name)
            (partial / "README.md").write_text(_card(source), encoding="utf-8")
            for name, content in _settings(source, dtype, Tokenizer(partial / TOKENIZER)).items():
                _write_json(partial / name, content)
        files = _write_weights(source, partial, dtype, shard_bytes, advance)
        sync_directory(partial)
        with writing(folder):
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    sync_directory(folder.parent)
    return files


def _check_target(folder: Path, overwrite: bool) -> None:
    if not folder.absolute().parent.is_dir():
        raise CheckpointError(f"there is no folder {folder.absolute().parent}; make it with `mkdir -p {folder.parent}`, or use another one")
    if not folder.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{folder} exists already; use another name, or --overwrite to replace it")
    if folder.resolve() == Path.cwd():
        raise CheckpointError(f"{folder} is the folder that you work in, which would be gone for your shell; `cd ..` and use {folder.resolve().name}")
    # What is replaced is deleted, and a mistyped name may be anybody's folder.
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    if not folder.is_dir() or (entries and not _is_export(folder)):
        raise CheckpointError(f"{folder} was not written by `kan export hf` and is not replaced; use another name")
    foreign = next((path.name for path in entries if path.is_dir() or not (path.name in _WRITTEN or _WEIGHTS.fullmatch(path.name))), None)
    if foreign is not None:
        raise CheckpointError(f"{folder} holds {foreign}, which `kan export hf` did not write, and is not replaced; move {foreign} away, or use another name")


def _is_export(folder: Path) -> bool:
    """Whether its config.json is as it was written: transformers, saving a trained copy of the model, adds its version."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "kan_train" in config and "transformers_version" not in config


def _settings(source: Source, dtype: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """The JSON files of the folder, as name -> content."""
    special = {"bos_token_id": tokenizer.boundary, "eos_token_id": tokenizer.boundary, "pad_token_id": 0}
    name = str(EXPORT_DTYPES[dtype]).removeprefix("torch.")
    model = dataclasses.asdict(source.config)
    del model["kernels"]  # how a run computed is no part of what it learned
    config = {
        "architectures": ["KanForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_kan.KanConfig", "AutoModelForCausalLM": "modeling_kan.KanForCausalLM"},
        "model_type": "kan",
        "dtype": name,
        "torch_dtype": name,  # of transformers before 4.56
        **special,
        **model,
        "kan_train": {"code_version": source.code_version, "step": source.step, "tokens": source.tokens},
    }
    hidden = not_text(tokenizer, source.config.vocab_size).nonzero().flatten().tolist()
    generation = {**special, "do_sample": False, "max_new_tokens": _NEW_TOKENS, "suppress_tokens": hidden}
    settings: dict[str, Any] = {
        "tokenizer_class": "KanTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kan.KanTokenizer", None]},
        "padding_side": "left",
    }
    if source.config.attention_pattern:
        settings["model_max_length"] = source.config.sequence_length
    return {"config.json": config, "generation_config.json": generation, "tokenizer_config.json": settings}


def _write_weights(source: Source, folder: Path, dtype: str, shard_bytes: int, advance: Advance) -> list[str]:
    def sizes() -> Iterator[tuple[str, int]]:
        for name, shape in source.shapes.items():
            if not name.endswith(_PENDING):
                yield name, math.prod(shape) * (EXPORT_DTYPES[dtype].itemsize if name in source.parameters else 4)

    def exported(name: str) -> Tensor:
        tensor = source.read(name)
        return tensor.to(EXPORT_DTYPES[dtype]) if name in source.parameters else tensor

    shards: list[list[str]] = [[]]
    filled, total = 0, 0
    for name, size in sizes():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + size, total + size
    files = ["model.safetensors"] if len(shards) == 1 else [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        advance(write_tensors(folder / file, [(name, exported(name)) for name in names]).size)
    if len(files) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        with writing(folder):
            _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    return files


def _card(source: Source) -> str:
    count = sum(math.prod(source.shapes[name]) for name in source.parameters)
    return CARD.format(name=source.config.name, parameters=count, step=source.step, code_version=source.code_version)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
