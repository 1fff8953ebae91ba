"""Dense peaks of devices as their makers publish them, for MFU. A device that is not in the table is refused by name: none is guessed.

Names are matched whole, as the driver reports them: a slice of a device (MIG) or another board of the same chip is another device.
"""

import difflib
from dataclasses import dataclass

from kan_train.config.errors import ConfigError, require_choice

PRECISIONS = ("bf16", "fp32")
_A100 = "NVIDIA A100 datasheet"
_H100 = "NVIDIA H100 datasheet (bf16 there is with sparsity: half of it here) and Hopper architecture whitepaper"
_H200 = "NVIDIA H200 datasheet (bf16 there is with sparsity: half of it here)"


@dataclass(frozen=True)
class Peak:
    """TFLOP/s of one device, dense, with fp32 accumulation; None where the source does not say."""

    bf16: float | None
    """On the matrix units."""
    fp32: float | None
    """Without TF32 or other shortened products."""
    source: str
    """Where the numbers come from."""


PEAKS = {
    "NVIDIA A100-SXM4-40GB": Peak(312.0, 19.5, _A100),
    "NVIDIA A100-SXM4-80GB": Peak(312.0, 19.5, _A100),
    "NVIDIA A100-PCIE-40GB": Peak(312.0, 19.5, _A100),
    "NVIDIA A100 80GB PCIe": Peak(312.0, 19.5, _A100),
    "NVIDIA H100 80GB HBM3": Peak(989.4, 66.9, _H100),
    "NVIDIA H100 PCIe": Peak(756.0, 51.2, _H100),
    "NVIDIA H100 NVL": Peak(835.0, 60.0, _H100),
    "NVIDIA H200": Peak(989.4, 66.9, _H200),
    "NVIDIA GH200 120GB": Peak(989.4, 66.9, "NVIDIA GH200 datasheet (bf16 there is with sparsity: half of it here)"),
    "NVIDIA GH200 480GB": Peak(989.4, 66.9, "NVIDIA GH200 datasheet (bf16 there is with sparsity: half of it here)"),
    "NVIDIA B200": Peak(2250.0, None, "NVIDIA Blackwell datasheet (bf16 there is with sparsity: half of it here)"),
    "NVIDIA L40S": Peak(362.05, 91.6, "NVIDIA L40S datasheet"),
    "AMD Instinct MI300X": Peak(1307.4, 163.4, "AMD Instinct MI300X datasheet"),
}


def peak_flops(device_name: str, precision: str, peak_tflops: float | None = None) -> float:
    """Dense peak of one device in FLOP/s.

    device_name: as torch.cuda.get_device_name reports it, or cluster.device_name. precision: bf16 or fp32, as train.precision.
    peak_tflops: cluster.peak_tflops, which goes before the table, and is how an unknown device (any CPU) gets a peak. ConfigError for another
    precision, and for a device without a known peak.
    """
    peak = known_peak_flops(device_name, precision, peak_tflops)
    if peak is not None:
        return peak
    similar = [name for name in difflib.get_close_matches(device_name, PEAKS, n=3) if known_peak_flops(name, precision) is not None]
    hint = f" (cluster.device_name names the device by hand; similar names in the table: {', '.join(similar)})" if similar else ""
    raise ConfigError(
        f"the peak of {device_name.strip()!r} in {precision} is not known, and none is guessed; set cluster.peak_tflops to the dense TFLOP/s of one device "
        f"in {precision}, from its datasheet or measured: cluster.peak_tflops=1.0 would be 1e12 FLOP/s{hint}"
    )


def known_peak_flops(device_name: str, precision: str, peak_tflops: float | None = None) -> float | None:
    """As `peak_flops`, but None for a device without a known peak: a run trains there too, and shows no share of a peak."""
    require_choice("train.precision", precision, PRECISIONS)
    if peak_tflops is not None:
        return peak_tflops * 1e12
    peak = PEAKS.get(device_name.strip())
    tflops = None if peak is None else peak.bf16 if precision == "bf16" else peak.fp32
    return None if tflops is None else tflops * 1e12
