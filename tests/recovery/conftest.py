"""The processes of the matrix of layouts (tests/layouts) serve here too."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from layout_matrix.pool import Pool

HERE = Path(__file__).parent
# recovery_proofs and layout_matrix are packages, which their processes and the benchmarks import by those names.
sys.path[:0] = [str(HERE), str(HERE.parent / "layouts")]


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of prepared corpora with the tiny one."""
    from recovery_proofs.corpus import prepare

    return prepare(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="session")
def pool() -> Iterator["Pool"]:
    """Processes that need no imports, those of `kan train` included."""
    from layout_matrix.pool import Pool

    with Pool("recovery_proofs.entry") as started:
        yield started
