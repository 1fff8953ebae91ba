"""One process, plain PyTorch, float64, the whole global batch in one piece: what every row is held against."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import oracle
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kan_train.config import ModelConfig
from kan_train.model.route import Router
from layout_matrix.rows import BALANCE_RATE, EPS, LENGTH, SEED, SEQUENCES, STEPS, Row, learning_rate, model_config, sequences


@dataclass
class Reference:
    """What one process saw."""

    losses: list[float]
    """A step each, nats a token."""
    norms: list[float]
    """Global gradient norm before clipping, a step each."""
    initial: dict[str, Tensor]
    """Parameters before the first step, float64."""
    weights: dict[str, Tensor]
    """Parameters after the last step."""
    buffers: dict[str, Tensor]
    """Persistent buffers after the last step."""
    gradients: dict[str, Tensor]
    """Of the first step, before clipping."""
    choices: Tensor
    """int16 [steps, layers, B, T, K], groves in ascending order; empty for a dense model."""
    margins: Tensor
    """float64 [steps, layers, B, T]: score of the K-th grove less that of the next one."""

    def save(self, folder: Path) -> None:
        """Write the folder that `load` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"choices": self.choices, "margins": self.margins}
        for kind in ("initial", "weights", "buffers", "gradients"):
            tensors |= {f"{kind}/{name}": tensor.contiguous() for name, tensor in getattr(self, kind).items()}
        save_file(tensors, folder / "tensors.safetensors")
        (folder / "run.json").write_text(json.dumps({"losses": self.losses, "norms": self.norms}))

    @classmethod
    def load(cls, folder: Path) -> "Reference":
        """Read what `save` wrote."""
        tensors = load_file(folder / "tensors.safetensors")
        kinds: dict[str, dict[str, Tensor]] = {"initial": {}, "weights": {}, "buffers": {}, "gradients": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if rest:
                kinds[kind][rest] = tensor
        return cls(**json.loads((folder / "run.json").read_text()), **kinds, choices=tensors["choices"], margins=tensors["margins"])


class _Witness(torch.optim.Optimizer):
    """An optimizer in the oracle's list that steps nothing: it sees the model before the first step, and the gradients of the first."""

    def __init__(self, model: nn.Module, clip: float) -> None:
        super().__init__([{"params": list(model.parameters()), "multiple": 1.0}], {})
        self.named, self.clip = dict(model.named_parameters()), clip
        self.gradients: dict[str, Tensor] = {}
        self.choices: dict[int, list[Tensor]] = {}
        self.margins: dict[int, list[Tensor]] = {}
        for number, router in enumerate(module for module in model.modules() if isinstance(module, Router)):
            self.choices[number], self.margins[number] = [], []
            router.selector = partial(self._see, number)

    def _see(self, layer: int, selection_TN: Tensor, index_TK: Tensor) -> Tensor:
        active = index_TK.shape[-1]
        best = selection_TN.topk(active + 1, dim=-1).values
        self.choices[layer].append(index_TK.sort(-1).values.to(torch.int16).view(SEQUENCES, LENGTH, active))
        self.margins[layer].append((best[:, -2] - best[:, -1]).view(SEQUENCES, LENGTH))
        return index_TK

    def step(self, closure=None) -> None:  # type: ignore[override]
        if not self.gradients:
            self.gradients = {name: parameter.grad.detach().clone() for name, parameter in self.named.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer behind this one clears them."""


def train(row: Row, model: ModelConfig | None = None, batches: Sequence[tuple[Tensor, Tensor]] | None = None) -> Reference:
    """Train the row's model on the whole global batch of every step.

    model: unset, that of the row's kind. batches: (tokens, resets) of each step as `rows.sequences` gives them; unset, those of all steps of a row.
    """
    model = model or model_config(row.kind)
    batches = [sequences(step) for step in range(STEPS)] if batches is None else batches
    witness: list[_Witness] = []

    def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
        (adamw,) = oracle.adamw(model)
        for group in adamw.param_groups:
            group["eps"] = EPS
        witness.append(_Witness(model, row.clip))
        return [witness[0], adamw]

    rates = [learning_rate(step) for step in range(len(batches))]
    settings = {"seed": SEED, "clip": row.clip, "balance_rate": BALANCE_RATE, "optimizers": optimizers}
    history = oracle.train(model, batches, rates, **settings)
    seen, norm = witness[0], history.norms[0]
    factor = max(1.0, (norm + 1e-6) / row.clip) if row.clip else 1.0  # torch's clipping divides by the norm and this epsilon
    return Reference(
        losses=history.losses,
        norms=history.norms,
        initial=history.initial,
        weights=history.weights,
        buffers=history.buffers,
        gradients={name: gradient * factor for name, gradient in seen.gradients.items()},
        choices=_by_step(seen.choices.values(), torch.int16),
        margins=_by_step(seen.margins.values(), torch.float64),
    )


def _by_step(layers: Iterable[list[Tensor]], dtype: torch.dtype) -> Tensor:
    stacked = [torch.stack(steps) for steps in layers]
    return torch.stack(stacked, dim=1).contiguous() if stacked else torch.empty(0, dtype=dtype)


def references(rows: Iterable[Row], folder: Path) -> Iterator[tuple[str, Path]]:
    """(key, folder) of the reference of every kind of `rows`, trained where it is not there yet."""
    for row in {row.model_key: row for row in rows}.values():
        path = folder / row.model_key
        if not (path / "run.json").exists():
            train(row).save(path)
        yield row.model_key, path
