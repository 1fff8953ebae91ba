"""How far a run is, and where it starts: fresh, from its own newest checkpoint, or from another run's (whole state, or weights alone)."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kan_train.checkpoint import Fragment, Ranks, checkpoint_directory, load, load_rank_tensors, newest_valid, read_manifest
from kan_train.config import Config, ConfigError, ModelConfig
from kan_train.engine.engine import Engine

if TYPE_CHECKING:
    from kan_train.data import Loader

FREE_SETTINGS = ("name", "kernels", "grove.balance_rate", "grove.balance_rate_final", "grove.auxiliary_loss", "grove.score_momentum")
"""Model settings that a run may change when it goes on; with any other it would be another model."""

INITIAL_SETTINGS = (
    "embedding_std",
    "sequence_length",
    "ada.half_life_min",
    "ada.half_life_middle",
    "ada.half_life_max",
    "grove.edge.spline_share",
)
"""Model settings that change initial values or the data alone: free for a run that starts from another's weights."""


@dataclass(kw_only=True)
class Progress:
    """Counters of a run that outlive its processes; part of every checkpoint's JSON state."""

    step: int = 0
    """Steps taken, skipped ones included."""
    tokens: int = 0
    """Tokens read for training."""
    skipped_steps: int = 0
    """Steps skipped for a loss or gradient that was not finite."""
    bad_steps: int = 0
    """How many of the last steps in a row were skipped, or spikes."""
    rewinds: int = 0
    """Times that the run went back to a checkpoint because of bad steps."""
    recent_losses: list[float] = field(default_factory=list)
    """Cross-entropies of the last good steps: what a spike is measured against."""
    validation_due: bool = False
    """Whether a stop signal came before the validation of this step was done."""
    evaluation_due: bool = False
    """The same of its evaluation (train.evaluate_every)."""
    segment: int = 1
    """Times the run was started, this time included."""
    figures: dict[str, float | None] = field(default_factory=dict)
    """Last validation loss, bits a byte and tokens a second."""

    @property
    def examination_due(self) -> bool:
        """Whether something that belongs to this step is still to be measured."""
        return self.validation_due or self.evaluation_due


def run_directory(config: Config) -> Path:
    """Where everything about the run is written."""
    return Path(config.run.root) / config.run.name


def starting_point(config: Config) -> Path | None:
    """The run's own newest checkpoint whose every byte is as it was written, or None for a new run. Collective.

    ConfigError where resuming is off and there is one, or where there are checkpoints and none can be used.
    """
    run_dir = run_directory(config)
    found = newest_valid(checkpoint_directory(run_dir, config.checkpoint.location), Ranks())
    if found is not None and not config.checkpoint.resume:
        raise ConfigError(
            f"{run_dir} holds a run already (its newest checkpoint is {found.name}) and checkpoint.resume=false; "
            f"use checkpoint.resume=true to go on with it, or run.name={config.run.name}-2 for a new one"
        )
    return found


def progress_of(checkpoint: Path) -> Progress:
    """The counters that `checkpoint` holds, as they were saved."""
    return Progress(**read_manifest(checkpoint).state["progress"])


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of this process's random generators, uint8: every rank's own part of a checkpoint."""
    states = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random/cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(checkpoint: Path, rank: int) -> None:
    """Put back what `random_states` gave; a rank that the saving run did not have keeps its own."""
    states = load_rank_tensors(checkpoint, rank, verify=False)
    if "random/cpu" in states:
        torch.set_rng_state(states["random/cpu"])
    if "random/cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["random/cuda"])


def state_for_checkpoint(progress: Progress, config: Config, engine: Engine, loader: "Loader") -> dict[str, Any]:
    """The JSON state of a checkpoint: all that is not a tensor and that a resumed run needs. Collective."""
    return {"progress": asdict(progress), "model": asdict(config.model), "engine": engine.state_dict(), "loader": loader.state_dict()}


def restore(checkpoint: Path, config: Config, engine: Engine, loader: "Loader", *, verify: bool) -> Progress:
    """Put the whole state of `checkpoint` into `engine` and `loader`, and return its counters. Collective.

    verify: compare the hashes of its files, where `newest_valid` has not done it. ConfigError where the model's settings or the data are not those of
    the checkpoint.
    """
    require_same_model(checkpoint, config.model, FREE_SETTINGS)
    fragments = list(engine.named_fragments())
    state = load(checkpoint, fragments, verify=verify)
    engine.after_load()
    engine.load_state_dict(state["engine"])
    loader.load_state_dict(state["loader"])
    return Progress(**state["progress"])


def restore_weights(checkpoint: Path, config: Config, engine: Engine) -> None:
    """Put the weights, and the buffers that belong to them, of `checkpoint` into `engine`; optimizer and data start anew. Collective."""
    require_same_model(checkpoint, config.model, FREE_SETTINGS + INITIAL_SETTINGS)
    weights: list[Fragment] = [fragment for fragment in engine.named_fragments() if fragment.name.startswith(("param/", "buffer/"))]
    load(checkpoint, weights, strict=False)
    engine.after_load()


def require_same_model(checkpoint: Path, model: ModelConfig, free: tuple[str, ...]) -> None:
    """Raise ConfigError naming the first setting of `model` that is not what `checkpoint` was trained with, but for those in `free`."""
    saved, current = dict(_flat(read_manifest(checkpoint).state["model"])), dict(_flat(asdict(model)))
    for name, value in current.items():
        if name in free or name not in saved or saved[name] == value:
            continue
        raise ConfigError(
            f"model.{name}={value}, but {checkpoint} was trained with model.{name}={saved[name]}; "
            f"use model.{name}={saved[name]}, or another run.name for a new run"
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
