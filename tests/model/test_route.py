"""Routing: what is counted and when, how balancing moves, what a recomputation must reuse."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kan_train.config import GroveConfig, ModelConfig
from kan_train.model.grove import KalmaGrove
from kan_train.model.init import materialise
from kan_train.model.route import checkpoint_contexts

WIDTH, GROVES, ACTIVE, RANK = 16, 8, 2, 4


def build(dtype: torch.dtype = torch.float32, **settings: object) -> KalmaGrove:
    settings = {"num_groves": GROVES, "active_groves": ACTIVE, "width": 16, "score_rank": RANK, **settings}
    return materialise(KalmaGrove(ModelConfig(width=WIDTH, grove=GroveConfig(**settings)), 0), seed=0, dtype=dtype)


def tokens(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, count, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def raw_scores(layer: KalmaGrove, x: Tensor) -> Tensor:
    score = layer.router.score.detach().double()
    norm = torch.einsum("nrd,btd->btnr", score, x.double()).square().sum(-1).add(1e-6).sqrt()
    return norm[0] / score.square().sum((1, 2)).sqrt()


def test_statistics_are_those_of_every_token_seen():
    """[load of each grove, sum of its scores, sum of their squares, tokens], over two passes of different length."""
    layer = build()
    parts = [tokens(40), tokens(25, seed=1)]
    for x in parts:
        layer(x)
    scores = torch.cat([raw_scores(layer, x) for x in parts])
    standard = (scores - layer.router.score_mean) / layer.router.score_std
    load = torch.zeros(GROVES).index_add_(0, standard.topk(ACTIVE).indices.flatten(), torch.ones(65 * ACTIVE))
    expected = torch.cat((load, scores.sum(0).float(), scores.square().sum(0).float(), torch.tensor([65.0])))
    torch.testing.assert_close(layer.pending, expected, rtol=1e-5, atol=1e-5)
    assert layer.pending.dtype == torch.float32


def test_evaluation_counts_nothing():
    layer = build()
    layer.eval()
    layer(tokens(10))
    layer.train()
    with torch.no_grad():
        layer(tokens(10))
    assert layer.pending.abs().sum() == 0


def test_running_statistics_and_balance_move_as_they_say():
    layer = build(score_momentum=0.75)
    mean0, std0 = layer.router.score_mean.clone(), layer.router.score_std.clone()
    scores = torch.rand(50, GROVES, dtype=torch.float64) + 0.5
    load = torch.tensor([30.0, 5, 13, 12, 12.5, 12.5, 15, 0])  # mean 12.5
    summed = torch.cat((load, scores.sum(0).float(), scores.square().sum(0).float(), torch.tensor([50.0])))
    layer(tokens(5))
    layer.apply_statistics(summed, balance_rate=0.01)
    torch.testing.assert_close(layer.router.score_mean, 0.75 * mean0 + 0.25 * scores.mean(0).float())
    torch.testing.assert_close(layer.router.score_std, 0.75 * std0 + 0.25 * scores.std(0, correction=0).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.router.balance, 0.01 * torch.tensor([-1.0, 1, -1, 1, 0, 0, -1, 1]))
    assert layer.pending.abs().sum() == 0


def test_a_step_without_tokens_moves_nothing():
    layer = build()
    before = [buffer.clone() for buffer in layer.buffers()]
    layer.apply_statistics(torch.zeros(3 * GROVES + 1), balance_rate=0.01)
    assert all(torch.equal(old, new) for old, new in zip(before, layer.buffers(), strict=True))


def skewed(step: int) -> Tensor:
    """Tokens of which five in six are alike, as hidden states of deep layers are: those go to the same groves."""
    x = tokens(510, seed=step)
    x[:, :425] = 0.5 * x[:, :425] + 2 * tokens(1, seed=12345)
    return x


def coefficient_of_variation(load: Tensor) -> float:
    return (load.std(correction=0) / load.mean()).item()


@pytest.mark.parametrize("score", ["norm", "linear"])
def test_balancing_evens_out_the_load(score: str):
    """Without balancing some groves take most of the tokens; with it every grove has its share."""
    loads = {}
    for rate in (0.0, 0.05):
        layer = build(score=score)
        with torch.no_grad():
            layer.router.score[3] *= 3  # one grove's projection has grown
        for step in range(200):
            layer.router(skewed(step)[0])
            summed = layer.pending.clone()
            layer.apply_statistics(summed, balance_rate=rate)
        loads[rate] = summed[:GROVES]
    assert coefficient_of_variation(loads[0.05]) < 0.15
    assert coefficient_of_variation(loads[0.05]) < 0.5 * coefficient_of_variation(loads[0.0])


def test_balance_touches_the_selection_alone():
    """A grove that is chosen anyway has the same gate whatever its bias."""
    layer = build(torch.float64, active_groves=GROVES)
    before = layer(tokens(6, dtype=torch.float64))
    layer.router.balance.copy_(torch.randn(GROVES))
    torch.testing.assert_close(layer(tokens(6, dtype=torch.float64)), before)
    few = build(torch.float64)
    chosen = few.router(tokens(6, dtype=torch.float64)[0]).index_TK
    few.router.balance[5] = 100.0
    assert (few.router(tokens(6, dtype=torch.float64)[0]).index_TK == 5).any(1).all()
    assert not (chosen == 5).any(1).all()


def test_the_literal_gate_knows_no_bias_and_no_normalisation():
    """The groves of largest ||E_i x||, weighted by sigmoid(w_i x + b_i) ||E_i x||; a grove of large E wins."""
    layer = build(torch.float64, gate="literal")
    layer.router.balance.fill_(0).index_fill_(0, torch.tensor([1]), 50.0)
    with torch.no_grad():
        layer.router.score[6] *= 10
        layer.router.gate_bias.copy_(torch.randn(GROVES))
    x = tokens(20, dtype=torch.float64)[0]
    routing = layer.router(x)
    norm = torch.einsum("nrd,td->tnr", layer.router.score, x).norm(dim=-1)
    assert torch.equal(routing.index_TK.sort().values, norm.topk(ACTIVE).indices.sort().values)
    assert (routing.index_TK == 6).any(1).all()
    gate = (x @ layer.router.gate.T + layer.router.gate_bias).sigmoid() * norm
    torch.testing.assert_close(routing.gate_TK, gate.gather(1, routing.index_TK), rtol=1e-5, atol=1e-6)


def test_the_norm_score_does_not_see_the_size_of_a_projection():
    """Otherwise the largest E would win, be trained most, and grow."""
    layer, scaled = build(torch.float64), build(torch.float64)
    with torch.no_grad():
        scaled.router.score *= torch.tensor([0.1, 1, 3, 10, 1, 0.5, 2, 1])[:, None, None]
    x = tokens(200, dtype=torch.float64)[0]
    assert (layer.router(x).index_TK == scaled.router(x).index_TK).float().mean() > 0.99


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_gate_values_sum_to_k_or_average_their_sigmoids(gate: str):
    routing = build(gate=gate).router(tokens(30)[0])
    assert routing.gate_TK.dtype == torch.float32
    if gate == "softmax":
        torch.testing.assert_close(routing.gate_TK.sum(1), torch.full((30,), float(ACTIVE)))
    else:
        assert ((routing.gate_TK > 0) & (routing.gate_TK < ACTIVE)).all()


class Region(torch.nn.Module):
    """Two layers, one after the other, in one checkpointed region."""

    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([build(torch.float64, **settings), build(torch.float64, **settings)])
        with torch.no_grad():
            self.layers[1].router.score.copy_(self.layers[1].router.score.flip(0))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x

    def recomputed(self, x: Tensor) -> Tensor:
        return checkpoint(self, x, use_reentrant=False, context_fn=checkpoint_contexts)

    def gradients(self) -> list[Tensor]:
        return [parameter.grad.clone() for parameter in self.parameters()]


@pytest.mark.parametrize("settings", [{}, {"kind": "reuse"}, {"capacity_factor": 1.0}], ids=str)
def test_recomputation_counts_once_and_chooses_as_before(settings: dict):
    """Were the selection made again, the changed biases would send the tokens elsewhere."""
    x = tokens(50, dtype=torch.float64).requires_grad_()
    plain, region = Region(**settings), Region(**settings)
    plain(x).square().sum().backward()
    expected, expected_x = plain.gradients(), x.grad.clone()
    x.grad = None
    y = region.recomputed(x)
    counted = [layer.pending.clone() for layer in region.layers]
    for layer in region.layers:
        layer.router.balance.copy_(torch.randn(GROVES) * 5)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, expected_x)
    for gradient, plain_gradient in zip(region.gradients(), expected, strict=True):
        torch.testing.assert_close(gradient, plain_gradient)
    for before, layer, plain_layer in zip(counted, region.layers, plain.layers, strict=True):
        assert torch.equal(layer.pending, before)
        assert torch.equal(layer.pending, plain_layer.pending)


def test_a_kept_graph_is_recomputed_alike_twice():
    x = tokens(20, dtype=torch.float64).requires_grad_()
    region = Region()
    y = region.recomputed(x).square().sum()
    y.backward(retain_graph=True)
    once = x.grad.clone()
    y.backward()
    torch.testing.assert_close(x.grad, 2 * once)


def test_regions_keep_their_selections_apart():
    """Two micro-batches in flight: the second forward pass comes before the first backward pass."""
    x = [tokens(20, seed, torch.float64).requires_grad_() for seed in (0, 1)]
    expected = [torch.autograd.grad(Region()(part).square().sum(), part)[0] for part in x]
    region = Region()
    losses = [region.recomputed(part).square().sum() for part in x]
    for loss, part, grad in zip(losses, x, expected, strict=True):
        torch.testing.assert_close(torch.autograd.grad(loss, part)[0], grad)


def test_the_auxiliary_loss_passes_through_a_recomputation():
    x = tokens(24, dtype=torch.float64).requires_grad_()
    gradients = []
    for run in ("forward", "recomputed"):
        region = Region(auxiliary_loss=0.1)
        y = region.recomputed(x) if run == "recomputed" else region(x)
        (y.square().sum() + sum(layer.auxiliary_loss() for layer in region.layers)).backward()
        gradients.append(region.gradients())
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_the_auxiliary_loss_is_its_weight_when_balanced_and_more_when_not():
    layer = build(torch.float64, auxiliary_loss=0.01)
    with torch.no_grad():
        layer.router.score.copy_(layer.router.score[:1].clone())  # every grove scores alike: probabilities are equal, and so f . P = 1
    layer(tokens(64, dtype=torch.float64))
    assert layer.auxiliary_loss().item() == pytest.approx(0.01)
    skewed_layer = build(torch.float64, auxiliary_loss=0.01)
    skewed_layer.router.score_std.mul_(0.2)
    skewed_layer(skewed(0).double())
    assert skewed_layer.auxiliary_loss().item() > 0.011


def test_non_finite_tokens_do_not_crash():
    """Their step is skipped later by all ranks alike; until then every index must stay in range."""
    layer = build()
    x = tokens(6)
    x[0, 2] = float("nan")
    x[0, 4] = float("inf")
    x.requires_grad_()
    layer(x).sum().backward()
    assert layer.router(x[0]).index_TK.max() < GROVES


def test_a_bf16_layer_scores_in_fp32():
    """Scores of bf16 activations differ in the third digit; their running statistics must not be rounded to it."""
    layer = build(torch.bfloat16)
    layer(tokens(300, dtype=torch.bfloat16))
    assert layer.pending.dtype == layer.router.balance.dtype == layer.router.score_mean.dtype == torch.float32
    assert layer.pending[-1] == 300
    assert layer.router(tokens(3, dtype=torch.bfloat16)[0]).gate_TK.dtype == torch.float32


def test_configuration_refuses_what_cannot_be_routed():
    config = dataclasses.replace(GroveConfig(), active_groves=65)
    with pytest.raises(Exception, match=r"active_groves=65 must lie between 1 and model\.grove\.num_groves=64"):
        config.validate()
