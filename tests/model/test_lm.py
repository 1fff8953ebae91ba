"""The whole model: decoding is training's function read one token at a time, and recomputation changes nothing."""

import dataclasses

import pytest
import torch

from kan_train.config import AdaConfig, AttentionConfig, EdgeConfig, GroveConfig, ModelConfig
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel, count_parameters, parameter_table

GROVE = GroveConfig(num_groves=8, active_groves=2, width=16, score_rank=4, shared_width=8, edge=EdgeConfig(group_size=8))
BASE = ModelConfig(
    num_layers=3, width=16, vocab_size=128, sequence_length=24,
    ada=AdaConfig(num_heads=2, chunk=8), attention=AttentionConfig(num_heads=4, num_kv_heads=2), grove=GROVE,
)  # fmt: skip
MODELS = {
    "ada": BASE,
    "hybrid": dataclasses.replace(BASE, attention_pattern=2),
    "dense": dataclasses.replace(BASE, attention_pattern=1, ffn="swiglu", ffn_width=40),
    "capacity": dataclasses.replace(BASE, grove=dataclasses.replace(GROVE, capacity_factor=8.0)),
    "auxiliary loss": dataclasses.replace(BASE, grove=dataclasses.replace(GROVE, auxiliary_loss=0.1)),
}


def built(config: ModelConfig) -> LanguageModel:
    model = materialise(LanguageModel(config), seed=4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the zeros and ones that some start from
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def text(config: ModelConfig, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (batch, config.sequence_length), generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=MODELS, ids=str)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return MODELS[request.param]


def test_prefill_and_steps_give_the_logits_of_the_whole_sequence(config: ModelConfig):
    model, tokens = built(config).eval(), text(config)
    expected = model.logits(tokens)
    logits, state = model.prefill(tokens[:, :10], model.init_state(2))
    seen = [logits]
    for position in range(10, config.sequence_length):
        logits, state = model.step(tokens[:, position], state)
        seen.append(logits)
    assert torch.allclose(torch.stack(seen, dim=1), expected[:, 9:], rtol=1e-9, atol=1e-11)


def test_a_token_does_not_see_what_comes_after_it(config: ModelConfig):
    model, tokens = built(config).eval(), text(config)
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % config.vocab_size
    before, after = model.logits(tokens), model.logits(changed)
    assert torch.allclose(before[:, :15], after[:, :15], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 15:], after[:, 15:])


def test_a_document_does_not_see_the_one_before_it(config: ModelConfig):
    model, tokens = built(config).eval(), text(config)
    resets = torch.zeros_like(tokens, dtype=torch.bool)
    resets[:, 9] = True
    together = model.logits(tokens, resets)
    alone = model.logits(tokens[:, 9:])
    if config.attention_pattern != 0:  # rotary positions are relative: only their differences may matter
        assert torch.allclose(together[:, 9:], alone, rtol=1e-7, atol=1e-9)
    else:
        assert torch.allclose(together[:, 9:], alone, rtol=1e-9, atol=1e-11)


def test_recomputation_changes_no_gradient_and_counts_the_load_once(config: ModelConfig):
    runs = []
    for recompute in (False, True):
        model, tokens = built(config).train(), text(config)
        model.activation_checkpointing = recompute
        loss, cross_entropy = model(tokens, tokens)
        loss.backward()
        runs.append((loss, cross_entropy, model.pending_statistics(), [parameter.grad for parameter in model.parameters()]))
    kept, recomputed = runs
    assert torch.equal(kept[0], recomputed[0])
    assert torch.equal(kept[1], recomputed[1])
    assert torch.equal(kept[2], recomputed[2])
    for a, b in zip(kept[3], recomputed[3], strict=True):
        assert torch.equal(a, b)
    if config.ffn == "kalmagrove":
        load = kept[2][:, : config.grove.num_groves]
        assert load.sum(1).tolist() == [2 * config.sequence_length * config.grove.active_groves] * config.num_layers


def test_the_auxiliary_loss_is_part_of_the_loss_alone():
    model, tokens = built(MODELS["auxiliary loss"]).train(), text(BASE)
    loss, cross_entropy = model(tokens, tokens)
    assert float(loss.detach()) > float(cross_entropy)
    assert not cross_entropy.requires_grad


def test_the_table_counts_what_the_model_holds(config: ModelConfig):
    model = built(config)
    table = parameter_table(config)
    assert {name: spec.shape for name, spec in table.items()} == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    total, active = count_parameters(config)
    assert total == sum(parameter.numel() for parameter in model.parameters())
    groves = sum(spec.numel for spec in table.values() if spec.grove)
    assert active == total - groves + groves * config.grove.active_groves // config.grove.num_groves
    assert (active < total) == (config.ffn == "kalmagrove")
