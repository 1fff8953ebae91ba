"""Sharding is an implementation detail: ZeRO 0, 1, 2 and 3 on two processes see the losses, the gradient norms and the weights of one.

The scenarios are in two_ranks.py; one pair of processes runs them all. The oracle is oracle.py: plain PyTorch, one process, float64.
"""

import math

import pytest
import torch

from kan_train.checkpoint import load_tensors
from kan_train.config import Config
from kan_train.engine import build_engine
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel
from kan_train.parallel.runtime import single_process_runtime

# One worker runs the two processes that all tests of this file judge.
pytestmark = pytest.mark.xdist_group("pair")

STAGES = (0, 1, 2, 3)
SHARDED = (1, 2, 3)

LOSS = 5e-7
"""Relative, fp32 against float64."""
NORM = 1e-5
"""Relative: a norm after some steps of Adam, which divides by roots of tiny squares, is worse conditioned than a loss."""
MOVED = 1e-3
"""Of the way that five steps moved a parameter: the first step of Adam is the gradient's sign, and rounding decides it where that is 0."""


@pytest.fixture(scope="session")
def history(cases, oracle):
    """Five steps of the oracle, by the model's kind and the settings that matter."""
    kept: dict = {}

    def train(kind: str, clip: float, dtype: torch.dtype = torch.float64, optimizers=None):
        key = (kind, clip, dtype, optimizers)
        if key not in kept:
            steps = [cases.sequences(step) for step in range(len(cases.RATES))]
            settings = {"seed": cases.SEED, "clip": clip, "balance_rate": cases.BALANCE_RATE, "heldout": cases.heldout()}
            settings |= {"optimizers": optimizers or oracle.adamw, "dtype": dtype}
            kept[key] = oracle.train(cases.model_config(kind), steps, cases.RATES, **settings)
        return kept[key]

    return train


def assert_same_run(seen: dict, expected, loss: float = LOSS, norm: float = NORM) -> None:
    assert seen["losses"] == pytest.approx(expected.losses, rel=loss)
    assert seen["cross_entropies"] == pytest.approx(expected.cross_entropies, rel=loss)
    assert seen["norms"] == pytest.approx(expected.norms, rel=norm)  # Adam would hide a wrong scale of the gradient
    assert seen["skipped"] == [False] * 5
    assert seen["engine"] == {"optimizer_steps": 5}


def assert_same_weights(folder, expected) -> None:
    """Every parameter that the layout saved: its distance from the oracle's is small beside how far training moved it."""
    found = load_tensors(folder / "step-00000005")
    assert found.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - weight).norm() <= MOVED * (weight - expected.initial[name]).norm(), name
    buffers = load_tensors(folder / "step-00000005", "buffer/")
    assert buffers.keys() == expected.buffers.keys()
    for name, buffer in expected.buffers.items():
        assert torch.allclose(buffers[name], buffer, rtol=1e-5, atol=1e-6), name


def test_the_clipped_cases_are_clipped(cases, history):
    """Otherwise they would say nothing about clipping."""
    assert min(history("kan", cases.CLIP).norms + history("dense", cases.CLIP).norms) > 1.2 * cases.CLIP


@pytest.mark.parametrize("stage", STAGES)
def test_kan_with_accumulation_and_clipping(stage, pair, history, cases):
    """Two micro-batches a rank, every step clipped, groves, statistics and selection biases."""
    assert pair.alike(f"kan-{stage}", "losses", "cross_entropies", "norms", "skipped", "heldout", "engine")
    assert_same_run(pair[f"kan-{stage}"], history("kan", cases.CLIP))
    assert_same_weights(pair.folder / f"kan-{stage}", history("kan", cases.CLIP))


@pytest.mark.parametrize("stage", STAGES)
def test_dense_in_one_piece_without_clipping(stage, pair, history):
    assert_same_run(pair[f"dense-{stage}"], history("dense", 0.0), norm=1e-6)
    assert_same_weights(pair.folder / f"dense-{stage}", history("dense", 0.0))


@pytest.mark.parametrize("scenario", ["recompute", "offload-2", "offload-3"])
def test_options_change_nothing(scenario, pair, history, cases):
    """Activation checkpointing under ZeRO-3, and optimizer state in host memory."""
    assert_same_run(pair[scenario], history("kan", cases.CLIP))
    assert_same_weights(pair.folder / scenario, history("kan", cases.CLIP))


@pytest.mark.parametrize("scenario", [*(f"{kind}-{stage}" for kind in ("kan", "dense") for stage in STAGES), "recompute"])
def test_validation_counts_every_heldout_token_once(scenario, pair, history, cases):
    """The last rank's last batch is padding alone: it must neither count nor poison the sum."""
    nats, tokens = pair[scenario]["heldout"]
    expected, counted = history("dense", 0.0).heldout if "dense" in scenario else history("kan", cases.CLIP).heldout
    assert tokens == counted == 5 * cases.LENGTH + cases.LENGTH // 2
    assert nats == pytest.approx(expected, rel=LOSS)


@pytest.mark.parametrize("stage", STAGES)
def test_plain_engine_agrees_with_the_oracle(stage, cases, history):
    """One process without DeepSpeed (stage is the accumulation here: 1, 2, 4 or 8 micro-batches)."""
    config: Config = cases.config("kan", None, micro_batch=8 >> stage)
    process = single_process_runtime(config)
    engine = build_engine(config, process, seed=cases.SEED)
    seen: dict = {"losses": [], "cross_entropies": [], "norms": [], "skipped": []}
    for step, rate in enumerate(cases.RATES):
        result = engine.train_step(cases.batches(step, micro_batch=8 >> stage), rate, cases.BALANCE_RATE)
        for key, value in zip(seen, (result.loss, result.cross_entropy, result.grad_norm, result.skipped), strict=True):
            seen[key].append(value)
    assert_same_run(seen | {"engine": engine.state_dict()}, history("kan", cases.CLIP))


@pytest.mark.parametrize(("prefix", "stage"), [*(("", stage) for stage in STAGES), *(("bf16-", stage) for stage in SHARDED)])
def test_a_step_spoilt_on_one_rank_changes_nothing_on_any(prefix, stage, pair):
    """The loss, or only the gradient, of one micro-batch on rank 1 is not finite: both ranks skip, and hold bit for bit what they held."""
    for rank in pair.ranks:
        loss, gradient = rank[f"{prefix}resumed-{stage}"]["spoilt"]
        for spoilt in (loss, gradient):
            assert spoilt == {"kind": spoilt["kind"], "skipped": [True], "unchanged": True, "pending": 0.0}


@pytest.mark.parametrize(("prefix", "stage"), [*(("", stage) for stage in STAGES), *(("bf16-", stage) for stage in SHARDED)])
def test_resumed_equals_uninterrupted_bit_for_bit(prefix, stage, pair):
    """Loss, norm, and all that a rank holds, also after two spoilt steps in between (skipped steps leave no trace)."""
    name = f"{prefix}kan-{stage}"
    for rank in pair.ranks:
        whole, resumed = rank[name], rank[f"{prefix}resumed-{stage}"]
        assert resumed["losses"] == whole["losses"][3:]
        assert resumed["norms"] == whole["norms"][3:]
        assert resumed["digest"] == whole["digest"]
        assert resumed["engine"] == {"optimizer_steps": 5}


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 1), (1, 3), (3, 2)])
def test_another_stage_continues(before, after, pair, history, cases):
    seen, expected = pair[f"from-{before}-to-{after}"], history("kan", cases.CLIP)
    assert seen["losses"] == pytest.approx(expected.losses[3:], rel=LOSS)
    assert seen["norms"] == pytest.approx(expected.norms[3:], rel=NORM)


@pytest.mark.parametrize("stage", SHARDED)
def test_bf16_stays_near_fp32(stage, pair, history, cases):
    seen, expected = pair[f"bf16-dense-{stage}"], history("dense", cases.CLIP)
    assert seen["losses"] == pytest.approx(expected.losses, rel=5e-4)
    assert seen["norms"] == pytest.approx(expected.norms, rel=1e-2)
    assert pair[f"bf16-kan-{stage}"]["losses"] == pytest.approx(history("kan", cases.CLIP).losses, rel=5e-3)


@pytest.mark.parametrize("stage", SHARDED)
def test_bf16_masters_and_buffers_are_fp32(stage, pair):
    """Masters hold what bf16 cannot; selection biases and running statistics are sums of small steps."""
    assert pair[f"bf16-kan-{stage}"]["dtypes"] == ["torch.float32"]
    folder = pair.folder / f"bf16-kan-{stage}" / "step-00000005"
    for tensors in (load_tensors(folder), load_tensors(folder, "exp_avg/")):
        finer = torch.cat([(t != t.bfloat16().float()).flatten() for t in tensors.values()])
        assert finer.float().mean() > 0.9


@pytest.mark.parametrize(("name", "micro_batches"), [*((str(stage), 32) for stage in SHARDED), ("pipeline", 64)])
def test_bf16_gradients_accumulate_in_fp32(name, micro_batches, pair, cases):
    """The gradient of 32 micro-batches (64 through a pipeline), read from the first moments, against their bf16 gradients summed in float64.

    Reducing between ranks may round each rank's sum to bf16 (2^-9 relative, 1e-3 in the mean); adding 16 of them in bf16 loses several times that.
    """
    config = cases.config("dense", 2)
    model = materialise(LanguageModel(config.model), seed=cases.SEED, dtype=torch.bfloat16)
    exact = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    rounded = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in (batch for step in range(micro_batches // cases.SEQUENCES) for batch in cases.batches(step, micro_batch=1)):
        gradients = torch.autograd.grad(model(batch.tokens, batch.targets, batch.resets)[0], list(model.parameters()))
        for parameter, gradient in zip(exact, gradients, strict=True):
            exact[parameter] += gradient.double() / micro_batches
            rounded[parameter] += gradient / micro_batches
    beta1 = config.optimizer.beta1
    moments = load_tensors(pair.folder / f"accumulated-{name}" / "step-00000001", "exp_avg/")

    def error(found: dict) -> float:
        misses = sum((found[parameter].double() - value).square().sum().item() for parameter, value in exact.items())
        return math.sqrt(misses / sum(value.square().sum().item() for value in exact.values()))

    assert error({parameter: moment / (1 - beta1) for parameter, moment in moments.items()}) < 2.5e-3
    assert error(rounded) > 4e-3  # what the law rules out


def test_zero_3_never_holds_more_than_its_part_and_one_module(pair):
    """While the weights are made: a rank of two has half of what is done already, and the whole of the module at hand."""
    for rank in pair.ranks:
        seen = rank["fills"]
        assert seen["peak"] <= seen["whole"] / 2 + seen["largest"]
        assert seen["peak"] < 0.75 * seen["whole"]


def test_muon_on_two_ranks(pair, history, cases, oracle):
    """torch.optim.Muon in one process; its bf16 Newton-Schulz steps magnify the rounding of fp32 gradients."""
    expected = history("dense", cases.CLIP, torch.float32, oracle.muon)
    assert_same_run(pair["muon"], expected, loss=2e-4, norm=1e-3)
    assert abs(expected.norms[-1] / history("dense", cases.CLIP).norms[-1] - 1) > 1e-2  # AdamW would fail


def test_too_many_bad_steps_stop_the_run_on_both_ranks(pair):
    """Rank 1 alone sees every step from the third on spoilt; recovery.max_bad_steps=3 and max_rewinds=0."""
    assert pair.alike("stops", "exit_code", "finished", "steps", "rows")
    seen = pair["stops"]
    assert (seen["exit_code"], seen["finished"], seen["steps"]) == (3, False, 5)
    skipped = [["skipped_step", 1], [3, 1], ["skipped_step", 2], [4, 2], ["skipped_step", 3], [5, 3]]
    assert seen["rows"] == [[1, 0], [2, 0], *skipped, ["failed", 5]]


def test_both_ranks_go_back_together_and_the_run_is_one_that_never_read_the_bad_samples(pair):
    """Rank 1 alone sees the global batches 5, 6 and 7 spoilt, under ZeRO-2: from step 8 back to the checkpoint of step 4."""
    assert pair.alike("goes-back", "exit_code", "finished", "steps", "rows")
    seen = pair["goes-back"]
    assert (seen["exit_code"], seen["finished"], seen["steps"]) == (0, True, 9)
    assert [row for row in seen["rows"] if row[0] == "rewind"] == [["rewind", 4]]
    assert [row[0] for row in seen["rows"] if isinstance(row[0], int)] == [1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8, 9]
    assert [rank["goes-back"]["digest"] for rank in pair.ranks] == [rank["never-read"]["digest"] for rank in pair.ranks]
