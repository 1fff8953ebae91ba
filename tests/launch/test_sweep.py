"""Sweeps: Hydra's grammar gives the product, every run is checked, and each has a name of its own."""

import pytest

from kan_train.config import ConfigError
from kan_train.launch.sweep import LONGEST_NAME, combinations


def sweep(*overrides: str):
    return combinations(overrides, [])


def names(*overrides: str) -> list[str]:
    return [one.config.run.name for one in sweep(*overrides)]


def test_the_product_of_what_is_swept():
    runs = sweep("optimizer.learning_rate=1e-3,3e-4", "model=kan_tiny,dense_tiny_total", "train.steps=50")
    found = [(one.config.optimizer.learning_rate, one.config.model.name, one.config.train.steps) for one in runs]
    assert found == [(1e-3, "kan_tiny", 50), (1e-3, "dense_tiny_total", 50), (3e-4, "kan_tiny", 50), (3e-4, "dense_tiny_total", 50)]
    assert [one.overrides[2] for one in runs] == ["train.steps=50"] * 4


def test_names_say_what_was_swept():
    assert names("optimizer.learning_rate=1e-3,3e-4", "model=kan_tiny,dense_tiny_total") == [
        "kan_tiny-learning_rate_0.001", "dense_tiny_total-learning_rate_0.001", "kan_tiny-learning_rate_0.0003", "dense_tiny_total-learning_rate_0.0003",
    ]  # fmt: skip
    assert names("run.name=first", "model=kan_tiny,dense_tiny_total") == ["first-model_kan_tiny", "first-model_dense_tiny_total"]
    assert names("run.name=one,two", "train.steps=50") == ["one", "two"]


def test_hydras_functions_serve():
    assert [one.config.run.seed for one in sweep("run.seed=range(1,4)")] == [1, 2, 3]
    assert [one.config.run.seed for one in sweep("run.seed=choice(5,7)")] == [5, 7]
    assert [one.config.model.name for one in sweep("model=glob(dense_tiny*)")] == ["dense_tiny_active", "dense_tiny_total"]
    assert [one.config.data.blend["mine"] for one in sweep("+data.blend.mine=1.0,2.0")] == [1.0, 2.0]


def test_text_arrives_as_it_was_written(tmp_path):
    odd = """it's; $HOME "x" \\"""
    (one, two) = sweep(f"data.root={odd}", "run.seed=1,2")
    assert one.overrides[0] == f"data.root={odd}"
    assert (one.config.data.root, two.config.data.root) == (odd, odd)
    assert [one.config.data.root for one in sweep("data.root='a, b','c $(x)'")] == ["a, b", "c $(x)"]


def test_names_are_plain_short_and_different():
    found = names("data.root='a b','a/$(reboot)'")
    assert found == ["kan_tiny-root_a_b", "kan_tiny-root_a_reboot_"]
    long = names(f"data.root={'x' * 300}a,{'x' * 300}b")
    assert max(map(len, long)) <= LONGEST_NAME
    assert len(set(long)) == 2


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.steps=50"], "no setting has several values; use for example optimizer.learning_rate=1e-3,3e-4"),
        (["run.seed=1,1"], "two runs of the sweep would be called kan_tiny-seed_1"),
        (["run.seed=range(0,2000)"], "make 2000 runs, and one sweep has at most 1000"),
        (["optimizer.learning_rate=interval(0,1)"], "is not a list of values; use optimizer.learning_rate=range"),
        (["model=glob(none*)"], "matches no choice of model; use one of: dense_125m_active"),
        (["optimizer.learning_rate=1e-3,-1"], "the sweep's run with optimizer.learning_rate=-1 is not possible: optimizer.learning_rate=-1.0 must be positive"),
        (["model=kan_tiny,kan_tini"], "with model=kan_tini is not possible: .*did you mean model=kan_tiny"),
    ],
)
def test_mistakes_are_told_before_anything_is_submitted(overrides, says):
    with pytest.raises(ConfigError, match=says):
        sweep(*overrides)


def test_every_run_is_checked_for_its_processes():
    with pytest.raises(ConfigError, match="is not possible"):
        sweep("parallel.tensor_parallel=1,2")
    assert len(sweep("parallel.tensor_parallel=1,2", "cluster.devices_per_node=2")) == 2
