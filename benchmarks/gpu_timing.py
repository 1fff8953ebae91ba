"""One case of benchmarks/gpu.py: compared with its reference, then timed beside its rivals and the ceilings of the machine."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_SECONDS_A_MEASUREMENT = 0.4
_LONG_SECONDS = 0.3  # calls that take this long vary little, and many of them would eat the time of all others
_FLUSH_BYTES = 2**29  # beyond every cache, and long enough to write that the host has prepared a call meanwhile


def run_case(case: dict[str, Any], device: torch.device, ceilings: dict[str, float], *, timed: bool) -> dict[str, Any]:
    """Compare, then time: the fields of a row."""
    row: dict[str, Any] = {}
    first = case["make"](0)
    if case.get("reference") is not None:
        row |= compare(case, first)
    if not timed:
        return row
    # Two sets of inputs take turns, and the cache is overwritten before every call: what is read comes from memory.
    copies = [first, *(case["make"](seed) for seed in range(1, case.get("copies", 2)))]
    row |= measure(case["kernel"], copies, device) | _floor(case, ceilings)
    if row.get("floor_ms"):
        row["share"] = row["floor_ms"] / row["median_ms"]
    if device.type == "cuda" and (row["median_ms"] < 2 or case.get("graph")):
        row["graph"] = attempt(lambda: measure(_captured(case["kernel"], first), [()], device))
        if row.get("floor_ms") and "median_ms" in row["graph"]:
            row["graph"]["share"] = row["floor_ms"] / row["graph"]["median_ms"]
    if "tokens" in case:
        row["tokens_per_second"] = 1e3 * case["tokens"] / row["median_ms"]
    row["rivals"] = {}
    for name, rival in case.get("rivals", {}).items():
        result = attempt(lambda rival=rival: measure(rival, copies, device))
        if "median_ms" in result:
            result["ratio"] = result["median_ms"] / row["median_ms"]
            if device.type == "cuda" and case.get("graph"):
                result["graph"] = attempt(lambda rival=rival: measure(_captured(rival, first), [()], device))
        row["rivals"][name] = result
    if "conclude" in case:
        row |= attempt(lambda: case["conclude"](row, first, ceilings))
    if device.type == "cuda":
        del copies, first
        torch.cuda.empty_cache()
    return row


def compare(case: dict[str, Any], inputs: tuple) -> dict[str, Any]:
    """The largest relative error of the kernel's outputs, and whether it is allowed. Memory that the kernel does not write holds NaN."""
    with poisoned():
        found = case["kernel"](*inputs)
    expected = case["reference"](*inputs)
    found, expected = ((tensors,) if torch.is_tensor(tensors) else tuple(tensors) for tensors in (found, expected))
    if [tuple(tensor.shape) for tensor in found] != [tuple(tensor.shape) for tensor in expected]:
        return {"error": "shapes differ", "passed": False}
    errors = [relative_error(left, right) for left, right in zip(found, expected, strict=True)]
    error = math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)
    dtypes = {tensor.dtype for tensor in (*inputs, *found) if torch.is_tensor(tensor)}
    allowed = case.get("tolerance") or max((TOLERANCE[dtype] for dtype in dtypes if dtype in TOLERANCE), default=0.0)
    # Records are read by strict readers too, and JSON has neither NaN nor infinity.
    return {"error": error if math.isfinite(error) else str(error), "tolerance": allowed, "passed": error <= allowed}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||; for whole numbers the share that differs, where one is too many. NaN where either has one."""
    if not expected.dtype.is_floating_point:
        return math.inf if bool((found != expected).any()) else 0.0
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


class poisoned:
    """Within it torch fills what `empty` gives out: floating point with NaN, whole numbers with their largest."""

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self.before[0], warn_only=self.before[1])


def measure(call: Callable[..., Any], copies: list[tuple], device: torch.device) -> dict[str, Any]:
    """Median and quartiles of a call's time in milliseconds: device events between which nothing else runs, after warming up."""
    cuda = device.type == "cuda"
    call(*copies[0])
    flush = torch.empty(max(2 * l2_bytes(), _FLUSH_BYTES), dtype=torch.int8, device=device) if cuda else None
    seconds = _times(call, copies, 2, flush)[-1]
    is_long = seconds > _LONG_SECONDS
    if cuda and not is_long:
        seconds = _times(call, copies, 2, flush)[-1]
    repeats = 3 if is_long else min(200 if cuda else 11, max(5, int(_SECONDS_A_MEASUREMENT / max(seconds, 1e-6))))
    times = sorted(1e3 * seconds for seconds in _times(call, copies, repeats, flush))
    low, _, high = statistics.quantiles(times, n=4)
    return {"median_ms": statistics.median(times), "quartiles_ms": [low, high], "repeats": repeats}


def _times(call: Callable[..., Any], copies: list[tuple], repeats: int, flush: torch.Tensor | None) -> list[float]:
    if flush is None:
        times = []
        for turn in range(repeats):
            start = time.perf_counter()
            call(*copies[turn % len(copies)])
            times.append(time.perf_counter() - start)
        return times
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for turn, (start, end) in enumerate(events):
        flush.fill_(turn % 100)  # while it runs, the host prepares the call: its launches are not waited for
        start.record()
        call(*copies[turn % len(copies)])
        end.record()
    torch.cuda.synchronize()
    return [1e-3 * start.elapsed_time(end) for start, end in events]


def _captured(call: Callable[..., Any], inputs: tuple) -> Callable[[], None]:
    """The call as a CUDA graph: its time on the device, without the host's."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(*inputs)
    return graph.replay


def ceilings(device: torch.device, dry: bool) -> dict[str, float]:
    """What this machine reaches: a bf16 product of 8192^3 on random numbers, and a copy of 1 GiB, read and written."""
    side, size = (64, 2**20) if dry else (8192, 2**30)
    product = measure(torch.mm, [tuple(torch.randn(side, side, device=device).bfloat16() for _ in range(2)) for _ in range(2)], device)
    source, target = (torch.empty(size, dtype=torch.int8, device=device) for _ in range(2))
    copy = measure(lambda: target.copy_(source), [()], device)
    return {"matmul_flops": 2 * side**3 / (1e-3 * product["median_ms"]), "copy_bytes_per_second": 2 * size / (1e-3 * copy["median_ms"])}


def _floor(case: dict[str, Any], ceilings: dict[str, float]) -> dict[str, Any]:
    fields: dict[str, Any] = {"bytes": case.get("bytes", 0), "flops": case.get("flops", 0)}
    if ceilings:
        memory, product = fields["bytes"] / ceilings["copy_bytes_per_second"], fields["flops"] / ceilings["matmul_flops"]
        fields |= {"floor_ms": 1e3 * max(memory, product), "bound": "memory" if memory >= product else "compute"}
    return fields


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except Exception as error:  # one row's failure is its own
        return {"failed": message(error)}


def message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip()[:500]


def l2_bytes() -> int:
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 * 2**20
