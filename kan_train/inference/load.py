"""A trained run in one process: configuration, weights and tokenizer from its directory, or from an exported file. No DeepSpeed, no process groups."""

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from kan_train.checkpoint import find_checkpoint, load_tensors, read_manifest
from kan_train.checkpoint.export import load_export, read_export
from kan_train.checkpoint.stream import CONFIG, TOKENIZER, WEIGHTS, model_config, run_directory_of
from kan_train.config import ConfigError, ModelConfig
from kan_train.data_tools.tokenizer import Tokenizer
from kan_train.model.lm import LanguageModel
from kan_train.parallel.params import initial_buffers


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A model that is ready to decode."""

    checkpoint: Path
    """The checkpoint, or the exported file, that the weights are from."""
    step: int
    """Optimizer steps it was trained for."""
    model: LanguageModel
    """The model in evaluation mode, on its device."""
    tokenizer: Tokenizer
    """The tokenizer of its training data."""
    reset_at_documents: bool = True
    """Whether its training reset states at the documents of a packed sequence (data.reset_at_documents)."""


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_run(run: str, root: str = "runs", device: str = "auto", dtype: str = "fp32", active_groves: int | None = None) -> LoadedRun:
    """The run named `run` below `root` (or at the path `run`, or the checkpoint there), from its newest complete checkpoint; or the exported file `run`.

    dtype: of the parameters, "fp32" or "bf16". active_groves: in the place of the training's K.
    Raises ConfigError where there is no such run or file, it has no complete checkpoint, or something of it is missing or damaged.
    """
    loaded = _load(run, root, device)
    adjust(loaded.model, dtype, active_groves)
    return loaded


def adjust(model: LanguageModel, dtype: str, active_groves: int | None) -> None:
    """What decoding changes of a model that was loaded, see `load_run`."""
    # Buffers keep their precision: they are statistics, and small.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    if active_groves is not None:
        set_active_groves(model, active_groves)


def set_active_groves(model: LanguageModel, count: int) -> None:
    """Compute `count` of the N groves for every token from now on. ConfigError where that cannot be.

    The gates stay as they are, so that the sum of the groves' outputs grows with their number: only at the K of the training is it what was trained.
    """
    layers = model.grove_layers()
    most = model.config.grove.num_groves
    if not layers:
        raise ConfigError(f"active_groves={count}, but this model has no groves; leave the setting out")
    if not 1 <= count <= most:
        raise ConfigError(f"active_groves={count} must lie between 1 and the model's {most} groves; it was trained with {model.config.grove.active_groves}")
    if count == 1 and model.config.grove.gate == "sigmoid":
        raise ConfigError(
            "active_groves=1: this model's gates (model.grove.gate=sigmoid) divide by the mean score of the chosen groves, which cancels the score of "
            "one alone; use active_groves=2 or more"
        )
    for layer in layers:
        layer.router.active = count


def _load(run: str, root: str, device: str) -> LoadedRun:
    source = find_source(run, root)
    place = choose_device(device)
    if source.exported:
        return _load_exported(source.path, place)
    config = source.model()
    tokenizer = Tokenizer(source.tokenizer_file())
    model = load_model(config, source.path, place)
    return LoadedRun(checkpoint=source.path, step=source.step(), model=model, tokenizer=tokenizer, reset_at_documents=_resets(source.sections()))


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a run's weights are."""

    path: Path
    """The checkpoint, or the exported file."""
    exported: bool
    """Whether it is a file that `kan checkpoint export` wrote."""
    run_dir: Path
    """The directory of the run (for an exported file the folder it lies in)."""

    def step(self) -> int:
        """Optimizer steps it was trained for."""
        return read_export(self.path).step if self.exported else read_manifest(self.path).step

    def model(self) -> ModelConfig:
        """The model's settings; ConfigError where they are nowhere."""
        return model_config(self.sections())

    def sections(self) -> dict[str, Any]:
        """The run's saved configuration as its sections; ConfigError where it is nowhere."""
        return read_export(self.path).config if self.exported else _sections(read_manifest(self.path).config, self.run_dir)

    def tokenizer_file(self) -> Path:
        """Of a checkpoint's run; ConfigError where it is missing."""
        tokenizer = self.run_dir / TOKENIZER
        if not tokenizer.is_file():
            raise ConfigError(f"{tokenizer} is missing; copy it there from the corpus that the run trained on: corpora/NAME/tokenizer/tokenizer.model")
        return tokenizer


def find_source(run: str, root: str, setting: str = "run") -> Source:
    """What `setting`=`run` names, as `load_run` takes it. ConfigError where there is no such thing."""
    places = (Path(run), Path(root) / run)
    file = next((path for path in places if path.is_file()), None)
    # A stray file of the same name does not hide a run.
    if file is not None and not any(path.is_dir() for path in places):
        return Source(path=file, exported=True, run_dir=file.parent)
    if run.endswith(".safetensors"):
        raise ConfigError(f"{setting}={run}: there is no such file; write it with `kan checkpoint export RUN {run}`, or use {setting}=RUN")
    checkpoint = find_checkpoint(setting, run, root)
    return Source(path=checkpoint, exported=False, run_dir=run_directory_of(checkpoint, run, Path(root)))


def load_model(config: ModelConfig, checkpoint: Path, device: torch.device) -> LanguageModel:
    """The model of `config` with the weights and buffers of `checkpoint`, fp32 on `device`, in evaluation mode."""
    return _filled(config, load_tensors(checkpoint, WEIGHTS), checkpoint, device)


def _load_exported(file: Path, device: torch.device) -> LoadedRun:
    facts = read_export(file)
    tensors, tokenizer = load_export(file)
    # A model decodes in fp32, whatever its parameters were rounded to.
    wide = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    model = _filled(model_config(facts.config), wide, file, device)
    return LoadedRun(
        checkpoint=file, step=facts.step, model=model, tokenizer=tokenizer_of(tokenizer, file), reset_at_documents=_resets(facts.config)
    )  # fmt: skip


def tokenizer_of(content: bytes, file: Path) -> Tokenizer:
    """A tokenizer from its bytes, which are from `file`."""
    with tempfile.NamedTemporaryFile(suffix=TOKENIZER) as written:
        written.write(content)
        written.flush()
        try:
            return Tokenizer(Path(written.name))
        except ConfigError:
            raise ConfigError(f"the tokenizer in {file} is not one of kan-train; write the file again with `kan checkpoint export`") from None


def _filled(config: ModelConfig, tensors: dict[str, Tensor], source: Path, device: torch.device) -> LanguageModel:
    # How a run computed is no part of what it learned, and may not be possible here.
    model = LanguageModel(dataclasses.replace(config, kernels="auto"))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    require_same_tensors(wanted, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, source)
    return with_tensors(model, tensors, device)


def with_tensors(model: LanguageModel, tensors: dict[str, Tensor], device: torch.device) -> LanguageModel:
    """A model on the meta device with its parameters and buffers, in evaluation mode."""
    # The meta tensors are replaced, not filled: the weights exist once, and nothing is drawn that would be overwritten.
    model.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()}, assign=True)
    for module in model.modules():
        for name, value in initial_buffers(module).items():
            if getattr(module, name).is_meta:
                setattr(module, name, torch.full_like(getattr(module, name), value, device=device))
    return model.eval()


Shapes = Mapping[str, tuple[int, ...]]


def require_same_tensors(wanted: Shapes, found: Shapes, source: Path) -> None:
    """Raise ConfigError on the first tensor of `source` that the model has not, or has in another (whole) shape."""
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ConfigError(
                f"{name} is {_shape(found.get(name))} in {source} and {_shape(wanted.get(name))} in the model of the run's "
                f"configuration: they do not belong together; use the config.yaml and the kan-train version that the run was trained with"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _resets(sections: dict[str, Any]) -> bool:
    return bool((sections.get("data") or {}).get("reset_at_documents", True))


def _sections(saved: str, run_dir: Path) -> dict[str, Any]:
    """The settings that the weights were trained with: as the checkpoint has them, or else the run directory's config.yaml."""
    source = run_dir / CONFIG
    if not saved:
        try:
            saved = source.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{source}: {error.strerror}; restore it: it says what model the run trained") from error
    sections: dict[str, Any] = yaml.safe_load(saved)
    return sections


def choose_device(name: str) -> torch.device:
    """The device that auto, cpu or cuda means here; ConfigError where it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but PyTorch sees no CUDA device; use device=cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
