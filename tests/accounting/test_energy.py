"""Energy from counters as the machine has them: RAPL's files as a real tree of files, NVML's module with a stand-in (no such device is needed)."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kan_train.accounting import energy
from kan_train.accounting.energy import EVERY, Counter, EnergyReports, counters_of, nvml_counters, rapl_counters

CPU = torch.device("cpu")


def zone(folder: Path, name: str, number: str, joules: float, wraps_at: float = 262_143.328_850) -> Path:
    path = folder / f"intel-rapl:{number}"
    path.mkdir()
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{round(wraps_at * 1e6)}\n")
    count(path, joules)
    return path


def count(path: Path, joules: float) -> None:
    (path / "energy_uj").write_text(f"{round(joules * 1e6)}\n")


def test_packages_are_added_up_and_their_parts_are_not_counted_again(tmp_path: Path):
    first, second = zone(tmp_path, "package-0", "0", 100), zone(tmp_path, "package-1", "1", 7)
    part, whole = zone(tmp_path, "core", "0:0", 50), zone(tmp_path, "psys", "2", 500)
    counters = rapl_counters(tmp_path)
    for path, joules in ((first, 130), (second, 8.5), (part, 70), (whole, 900)):
        count(path, joules)
    assert sum(counter.taken() for counter in counters) == pytest.approx(31.5)
    assert sum(counter.taken() for counter in counters) == 0


def test_a_counter_that_wraps_goes_on(tmp_path: Path):
    path = zone(tmp_path, "package-0", "0", 990, wraps_at=1000)
    (counter,) = rapl_counters(tmp_path)
    count(path, 15)
    assert counter.taken() == pytest.approx(25)
    count(path, 20)
    assert counter.taken() == pytest.approx(5)


def test_what_cannot_be_read_is_not_there(tmp_path: Path):
    assert rapl_counters(tmp_path / "nowhere") == []
    zone(tmp_path, "package-0", "0", 1)
    (zone(tmp_path, "package-1", "1", 1) / "energy_uj").unlink()  # one package alone would pass for the machine
    assert rapl_counters(tmp_path) == []


def test_a_counter_that_was_set_back_counts_from_nothing():
    readings = iter([500.0, 30.0, 40.0])
    counter = Counter(lambda: next(readings))
    assert [counter.taken(), counter.taken()] == [30.0, 10.0]


class Failure(Exception):
    """As NVML raises it."""


def stand_in(millijoules: list[Any], seen: list[str]) -> SimpleNamespace:
    """What is asked of the module pynvml; readings that are errors are raised."""

    def read(handle: str) -> int:
        value = millijoules.pop(0)
        if isinstance(value, Exception):
            raise value
        return value

    def handle(uuid: str) -> str:
        seen.append(uuid)
        return uuid

    return SimpleNamespace(NVMLError=Failure, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=handle, nvmlDeviceGetTotalEnergyConsumption=read)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="8a7b"))
    return torch.device("cuda", 0)


def test_nvml_counts_millijoules_of_the_own_device(device: torch.device):
    seen: list[str] = []
    (counter,) = nvml_counters(device, stand_in([5_000, 305_500], seen))
    assert seen == ["GPU-8a7b"], "not by its number, which CUDA_VISIBLE_DEVICES changes"
    assert counter.taken() == pytest.approx(300.5)


def test_a_device_that_does_not_count_is_not_guessed(device: torch.device):
    assert nvml_counters(device, stand_in([Failure("Not Supported")], [])) == []


def test_without_the_package_nothing_is_counted(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(energy.importlib, "import_module", missing)
    assert nvml_counters(device) == []


@dataclass
class Process:
    """One of two ranks; `other` is what the other one gives."""

    local_rank: int = 0
    other: tuple[float, float] = (0.0, 0.0)
    other_knows: bool = True
    device: torch.device = CPU

    def largest(self, value: int) -> int:
        return max(value, int(not self.other_knows))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + torch.tensor(self.other, dtype=tensor.dtype)


@pytest.mark.parametrize("last", [True, False], ids=["its last step", "stopped"])
def test_all_ranks_are_added_up_every_few_steps(last: bool, tmp_path: Path):
    path = zone(tmp_path, "package-0", "0", 0)
    process = Process(other=(4.0, 0.0))
    reports = EnergyReports(process, counters_of(process, tmp_path))
    told = []
    count(path, 100)
    reports.begin()  # a counter shows since it was made what the start took
    for step in range(1, 2 * EVERY + 4):
        count(path, 100 + step)
        told.append(reports.count(last=last and step == 2 * EVERY + 3))
    count(path, 1000)
    told.append(reports.rest())
    assert [one for one in told if one] == [{"joules": EVERY + 4, "steps": EVERY}] * 2 + [{"joules": 7, "steps": 3}]
    assert (told[-1] is None) == last


def test_one_rank_of_a_machine_reads_for_all(tmp_path: Path):
    zone(tmp_path, "package-0", "0", 0)
    assert counters_of(Process(local_rank=1), tmp_path) == []
    assert len(counters_of(Process(), tmp_path) or []) == 1
    assert counters_of(Process(), tmp_path / "nowhere") is None


@pytest.mark.parametrize("process", [Process(other_knows=False), Process(other=(0.0, 1.0))], ids=["never there", "lost on the way"])
def test_a_part_is_not_told_as_the_whole(process: Process, tmp_path: Path):
    zone(tmp_path, "package-0", "0", 0)
    reports = EnergyReports(process, counters_of(process, tmp_path))
    assert [reports.count() for _ in range(3 * EVERY)] == [None] * 3 * EVERY
    assert not reports.known


def test_a_file_that_goes_away_ends_the_counting(tmp_path: Path):
    path = zone(tmp_path, "package-0", "0", 0)
    reports = EnergyReports(Process(), counters_of(Process(), tmp_path))
    (path / "energy_uj").unlink()
    assert [reports.count() for _ in range(EVERY)] == [None] * EVERY
