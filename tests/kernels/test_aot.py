"""Every configuration that a launcher can choose compiles for sm_80, sm_90 and gfx942, fits the hardware, and is no worse than the stored report."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import triton


@pytest.fixture(scope="module")
def aot() -> ModuleType:
    """tests/kernels/aot.py: tests are no package."""
    spec = importlib.util.spec_from_file_location("kernels_aot", Path(__file__).with_name("aot.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("room", ["grove_gemm", "edge_spline", "ada_scan", "grove_route"])
def test_every_configuration_compiles_and_fits(aot: ModuleType, room: str):
    """A kernel that spills, outgrows shared memory or misses the tensor cores would only show as a slow or failing GPU run."""
    baseline = json.loads(aot.baseline_file(room).read_text())
    reports = aot.compile_room(room)
    assert set(reports) == set(baseline["reports"]), f"run python tests/kernels/aot.py {room} --write after the configurations changed"
    found = {name: aot.problems(report) for name, report in reports.items()}
    if baseline["triton"] == triton.__version__:  # another compiler allocates other registers; what fits must fit all the same
        found = {name: lines + aot.regressions(reports[name], baseline["reports"][name]) for name, lines in found.items()}
    assert not any(found.values()), "\n".join(f"{name}: {'; '.join(lines)}" for name, lines in found.items() if lines)


def test_a_worse_report_is_a_regression(aot: ModuleType):
    """The comparison itself: each figure that gets worse is named, and equal reports pass."""
    good = {
        "target": "sm_90", "warps": 8, "registers": 200, "shared": 100_000, "spill_bytes": 0, "spills_accepted": 0, "tensor_cores_asked": True,
        "instructions": 900, "counts": {"HGMMA": 16, "UTMALDG": 2}, "serialised": 0,
    }  # fmt: skip
    assert aot.problems(good) == []
    assert aot.regressions(good, good) == []
    for change, words in (
        ({"shared": 240_000}, "over the limit"),
        ({"spill_bytes": 16}, "spills"),
        ({"registers": 300}, "registers"),
        ({"instructions": 12}, "empty"),
        ({"counts": {}}, "tensor-core"),
        ({"counts": {"HGMMA": 16, "ATOM": 1}}, "atomic"),
    ):
        assert words in " ".join(aot.problems(good | change))
    for change, words in (
        ({"shared": 100_016}, "shared"),
        ({"spill_bytes": 8}, "spills"),
        ({"registers": 210}, "registers"),
        ({"counts": {"HGMMA": 8}}, "HGMMA"),
        ({"serialised": 1}, "waits"),
    ):
        assert words in " ".join(aot.regressions(good | change, good))
