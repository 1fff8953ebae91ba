"""One process's share of a trained run: of every tensor it reads the part that its place in the layout holds, whatever layout wrote it.

A checkpoint's files are memory-mapped, and hashed by one process each; neither memory nor a device ever holds a tensor of which this process has a part
alone, but for the pages that the system keeps of the files.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from kan_train.checkpoint import Fragment, load, read_manifest
from kan_train.checkpoint.export import check_export
from kan_train.checkpoint.manifest import read_table
from kan_train.checkpoint.stream import TOKENIZER, WEIGHTS
from kan_train.config import GenerateConfig, ModelConfig
from kan_train.data_tools.tokenizer import Tokenizer
from kan_train.inference.layout import decode_layout, start_groups
from kan_train.inference.load import LoadedRun, Source, adjust, find_source, require_same_tensors, tokenizer_of, with_tensors
from kan_train.inference.lockstep import Lockstep
from kan_train.model.lm import LanguageModel
from kan_train.parallel.params import shard_of, spec_of
from kan_train.parallel.place import Place, at


def load_share(config: GenerateConfig, device: torch.device, lockstep: Lockstep) -> LoadedRun:
    """The share that this process holds of the run config.run, on `device`, as `load_run` gives the whole. Collective over all processes.

    ConfigError on all of them where one of them cannot, or where the model cannot be split as config.parallel says; that before any weights are read.
    """
    # Asked of the first process alone: a run that is being trained may get a newer checkpoint in between.
    source = lockstep.first(lambda: find_source(config.run, config.root))
    model = lockstep.first(source.model)
    layout = decode_layout(config.parallel, model, lockstep.size)
    tokenizer = tokenizer_of(lockstep.first(lambda: _tokenizer_bytes(source)), source.path)
    share = build_share(model, start_groups(layout), source, device, lockstep)
    adjust(share, config.dtype, config.active_groves)
    return LoadedRun(checkpoint=source.path, step=lockstep.first(source.step), model=share, tokenizer=tokenizer)


def build_share(config: ModelConfig, place: Place, source: Source, device: torch.device, lockstep: Lockstep) -> LanguageModel:
    """The model as `place` holds it, in fp32 with the weights and buffers of `source`, in evaluation mode. Collective."""
    with at(place):
        model = LanguageModel(dataclasses.replace(config, kernels="auto"))
    tensors = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for name, tensor in model.state_dict().items()}
    (_read_export if source.exported else _read_checkpoint)(source.path, model, tensors, lockstep)
    return with_tensors(model, tensors, device)


def _read_checkpoint(path: Path, model: LanguageModel, tensors: dict[str, Tensor], lockstep: Lockstep) -> None:
    table = {name: stored for name, stored in read_table(path, read_manifest(path)).items() if name.startswith(WEIGHTS)}
    found = {name.partition("/")[2]: tuple(stored.shape) for name, stored in table.items()}
    require_same_tensors({name: shape for name, shape, _, _ in _boxes(model)}, found, path)
    parameters = dict(model.named_parameters())
    fragments = [
        Fragment(
            name=f"{'param' if name in parameters else 'buffer'}/{name}",
            global_shape=shape, local_offset=offset, local_shape=size, start=0, flat=tensors[name].view(-1),
        )
        for name, shape, offset, size in _boxes(model)
    ]  # fmt: skip
    load(path, fragments, strict=False)


def _read_export(path: Path, model: LanguageModel, tensors: dict[str, Tensor], lockstep: Lockstep) -> None:
    lockstep.first(lambda: check_export(path))
    with safe_open(path, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys() if name != TOKENIZER}  # noqa: SIM118
        require_same_tensors({name: shape for name, shape, _, _ in _boxes(model)}, found, path)
        for name, _, offset, size in _boxes(model):
            part = tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))
            tensors[name].copy_(file.get_slice(name)[part])


def _boxes(model: LanguageModel) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """(name, whole shape, offset and size of the part) of every parameter and buffer; of buffers all is held."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        yield name, spec_of(name, parameter).shape, *shard_of(name, parameter)
    for name, tensor in model.state_dict().items():
        if name not in parameters:
            shape = tuple(tensor.shape)
            yield name, shape, (0,) * len(shape), shape


def _tokenizer_bytes(source: Source) -> bytes:
    if source.exported:
        with safe_open(source.path, framework="pt") as file:
            return file.get_tensor(TOKENIZER).numpy().tobytes()
    file = source.tokenizer_file()
    Tokenizer(file)  # what is wrong with it is said as in one process
    return file.read_bytes()
