"""The model on kernels is the model in plain torch: loss, gradients, routing statistics, decoding; and the kernels are what runs."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

if torch.cuda.is_available():  # a machine with a GPU need not have what the trainer has besides its kernels
    pytest.importorskip("hydra", reason="the shipped configurations are composed by Hydra")
    pytest.importorskip("webdataset", reason="batches come from the loader's module")

from kan_train.config import AdaConfig, AttentionConfig, EdgeConfig, GroveConfig, ModelConfig
from kan_train.config.compose import compose_train
from kan_train.data import Batch
from kan_train.engine.plain import build_plain
from kan_train.model import ada, conv
from kan_train.model.dispatch import partial_plan
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel
from kan_train.parallel.place import Axis
from kan_train.parallel.runtime import Runtime

EDGE = EdgeConfig(group_size=8)
GROVE = GroveConfig(num_groves=4, active_groves=2, width=16, score_rank=4, edge=EDGE)
ADA = AdaConfig(num_heads=2, chunk=8)
BASE = ModelConfig(
    num_layers=1, width=32, vocab_size=128, sequence_length=20, ada=ADA, attention=AttentionConfig(num_heads=2, num_kv_heads=1), grove=GROVE
)
EVERYWHERE = {"grove_route", "grove_gemm", "ada_scan"}


def variant(*, ada: dict[str, Any] | None = None, grove: dict[str, Any] | None = None, edge: dict[str, Any] | None = None, **model: Any) -> ModelConfig:
    groves = dataclasses.replace(GROVE, **(grove or {}), edge=dataclasses.replace(EDGE, **(edge or {})))
    return dataclasses.replace(BASE, ada=dataclasses.replace(ADA, **(ada or {})), grove=groves, **model)


VARIANTS = {
    "shared grove": (variant(grove={"shared_width": 16}), EVERYWHERE | {"edge_spline"}),
    "reuse": (variant(grove={"kind": "reuse"}), EVERYWHERE),
    "edge": (variant(grove={"kind": "edge"}, edge={"sharing": "per_edge"}), EVERYWHERE | {"edge_spline"}),
    "data decay, mixture": (variant(ada={"decay": "data", "mixture": 2}), EVERYWHERE),
    "literal": (
        variant(ada={"decay": "none", "feature_map": "identity", "output_norm": False, "output_gate": False}, grove={"gate": "literal"}, edge={"kind": "silu"}),
        EVERYWHERE,
    ),
    "no convolution, sigmoid gate": (variant(ada={"conv_width": 1}, grove={"gate": "sigmoid"}, edge={"kind": "piecewise_poly"}), EVERYWHERE),
    "linear score, capacity": (variant(grove={"score": "linear", "capacity_factor": 1.0}), EVERYWHERE),
    "auxiliary loss": (variant(grove={"auxiliary_loss": 0.1}), EVERYWHERE),
    "functions without a kernel": (variant(edge={"kind": "chebyshev"}), EVERYWHERE),  # of the groves the projection alone
    "hybrid": (variant(attention_pattern=2, num_layers=2), EVERYWHERE),
    "dense": (variant(attention_pattern=1, ffn="swiglu", ffn_width=40), set()),
}


@pytest.fixture
def launched(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The rooms whose kernels ran."""
    if device.type == "cpu":
        from triton.runtime.interpreter import GridExecutor as Launcher

        name = "__call__"
    else:
        from triton.runtime.jit import JITFunction as Launcher

        name = "run"
    rooms: set[str] = set()
    original = getattr(Launcher, name)

    def launch(self: Any, *arguments: Any, **options: Any) -> Any:
        rooms.add(self.fn.__module__.removeprefix("kan_train.kernels.").partition(".")[0])
        return original(self, *arguments, **options)

    monkeypatch.setattr(Launcher, name, launch)
    return rooms


def built(config: ModelConfig, kernels: str, device: torch.device) -> LanguageModel:
    """Weights of seed 4, moved away from the zeros and ones that some start from."""
    model = materialise(LanguageModel(dataclasses.replace(config, kernels=kernels)), seed=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(device)


def batch_of(config: ModelConfig, *, sequences: int = 2, time: int | None = None) -> Batch:
    """Random tokens, with a document that starts within each sequence."""
    time = time or config.sequence_length
    tokens = torch.randint(0, config.vocab_size, (sequences, time + 1), generator=torch.Generator().manual_seed(2))
    resets = torch.zeros(sequences, time, dtype=torch.bool)
    for row in range(sequences):
        resets[row, [0, time // 3 + row]] = True
    return Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], resets=resets)


def relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).norm() / expected.norm()) if expected.any() else float(actual.norm())


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradients_are_those_of_plain_torch(name: str, device: torch.device, launched: set[str]):
    config, rooms = VARIANTS[name]
    batch, seen = batch_of(config).to(device), {}
    for kernels in ("torch", "triton"):
        launched.clear()
        model = built(config, kernels, device).train()
        loss, _ = model(batch.tokens, batch.targets, batch.resets)
        loss.backward()
        seen[kernels] = {"loss": loss.detach(), "routing": model.pending_statistics(), **{n: p.grad for n, p in model.named_parameters()}}
        assert launched == (rooms if kernels == "triton" else set())
    for part, expected in seen["torch"].items():
        assert relative(seen["triton"][part], expected) < (1e-6 if part == "loss" else 1e-4), part


@pytest.mark.parametrize("name", ["shared grove", "edge"])
def test_bf16_is_as_near_to_fp32_as_plain_torch_is(name: str, device: torch.device, launched: set[str]):
    """Weights and activations in bf16, all three with the choices of the fp32 model: rounding would break near-ties in another way."""
    config, rooms = VARIANTS[name]
    batch, seen, choices = batch_of(config).to(device), {}, []
    for kernels, dtype in (("torch", torch.float32), ("torch", torch.bfloat16), ("triton", torch.bfloat16)):
        launched.clear()
        model = built(config, kernels, device).to(dtype).train()
        (layer,) = model.grove_layers()
        layer.router.selector = lambda _, index: choices[0] if choices else choices.append(index) or index
        loss, _ = model(batch.tokens, batch.targets, batch.resets)
        loss.backward()
        seen[kernels, dtype] = {n: p.grad.float() for n, p in model.named_parameters()}
    assert launched == rooms
    exact, plain, actual = seen.values()
    for part, expected in exact.items():
        assert relative(actual[part], expected) < 1.5 * relative(plain[part], expected) + 1e-2, part


def test_recomputation_routes_and_counts_as_the_first_pass(device: torch.device):
    config, results = VARIANTS["reuse"][0], []
    batch = batch_of(config).to(device)
    for recompute in (False, True):
        model = built(config, "triton", device).train()
        model.activation_checkpointing = recompute
        model(batch.tokens, batch.targets, batch.resets)[0].backward()
        results.append([model.pending_statistics(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["shared grove", "data decay, mixture"])
def test_two_context_ranks_are_the_whole_sequence(name: str, device: torch.device, launched: set[str], monkeypatch: pytest.MonkeyPatch):
    """The second rank of a context axis begins with the state that the kernels say the first one leaves; a document that crosses the cut goes on."""
    mixer = built(VARIANTS[name][0], "triton", device).layers[0].mixer
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(5)).to(device)
    resets = torch.zeros(2, 16, dtype=torch.bool, device=device)
    resets[:, 0], resets[1, 5] = True, True
    whole = mixer(x, resets)
    left: list[tuple[Tensor, ...]] = []

    def carry_in(added: Tensor, kept: Tensor | None, axis: Axis) -> Tensor:
        if axis.rank == 0:
            left.append(added)
            return torch.zeros_like(added)
        return left.pop(0)

    monkeypatch.setattr(ada, "carry_in", carry_in)
    monkeypatch.setattr(conv, "carry_in", carry_in)
    parts = []
    launched.clear()
    for rank in range(2):
        mixer.context = Axis(rank=rank, size=2)
        part = slice(8 * rank, 8 * rank + 8)
        parts.append(mixer(x[:, part], resets[:, part]))
    assert launched == {"ada_scan"}
    assert relative(torch.cat(parts, dim=1), whole) < 1e-5


@pytest.mark.parametrize("kind", ["gated", "reuse", "edge"])
def test_groves_of_an_expert_rank_are_those_of_plain_torch(kind: str, device: torch.device):
    """Rows that came from other ranks: a token has as many choices here as there are groves of its own among these, some none."""
    config = variant(grove={"kind": kind}, edge={"sharing": "per_edge"} if kind == "edge" else {})
    generator = torch.Generator().manual_seed(6)
    # Of five tokens with up to two choices each, three have two, one has one, and one has none.
    plan = partial_plan(torch.tensor([0, 4, 6, 1, 2, 5, 7], device=device), [3, 0, 2, 2], 5, 2)
    x, z, gate = (torch.randn(*shape, generator=generator).to(device).requires_grad_() for shape in ((5, 32), (5, 2, 4), (5, 2)))
    weight = torch.randn(5, 32, generator=generator).to(device)
    seen = []
    for kernels in ("torch", "triton"):
        groves = built(config, kernels, device).layers[0].ffn.groves
        y = groves(x, z, gate, plan)
        inputs = [tensor for tensor, read in ((x, kind != "edge"), (z, kind != "gated"), (gate, True)) if read]
        seen.append([y, *torch.autograd.grad((y * weight).sum(), [*inputs, *groves.parameters()])])
    for actual, expected in zip(seen[1], seen[0], strict=True):
        assert relative(actual, expected) < 1e-5


@pytest.mark.parametrize("name", ["shared grove", "edge", "no convolution, sigmoid gate"])
@torch.no_grad()
def test_decoding_is_that_of_plain_torch(name: str, device: torch.device, launched: set[str]):
    config, rooms = VARIANTS[name]
    tokens, seen = batch_of(config).tokens.to(device), []
    for kernels in ("torch", "triton"):
        model = built(config, kernels, device).eval()
        logits, state = model.prefill(tokens[:, :7], model.init_state(2))
        after, _ = model.step(tokens[:, 7], state)
        seen.append((logits, after))
    assert launched == rooms
    for actual, expected in zip(seen[1], seen[0], strict=True):
        assert relative(actual, expected) < 1e-5


def test_auto_on_a_cpu_is_plain_torch(launched: set[str]):
    config = VARIANTS["shared grove"][0]
    batch = batch_of(config)
    loss, _ = built(config, "auto", torch.device("cpu"))(batch.tokens, batch.targets, batch.resets)
    assert torch.equal(loss, built(config, "torch", torch.device("cpu"))(batch.tokens, batch.targets, batch.resets)[0])
    assert launched == set()


@pytest.mark.slow
def test_a_training_step_of_kan_tiny_is_that_of_plain_torch(device: torch.device, launched: set[str]):
    """The shipped model, its engine and its optimizer: loss, every gradient, their norm, the statistics of routing, and where the weights go."""
    seen = {}
    for kernels in ("torch", "triton"):
        launched.clear()
        config = compose_train(["run.name=step", "model=kan_tiny", f"model.kernels={kernels}"])
        engine = build_plain(config, Runtime(device=device), seed=3)
        start = {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}
        gradients = dict(watched(engine.model))
        result = engine.train_step([batch_of(config.model, sequences=1, time=24)], learning_rate=1e-3)
        moved = {name: parameter.detach() - start[name] for name, parameter in engine.model.named_parameters()}
        seen[kernels] = (result, gradients, moved)
        assert launched == (EVERYWHERE if kernels == "triton" else set())
    (result, gradients, moved), (expected, expected_gradients, expected_moved) = seen["triton"], seen["torch"]
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert relative(result.statistics, expected.statistics) < 1e-5
    for name, gradient in expected_gradients.items():
        assert relative(gradients[name], gradient) < 1e-4, name
        # Adam's first step is the sign of a gradient, which may differ where one is next to nothing.
        assert relative(moved[name], expected_moved[name]) < 2e-2, name


def watched(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Tensors that will hold each parameter's gradient, which the optimizer clips and forgets."""
    for name, parameter in model.named_parameters():
        copy = torch.zeros_like(parameter)
        parameter.register_post_accumulate_grad_hook(_copy_to(copy))
        yield name, copy


def _copy_to(copy: Tensor) -> Callable[[Tensor], None]:
    def keep(parameter: Tensor) -> None:
        assert parameter.grad is not None
        copy.copy_(parameter.grad)

    return keep
