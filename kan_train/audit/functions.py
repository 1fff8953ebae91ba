"""The learnable functions of a model, wherever its kind of grove keeps them (docs/model.md, sections 1 and 2).

N groves, I inputs, O outputs: function [n, i, o] is phi(x) = w silu(x) + s(x), s its learned part (the spline).

    edge            [N, r, M]: one on every edge from the normalised projection to the hidden units
    gated, reuse    [N, F, 1]: one for a group of hidden units, w = 1; the shared grove's are [1, F, 1]
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kan_train.config import ConfigError, EdgeConfig, ModelConfig
from kan_train.model.edge import EdgeLayer, GroupedFunctions, coefficients_of, edge_basis, rational
from kan_train.model.grove import KalmaGrove
from kan_train.model.lm import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Functions:
    """The functions of one layer's groves, or of its shared grove."""

    layer: int
    """Number of the block."""
    shared: bool
    """Whether they are the shared grove's."""
    module: GroupedFunctions | EdgeLayer
    """Where the coefficients are."""

    @property
    def config(self) -> EdgeConfig:
        """Kind and grid."""
        return self.module.config

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, I, O)."""
        coefficients = self.module.coefficients
        if isinstance(self.module, EdgeLayer):
            return coefficients.shape[0], coefficients.shape[1] // coefficients_of(self.config), coefficients.shape[2]
        return coefficients.shape[0], coefficients.shape[1], 1

    @property
    def count(self) -> int:
        """How many there are."""
        groves, inputs, outputs = self.shape
        return groves * inputs * outputs

    def silu_weights(self, grove: int) -> np.ndarray:
        """w of one grove: fp64 [I, O]."""
        if isinstance(self.module, EdgeLayer):
            return self.module.base[grove].detach().double().cpu().numpy()
        return np.ones(self.shape[1:])

    def learned(self, grove: int, x: np.ndarray) -> np.ndarray:
        """s of one grove at the points x [P]: fp64 [I, O, P]."""
        points = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64))
        weights = self.module.coefficients[grove].detach().double().cpu()
        if self.config.kind == "rational":
            return rational(points[:, None].expand(-1, len(weights)), weights).T[:, None].numpy()
        basis_Pn = edge_basis(points, self.config)
        if isinstance(self.module, EdgeLayer):
            return torch.einsum("pn,ino->iop", basis_Pn, weights.unflatten(0, (-1, basis_Pn.shape[1]))).numpy()
        return (weights @ basis_Pn.T)[:, None].numpy()

    @torch.no_grad()
    def zero(self, which: np.ndarray) -> None:
        """Set s = 0 where `which` (bool [N, I, O]) says so; w silu stays."""
        coefficients = self.module.coefficients
        mask = torch.from_numpy(which).to(coefficients.device)
        if isinstance(self.module, EdgeLayer):
            coefficients.data.unflatten(1, (self.shape[1], -1)).masked_fill_(mask[:, :, None], 0.0)
        else:
            coefficients.data.masked_fill_(mask, 0.0)


def functions_of(model: LanguageModel) -> list[Functions]:
    """Every layer's functions, in order; [] where the groves' activation is plain silu, which learns nothing. ConfigError for a dense model."""
    require_groves(model.config)
    if model.config.grove.edge.kind == "silu":
        return []
    found = []
    for layer, groves in grove_layers(model):
        if model.config.grove.num_groves:
            module = groves.groves.edges if model.config.grove.kind == "edge" else groves.groves.functions
            found.append(Functions(layer=layer, shared=False, module=module))
        if model.config.grove.shared_width:
            found.append(Functions(layer=layer, shared=True, module=groves.shared.functions))
    return found


def grove_layers(model: LanguageModel) -> list[tuple[int, KalmaGrove]]:
    """Number of the block and its KalmaGrove layer, of every block that has one."""
    return [(int(name), block.ffn) for name, block in model.layers.named_children() if isinstance(block.ffn, KalmaGrove)]


def require_groves(config: ModelConfig) -> None:
    """ConfigError for a model without groves."""
    if config.ffn != "kalmagrove":
        raise ConfigError(
            f"{config.name} is a dense model (model.ffn={config.ffn}): it has neither edge functions nor groves to audit; "
            "use a run with model.ffn=kalmagrove, such as one of model=kan_tiny"
        )


@contextmanager
def zeroed(functions: Sequence[Functions], masks: Sequence[np.ndarray]) -> Iterator[None]:
    """Within it, the functions that `masks` (bool [N, I, O] each) choose have no learned part; afterwards they are what they were, bit for bit."""
    kept: list[Tensor] = [each.module.coefficients.detach().clone() for each in functions]
    try:
        for each, mask in zip(functions, masks, strict=True):
            each.zero(mask)
        yield
    finally:
        for each, before in zip(functions, kept, strict=True):
            each.module.coefficients.data.copy_(before)
