"""Groves over 2 and 4 processes against one process that holds them all and sees every token; what travels is counted by hand."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from free_ports import free_port
from torch import Tensor

from kan_train.config import ConfigError
from kan_train.model.dispatch import Plan, capacity_plan, dropless_plan, partial_plan
from kan_train.parallel.expert import Exchange
from kan_train.parallel.place import Axis

HERE = Path(__file__).parent


def _beside(name: str) -> ModuleType:
    """A module of this folder: tests are no package, and the processes import it as a plain script's neighbour."""
    spec = importlib.util.spec_from_file_location(f"parallel_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cases = _beside("expert_cases")


RANKS = [pytest.param(2, marks=pytest.mark.xdist_group("expert-2")), pytest.param(4, marks=[pytest.mark.slow, pytest.mark.xdist_group("expert-4")])]


@pytest.fixture(scope="module", params=RANKS, ids="{} ranks".format)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw, case by case."""
    count, folder = request.param, tmp_path_factory.mktemp("expert")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, str(HERE / "expert_ranks.py"), str(folder)]
    errors = [(folder / f"errors-{rank}").open("w+") for rank in range(count)]
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stdout=errors[rank], stderr=errors[rank]) for rank in range(count)
    ]
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * count, "\n".join((file.seek(0), file.read()[-4000:])[1] for file in errors)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(count)]


def one_process(case: Any, ranks: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients of all groves on all tokens, the numbers of the case computed in `dtype`."""
    numbers = cases.inputs(case, ranks)
    gate_dtype = torch.promote_types(dtype, torch.float32)
    x, z, gate = (numbers[name].to(gate_dtype if name == "gate" else dtype).requires_grad_() for name in ("x", "z", "gate"))
    groves = cases.build_groves(case).to(dtype)
    y = groves(x, z, gate, dropless_plan(numbers["index"], case.groves))
    (y * numbers["loss"].to(dtype)).sum().backward()
    gradients = {"x": x.grad, "z": z.grad, "gate": gate.grad} | {name: parameter.grad for name, parameter in groves.named_parameters()}
    return {"y": y.detach()} | {name: gradient for name, gradient in gradients.items() if gradient is not None}


def joined(ranks: list[dict[str, Any]], case: Any) -> dict[str, Tensor]:
    """Tokens of all ranks, and groves of all ranks, in order."""
    names = ranks[0][case.name]["gradients"]
    gradients = {name: torch.cat([rank[case.name]["gradients"][name] for rank in ranks]) for name in names}
    return {"y": torch.cat([rank[case.name]["y"] for rank in ranks])} | gradients


def error(found: Tensor, exact: Tensor) -> float:
    """Relative to the size of the whole tensor."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("case", cases.EXACT + cases.LARGE, ids=lambda case: case.name)
def test_values_and_all_gradients_are_those_of_one_process(ranks: list[dict[str, Any]], case: Any):
    """Also of groves that no token chose, of ranks that receive nothing, and of ranks without tokens."""
    expected, found = one_process(case, len(ranks), torch.float64), joined(ranks, case)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.isfinite(found[name]).all()
        assert error(found[name], tensor) < 1e-12, name


@pytest.mark.parametrize("case", cases.ROUNDED, ids=lambda case: case.name)
def test_rounding_is_about_that_of_one_process(ranks: list[dict[str, Any]], case: Any):
    """Each rank rounds its part of a token's sum once more before it returns it."""
    exact, one, found = one_process(case, len(ranks), torch.float64), one_process(case, len(ranks), case.dtype), joined(ranks, case)
    assert found.keys() == one.keys() == exact.keys()
    for name, tensor in exact.items():
        assert found[name].dtype == one[name].dtype
        assert error(found[name], tensor) < 2 * error(one[name], tensor), name


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_two_runs_have_the_same_bits(ranks: list[dict[str, Any]], case: Any):
    assert all(rank[case.name]["again"] for rank in ranks)


def pairs(case: Any, ranks: int) -> list[list[set[int]]]:
    """For each source and destination rank the tokens that must go."""
    index, own = cases.inputs(case, ranks)["index"], case.groves // ranks
    return [
        [{token for token, groves in enumerate(part.tolist()) if any(grove // own == to for grove in groves)} for to in range(ranks)]
        for part in index.split(cases.tokens_of(case, ranks))
    ]


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_each_token_travels_once_to_a_rank(ranks: list[dict[str, Any]], case: Any):
    must = pairs(case, len(ranks))
    for number, rank in enumerate(ranks):
        assert rank[case.name]["sent"]["rows"] == [len(tokens) for tokens in must[number]]
        assert rank[case.name]["sent"]["received"] == sum(len(source[number]) for source in must)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_collectives_and_bytes_are_those_of_the_module_docstring(ranks: list[dict[str, Any]], case: Any):
    """The number of collectives depends neither on N nor on T; `edge` groves send z and no x."""
    count, index = len(ranks), cases.inputs(case, len(ranks))["index"]
    own, tokens = case.groves // count, cases.tokens_of(case, count)
    number, gate = case.dtype.itemsize, 8 if case.dtype == torch.float64 else 4
    row, choice = cases.WIDTH * number, gate + (cases.RANK * number if case.sends_z else 0)
    for position, rank in enumerate(ranks):
        seen, chosen_here = rank[case.name], (index // own == position).sum().item()
        out, back = sum(map(len, pairs(case, count)[position])), sum(len(source[position]) for source in pairs(case, count))
        forward = 8 * count * (own + 1) + case.sends_x * out * row + tokens[position] * cases.CHOICES * (4 + choice) + back * row
        backward = out * row + case.sends_x * back * row + chosen_here * choice
        assert seen["bytes"] == forward + backward
        assert seen["sent"]["choices received"] == chosen_here
        assert seen["collectives"] == ["c10d::alltoall_base_"] * (7 if case.sends_x else 5)


@pytest.mark.parametrize("kind", ["gated", "reuse", "edge"])
def test_what_is_computed_between_start_and_wait_overlaps(ranks: list[dict[str, Any]], kind: str):
    """In both passes the transfers are under way while it runs, at another speed on every rank, and it changes no bit."""
    flights = 1 if kind == "edge" else 2
    travel = ["start"] * flights + ["between"] + ["wait"] * flights
    for rank in ranks:
        seen = rank[f"overlap {kind}"]
        assert seen["events"] == ["start", "wait", *travel, "start", "wait", "backward", "start", "wait", *travel]
        assert seen["same"]


@pytest.mark.parametrize("kind", ["gated", "reuse", "edge"])
def test_recomputation_changes_no_bit(ranks: list[dict[str, Any]], kind: str):
    """Under activation checkpointing with the router's selections replayed: counts, rows and choices travel again, the sums do not."""
    tokens = cases.tokens_of(cases.Case(kind), len(ranks))
    for position, rank in enumerate(ranks):
        seen = rank[f"checkpoint {kind}"]
        assert seen["same"]
        assert {"x", "score", "gate", "out"} <= set(seen["gradients"])
        assert seen["tokens"] == [tokens[position]] * 2
        assert seen["collectives"] == ([5, 7] if kind == "edge" else [7, 10])


def test_layouts_that_cannot_exchange_are_refused():
    index = torch.tensor([[0, 1], [2, 3], [4, 5]])
    with pytest.raises(ValueError, match="6 groves over 4 ranks"):
        Exchange(dropless_plan(index, 6), Axis(4, 0, object()))
    with pytest.raises(ValueError, match="process group"):
        Exchange(dropless_plan(index, 6), Axis(2, 0, None))
    with pytest.raises(ConfigError, match=r"model\.grove\.capacity_factor=0"):
        Exchange(capacity_plan(index, torch.rand(3, 2), 6, capacity=1), Axis(2, 0, object()))


def test_a_partial_plan_has_rows_for_the_choices_that_there_are():
    """Tokens 0 and 2 have one choice of the three that they might, token 1 has all."""
    plan: Plan = partial_plan(torch.tensor([3, 0, 6, 4, 5]), [1, 2, 0, 2], 3, 3)
    assert plan.token_of_row.tolist() == [1, 0, 2, 1, 1]
    assert plan.row_of_choice.tolist() == [[1, 5, 5], [0, 3, 4], [2, 5, 5]]
    assert plan.dropped
    assert not plan.padded
