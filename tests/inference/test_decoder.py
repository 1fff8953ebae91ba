"""The decoder's steps are the training forward, for every kind of layer that it has a form for, and those that it hands on."""

import random

import pytest
import torch

from kan_train.config import AdaConfig, AttentionConfig, EdgeConfig, GroveConfig
from kan_train.inference.engine import evaluating
from kan_train.inference.states import joined, rows_of
from kan_train.model.decoder import AdaStep, AttentionStep, Decoder
from kan_train.model.decoder_groves import GroveStep


def grove(**changes) -> GroveConfig:
    edge = changes.pop("edge", {})
    return GroveConfig(**{"num_groves": 8, "active_groves": 2, "width": 16, **changes, "edge": EdgeConfig(group_size=8, **edge)})


def ada(**changes) -> AdaConfig:
    return AdaConfig(num_heads=2, chunk=8, **changes)


DIRECT = {
    "gated": {"grove": grove()},
    "gated, one of eight": {"grove": grove(active_groves=1)},
    "three of eight, shared, scaled": {"grove": grove(active_groves=3, shared_width=24, route_scale=0.7)},
    "reuse, quadratic": {"grove": grove(kind="reuse", edge={"order": 2, "grid": 3})},
    "pieces": {"grove": grove(edge={"kind": "piecewise_poly", "order": 1})},
    "silu": {"grove": grove(edge={"kind": "silu"})},
    "literal ada": {"ada": ada(conv_width=1, feature_map="identity", decay="none", output_norm=False, output_gate=False)},
    "no gate": {"ada": ada(output_gate=False)},
    "hybrid": {"attention_pattern": 2, "attention": AttentionConfig(num_heads=4, num_kv_heads=2)},
    "dense": {"attention_pattern": 1, "ffn": "swiglu", "ffn_width": 48},
}
HANDED_ON = {
    "edge groves": {"grove": grove(kind="edge", edge={"sharing": "per_edge"})},
    "literal gate": {"grove": grove(gate="literal")},
    "linear score": {"grove": grove(score="linear")},
    "capacity": {"grove": grove(capacity_factor=8.0)},
    "data decay, mixture": {"ada": ada(decay="data", mixture=2)},
    "chebyshev": {"grove": grove(edge={"kind": "chebyshev"})},
}


def lively(model, std: float = 0.5):
    """Every parameter and statistic that starts as a constant gets a part in the result."""
    chance = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("coefficients", "kernel", "gate_bias", "gate_score", "norm.weight", "norm_weight", "rate_weight", "mixture_weight")):
                parameter += std * torch.randn(parameter.shape, generator=chance, dtype=torch.float64).to(parameter.dtype)
        for layer in model.grove_layers():
            layer.router.score_mean += 0.2 * torch.rand(layer.router.score_mean.shape, generator=chance)
            layer.router.balance += 0.3 * torch.randn(layer.router.balance.shape, generator=chance)
    return model


def worst(model, batch: int, seed: int, steps: int = 6) -> float:
    """Largest difference of a step's logits to those of each row's whole sequence in the training forward, over the largest; rows are replaced on the way."""
    chance = random.Random(seed)
    found = 0.0

    def tokens(count: int) -> list[int]:
        return [chance.randrange(model.config.vocab_size) for _ in range(count)]

    with evaluating(model):
        decoder = Decoder(model)

        def read(sequence: list[int]):
            return model.prefill(torch.tensor([sequence]), model.init_state(1))[1]

        rows = [tokens(chance.randint(1, 30)) for _ in range(batch)]
        state = joined([read(row) for row in rows])
        for step in range(steps):
            if step == steps // 2:  # one row starts a document of its own, another is there twice
                rows[0] = tokens(1)
                kept = [chance.randrange(1, batch) if batch > 1 else 0 for _ in range(batch - 1)]
                rows = [rows[0], *([*rows[row]] for row in kept)]
                state = joined([read(rows[0]), *([rows_of(state, kept)] if kept else [])])
            new = tokens(batch)
            logits, state = decoder.step(torch.tensor(new), state)
            for row, token in zip(rows, new, strict=True):
                row.append(token)
            whole = torch.cat([model.logits(torch.tensor([row]))[:, -1] for row in rows])
            found = max(found, float((logits - whole).double().abs().max() / whole.double().abs().max()))
    return found


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("name", [*DIRECT, *HANDED_ON])
def test_steps_are_the_training_forward(make_model, name, batch):
    """In float64, rows of different lengths, replaced and forked on the way; coefficients, statistics and gates not as they start."""
    model = lively(make_model(**{**DIRECT, **HANDED_ON}[name]))
    decoder = Decoder(model)
    direct = all(isinstance(mixer, (AdaStep, AttentionStep)) for mixer in decoder._mixers) and all(map(GroveStep.fits, model.grove_layers()))
    assert direct == (name in DIRECT)
    assert worst(model, batch, seed=batch) < 1e-10


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("name", ["gated", "three of eight, shared, scaled", "hybrid", "dense"])
def test_in_low_precision_too(make_model, name, dtype, tolerance, batch):
    """All groves run, so that no choice can fall the other way."""
    changes = DIRECT[name]
    if "grove" in changes or name == "hybrid":
        changes = changes | {"grove": grove(num_groves=2, active_groves=2, shared_width=24 if "shared" in name else 0)}
    assert worst(lively(make_model(dtype, **changes), std=0.1), batch, seed=batch) < tolerance


def test_far_outside_the_grid_and_not_a_number(make_model):
    """The outer cells continue linearly, and what is no number crashes nothing: it is the sampler that refuses it."""
    model = lively(make_model())
    with torch.no_grad():
        for layer in model.grove_layers():
            layer.groves.up *= 1e6
    assert worst(model, 3, seed=0) < 1e-10
    with torch.no_grad():
        model.embedding.weight.fill_(torch.nan)
    with evaluating(model):
        logits, _ = Decoder(model).step(torch.tensor([1, 2]), model.init_state(2))
    assert logits.isnan().all()


def test_other_groves_than_in_training(make_model):
    """K is read when the decoder is made."""
    model = lively(make_model())
    for layer in model.grove_layers():
        layer.router.active = 1
    assert worst(model, 3, seed=1) < 1e-10


def test_the_weights_of_groves_that_are_not_chosen_are_not_read(make_model):
    """With no numbers in place of theirs, the logits stay as they are."""
    model = lively(make_model())
    with evaluating(model):
        state = joined([model.prefill(torch.tensor([[5, 9, 2]]), model.init_state(1))[1]] * 2)
        chosen: list[set[int]] = []
        for layer in model.grove_layers():
            layer.router.selector = lambda _, index: chosen.append(set(index.flatten().tolist())) or index
        model.step(torch.tensor([3, 4]), state)
        for layer in model.grove_layers():
            layer.router.selector = None
        logits, _ = Decoder(model).step(torch.tensor([3, 4]), joined([state]))
        for layer, mine in zip(model.grove_layers(), chosen, strict=True):
            others = [grove for grove in range(8) if grove not in mine]
            assert others
            for weight in (layer.groves.up, layer.groves.value, layer.groves.out, layer.groves.functions.coefficients):
                weight.data[others] = torch.nan
        again, _ = Decoder(model).step(torch.tensor([3, 4]), joined([state]))
    assert torch.equal(logits, again)


@pytest.mark.parametrize("name", ["gated", "hybrid"])
def test_what_was_joined_is_not_overwritten(make_model, name):
    """A kept prompt's state is the same after others were decoded from it."""
    model = make_model(**DIRECT[name])
    with evaluating(model):
        _, before = model.prefill(torch.tensor([[1, 2, 3, 4, 5]]), model.init_state(1))
        decoder, futures = Decoder(model), []
        for _ in range(2):
            state, logits = joined([before]), []
            for token in (7, 8, 9):
                given, state = decoder.step(torch.tensor([token]), state)
                logits.append(given)
            futures.append(torch.cat(logits))
    assert torch.equal(*futures)
