"""How long a message takes: by its size, by the links it crosses, and by how many ranks of its group share a machine.

    all-reduce                    2 (n - 1)/n S / b + 2 a log2 n          n ranks, S bytes, r of the ranks on one machine
    all-gather, reduce-scatter      (n - 1)/n S / b +   a log2 n          b = the link inside a machine where r = n, else at most r network adapters
    all-to-all                    max((n - r)/n S / network, (r - 1)/n S / inside) + a log2 n
    send                          S / (network or inside) + a

A ring through several machines enters and leaves each by the adapters of the ranks that it has there, one a device, as NCCL builds them. Ranks fill machines in
their order. Bandwidths are of one direction.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from kan_train.config.layout import DENSE_ORDER, GROUPS, GROVE_ORDER, Layout
from kan_train.planner.message import Message
from kan_train.planner.quantity import Quantity, assumed

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Link:
    """What a rank's messages go through."""

    name: str
    """For people."""
    bandwidth: Quantity
    """Bytes a second that one rank sends while it receives as many, as reached by large messages."""
    latency: Quantity
    """Seconds of a message without length, a hop."""


def _reached(name: str, nominal_gb: float, source: str, latency: float) -> Link:
    share = "of it, 80% (60% to 92%) is reached by large messages: assumed, after the bus bandwidths that users of nccl-tests publish"
    bandwidth = assumed(0.8 * nominal_gb * GB, 0.6 * nominal_gb * GB, 0.92 * nominal_gb * GB, f"{nominal_gb:g} GB/s each way: {source}; {share}")
    about = "order of magnitude of NCCL's small messages, between 0.4 and 2.5 times it"
    return Link(name=name, bandwidth=bandwidth, latency=assumed(latency, 0.4 * latency, 2.5 * latency, about))


_NVLINK_3 = _reached("NVLink 3", 300, "NVIDIA A100 datasheet: 600 GB/s, both directions together", 8e-6)
_NVLINK_4 = _reached("NVLink 4", 450, "NVIDIA H100 and H200 datasheets: 900 GB/s, both directions together", 8e-6)
_NVLINK_5 = _reached("NVLink 5", 900, "NVIDIA Blackwell datasheet: 1.8 TB/s, both directions together", 8e-6)
_PCIE_4 = _reached("PCIe 4 x16", 32, "PCI Express 4.0: 16 lanes of 16 GT/s", 12e-6)
_PCIE_5 = _reached("PCIe 5 x16", 64, "PCI Express 5.0: 16 lanes of 32 GT/s", 12e-6)

INSIDE = {
    "NVIDIA A100-SXM4-40GB": _NVLINK_3,
    "NVIDIA A100-SXM4-80GB": _NVLINK_3,
    "NVIDIA A100-PCIE-40GB": _PCIE_4,
    "NVIDIA A100 80GB PCIe": _PCIE_4,
    "NVIDIA H100 80GB HBM3": _NVLINK_4,
    "NVIDIA H100 PCIe": _PCIE_5,
    "NVIDIA H100 NVL": _PCIE_5,
    "NVIDIA H200": _NVLINK_4,
    "NVIDIA B200": _NVLINK_5,
    "NVIDIA L40S": _PCIE_4,
    "AMD Instinct MI300X": _reached("Infinity Fabric", 448, "AMD Instinct MI300X platform: 7 links of 64 GB/s each way", 10e-6),
}
"""Device -> the link between the devices of a machine."""
NETWORK = _reached("400 Gb/s a device", 50, "one 400 Gb/s adapter a device, as NVIDIA's DGX H100 reference architecture has", 15e-6)
"""Between machines, unless the user says otherwise."""
HOST = _PCIE_5
"""Between a device and its host's memory."""

_AROUND = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}


@dataclass(frozen=True, kw_only=True)
class Network:
    """The links of a cluster."""

    devices_per_node: int
    """Ranks of a machine."""
    inside: Link
    """Between them."""
    between: Link
    """Between machines, of one rank."""

    def seconds(self, messages: Iterable[Message], layout: Layout, end: str = "expected") -> float:
        """All messages, one after the other. end: one of `kan_train.planner.quantity.ENDS`."""
        return sum(self.message_seconds(one, layout, end) for one in messages)

    def message_seconds(self, message: Message, layout: Layout, end: str = "expected") -> float:
        """The calls of one message; what is received is counted where it is sent."""
        if message.operation == "receive":
            return 0.0
        ranks, size = message.ranks, message.total
        here = ranks_on_a_node(layout, message.group, self.devices_per_node)
        inside, between = self.inside.bandwidth.rate(end), self.between.bandwidth.rate(end)
        link = self.inside if here >= ranks else self.between
        hops = math.ceil(math.log2(ranks)) if message.operation != "send" else 1
        latency = message.calls * link.latency.burden(end) * hops
        if message.operation == "send":
            return latency + size / (inside if here > 1 else between)
        if message.operation == "all-to-all":
            return latency + max((ranks - here) / ranks * size / between, (here - 1) / ranks * size / inside)
        around = _AROUND[message.operation]
        bandwidth = inside if here >= ranks else min(inside, here * between)
        return around * (latency + (ranks - 1) / ranks * size / bandwidth)


def ranks_on_a_node(layout: Layout, group: str, devices_per_node: int) -> int:
    """How many ranks of rank 0's group are on its machine."""
    if group == "default":
        return min(layout.world_size, devices_per_node)
    dense = (layout.world_size, layout.tensor_parallel, layout.context_parallel, layout.pipeline_parallel)
    return _ranks_here((*dense, layout.expert_parallel, layout.expert_tensor_parallel), group, devices_per_node)


@lru_cache(maxsize=65536)
def _ranks_here(sizes: tuple[int, ...], group: str, devices_per_node: int) -> int:
    world, tensor, context, pipeline, expert, expert_tensor = sizes
    layout = Layout(
        world_size=world, tensor_parallel=tensor, context_parallel=context, pipeline_parallel=pipeline, expert_parallel=expert,
        expert_tensor_parallel=expert_tensor,
    )  # fmt: skip
    # Dimension by dimension: the fastest ones lie whole on a machine, the first that reaches beyond it is cut there.
    here, stride = 1, 1
    order = DENSE_ORDER if set(GROUPS[group]) <= set(DENSE_ORDER) else GROVE_ORDER
    for name in order:
        size = layout.size(name)
        here *= max(1, min(size, devices_per_node // stride)) if name in GROUPS[group] else 1
        stride *= size
    return here
