"""What an export is made from: the weights of a run's checkpoint, or of an exported file, read one at a time."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kan_train.checkpoint import CheckpointError, find_checkpoint
from kan_train.checkpoint.export import check_export, read_export
from kan_train.checkpoint.stream import TOKENIZER, WEIGHTS, Advance, TensorStream, ignore, model_config, run_directory_of
from kan_train.config import ModelConfig
from kan_train.model.lm import LanguageModel

_WRITE_AGAIN = "write it again with `kan checkpoint export`"


@dataclass(frozen=True)
class Source:
    """A trained model's weights under their canonical names."""

    origin: Path
    """The checkpoint or the file."""
    config: ModelConfig
    """The model."""
    shapes: dict[str, tuple[int, ...]]
    """Of every parameter and buffer, in the order of the model."""
    parameters: frozenset[str]
    """Which of them are parameters."""
    read: Callable[[str], Tensor]
    """The whole tensor of that name, on CPU, as it was saved."""
    tokenizer: bytes
    """A serialised sentencepiece model."""
    step: int
    """Optimizer steps that it was trained for."""
    tokens: int | None
    """Tokens that it was trained on, where the source says."""
    code_version: str
    """Version of kan-train that trained it."""


def open_source(source: str, root: Path, advance: Advance = ignore) -> Source:
    """The newest complete checkpoint of the run `source` (by name below `root`, or path), the checkpoint, or the exported file there; it is verified first.

    advance: called with the bytes of a checkpoint that were verified. Raises ConfigError where there is none, or it is damaged or of another model.
    """
    path = Path(source)
    if path.is_file() and not (root / source).is_dir():
        return _of_file(path)
    checkpoint = find_checkpoint("run", source, str(root))
    stream = TensorStream(checkpoint, WEIGHTS, run_dir=run_directory_of(checkpoint, source, root), advance=advance)
    full = {name.removeprefix("param/").removeprefix("buffer/"): name for name in stream.table}
    shapes = {name: tuple(stream.table[saved].shape) for name, saved in full.items()}
    config, manifest = model_config(stream.run_config()), stream.manifest
    return _checked(
        checkpoint, config, shapes, lambda name: stream.read(full[name]), stream.tokenizer(), manifest.step, stream.tokens, manifest.code_version
    )


def _of_file(path: Path) -> Source:
    facts = read_export(path)
    check_export(path)

    def read(name: str) -> Tensor:
        with _opened(path) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    with _opened(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    tokenizer = read(TOKENIZER) if shapes.pop(TOKENIZER, None) else None
    if tokenizer is None or tokenizer.dtype != torch.uint8:
        raise CheckpointError(f"{path} holds no tokenizer; {_WRITE_AGAIN}")
    return _checked(path, model_config(facts.config), shapes, read, tokenizer.numpy().tobytes(), facts.step, facts.tokens, facts.code_version)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The safetensors file `path`; its failures name it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {_WRITE_AGAIN}") from error


def _checked(
    origin: Path, config: ModelConfig, shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor], tokenizer: bytes, step: int, tokens: int | None,
    code_version: str,
) -> Source:  # fmt: skip
    model = LanguageModel(dataclasses.replace(config, kernels="torch"))  # of shapes alone, without memory
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
    if wrong:
        raise CheckpointError(
            f"{wrong[0]} is {shapes.get(wrong[0], 'missing')} in {origin} and {wanted.get(wrong[0], 'missing')} in the model of its configuration: they do not "
            "belong together; use the config.yaml and the kan-train version that the run was trained with"
        )
    parameters = frozenset(name for name, _ in model.named_parameters())
    return Source(origin, config, wanted, parameters, read, tokenizer, step, tokens, code_version)
