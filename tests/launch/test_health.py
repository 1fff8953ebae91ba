"""The health check names what is wrong, and where; that it stops a job is a matter of test_node."""

import pytest
import torch

from kan_train.launch import health


def measured(product: list[float], transfer: list[float]) -> list[dict]:
    return [{"host": f"n{number}", "product": one, "transfer": other} for number, (one, other) in enumerate(zip(product, transfer, strict=True))]


def test_alike_nodes_are_not_slow():
    assert health.slow_nodes(measured([1.0, 1.1, 0.9, 1.2], [0.2, 0.21, 0.2, 0.19])) == {}


def test_a_slow_device_and_a_slow_link_are_named():
    problems = health.slow_nodes(measured([1.0, 1.0, 9.0, 1.0], [0.2, 0.2, 0.2, 4.0]))
    assert set(problems) == {"n2", "n3"}
    assert "product" in problems["n2"]
    assert "transfer" in problems["n3"]


def test_of_two_nodes_the_slower_is_named_and_noise_is_not():
    assert set(health.slow_nodes(measured([1.0, 9.0], [0.1, 0.1]))) == {"n1"}
    assert health.slow_nodes(measured([0.001, 0.1], [0.001, 0.1])) == {}


def test_a_product_that_is_right_passes_and_one_that_is_not_is_told(monkeypatch):
    assert health._product(torch.device("cpu"), 8)[1] == []
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    assert health._product(torch.device("cpu"), 8)[1] == ["device 0 computes a wrong product"]


def test_what_a_node_does_not_see_is_named(make_spec, tmp_path, monkeypatch):
    spec = make_spec(data=[str(tmp_path / "corpus")], working_directory=str(tmp_path / "nowhere"))
    problems = " ".join(health._disk(spec))
    for missing in (f"the corpus {tmp_path}/corpus", f"the working directory {tmp_path}/nowhere", f"the run directory {spec.run_dir}"):
        assert missing in problems


def test_a_full_disk_is_named_with_a_setting(make_spec, monkeypatch):
    monkeypatch.setattr(health, "DISK_FREE", 1 << 60)
    assert "cluster.scratch=PATH" in " ".join(health._disk(make_spec()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_node_without_the_devices_that_were_asked_for_is_named(make_spec):
    assert "0 CUDA devices are visible, 8 are needed" in " ".join(health._devices(make_spec(processes_per_node=8, device="auto")))


@pytest.mark.parametrize(("device", "scheduler", "kind"), [("cpu", "slurm", "cpu"), ("auto", "slurm", "cuda"), ("cuda", "local", "cuda")])
def test_a_scheduler_that_was_asked_for_gpus_must_have_given_some(device, scheduler, kind, make_spec):
    assert health._device(make_spec(device=device, scheduler=scheduler)).type == kind


def test_neighbours_pair_off_in_two_rounds():
    """Every node of five has a neighbour in at least one round, and partners agree."""
    partners = [{node: ((node + shift) ^ 1) - shift for node in range(5)} for shift in (0, 1)]
    for round_ in partners:
        pairs = {(node, other) for node, other in round_.items() if 0 <= other < 5}
        assert all((other, node) in pairs and abs(node - other) == 1 for node, other in pairs)
    assert all(any(0 <= round_[node] < 5 for round_ in partners) for node in range(5))
