"""FLOPs from the configuration: against published numbers, sums by hand and each other. test_flops_reference.py holds them against what runs."""

import dataclasses

import pytest

from kan_train.accounting import executed_flops_share, flops_per_token, ideal_ratio, parameter_counts
from kan_train.accounting.flops import layer_flops
from kan_train.config import AttentionConfig, ConfigError, GroveConfig, ModelConfig
from kan_train.model.lm import LanguageModel


def model(**settings: object) -> ModelConfig:
    """One layer, so that a part of the count is the count of a layer."""
    return ModelConfig(**{"num_layers": 1, "width": 64, "sequence_length": 96, "vocab_size": 256, "ffn_width": 160, **settings})  # type: ignore[arg-type]


def test_a_block_of_groves_by_hand():
    """D 64, N 8, K 2, M 48, r 8: scoring of all groves has no backward pass, z of the chosen ones is projected a second time for its gradient."""
    layer = flops_per_token(model(grove=GroveConfig(num_groves=8, active_groves=2, width=48))).layers[0]
    scoring, projection, groves = layer["scoring"], layer["projection"], layer["groves"]
    assert (scoring.forward, scoring.executed(activation_checkpointing=True)) == (2 * 8 * 8 * 64, 2 * 8 * 8 * 64)
    assert (projection.forward, projection.extra_forward, projection.backward) == (2 * 2 * 64, 2 * 2 * 8 * 64, 2 * 2 * 2 * 9 * 64)
    assert (groves.forward, groves.backward) == (2 * 2 * 3 * 64 * 48, 4 * 2 * 3 * 64 * 48)
    assert groves.executed() == groves.training == 3 * groves.forward
    assert groves.executed(activation_checkpointing=True) == 4 * groves.forward


def test_model_flops_do_not_depend_on_what_runs_again():
    count = flops_per_token(model())
    assert count.training == count.forward + count.backward
    assert count.training < count.executed() < count.executed(activation_checkpointing=True)
    assert count.executed(activation_checkpointing=True) - count.executed() < count.forward  # neither scoring nor head


def test_layers_and_head_make_the_whole():
    config = model(num_layers=4, attention_pattern=2)
    count = flops_per_token(config)
    assert [set(layer) & {"ada_scan", "attention_scores"} for layer in count.layers] == [{"ada_scan"}, {"attention_scores"}] * 2
    assert count.forward == pytest.approx(sum(count.by_part.values())) == pytest.approx(sum(layer_flops(config)))
    assert count.training == pytest.approx(sum(count.layer(layer).training for layer in range(4)) + 3 * 2 * 64 * 256)
    assert count.executed() == pytest.approx(sum(count.layer(layer).executed() for layer in range(4)) + 3 * 2 * 64 * 256)
    deeper = flops_per_token(dataclasses.replace(config, num_layers=8))
    assert deeper.training - count.training == pytest.approx(count.training - count.head.training)


def parts(config: ModelConfig, *names: str, counting: str = "full") -> float:
    count = flops_per_token(config, counting=counting).by_part
    return sum(count[name] for name in names)


def test_causal_counting_is_the_sum_over_what_a_token_may_see():
    """Causal scores token by token, and ADA's recurrence: an outer product and a read of the state."""
    config = model(num_layers=2, attention_pattern=2)
    time, width = config.sequence_length, config.width
    assert parts(config, "attention_scores", counting="causal") == sum(4 * width * (t + 1) for t in range(time)) / time
    assert parts(config, "ada_scan", counting="causal") == 4 * config.ada.num_heads * config.head_width**2
    with pytest.raises(ConfigError, match="full, causal"):
        flops_per_token(config, counting="half")


def test_a_published_dense_model_has_its_published_flops():
    """Nemotron-4 340B: 2.105 TFLOP a token at a context of 4k (its FFN has two matrices of 73728; SwiGLU has three of 49152)."""
    dense = ModelConfig(
        num_layers=96, width=18432, vocab_size=256000, sequence_length=4096, attention_pattern=1, ffn="swiglu", ffn_width=49152,
        attention=AttentionConfig(num_heads=96, num_kv_heads=8),
    )  # fmt: skip
    assert flops_per_token(dense).training == pytest.approx(2.105e12, rel=1e-3)


def test_the_ratio_to_a_twin_is_the_quotient_of_training_flops():
    kan, dense = model(), model(attention_pattern=1, ffn="swiglu", ffn_width=4000)
    expected = flops_per_token(dense).training / flops_per_token(kan).training
    assert ideal_ratio(kan, dense) == pytest.approx(expected)
    assert ideal_ratio(dense, kan) == pytest.approx(1 / expected)
    assert ideal_ratio(kan, dense, counting="causal") != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("capacity", [None, 0.5, 1.25])
def test_executed_share_compares_with_all_groves_active(capacity: float | None):
    """Under a capacity too: as many groves as were run, against all of them."""
    settings = {"num_groves": 32, "width": 48}
    one, sparse, full = (model(num_layers=2, grove=GroveConfig(active_groves=k, **settings)) for k in (1, 2, 32))
    expected = flops_per_token(sparse).forward / flops_per_token(full).forward
    sparse.grove.capacity_factor = capacity
    assert executed_flops_share(sparse) == pytest.approx(expected)
    assert executed_flops_share(full) == pytest.approx(1.0)
    assert executed_flops_share(sparse, active_groves=32) == pytest.approx(1.0)
    assert executed_flops_share(sparse, active_groves=1) == pytest.approx(flops_per_token(one).forward / flops_per_token(full).forward)
    assert executed_flops_share(sparse, active_groves=1.5) < expected
    assert executed_flops_share(model(ffn="swiglu")) == 1.0


def test_parameters_come_from_the_table_and_agree_with_the_products():
    """In a dense model every matrix is multiplied once a token: forward FLOPs without scores are twice its matrix parameters."""
    config = model(attention_pattern=1, ffn="swiglu")
    total, active = parameter_counts(config)
    assert total == active == sum(p.numel() for p in LanguageModel(config).parameters())
    norms, embedding = 3 * config.width, config.vocab_size * config.width
    count = flops_per_token(config)
    assert count.forward - count.by_part["attention_scores"] == 2 * (total - norms - embedding)
    sparse_total, sparse_active = parameter_counts(model(grove=GroveConfig(num_groves=16, active_groves=2)))
    assert sparse_active < sparse_total / 2
