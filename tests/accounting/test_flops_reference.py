"""FLOPs from the configuration against the products that plain torch dispatches: on the meta device for every shipped model, with real routing on a CPU.

Equal means equal: the relative tolerance is the rounding of a sum of doubles. What the project's convention calls elementwise, but plain torch runs as
products, is written down here (`as_products`), and bounded.
"""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

import kan_train.model.route
from kan_train.accounting.flops import Flops, flops_per_token
from kan_train.config import AdaConfig, AttentionConfig, EdgeConfig, GroveConfig, ModelConfig
from kan_train.config.compose import compose_train
from kan_train.model.conv import causal_conv
from kan_train.model.dispatch import Plan
from kan_train.model.edge import coefficients_of
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel
from kan_train.model.scan import chunkwise_scan, recurrent_step

SHIPPED = sorted(path.stem for path in (Path(__file__).resolve().parents[2] / "conf" / "model").glob("*.yaml"))
EXACT = {"rel": 1e-12}
UNCOUNTED_SHARE = 0.001
"""What `as_products` may at most be of all products of a shipped model."""
PER_EDGE = {"sharing": "per_edge"}


class Products(TorchDispatchMode):
    """Adds up the FLOPs of matrix products and fused attention by their shapes; an operator that may be another product is an error, not a zero."""

    SUSPECT = ("mm", "mv", "dot", "ger", "conv", "attention", "linear", "einsum", "cdist", "outer")

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = operator._schema.name.removeprefix("aten::")
        match name:
            case "mm":
                self.flops += product(args[0], args[1])
            case "addmm" | "addmm_":
                self.flops += product(args[1], args[2])
            case "bmm":
                self.flops += product(args[0], args[1])
            case "baddbmm" | "baddbmm_":
                self.flops += product(args[1], args[2])
            case "_scaled_dot_product_flash_attention_for_cpu":
                self.flops += sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
            case "_scaled_dot_product_flash_attention_for_cpu_backward":
                self.flops += sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))  # its scores again, as the fused operator takes them
            case _:
                assert not any(word in name for word in self.SUSPECT), f"{name} may be a product, and is not counted"
        return operator(*args, **(kwargs or {}))


def product(left: Tensor, right: Tensor) -> int:
    """Of [..., n, k] and [..., k, m]."""
    return 2 * math.prod(left.shape) * right.shape[-1]


def even_plan(index_TK: Tensor, groves: int) -> Plan:
    """As many choices for every grove, of tensors without data: products depend on the number of rows alone, which is T K whatever the routing."""
    rows, device = index_TK.numel(), index_TK.device
    assert rows % groves == 0
    order = torch.empty(rows, dtype=torch.int64, device=device)
    plan = Plan(torch.empty(groves + 1, dtype=torch.int32, device=device), order, order, torch.empty_like(index_TK), padded=False, dropped=False)
    plan.sizes = [rows // groves] * groves
    return plan


@contextmanager
def fixed_shapes() -> Iterator[None]:
    """Routing whose shapes the host knows, for the meta device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kan_train.model.route, "dropless_plan", even_plan)
        yield


def counted(config: ModelConfig, device: str, *, checkpointing: bool = False, batch: int = 1) -> tuple[float, float]:
    """Products a token of (the forward pass alone, a training pass), in plain torch."""
    net: nn.Module = LanguageModel(dataclasses.replace(config, kernels="torch"))
    if device == "cpu":
        net = materialise(net, seed=0)
    net.activation_checkpointing = checkpointing  # type: ignore[assignment]
    tokens = torch.zeros(batch, config.sequence_length, dtype=torch.int64, device=device)
    if device == "cpu":
        tokens.random_(config.vocab_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Products() as forward:
        net.logits(tokens)
    with Products() as training:
        loss, _ = net(tokens, tokens)
        loss.backward()
    return forward.flops / tokens.numel(), training.flops / tokens.numel()


def as_products(config: ModelConfig, *, training: bool, checkpointing: bool, tokens: int) -> float:
    """FLOPs a token of what counts as elementwise and runs as products; each has one product in the backward pass, its other factor being constant.

    Cell tables of splines: coefficients [F, n] times [n, (G + 2) P], once a micro-batch. Edge groves: powers [R r, P] times [P, P] into local basis functions.
    """
    if config.ffn != "kalmagrove":
        return 0.0
    grove, edge = config.grove, config.grove.edge
    passes = 1 + training * (1 + checkpointing)
    if edge.kind not in ("bspline", "piecewise_poly"):
        return 0.0
    powers = edge.order + 1
    shared = 0.0
    if grove.kind == "edge":
        rows = (grove.capacity_factor or 1.0) * grove.active_groves
        total = rows * grove.score_rank * 2.0 * powers**2
    else:
        total = grove.num_groves * table_flops(grove.width, edge) / tokens
    if grove.shared_width:
        shared = table_flops(grove.shared_width, edge) / tokens
    return config.num_layers * passes * (total + shared)


def table_flops(hidden: int, edge: EdgeConfig) -> float:
    return 2.0 * (hidden // edge.group_size) * coefficients_of(edge) * (edge.grid + 2) * (edge.order + 1)


def expected(config: ModelConfig, device: str, *, checkpointing: bool, tokens: int) -> tuple[float, float]:
    """What `counted` should find: the project's count without ADA's elementwise convolution and mixture, and with `as_products`."""
    count = flops_per_token(config)
    conv = sum((layer["ada_conv"] for layer in count.layers if "ada_conv" in layer), Flops())
    training = count.executed(activation_checkpointing=checkpointing) - conv.executed(activation_checkpointing=checkpointing)
    if device == "meta":
        # Attention is not fused there, and its backward pass has kept what the fused one computes again.
        training -= sum(layer["attention_scores"].extra_backward for layer in count.layers if "attention_scores" in layer)
    return (
        count.total.forward + count.total.extra_forward - conv.forward + as_products(config, training=False, checkpointing=False, tokens=tokens),
        training + as_products(config, training=True, checkpointing=checkpointing, tokens=tokens),
    )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_count_what_runs(name: str, checkpointing: bool):
    """Forward and training pass of the whole shipped model on one sequence; of the largest, of one block of each kind, which all others equal."""
    config = compose_train([f"model={name}"], world_size=1).model
    if config.width > 4096:
        config = one_block_of_each_kind(config)
    with fixed_shapes():
        measured = counted(config, "meta", checkpointing=checkpointing)
    assert measured == pytest.approx(expected(config, "meta", checkpointing=checkpointing, tokens=config.sequence_length), **EXACT)
    elementwise = as_products(config, training=True, checkpointing=checkpointing, tokens=config.sequence_length)
    assert elementwise <= UNCOUNTED_SHARE * measured[1]


def one_block_of_each_kind(config: ModelConfig) -> ModelConfig:
    """The shortest model that has every kind of block of `config`; its count is that of `config` but for the number of equal blocks."""
    shorter = dataclasses.replace(config, num_layers=min(config.num_layers, max(1, config.attention_pattern)))
    whole, count = flops_per_token(config), flops_per_token(shorter)
    assert {config.is_softmax_layer(layer): parts for layer, parts in enumerate(whole.layers)} == {
        shorter.is_softmax_layer(layer): parts for layer, parts in enumerate(count.layers)
    }
    assert whole.total.training == pytest.approx(sum(whole.layer(layer).training for layer in range(config.num_layers)) + count.head.training)
    return shorter


def small(**settings: Any) -> ModelConfig:
    defaults = {"num_layers": 2, "width": 64, "sequence_length": 96, "vocab_size": 128, "ffn_width": 160}
    grove = {"num_groves": 8, "active_groves": 2, "width": 48} | settings.pop("grove", {})
    return ModelConfig(**{**defaults, "grove": GroveConfig(**grove), **settings})


def edge(kind: str, **settings: Any) -> EdgeConfig:
    return EdgeConfig(kind=kind, **settings)


MODELS = {
    "gated": small(),
    "gated piecewise": small(grove={"edge": edge("piecewise_poly", order=2, grid=4)}),
    "gated rational": small(grove={"edge": edge("rational")}),
    "gated chebyshev": small(grove={"edge": edge("chebyshev", order=5)}),
    "gated silu": small(grove={"edge": edge("silu")}),
    "reuse": small(grove={"kind": "reuse"}),
    "edge bspline": small(grove={"kind": "edge", "edge": edge("bspline", **PER_EDGE)}),
    "edge piecewise": small(grove={"kind": "edge", "edge": edge("piecewise_poly", order=2, grid=4, **PER_EDGE)}),
    "edge chebyshev": small(grove={"kind": "edge", "edge": edge("chebyshev", order=5, **PER_EDGE)}),
    "literal gate": small(grove={"gate": "literal"}),
    "sigmoid gate": small(grove={"gate": "sigmoid"}),
    "linear score": small(grove={"score": "linear", "edge": edge("silu")}),
    "shared grove": small(grove={"shared_width": 32}),
    "auxiliary loss": small(grove={"auxiliary_loss": 0.1}),
    "all groves": small(grove={"active_groves": 8}),
    "ADA as the paper has it": small(ada=AdaConfig(decay="none", feature_map="identity", output_norm=False, output_gate=False)),
    "ADA by data, mixture": small(ada=AdaConfig(decay="data", mixture=2, conv_width=3)),
    "ADA, short last chunk": small(ada=AdaConfig(chunk=40)),
    "ADA, one chunk": small(ada=AdaConfig(chunk=500)),
    "hybrid": small(num_layers=4, attention_pattern=2, attention=AttentionConfig(num_heads=4, num_kv_heads=2)),
    "dense": small(attention_pattern=1, ffn="swiglu", attention=AttentionConfig(num_heads=4, num_kv_heads=1)),
    "dense ADA": small(ffn="swiglu"),
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_counts_what_runs_with_real_routing(name: str, checkpointing: bool):
    """On a CPU, where the routing follows the data and attention is fused."""
    config, batch = MODELS[name], 2
    measured = counted(config, "cpu", checkpointing=checkpointing, batch=batch)
    assert measured == pytest.approx(expected(config, "cpu", checkpointing=checkpointing, tokens=batch * config.sequence_length), **EXACT)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_a_capacity_runs_its_padding_and_nothing_that_it_drops(factor: float):
    config = small(grove={"capacity_factor": factor})
    measured = counted(config, "cpu")
    assert measured == pytest.approx(expected(config, "cpu", checkpointing=False, tokens=config.sequence_length), **EXACT)
    dropless, count = flops_per_token(small()), flops_per_token(config)
    assert count.by_part["groves"] == min(1.0, factor) * dropless.by_part["groves"]


def test_a_count_that_misses_a_product_fails():
    """The counter's own test: it sees every product once, by its shape, and refuses one that it does not know."""
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with Products() as seen:
        torch.mm(a, b, out=torch.empty(3, 5))
        torch.ones(3, 5).addmm_(a, b)
        torch.ones(2, 3, 5).baddbmm_(a.expand(2, 3, 4), b.expand(2, 4, 5))
    assert seen.flops == 2 * 3 * 4 * 5 * (1 + 1 + 2)
    with pytest.raises(AssertionError, match="not counted"), Products():
        torch.mv(a, torch.ones(4))


class ElementwiseMultiplies(TorchDispatchMode):
    """FLOPs of elementwise products and multiply-adds."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        name = operator._schema.name.removeprefix("aten::")
        self.flops += {"mul": 1, "addcmul_": 2}.get(name, 0) * (result.numel() if isinstance(result, Tensor) else 0)
        return result


def test_the_convolution_is_counted_as_its_multiply_adds():
    """2 w a channel and token; the first tap needs no add, and the first tokens of a sequence have fewer taps."""
    config = small(ada=AdaConfig(conv_width=4))
    time, heads, head, taps = config.sequence_length, config.ada.num_heads, config.head_width, config.ada.conv_width
    with ElementwiseMultiplies() as seen:
        causal_conv(torch.ones(1, time, heads, head), torch.ones(heads, head, taps))
    missing = time + 2 * sum(range(taps))
    assert config.num_layers * (seen.flops + missing * config.width) == time * flops_per_token(config).by_part["ada_conv"]


def test_the_causal_counting_is_that_of_the_recurrence():
    """A token's read of the state in `recurrent_step`, and its outer product (elementwise there, as many multiply-adds)."""
    config = small(num_layers=1)
    heads, head = config.ada.num_heads, config.head_width
    q, k, v = torch.ones(3, 1, heads, head).unbind()
    with Products() as seen:
        recurrent_step(q, k, v, None, torch.zeros(1, heads, head, head))
    assert flops_per_token(config, counting="causal").by_part["ada_scan"] == 2 * seen.flops
    with Products() as chunkwise:
        chunkwise_scan(*(torch.ones(3, 1, config.sequence_length, heads, head).unbind()), None, chunk=config.ada.chunk)
    count = flops_per_token(config, counting="causal").layers[0]["ada_scan"]
    assert chunkwise.flops / config.sequence_length == pytest.approx(count.forward + count.extra_forward, **EXACT)
