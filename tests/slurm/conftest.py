"""One real Slurm for all tests of this room, and a corpus for their runs."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from slurm_proofs.cluster import Cluster

HERE = Path(__file__).parent
# slurm_proofs, recovery_proofs and layout_matrix are packages, which the benchmarks import by those names too.
sys.path[:0] = [str(HERE), str(HERE.parent / "recovery"), str(HERE.parent / "layouts")]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Cluster"]:
    """Six nodes, three apart, and accounts. Where the machine has no Slurm the tests fail and say what to install: a proof that was skipped is none."""
    from slurm_proofs.cluster import Cluster, SlurmMissing
    from slurm_proofs.journeys import NODES

    try:
        started = Cluster(tmp_path_factory.mktemp("slurm"), NODES, apart=3, accounts=True)  # two and one in the place of the one that fails
    except SlurmMissing as missing:
        pytest.fail(str(missing), pytrace=False)
    with started:
        yield started


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of prepared corpora with the tiny one."""
    from recovery_proofs.corpus import prepare

    return prepare(tmp_path_factory.mktemp("corpora"))
