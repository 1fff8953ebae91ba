"""One process against PyTorch's own AdamW and clipping, on the bare model."""

import copy
import math

import pytest
import torch

from kan_train.checkpoint import load, save
from kan_train.config import Config
from kan_train.engine import build_engine
from kan_train.engine.engine import Engine
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel
from kan_train.parallel.runtime import single_process_runtime

RATES = (3e-3, 2e-3, 1e-3, 2e-3)


def engine_for(config: Config, seed: int = 3) -> Engine:
    return build_engine(config, single_process_runtime(config), seed=seed)


def oracle(config: Config, steps, dtype: torch.dtype = torch.float32) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, norms and last weights of plain training, every global batch in one piece."""
    model = materialise(LanguageModel(config.model), seed=3, dtype=dtype)
    groups = [
        {"params": [p], "weight_decay": 0.1 if p.spec.decay else 0.0, "multiple": 0.5 if p.spec.grove else 1.0} for p in model.parameters()
    ]
    optimizer, losses, norms = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8), [], []
    for batch, rate in zip(steps, RATES, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["multiple"]
        loss, _ = model(batch.tokens, batch.targets, batch.resets)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        if model.pending_statistics().numel():
            model.apply_statistics(model.pending_statistics(), 1e-2)
        losses.append(loss.item())
    return losses, norms, dict(model.named_parameters())


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {fragment.name: fragment.flat.clone() for fragment in engine.named_fragments()}


def test_training_is_that_of_plain_pytorch(config, draw):
    """Two micro-batches accumulated, clipping active: losses and norms of one process and one batch."""
    losses, norms, last = oracle(config, [draw(step, 4)[0] for step in range(4)])
    engine = engine_for(config)
    results = [engine.train_step(draw(step, 2), RATES[step], 1e-2) for step in range(4)]
    assert min(norms) > config.optimizer.clip_norm
    assert [r.loss for r in results] == pytest.approx(losses, rel=1e-6)
    assert [r.grad_norm for r in results] == pytest.approx(norms, rel=5e-6)
    assert not any(r.skipped for r in results)
    for name, parameter in engine.model.named_parameters():
        torch.testing.assert_close(parameter, last[name], rtol=0, atol=2e-5)


def test_a_run_repeats_bit_for_bit(config, draw):
    runs = []
    for _ in range(2):
        engine = engine_for(config)
        results = [engine.train_step(draw(step), RATES[step]) for step in range(3)]
        runs.append(([(r.loss, r.grad_norm) for r in results], weights(engine)))
    assert runs[0][0] == runs[1][0]
    assert runs[0][1].keys() == runs[1][1].keys()
    assert all(torch.equal(tensor, runs[1][1][name]) for name, tensor in runs[0][1].items())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(config, draw, what):
    engine, untouched = engine_for(config), engine_for(config)
    for one in (engine, untouched):
        one.train_step(draw(0), 3e-3)
    before, state = weights(engine), engine.state_dict()

    def spoil(module, inputs, output):
        if what == "loss":
            return output * float("nan")
        output.register_hook(lambda gradient: gradient * float("inf"))
        return None

    handle = engine.model.final_norm.register_forward_hook(spoil)
    result = engine.train_step(draw(1), 3e-3)
    handle.remove()
    assert result.skipped
    assert result.statistics is None
    assert math.isfinite(result.loss) == (what == "gradient")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(engine).items())
    assert engine.state_dict() == state
    # The next step sees nothing of the skipped one.
    ours, theirs = engine.train_step(draw(2), 3e-3), untouched.train_step(draw(2), 3e-3)
    assert (ours.loss, ours.grad_norm) == (theirs.loss, theirs.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(weights(engine).values(), weights(untouched).values(), strict=True))


def test_evaluation_sums_over_counted_tokens_and_touches_nothing(config, draw):
    engine = engine_for(config)
    batches = draw(0, 2) + copy.deepcopy(draw(1, 2))
    batches[1].targets[1, 7:] = -1
    batches[3].targets[:] = -1  # a batch of padding alone
    before = weights(engine)
    engine.model.train()
    nats, tokens = engine.evaluate(batches)
    assert engine.model.training
    expected, counted = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            logits = engine.model.eval().logits(batch.tokens, batch.resets).double()
            own = -logits.log_softmax(-1).gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0]
            expected += own[batch.targets >= 0].sum().item()
            counted += int((batch.targets >= 0).sum())
    assert tokens == counted == 4 * 48 - 17 - 48
    assert nats == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(engine).items())


def test_a_saved_engine_goes_on_bit_for_bit(config, draw, tmp_path):
    first = engine_for(config)
    for step in range(2):
        first.train_step(draw(step), RATES[step])
    path = save(tmp_path, step=2, fragments=list(first.named_fragments()), state=first.state_dict())
    second = engine_for(config, seed=99)
    state = load(path, list(second.named_fragments()))
    second.after_load()
    second.load_state_dict(state)
    for step in (2, 3):
        ours, theirs = second.train_step(draw(step), RATES[step]), first.train_step(draw(step), RATES[step])
        assert (ours.loss, ours.grad_norm) == (theirs.loss, theirs.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(second).values(), strict=True))


def test_fragments_name_every_parameter_moment_and_buffer_once(config):
    engine = engine_for(config)
    names = [fragment.name for fragment in engine.named_fragments()]
    parameters = [name for name, _ in engine.model.named_parameters()]
    expected = [f"{kind}/{name}" for kind in ("param", "exp_avg", "exp_avg_sq") for name in parameters]
    expected += [f"buffer/{name}" for name in engine.model.state_dict() if name not in parameters]
    assert sorted(names) == sorted(expected)


def test_balance_moves_once_a_step_by_the_whole_global_batch(draw, config):
    if config.model.ffn != "kalmagrove":
        assert engine_for(config).train_step(draw(0), 1e-3).statistics is None
        return
    engine = engine_for(config)
    result = engine.train_step(draw(0), 1e-3, balance_rate=0.25)
    groves = config.model.grove.num_groves
    assert result.statistics.shape == (2, 3 * groves + 1)
    assert result.statistics[:, -1].tolist() == [96.0, 96.0]  # four sequences of 24 tokens
    assert result.statistics[:, :groves].sum(1).tolist() == [192.0, 192.0]  # two groves each
    assert engine.model.pending_statistics().abs().sum() == 0
    for layer, row in zip(engine.model.grove_layers(), result.statistics, strict=True):
        balance = layer.router.balance
        assert balance.abs().max() <= 0.25 + 1e-6
        assert balance[row[:groves].argmax()] < 0 < balance[row[:groves].argmin()]


def test_recomputing_activations_changes_no_bit(config, draw):
    runs = []
    for recompute in (False, True):
        config.train.activation_checkpointing = recompute
        engine = engine_for(config)
        results = [engine.train_step(draw(step), RATES[step]) for step in range(2)]
        runs.append([(r.loss, r.grad_norm) for r in results])
    assert runs[0] == runs[1]


def test_muon_trains_too(config, draw):
    config.optimizer.kind = "muon"
    engine = engine_for(config)
    losses = [engine.train_step(draw(0), 3e-3).loss for _ in range(6)]
    assert losses[-1] < losses[0] - 0.3
    assert any(fragment.name.startswith("momentum/") for fragment in engine.named_fragments())
