"""A sequence split over ranks is the whole sequence: outputs and gradients, what is sent, and what a rank holds."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kan_train.config import ConfigError
from kan_train.model.conv import inputs_before
from kan_train.model.scan import last_state
from kan_train.parallel.place import ALONE, Axis, Place, at

SCRIPT = Path(__file__).parent / "context_ranks.py"
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Largest difference from one process, as a share of the largest element."""

pytestmark = pytest.mark.xdist_group("context_ranks")


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("context_ranks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ranks_script = _script()
CASES = {case.name: case for case in ranks_script.cases()}


def launch(folder: Path, what: str) -> list[dict[str, dict]]:
    """What each of four processes got, by case."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    errors = [(folder / f"errors-{rank}").open("w+") for rank in range(ranks_script.RANKS)]
    command = [sys.executable, str(SCRIPT), str(folder), what]
    ranks = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stdout=file, stderr=file) for rank, file in enumerate(errors)]
    try:
        codes = [rank.wait(timeout=600) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    texts = [(file.seek(0), file.read()[-3000:])[1] for file in errors]
    assert codes == [0] * len(ranks), "\n".join(texts)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(len(ranks))]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    return launch(tmp_path_factory.mktemp("context"), "cases")


def joined(outcomes: list[dict]) -> dict[str, Tensor]:
    """Chunks one after the other, parts of parameters' gradients summed."""
    found = {name: torch.cat([outcome[name] for outcome in outcomes], dim=1) for name in ("y", "x")}
    return found | {name: sum(outcome["parameters"][name].double() for outcome in outcomes) for name in outcomes[0]["parameters"]}


def differences(seen: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest, as a share of the largest expected element."""
    assert seen.keys() == expected.keys()
    return {name: float((seen[name].double() - value.double()).abs().max() / value.double().abs().max()) for name, value in expected.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_chunks_together_are_the_whole_sequence(name: str, split: list[dict[str, dict]]):
    """Outputs, and gradients of the input and of every parameter, against one process that reads the sequence whole."""
    case = CASES[name]
    outcomes = [rank[name] for rank in split if name in rank]
    assert len(outcomes) == case.ranks
    whole = joined([vars(ranks_script.run(case, ALONE.context))])
    found = differences(joined(outcomes), whole)
    assert max(found.values()) < BOUNDS[case.dtype], found
    assert all(bool(value.abs().max() > 0) for value in whole.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.ranks == 4 and not case.recompute])
def test_a_layer_sends_what_it_must_and_no_more(name: str, split: list[dict[str, dict]]):
    """ADA: one all-gather for the state, one for the convolution's last keys, one for the mixture's means, and as many backwards.

    Softmax: one all-gather of keys and values together, one of resets; one reduce-scatter backwards.
    """
    case = CASES[name]
    if case.ada is not None:
        count = 1 + (case.ada.get("conv_width", 4) > 1) + (case.ada.get("mixture", 0) > 0)
        expected = [{"_allgather_base_": count}] * 2
    else:
        expected = [{"_allgather_base_": 1 + (case.resets is not None)}, {"_reduce_scatter_base_": 1}]
    assert [rank[name]["collectives"] for rank in split] == [expected] * 4


@pytest.mark.slow
def test_64k_tokens_over_four_ranks_are_one_process(tmp_path_factory: pytest.TempPathFactory):
    """In fp32, against one process in float64 (where one in fp32 is 4e-6 away); and the most bytes that live at one time on a rank, forwards and
    backwards, are its share and little more."""
    ranks = launch(tmp_path_factory.mktemp("long"), "long")
    exact = joined([vars(ranks_script.run(ranks_script.long_case(1, torch.float64), ALONE.context))])
    whole = ranks_script.run(ranks_script.long_case(1), ALONE.context).peak
    for size in (2, 4):
        outcomes = [rank[f"long, {size}"] for rank in ranks if f"long, {size}" in rank]
        assert len(outcomes) == size
        found = differences(joined(outcomes), exact)
        peak = max(outcome["peak"] for outcome in outcomes)
        print(f"{size} ranks: peak {peak / 2**20:.1f} MiB of {whole / 2**20:.1f} MiB; worst difference {max(found.values()):.1e}")
        assert max(found.values()) < 5e-6, found
        assert peak < 1.1 * whole / size


def test_peak_of_live_bytes_is_measured():
    """What lives together counts, what is gone does not, a view costs nothing."""
    with ranks_script.Watch() as watch:
        first = torch.ones(1000)
        second = first.view(10, 100) + 1.0
        del first
        third = second * 2.0
        del second
        fourth = third.reshape(-1)
    assert fourth.numel() == 1000
    assert (watch.live, watch.peak) == (4000, 8000)


@pytest.mark.parametrize("decay", ["none", "learned", "data"])
@pytest.mark.parametrize("packed", [False, True])
def test_last_state_is_the_recurrence(decay: str, packed: bool):
    """Token by token in float64: kept * S + added is what the recurrence makes of S, with gradients."""
    time, generator = 13, torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, time, 3, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    state = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    rates = {"none": None, "learned": -torch.tensor([0.01, 0.5, 2.0]).double(), "data": -torch.rand(2, time, 3, generator=generator).double()}
    log_decay = rates[decay] if rates[decay] is None else rates[decay].requires_grad_()
    resets = torch.zeros(2, time, dtype=torch.bool)
    resets[0, [0, 4, 9]] = packed
    added, kept = last_state(k, v, log_decay, resets if packed else None)
    expected, left = torch.zeros_like(state), torch.ones(2, 3, 1, 1, dtype=torch.float64)
    for t in range(time):
        a = torch.ones(2, 3).double() if log_decay is None else log_decay.expand(2, time, 3)[:, t].exp()
        a = torch.where(resets[:, t, None], 0.0, a)[..., None, None]
        expected, left = a * expected + k[:, t, :, :, None] * v[:, t, :, None, :], a * left
    weight = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    ours, theirs = kept * state + added, left * state + expected
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    leaves = [k, v] if log_decay is None else [k, v, log_decay]
    for mine, reference in zip(*(torch.autograd.grad(y, leaves, weight) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


def test_small_sums_of_decay_keep_their_precision_behind_large_ones():
    """fp32: what is left of a late token must not carry the rounding of what was forgotten long before it."""
    time = 20_000
    log_decay = torch.full((1, time, 1), -50.0)
    log_decay[:, -10:] = -1e-3
    keys, values = torch.ones(1, time, 1, 1), torch.zeros(1, time, 1, 1)
    values[:, -11:] = 1.0
    added, _ = last_state(keys, values, log_decay)
    exact = torch.exp(-1e-3 * torch.arange(11).double()).sum()
    assert float(added) == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("name", ["4 ranks: ada, decay data, mixture 2, conv_width 4, every chunk", "4 ranks: softmax, 2 key-value heads, every chunk"])
def test_a_rank_can_be_looked_at_without_the_others(name: str):
    """On the meta device, where a place has sizes and no groups: shapes forwards and backwards."""
    case = CASES[name]
    with at(Place(context=Axis(4, 1))):
        layer = case.layer().to("meta")
    x = torch.empty(2, 8, case.width, dtype=case.dtype, device="meta", requires_grad=True)
    y = layer(x, torch.empty(2, 8, dtype=torch.bool, device="meta"))
    y.backward(torch.empty_like(y))
    assert x.grad.shape == y.shape == x.shape


@pytest.mark.parametrize(("time", "message"), [(2, "context_parallel=2 or model.ada.conv_width=3"), (1, "context_parallel=1 or model.ada.conv_width=2")])
def test_a_chunk_shorter_than_the_convolution_is_refused(time: int, message: str):
    with pytest.raises(ConfigError, match=message):
        inputs_before(torch.zeros(1, time, 1, 1), 3, None, Axis(4, 0))
