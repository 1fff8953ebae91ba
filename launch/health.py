"""Whether a node is fit to train, before any trainer starts: its devices, disk and clock, and its connection to the others. What is wrong is told by host.

A node that is slow alone slows all: products and transfers are timed on every node, and compared with the lower median of all.
"""

import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kan_train.launch.place import Place, first_line
from kan_train.launch.spec import JobSpec

MEMORY_USED = 0.05
"""Share of a device's memory that may be in use before training: beyond the driver's own it is another process's."""

DISK_FREE = 1 << 30
"""Bytes that the temporary folder of a node must have free."""

CLOCK_SECONDS = 30.0
"""Largest difference of a node's clock from the first node's: beyond it the logs of the nodes cannot be put in order."""

SLOWER = 3.0
"""A node whose product or transfer takes so many times the median of all is not fit."""

NOTICEABLE_SECONDS = 0.5
"""Below this a difference is noise."""

PRODUCT = {"cuda": 8192, "cpu": 256}
"""Rows and columns of the test product."""

TRANSFER = {"cuda": 1 << 26, "cpu": 1 << 20}
"""Elements of fp32 of the test transfer."""

TOGETHER_SECONDS = 120.0
"""Time for all nodes to come to a sum."""


def check(spec: JobSpec, place: Place, file: Path) -> None:
    """Check this node and, with all others, the connections; write {"problems": {host: text}, "seconds": ...} to `file`. Exits with 1 where there are any."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    started = time.monotonic()
    problems: dict[str, str] = {}
    device = _device(spec)
    found, seconds = [*_disk(spec), *(_devices(spec) if device.type == "cuda" else ())], 0.0
    if not found:
        seconds, wrong = _product(device, spec.processes_per_node)
        found += wrong
    if found:
        problems[place.host] = "; ".join(found)
    problems |= _together(spec, place, device, product=seconds, fit=not found)
    file.write_text(json.dumps({"problems": problems, "seconds": round(time.monotonic() - started, 3), "product_seconds": seconds}))
    sys.stdout.flush()
    # Not sys.exit: a sum that another node does not come to would keep its threads, and this process, alive.
    os._exit(1 if problems else 0)


# --- this node alone ------------------------------------------------------------------------------------------------------------------------------------


def _disk(spec: JobSpec) -> Iterator[str]:
    temporary = tempfile.gettempdir()
    free = shutil.disk_usage(temporary).free
    if free < DISK_FREE:
        yield f"{temporary} has only {free / 1e9:.2f} GB free; clean it, or use cluster.scratch=PATH"
    probe = Path(spec.run_dir) / "logs" / f".writable-{os.getpid()}-{time.time_ns()}"
    try:
        probe.write_bytes(b"kan")
        probe.unlink()
    except OSError as error:
        yield f"the run directory {spec.run_dir} cannot be written ({error.strerror}): is the shared file system mounted?"
    if not Path(spec.working_directory).is_dir():
        yield f"the working directory {spec.working_directory} is not there: is the shared file system mounted?"
    for folder in spec.data:
        if not Path(folder).is_dir():
            yield f"the corpus {folder} is not there: is the shared file system mounted?"


def _device(spec: JobSpec) -> torch.device:
    # run.device=auto takes the CPU where there is no GPU: right on a machine of one's own, but a scheduler was asked for GPUs.
    there = torch.cuda.is_available() if spec.device == "auto" and spec.scheduler == "local" else spec.device != "cpu"
    return torch.device("cuda" if there else "cpu")


def _devices(spec: JobSpec) -> Iterator[str]:
    wanted = spec.processes_per_node
    count = torch.cuda.device_count()
    if not torch.cuda.is_available() or count < wanted:
        yield f"{count} CUDA devices are visible, {wanted} are needed (cluster.devices_per_node; for CPUs: run.device=cpu)"
        return
    for number in range(wanted):
        try:
            free, total = torch.cuda.mem_get_info(number)
        except RuntimeError as error:
            yield f"device {number} does not answer: {first_line(error)}"
            continue
        if free < (1 - MEMORY_USED) * total:
            yield f"device {number} has only {free / 1e9:.1f} of {total / 1e9:.1f} GB free: another process uses it"


def _product(device: torch.device, devices: int) -> tuple[float, list[str]]:
    """Seconds of the slowest device's product, and which devices compute wrongly."""
    size, slowest, problems = PRODUCT[device.type], 0.0, []
    for number in range(devices if device.type == "cuda" else 1):
        place = torch.device("cuda", number) if device.type == "cuda" else device
        try:
            seconds, right = _timed_product(place, size)
        except RuntimeError as error:
            problems.append(f"device {number} cannot compute: {first_line(error)}")
            continue
        slowest = max(slowest, seconds)
        if not right:
            problems.append(f"device {number} computes a wrong product")
    return slowest, problems


def _timed_product(device: torch.device, size: int) -> tuple[float, bool]:
    # Entries are small whole numbers, exact in every type: with x = 1 2 3 1 2 3 ..., (x 1^T)(1 x^T) is size * x x^T.
    x = torch.arange(size, device=device, dtype=torch.float32).remainder(3) + 1
    ones = torch.ones(size, device=device)
    left, right = torch.outer(x, ones), torch.outer(ones, x)
    product = left @ right  # also warms up
    exact = bool(torch.equal(product, size * torch.outer(x, x)))
    _synchronise(device)
    started = time.perf_counter()
    for _ in range(4):
        product = left @ right
    _synchronise(device)
    return time.perf_counter() - started, exact


# --- all nodes together ---------------------------------------------------------------------------------------------------------------------------------


def _together(spec: JobSpec, place: Place, device: torch.device, *, product: float, fit: bool) -> dict[str, str]:
    """Compare what every node measured, and sum over all nodes. Problems of this node, and on the first node those of nodes that do not answer."""
    try:
        store = dist.TCPStore(place.head, place.port, None, False, timedelta(seconds=TOGETHER_SECONDS), wait_for_workers=False)
        shared = dist.PrefixStore(f"health/{place.attempt}", store)
        here = dist.PrefixStore(f"launch/{place.attempt}", store)  # where every node left its host's name when it came
        measured = _exchange(shared, here, place, {"host": place.host, "fit": fit, "product": product})
        unfit = [report["host"] for report in measured if not report["fit"]]
        if unfit:
            return {}  # each of them tells its own problem
        problems = {} if place.node == 0 else _clock(shared, place)
        if place.node == 0:
            _answer_clocks(shared, place)
        if place.nodes > 1:
            transfer = _sum(shared, place, device)
            measured = _exchange(shared, here, place, {"host": place.host, "fit": True, "product": product, "transfer": transfer}, "transfer")
            if place.node == 0:
                problems |= slow_nodes(measured)
        return problems
    except _Absent as absent:
        return dict.fromkeys(absent.hosts, f"did not answer {place.host} during the health check") if place.node == 0 else {}
    except RuntimeError as error:
        return {place.host: f"cannot compute a sum with the other nodes: {first_line(error)} (cluster.network.interface={spec.network_interface!r})"}


class _Absent(Exception):
    """Nodes that did not answer in time."""

    def __init__(self, hosts: list[str]) -> None:
        super().__init__(", ".join(hosts))
        self.hosts = hosts


def slow_nodes(measured: list[dict[str, Any]]) -> dict[str, str]:
    """Host -> problem of those that took far longer than the median for the same work. measured: host, and seconds of `product` and `transfer`."""
    problems = {}
    for what, text in (("product", "a product of matrices"), ("transfer", "a transfer to its neighbour")):
        median = statistics.median_low(report[what] for report in measured)
        for report in measured:
            if report[what] > SLOWER * median + NOTICEABLE_SECONDS:
                problems[report["host"]] = f"{text} took {report[what]:.2f} s, on the other nodes {median:.2f} s"
    return problems


def _exchange(store: Any, here: Any, place: Place, report: dict[str, Any], name: str = "local") -> list[dict[str, Any]]:
    """Every node's report, in the order of the nodes; _Absent names those that gave none in time."""
    store.set(f"{name}/{place.node}", json.dumps(report))
    end, found = time.monotonic() + TOGETHER_SECONDS, {}
    while len(found) < place.nodes:
        for node in range(place.nodes):
            if node not in found and store.check([f"{name}/{node}"]):
                found[node] = json.loads(store.get(f"{name}/{node}"))
        if len(found) < place.nodes and time.monotonic() > end:
            raise _Absent([here.get(f"here/{node}").decode() for node in range(place.nodes) if node not in found])
        time.sleep(0 if len(found) == place.nodes else 0.05)
    return [found[node] for node in range(place.nodes)]


def _clock(store: Any, place: Place) -> dict[str, str]:
    sent = time.time()
    store.set(f"ask/{place.node}", "?")
    first = float(store.get(f"answer/{place.node}"))
    difference = (sent + time.time()) / 2 - first
    # The answer may have waited for others: the first node's clock was read at some time between the two.
    waited = (time.time() - sent) / 2
    if abs(difference) > CLOCK_SECONDS + waited:
        way = "ahead of" if difference > 0 else "behind"
        return {place.host: f"its clock is {abs(difference):.0f} s {way} that of {place.head}: start chrony or ntpd there"}
    return {}


def _answer_clocks(store: Any, place: Place) -> None:
    for node in range(1, place.nodes):
        store.get(f"ask/{node}")
        store.set(f"answer/{node}", repr(time.time()))


def _sum(store: Any, place: Place, device: torch.device) -> float:
    """A sum over all nodes, which must be right; then seconds of an exchange with each neighbour in turn, the shorter of the two.

    The shorter, because a slow link slows the node at its other end too, whose other link is fast.
    """
    if device.type == "cuda":
        torch.cuda.set_device(0)
    here = torch.device("cuda", 0) if device.type == "cuda" else device
    dist.init_process_group(
        "nccl" if here.type == "cuda" else "gloo", store=store, rank=place.node, world_size=place.nodes, timeout=timedelta(seconds=TOGETHER_SECONDS)
    )
    values = torch.full((TRANSFER[here.type],), float(place.node + 1), device=here)
    dist.all_reduce(values)
    if values[0].item() != place.nodes * (place.nodes + 1) / 2 or not bool((values == values[0]).all()):
        raise RuntimeError(f"the sum over all nodes is {values[0].item():g}")
    seconds = [_swap(values, (place.node + shift) ^ 1, shift, place) for shift in (0, 1)]
    dist.barrier()
    dist.destroy_process_group()
    measured = [second for second in seconds if second is not None]
    return min(measured, default=0.0)


def _swap(values: torch.Tensor, partner: int, shift: int, place: Place) -> float | None:
    """Seconds to swap `values` with the neighbour: pairs (0 1)(2 3)... where shift is 0, (1 2)(3 4)... where it is 1. None for a node without one."""
    partner -= shift
    if not 0 <= partner < place.nodes:
        return None
    received = torch.empty_like(values)
    for _ in range(2):  # the first time connects
        started = time.perf_counter()
        if place.node < partner:
            dist.send(values, partner)
            dist.recv(received, partner)
        else:
            dist.recv(received, partner)
            dist.send(values, partner)
        _synchronise(values.device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
