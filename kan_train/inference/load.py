"""A trained run in one process: configuration, weights and tokenizer from its directory, or from an exported file. No DeepSpeed, no process groups."""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

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


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_run(run: str, root: str = "runs", device: str = "auto", dtype: str = "fp32", active_groves: int | None = None) -> LoadedRun:
    """The run named `run` below `root` (or at the path `run`, or the checkpoint there), from its newest complete checkpoint; or the exported file `run`.

    dtype: of the parameters, "fp32" or "bf16". active_groves: in the place of the training's K.
    Raises ConfigError where there is no such run or file, it has no complete checkpoint, or something of it is missing or damaged.
    """
    loaded = _load(run, root, device)
    _cast(loaded.model, DTYPES[dtype])
    if active_groves is not None:
        set_active_groves(loaded.model, active_groves)
    return loaded


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
    for layer in layers:
        layer.router.active = count


def _cast(model: LanguageModel, dtype: torch.dtype) -> None:
    # Buffers keep their precision: they are statistics, and small.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _load(run: str, root: str, device: str) -> LoadedRun:
    places = (Path(run), Path(root) / run)
    file = next((path for path in places if path.is_file()), None)
    # A stray file of the same name does not hide a run.
    if file is not None and not any(path.is_dir() for path in places):
        return _load_exported(file, _device(device))
    if run.endswith(".safetensors"):
        raise ConfigError(f"run={run}: there is no such file; write it with `kan checkpoint export RUN {run}`, or use run=RUN")
    checkpoint = find_checkpoint("run", run, root)
    run_dir = run_directory_of(checkpoint, run, Path(root))
    manifest = read_manifest(checkpoint)
    tokenizer = run_dir / TOKENIZER
    if not tokenizer.is_file():
        raise ConfigError(f"{tokenizer} is missing; copy it there from the corpus that the run trained on: corpora/NAME/tokenizer/tokenizer.model")
    config = _model_config(manifest.config, run_dir)
    model = load_model(config, checkpoint, _device(device))
    return LoadedRun(checkpoint=checkpoint, step=manifest.step, model=model, tokenizer=Tokenizer(tokenizer))


def load_model(config: ModelConfig, checkpoint: Path, device: torch.device) -> LanguageModel:
    """The model of `config` with the weights and buffers of `checkpoint`, fp32 on `device`, in evaluation mode."""
    return _filled(config, load_tensors(checkpoint, WEIGHTS), checkpoint, device)


def _load_exported(file: Path, device: torch.device) -> LoadedRun:
    facts = read_export(file)
    tensors, tokenizer = load_export(file)
    # A model decodes in fp32, whatever its parameters were rounded to.
    wide = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    model = _filled(model_config(facts.config), wide, file, device)
    return LoadedRun(checkpoint=file, step=facts.step, model=model, tokenizer=_tokenizer(tokenizer, file))


def _tokenizer(content: bytes, file: Path) -> Tokenizer:
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
    _require_same_tensors(model, tensors, source)
    # The meta tensors are replaced, not filled: the weights exist once, and nothing is drawn that would be overwritten.
    model.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()}, assign=True)
    for module in model.modules():
        for name, value in initial_buffers(module).items():
            if getattr(module, name).is_meta:
                setattr(module, name, torch.full_like(getattr(module, name), value, device=device))
    return model.eval()


def _require_same_tensors(model: LanguageModel, tensors: dict[str, Tensor], source: Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ConfigError(
                f"{name} is {_shape(found.get(name))} in {source} and {_shape(wanted.get(name))} in the model of the run's "
                f"configuration: they do not belong together; use the config.yaml and the kan-train version that the run was trained with"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _model_config(saved: str, run_dir: Path) -> ModelConfig:
    """The model's settings that the weights were trained with: as the checkpoint has them, or else the run directory's config.yaml."""
    source = run_dir / CONFIG
    if not saved:
        try:
            saved = source.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{source}: {error.strerror}; restore it: it says what model the run trained") from error
    return model_config(yaml.safe_load(saved))


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but PyTorch sees no CUDA device; use device=cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
