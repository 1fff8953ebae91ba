import pytest
import torch

from kan_train.config import Config, ModelConfig, OptimizerConfig
from kan_train.engine.optimizer import (
    build_optimizer,
    ensure_state,
    optimizer_steps,
    parameter_groups,
    set_learning_rate,
    set_optimizer_steps,
    state_tensors,
)
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_in_the_one_group_of_its_facts(config: Config, kind: str):
    model = LanguageModel(config.model)
    settings = OptimizerConfig(kind=kind, learning_rate=1e-3, muon_learning_rate=2e-2, grove_learning_rate=0.25, weight_decay=0.3)
    group_of = {id(p): group for group in parameter_groups(settings, model.named_parameters()) for p in group["params"]}
    assert len(group_of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group, spec = group_of[id(parameter)], parameter.spec
        muon = kind == "muon" and spec.matrix and name != "head.weight"
        assert group["weight_decay"] == (0.3 if spec.decay else 0.0), name
        assert group["multiple"] == pytest.approx((0.25 if spec.grove else 1.0) * (20 if muon else 1.0)), name
        assert group.get("muon", False) == muon, name


def test_splines_decay_rates_convolutions_norms_and_biases_do_not_decay():
    model = LanguageModel(ModelConfig(num_layers=1, width=32, vocab_size=128))
    free = ("norm", "kernel", "log_rate", "coefficients", "bias", "gate_score")
    decay_of = {id(p): group["weight_decay"] for group in parameter_groups(OptimizerConfig(), model.named_parameters()) for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (decay_of[id(parameter)] == 0) == any(word in name for word in free), name


def test_state_made_beforehand_is_what_the_optimizer_would_have_made(config: Config):
    """A checkpoint before the first step needs state tensors; making them must not change the run."""
    models = [materialise(LanguageModel(config.model), seed=1) for _ in range(2)]
    optimizers = [build_optimizer(config.optimizer, [model]) for model in models]
    for group in optimizers[0].param_groups:
        for parameter in group["params"]:
            assert set(state_tensors(ensure_state(optimizers[0], group, parameter))) == {"exp_avg", "exp_avg_sq"}
    for model, optimizer in zip(models, optimizers, strict=True):
        set_learning_rate(optimizer, 1e-2)
        for step in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.1 * (step + 1))
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert optimizer_steps(optimizers[0]) == 3


def test_bias_correction_goes_on_from_a_given_step():
    """The first step of AdamW moves by the whole rate; after 1000 steps of zero moments the same gradient moves by far less."""
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([{"params": [parameter], "multiple": 1.0}], lr=0.1, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    ensure_state(optimizer, optimizer.param_groups[0], parameter)
    set_optimizer_steps(optimizer, 1000)
    parameter.grad = torch.ones(4)
    optimizer.step()
    assert optimizer_steps(optimizer) == 1001
    first, second = 0.1, 0.001
    expected = -0.1 * (first / (1 - 0.9**1001)) / ((second / (1 - 0.999**1001)) ** 0.5 + 1e-8)
    torch.testing.assert_close(parameter.data, torch.full((4,), expected), rtol=1e-5, atol=0)
