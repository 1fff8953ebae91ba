"""Memory of devices as their makers publish it, for the question whether a model fits. A device that is not in the table has none: none is guessed.

Names are those of `kan_train.accounting.peaks`. Drivers and the processes' own libraries keep a part of it, often 1 to 2 GB.
"""

GB = 10**9

DEVICE_MEMORY = {
    "NVIDIA A100-SXM4-40GB": 40 * GB,
    "NVIDIA A100-SXM4-80GB": 80 * GB,
    "NVIDIA A100-PCIE-40GB": 40 * GB,
    "NVIDIA A100 80GB PCIe": 80 * GB,
    "NVIDIA H100 80GB HBM3": 80 * GB,
    "NVIDIA H100 PCIe": 80 * GB,
    "NVIDIA H100 NVL": 94 * GB,
    "NVIDIA H200": 141 * GB,
    "NVIDIA L40S": 48 * GB,
    "AMD Instinct MI300X": 192 * GB,
}
"""Bytes of device memory, by the makers' datasheets."""

RESERVED = 2 * GB
"""Bytes of a device left to CUDA's context, NCCL and libraries: an assumption, not a measurement."""
FRAGMENTED = 0.05
"""Share of what tensors take that the allocator loses beside them: an assumption, not a measurement."""
ALLOWANCE = f"{RESERVED // GB} GB and {FRAGMENTED:.0%} are left to CUDA, NCCL and the allocator's fragments"


def usable_memory(device_bytes: int) -> int:
    """Bytes that live tensors may take of a device's memory."""
    return max(0, int((device_bytes - RESERVED) / (1 + FRAGMENTED)))


def device_memory(device_name: str | None) -> int | None:
    """Bytes of the memory of one device, or None if it is not known. device_name: cluster.device_name."""
    return None if device_name is None else DEVICE_MEMORY.get(device_name.strip())
