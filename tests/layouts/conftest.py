"""Two processes run every scenario once; the tests judge what they saw against an oracle in one process."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from free_ports import free_port

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # layout_matrix is a package, which its processes and the campaign import by that name


def _beside(name: str) -> ModuleType:
    """A module of this folder: tests are no package, and the two processes import it as a plain script's neighbour."""
    spec = importlib.util.spec_from_file_location(f"layouts_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cases() -> ModuleType:
    return _beside("cases")


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    return _beside("oracle")


@dataclass
class Pair:
    """What the two ranks saw, scenario by scenario, and the folder of their checkpoints."""

    ranks: list[dict]
    folder: Path

    def __getitem__(self, scenario: str) -> dict:
        return self.ranks[0][scenario]

    def alike(self, scenario: str, *keys: str) -> bool:
        """Whether both ranks saw the same under `keys` (default: everything)."""
        first, second = (rank[scenario] for rank in self.ranks)
        return all(repr(first[key]) == repr(second[key]) for key in keys or first)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    (folder / "tokenizer.model").write_bytes(b"a tokenizer")
    port, *ports = (free_port() for _ in range(4))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, str(HERE / "two_ranks.py"), str(folder), *map(str, ports)]
    errors = [(folder / f"errors-{rank}").open("w+") for rank in range(2)]
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    ranks = [subprocess.Popen(command, env=environment | own[rank], stdout=errors[rank], stderr=errors[rank]) for rank in range(2)]
    try:
        codes = [rank.wait(timeout=600) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    texts = [(file.seek(0), file.read()[-4000:])[1] for file in errors]
    assert codes == [0, 0], "\n".join(texts)
    return Pair([json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)], folder)
