"""Energy that a run's devices took, where they count it themselves: never guessed from a data sheet.

CUDA: NVML's counter of each rank's own device (nvmlDeviceGetTotalEnergyConsumption, millijoules since the driver was loaded; Volta and later), board and
memory, not the host. CPU: Intel's and AMD's RAPL counters of all packages of a machine (/sys/class/powercap, microjoules), read by its first rank: they count
whatever else runs there too, and only root may read them on most systems. Both are read often enough to see every wrap of a counter.
"""

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

POWERCAP = Path("/sys/class/powercap")
"""Where Linux shows RAPL's counters, one folder a zone: `energy_uj`, `max_energy_range_uj` and `name`."""

EVERY = 10
"""Steps between readings that are added up over the ranks: a collective each."""


class Counter:
    """A counter of joules that only grows, made of one that wraps."""

    def __init__(self, read: Callable[[], float], wraps_at: float | None = None) -> None:
        """read: joules now, or an OSError. wraps_at: the joules after which it begins at 0 again; None: never."""
        self._read, self._wraps_at = read, wraps_at
        self._last = read()

    def taken(self) -> float:
        """Joules since the last call, or since the counter was made."""
        now = self._read()
        joules, self._last = now - self._last, now
        if joules < 0:
            # Without a range a counter that fell was set back: what it lost is not known, what it shows since was taken.
            joules = joules + self._wraps_at if self._wraps_at is not None else now
        return joules


def rapl_counters(folder: Path = POWERCAP) -> list[Counter]:
    """One a package of this machine; none where one of them cannot be read."""
    counters = []
    for zone in sorted(folder.glob("*-rapl:*")):
        try:
            # psys holds the packages, and a subzone such as intel-rapl:0:0 (cores, memory) is part of one.
            if not (zone / "name").read_text().startswith("package"):
                continue
            counters.append(Counter(_microjoules(zone / "energy_uj"), 1e-6 * int((zone / "max_energy_range_uj").read_text())))
        except (OSError, ValueError):
            return []
    return counters


def nvml_counters(device: torch.device, nvml: Any = None) -> list[Counter]:
    """That of a CUDA device; none without nvidia-ml-py (the extra `gpu`), or where the device does not count. nvml: the module; unset: imported."""
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return []
    try:
        nvml.nvmlInit()
        # By its UUID: CUDA_VISIBLE_DEVICES numbers the devices of a process anew, NVML those of the machine.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")

        def read() -> float:
            try:
                return 1e-3 * nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            except nvml.NVMLError as error:
                raise OSError(str(error)) from error

        return [Counter(read)]
    except (nvml.NVMLError, OSError):
        return []


class Process(Protocol):
    """What is asked about this process of a run."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def local_rank(self) -> int:
        """This process among those of its machine."""
        ...

    def largest(self, value: int) -> int:
        """The largest of all processes."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        ...


def counters_of(process: Process, powercap: Path = POWERCAP) -> list[Counter] | None:
    """What this process reads for the run; an empty list where another reads for it, None where what it should read is not there."""
    if process.device.type == "cuda":
        return nvml_counters(process.device) or None
    return (rapl_counters(powercap) or None) if process.local_rank == 0 else []


class EnergyReports:
    """This rank's part in counting the energy of a run. Silent where one rank cannot tell: a part would pass for the whole."""

    def __init__(self, process: Process, counters: Iterable[Counter] | None) -> None:
        """counters: see `counters_of`. Collective."""
        self.process, self.counters = process, list(counters or ())
        self.known = not process.largest(int(counters is None))
        self._joules, self._steps, self._broken = 0.0, 0, False

    def begin(self) -> None:
        """Before the first step: what was taken until now is not counted."""
        self._taken()

    def count(self, *, last: bool = False) -> dict[str, float] | None:
        """After every step; every EVERY steps, and at the `last`: joules of all ranks, and steps, since the time before. Collective."""
        self._joules += self._taken()
        self._steps += 1
        return self.rest() if last or self._steps >= EVERY else None

    def rest(self) -> dict[str, float] | None:
        """The same of the steps that were not told yet, up to the last of them; None where there are none. Collective."""
        if not self.known or not self._steps:
            return None
        joules, broken = self.process.sum(torch.tensor([self._joules, float(self._broken)], dtype=torch.float64, device=self.process.device)).tolist()
        steps, self._joules, self._steps = self._steps, 0.0, 0
        self.known = not broken
        return {"joules": joules, "steps": steps} if self.known else None

    def _taken(self) -> float:
        try:
            return sum(counter.taken() for counter in self.counters) if self.known else 0.0
        except OSError:
            self._broken = True
            return 0.0


def _microjoules(file: Path) -> Callable[[], float]:
    return lambda: 1e-6 * int(file.read_text())
