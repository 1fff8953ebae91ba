"""FLOPs counted from the configuration against those that PyTorch counts while the real layers run, and against published numbers."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kan_train.accounting import executed_flops_share, flops_per_token, ideal_ratio, parameter_counts, peak_flops
from kan_train.config import AdaConfig, AttentionConfig, ConfigError, EdgeConfig, GroveConfig, ModelConfig
from kan_train.model.ada import Ada
from kan_train.model.attention import SoftmaxAttention
from kan_train.model.ffn import SwiGLU
from kan_train.model.grove import KalmaGrove
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel

BATCH = 4
EDGE = {"sharing": "per_edge"}


def model(**settings: object) -> ModelConfig:
    """One layer, so that a part of the count is the count of a layer."""
    return ModelConfig(**{"num_layers": 1, "width": 64, "sequence_length": 96, "vocab_size": 256, "ffn_width": 160, **settings})  # type: ignore[arg-type]


@contextlib.contextmanager
def counter() -> Iterator[FlopCounterMode]:
    """PyTorch's counter, told of an in-place product that it does not know; attention by explicit products, which it does."""

    def in_place_product(total: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
        return 2 * a[0] * a[1] * a[2] * b[2]

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place_product}) as mode:
        yield mode


def counted(layer: nn.Module, config: ModelConfig, *, backward: bool = False) -> float:
    """FLOPs a token of the products that PyTorch sees in one call of `layer`."""
    layer = materialise(layer, seed=0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, config.sequence_length, config.width, generator=generator, requires_grad=True)
    with counter() as mode:
        y: Tensor = layer(x)
        if backward:
            y.backward(torch.ones_like(y))
    return mode.get_total_flops() / (BATCH * config.sequence_length)


def parts(config: ModelConfig, *names: str, counting: str = "executed") -> float:
    count = flops_per_token(config, counting=counting).by_part
    assert set(names) <= set(count), count
    return sum(count[name] for name in names)


@pytest.mark.parametrize("ada", [{}, {"output_gate": False}, {"decay": "data"}, {"chunk": 20}, {"chunk": 500}], ids=str)
def test_ada_counts_what_runs(ada: dict):
    """Exactly, but for the convolution: its multiply-adds are elementwise to PyTorch, which does not count them."""
    config = model(ada=AdaConfig(**ada))
    assert counted(Ada(config, 0), config) == pytest.approx(parts(config, "ada_projections", "ada_scan"), rel=1e-12)
    assert parts(config, "ada_conv") == 2 * 4 * 64


def test_adas_backward_pass_is_twice_the_forward_one_plus_what_it_computes_again():
    """The scan recomputes the masked products (a half of its C term) and the states (a half of its d term) instead of keeping them."""
    config = model()
    head, chunk = config.head_width, config.ada.chunk
    whole, rest = divmod(config.sequence_length, chunk)
    entries = (whole * chunk**2 + rest**2) / config.sequence_length
    again = 2 * config.width * entries + 2 * config.width * head
    both = counted(Ada(config, 0), config, backward=True)
    assert both == pytest.approx(3 * parts(config, "ada_projections", "ada_scan") + again, rel=1e-12)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_counts_what_runs(kv_heads: int):
    config = model(attention_pattern=1, attention=AttentionConfig(num_heads=4, num_kv_heads=kv_heads))
    expected = parts(config, "attention_projections", "attention_scores")
    assert counted(SoftmaxAttention(config, 0), config) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "grove",
    [
        {},
        {"active_groves": 3, "num_groves": 12},
        {"kind": "reuse"},
        {"kind": "edge", "edge": EdgeConfig(**EDGE)},
        {"kind": "edge", "edge": EdgeConfig(kind="piecewise_poly", order=2, grid=4, **EDGE)},
        {"kind": "edge", "edge": EdgeConfig(kind="chebyshev", order=5, **EDGE)},
        {"gate": "literal"},
        {"score": "linear", "edge": EdgeConfig(kind="silu")},
        {"shared_width": 32},
    ],
    ids=str,
)
def test_groves_count_what_runs(grove: dict):
    """To 6% on these small layers: PyTorch also counts what this project calls elementwise where it is written as a product (coefficients
    of splines into values, sums of squares into scores, the weighted sum of the chosen groves)."""
    config = model(grove=GroveConfig(**{"num_groves": 8, "active_groves": 2, "width": 48, **grove}))
    names = {"groves", "scoring"}
    names |= {"gate"} if config.grove.score == "norm" else set()
    names |= {"shared_grove"} if config.grove.shared_width else set()
    expected = parts(config, *names)
    measured = counted(KalmaGrove(config, 0), config)
    assert expected * (1 - 1e-12) <= measured <= expected * 1.06


def test_swiglu_counts_what_runs_and_its_backward_pass_is_twice_that():
    config = model(ffn="swiglu", attention_pattern=1)
    assert counted(SwiGLU(config, 0), config) == pytest.approx(parts(config, "ffn"), rel=1e-12)
    assert counted(SwiGLU(config, 0), config, backward=True) == pytest.approx(3 * parts(config, "ffn"), rel=1e-12)


def test_a_whole_model_counts_what_runs():
    """Every layer, head and all: a hybrid dense model exactly, but for the convolution."""
    config = model(num_layers=4, attention_pattern=2, ffn="swiglu")
    net = materialise(LanguageModel(config), seed=0)
    tokens = torch.randint(0, config.vocab_size, (BATCH, config.sequence_length), generator=torch.Generator().manual_seed(0))
    with counter() as mode:
        net.logits(tokens)
    measured = mode.get_total_flops() / tokens.numel()
    count = flops_per_token(config)
    assert measured == pytest.approx(count.forward - count.by_part["ada_conv"], rel=1e-12)
    assert (count.backward, count.training) == (2 * count.forward, 3 * count.forward)
    assert count.forward == pytest.approx(sum(count.by_part.values()))


def test_ideal_counting_is_the_sum_over_what_a_token_needs():
    """Causal scores token by token, and ADA's recurrence: an outer product and a read of the state."""
    config = model(num_layers=2, attention_pattern=2)
    time, width = config.sequence_length, config.width
    assert parts(config, "attention_scores", counting="ideal") == sum(4 * width * (t + 1) for t in range(time)) / time
    assert parts(config, "ada_scan", counting="ideal") == 4 * config.ada.num_heads * config.head_width**2
    with pytest.raises(ConfigError, match="executed, ideal"):
        flops_per_token(config, counting="full")


def test_a_published_dense_model_has_its_published_flops():
    """Nemotron-4 340B: 2.105 TFLOP a token at a context of 4k (its FFN has two matrices of 73728; SwiGLU has three of 49152)."""
    dense = ModelConfig(
        num_layers=96, width=18432, vocab_size=256000, sequence_length=4096, attention_pattern=1, ffn="swiglu", ffn_width=49152,
        attention=AttentionConfig(num_heads=96, num_kv_heads=8),
    )  # fmt: skip
    assert flops_per_token(dense).training == pytest.approx(2.105e12, rel=1e-3)


def test_the_ratio_to_a_twin_is_the_quotient_of_training_flops():
    kan, dense = model(), model(attention_pattern=1, ffn="swiglu", ffn_width=4000)
    expected = flops_per_token(dense).forward / flops_per_token(kan).forward
    assert ideal_ratio(kan, dense) == pytest.approx(expected)
    assert ideal_ratio(dense, kan) == pytest.approx(1 / expected)
    assert ideal_ratio(kan, dense, counting="ideal") != pytest.approx(expected, rel=1e-3)


def test_executed_share_compares_with_all_groves_active():
    settings = {"num_groves": 32, "width": 48}
    sparse, full = (model(grove=GroveConfig(active_groves=k, **settings)) for k in (2, 32))
    expected = flops_per_token(sparse).forward / flops_per_token(full).forward
    assert executed_flops_share(sparse) == pytest.approx(expected)
    assert executed_flops_share(full) == pytest.approx(1.0)
    assert executed_flops_share(sparse, active_groves=32) == pytest.approx(1.0)
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


def test_peaks_are_looked_up_and_never_guessed():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == pytest.approx(989.4e12)
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == pytest.approx(19.5e12)
    for unknown in ("cpu", "AMD EPYC 9B14", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA Z999", ""):
        assert peak_flops(unknown, "bf16") is None
    assert peak_flops("NVIDIA B200", "fp32") is None
    assert peak_flops("cpu", "fp32", peak_tflops=0.2) == pytest.approx(0.2e12)
    with pytest.raises(ConfigError, match=r"train\.precision"):
        peak_flops("NVIDIA H100 80GB HBM3", "fp8")
