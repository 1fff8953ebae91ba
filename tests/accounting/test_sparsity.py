"""Measured load and sparsity against counts made one by one."""

import numpy as np
import pytest
import torch

from kan_train.accounting.flops import flops_per_token
from kan_train.accounting.sparsity import grove_figures
from kan_train.config import GroveConfig, ModelConfig

GROVES, ACTIVE, TOKENS = 8, 2, 100


def model(**grove: float) -> ModelConfig:
    config = ModelConfig(num_layers=2, grove=GroveConfig(num_groves=GROVES, active_groves=ACTIVE, width=32))
    for name, value in grove.items():
        setattr(config.grove, name, value)
    config.validate()
    return config


def statistics(choices_LTK: np.ndarray) -> torch.Tensor:
    """[layers, 3N+1] of the groves that every token of every layer chose."""
    layers, tokens, _ = choices_LTK.shape
    table = torch.full((layers, 3 * GROVES + 1), 7.0)  # sums of scores: anything
    for layer in range(layers):
        for grove in range(GROVES):
            table[layer, grove] = float((choices_LTK[layer] == grove).sum())
    table[:, -1] = tokens
    return table


def test_load_and_touched_share_are_those_of_the_counts():
    rng = np.random.default_rng(5)
    uneven = np.stack([rng.choice(GROVES, ACTIVE, replace=False, p=np.arange(1, GROVES + 1) / 36) for _ in range(TOKENS)])
    few = np.stack([rng.choice(3, ACTIVE, replace=False) for _ in range(TOKENS)])
    figures = grove_figures(model(), statistics(np.stack([uneven, few])))
    for layer, choices in enumerate((uneven, few)):
        counts = np.bincount(choices.ravel(), minlength=GROVES)
        assert figures[f"load/cv/{layer}"] == pytest.approx(np.std(counts) / np.mean(counts), rel=1e-9)
    assert figures["sparsity/touched/0"] == 1.0
    assert figures["sparsity/touched/1"] == 3 / GROVES
    assert figures["sparsity/nominal"] == 1 - ACTIVE / GROVES


def test_an_even_load_does_not_vary():
    even = np.stack([[(token + k) % GROVES for k in range(ACTIVE)] for token in range(GROVES * 5)])
    assert grove_figures(model(), statistics(np.stack([even, even])))["load/cv/1"] == 0.0


def test_the_executed_share_is_flops_over_those_of_all_groves():
    choices = np.zeros((2, TOKENS, ACTIVE), dtype=int)
    config, dense = model(), model(active_groves=GROVES)
    share = flops_per_token(config).forward / flops_per_token(dense).forward
    assert grove_figures(config, statistics(choices))["sparsity/executed_flops_share"] == pytest.approx(share, rel=1e-12)
    assert share < 1


def test_under_a_capacity_padding_is_executed():
    choices = np.zeros((2, TOKENS, ACTIVE), dtype=int)
    config = model(capacity_factor=1.5)
    share = flops_per_token(model(active_groves=3)).forward / flops_per_token(model(active_groves=GROVES)).forward
    assert grove_figures(config, statistics(choices))["sparsity/executed_flops_share"] == pytest.approx(share, rel=1e-12)


def test_a_batch_without_tokens_has_figures():
    figures = grove_figures(model(), torch.zeros(2, 3 * GROVES + 1))
    assert (figures["load/cv/0"], figures["sparsity/touched/0"]) == (0.0, 0.0)
