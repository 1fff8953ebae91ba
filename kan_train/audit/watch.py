"""Held-out text through the model once, watched: what the functions read, and which groves every token went to.

T tokens, D width, K choices a token, R rows, N groves, I inputs of a grove's functions, M hidden units.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kan_train.audit.functions import Functions, grove_layers, require_groves
from kan_train.config import EdgeConfig
from kan_train.data.index import CorpusIndex
from kan_train.evaluation.perplexity import packed_batches
from kan_train.evaluation.score import require_finite
from kan_train.inference.engine import evaluating
from kan_train.model.dispatch import Plan
from kan_train.model.grove import EdgeGroves, GatedGroves
from kan_train.model.lm import LanguageModel
from kan_train.model.norm import at_least_fp32

BINS = 96
"""Bins of the inputs of a function, over twice the width of its grid."""


@dataclass
class Watched:
    """What was seen."""

    tokens: np.ndarray
    """int64 [n]: the tokens read, in order."""
    documents: np.ndarray
    """int64 [n]: number of the document, or of the part of one in a sequence, that a token belongs to."""
    layers: list[int]
    """Number of the block of every entry of `choices`."""
    choices: list[np.ndarray]
    """int32 [n, K] a layer: the groves that ran the token; -1 where one had no room for it (model.grove.capacity_factor)."""
    inputs: list[np.ndarray]
    """int64 [N, I, BINS] for every entry of the functions watched: how many of their inputs lay in each bin; the outer bins hold all that is beyond."""


def range_of(config: EdgeConfig) -> tuple[float, float]:
    """Ends of the bins: the grid, and half of its width on each side."""
    half = (config.high - config.low) / 2
    return config.low - half, config.high + half


def middles_of(config: EdgeConfig) -> np.ndarray:
    """Middle of every bin: fp64 [BINS]."""
    low, high = range_of(config)
    return low + (np.arange(BINS) + 0.5) * (high - low) / BINS


def watch(model: LanguageModel, functions: list[Functions], corpus: CorpusIndex, sequences: int, batch_size: int, *, resets: bool = True) -> Watched:
    """Read the first `sequences` sequences of training's own validation, documents end to end. `functions`: those of the model whose inputs to count;
    resets: whether states begin anew with a document, as they did in training.

    ConfigError for a dense model, one that has diverged, or where the corpus holds too little text out.
    """
    require_groves(model.config)
    batches = packed_batches(corpus, model.config, sequences, batch_size, resets=resets)
    inputs = [np.zeros((*each.shape[:2], BINS), dtype=np.int64) for each in functions]
    counted = {(each.layer, each.shared): (each, counts) for each, counts in zip(functions, inputs, strict=True)}
    # Where N = 0, the shared grove is alone, and there is nothing to choose.
    layers: dict[int, list[np.ndarray]] = {layer: [] for layer, _ in grove_layers(model) if model.config.grove.num_groves}
    hooks = []
    for layer, groves in grove_layers(model):
        if layer in layers:
            hooks.append(groves.groves.register_forward_pre_hook(_on_groves(layers[layer], counted.get((layer, False)))))
        if (layer, True) in counted:
            hooks.append(groves.shared.up.register_forward_hook(_on_shared(*counted[layer, True])))
    tokens: list[np.ndarray] = []
    try:
        with evaluating(model):
            for batch in batches:
                real = batch.targets[:, 0] >= 0  # not the rows that fill up the last batch
                tokens.append(batch.tokens[real].numpy())
                moved = batch.to(model.embedding.weight.device)
                x_BTD = model.stream(moved.tokens[real], None if moved.resets is None else moved.resets[real])
                require_finite([float(x_BTD.abs().max())], "the largest output of the last layer")
    finally:
        for hook in hooks:
            hook.remove()
    read_ST = np.concatenate(tokens)
    starts_ST = read_ST == corpus.boundary
    starts_ST[:, 0] = True
    return Watched(
        tokens=read_ST.ravel(), documents=np.cumsum(starts_ST.ravel()) - 1, layers=list(layers),
        choices=[np.concatenate(seen) for seen in layers.values()], inputs=inputs,
    )  # fmt: skip


def _on_groves(seen: list[np.ndarray], counted: tuple[Functions, np.ndarray] | None) -> Callable[..., None]:
    """Sees the arguments of a layer's groves before they compute."""

    def hook(module: GatedGroves | EdgeGroves, arguments: tuple[Tensor, Tensor | None, Tensor, Plan]) -> None:
        x_TD, z_TKr, gate_TK, plan = arguments
        number = gate_TK.numel()
        grove_R = torch.repeat_interleave(torch.arange(len(plan.sizes)), torch.tensor(plan.sizes))
        choice_R = plan.choice_of_row.cpu()
        real_R = choice_R < number  # not padding
        index = torch.full((number,), -1, dtype=torch.int32)
        index[choice_R[real_R]] = grove_R[real_R].int()
        seen.append(index.view(gate_TK.shape).numpy())
        if counted is None:
            return
        functions, counts = counted
        for grove in range(len(plan.sizes)):
            rows = choice_R[(grove_R == grove) & real_R].to(gate_TK.device)
            if len(rows):
                counts[grove] += _histogram(_inputs(module, grove, x_TD, z_TKr, rows, gate_TK.shape[1]), functions)

    return hook


def _inputs(module: GatedGroves | EdgeGroves, grove: int, x_TD: Tensor, z_TKr: Tensor | None, choices: Tensor, active: int) -> Tensor:
    """What one grove's functions read for these choices (flat numbers t K + k), [rows, hidden units or r]."""
    if isinstance(module, EdgeGroves):
        assert z_TKr is not None
        z = at_least_fp32(z_TKr.flatten(0, 1)[choices])
        return F.rms_norm(z, z.shape[-1:], eps=module.norm_eps)
    if module.reuse:
        assert z_TKr is not None
        return z_TKr.flatten(0, 1)[choices] @ module.up[grove]
    return x_TD[choices // active] @ module.up[grove]


def _on_shared(functions: Functions, counts: np.ndarray) -> Callable[..., None]:
    def hook(_module: Any, _arguments: Any, up_BTM: Tensor) -> None:
        counts[0] += _histogram(up_BTM.flatten(0, 1), functions)

    return hook


def _histogram(h: Tensor, functions: Functions) -> np.ndarray:
    """Inputs [rows, hidden units or inputs] -> counts [I, BINS]."""
    inputs = functions.shape[1]
    low, high = range_of(functions.config)
    bins = ((at_least_fp32(h) - low) * (BINS / (high - low))).floor().nan_to_num(0.0).clamp(0, BINS - 1).long()
    function = torch.arange(h.shape[1], device=h.device) // (h.shape[1] // inputs)
    return torch.bincount((function * BINS + bins).flatten(), minlength=inputs * BINS).view(inputs, BINS).cpu().numpy()
