"""How fast a device computes: FLOP/s by part of the model, from benchmark results of the project, from the user, or assumed after published runs.

FLOP/s are executed FLOPs (`kan_train.accounting.flops`) over seconds, elementwise work among them. A result counts where it was measured on the very device
in the very precision; where there is none, the share of the peak is what published runs of dense models on the same kind of device lead to
(`kan_train.planner.published`), and that is said.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kan_train.accounting.flops import flops_per_token
from kan_train.accounting.peaks import known_peak_flops
from kan_train.config import ConfigError, ModelConfig
from kan_train.config.compose import compose_train
from kan_train.planner.quantity import Quantity, assumed, given

PARTS = (
    "ada_projections", "ada_conv", "ada_scan", "attention_projections", "attention_scores", "ffn", "scoring", "projection", "groves", "shared_grove",
    "auxiliary_loss", "head",
)  # fmt: skip
"""Parts of `kan_train.accounting.flops` that may have an efficiency of their own."""

_TB = 1e12
MEMORY_BANDWIDTH = {
    "NVIDIA A100-SXM4-40GB": 1.555 * _TB,
    "NVIDIA A100-SXM4-80GB": 2.039 * _TB,
    "NVIDIA A100-PCIE-40GB": 1.555 * _TB,
    "NVIDIA A100 80GB PCIe": 1.935 * _TB,
    "NVIDIA H100 80GB HBM3": 3.35 * _TB,
    "NVIDIA H100 PCIe": 2.0 * _TB,
    "NVIDIA H100 NVL": 3.9 * _TB,
    "NVIDIA H200": 4.8 * _TB,
    "NVIDIA B200": 8.0 * _TB,
    "NVIDIA L40S": 0.864 * _TB,
    "AMD Instinct MI300X": 5.3 * _TB,
}
"""Bytes a second of device memory, by the makers' datasheets."""

LAUNCHES = assumed(0.0, 0.0, 2e-4, "launching kernels: hidden behind them in large models")
HOST_MEMORY = assumed(50e9, 20e9, 100e9, "a share of the host's memory bandwidth for each device; not measured")
_ONE_B = "training, forward + backward, B 8 T 4096 kan_1b bf16"


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Speeds of one device in one precision."""

    device: str
    """As the table of peaks names it, or "cpu"."""
    products: Quantity
    """FLOP/s of every part that has no entry of its own."""
    parts: dict[str, Quantity] = field(default_factory=dict)
    """FLOP/s of single parts."""
    block_seconds: Quantity = LAUNCHES
    """Of every block and micro-batch, forward and backward, whatever its size."""
    memory: Quantity
    """Bytes a second that the optimizer's step reads and writes."""
    host_memory: Quantity = HOST_MEMORY
    """Bytes a second of an optimizer's step in the host's memory."""
    overlaps: bool = True
    """Whether communication that the engine starts early runs beside the computation: on an accelerator, not on a CPU."""

    def of(self, part: str) -> Quantity:
        """FLOP/s of a part."""
        return self.parts.get(part, self.products)

    def as_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "device": self.device, "products": self.products.as_json(), "parts": {name: one.as_json() for name, one in self.parts.items()},
            "block_seconds": self.block_seconds.as_json(), "memory": self.memory.as_json(), "host_memory": self.host_memory.as_json(),
        }  # fmt: skip


def efficiency_of(
    model: ModelConfig, device: str | None, precision: str, *, results: Path, share: str | None = None, peak_tflops: float | None = None
) -> Efficiency:
    """What `device` reaches in training `model`.

    device: cluster.device_name, or "cpu". share: what the user gives, a share of the peak ("0.45"), for single parts too ("0.45,groves=0.3").
    results: folder of benchmark results. ConfigError where neither a result nor a peak is known.
    """
    if device == "cpu":
        return _on_cpu(model, results, share, peak_tflops)
    peak = None if device is None else known_peak_flops(device, precision, peak_tflops)
    if device is None or peak is None:
        raise ConfigError(
            f"the speed of cluster.device_name={device} in {precision} is not known: no peak, and none is guessed; "
            "use cluster.device_name='NVIDIA H100 80GB HBM3', or cluster.peak_tflops with the dense TFLOP/s of your device"
        )
    bandwidth = MEMORY_BANDWIDTH.get(device, peak / 300)
    known = "datasheet" if device in MEMORY_BANDWIDTH else "a byte for 300 FLOPs, as of an H100; not known"
    why = f"80% (60% to 92%) of {bandwidth / _TB:.2f} TB/s: {known}"
    memory = assumed(0.8 * bandwidth, 0.6 * bandwidth, 0.92 * bandwidth, why)
    found = Efficiency(device=device, products=_measured_on(device, model, precision, results) or _assumed(peak, precision), memory=memory)
    return found if share is None else _with_shares(found, share, peak)


def _measured_on(device: str, model: ModelConfig, precision: str, results: Path) -> Quantity | None:
    """From a model of 1 B that was trained on one such device: a KAN for a KAN, its dense twin for a dense model."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in device.lower())
    files = sorted(results.glob(f"????-??-??-{slug}-kernels.json"))
    if precision != "bf16" or not files:
        return None
    rows = [row for row in json.loads(files[-1].read_text(encoding="utf-8"))["rows"] if row["name"] == _ONE_B]
    if not rows:
        return None
    name = "kan_1b" if model.has_groves else "dense_1b_total"
    row = rows[-1] if name == "kan_1b" else rows[-1]["rivals"][name]
    config = compose_train([f"model={name}", "model.sequence_length=4096"], world_size=1)
    flops = 8 * 4096 * flops_per_token(config.model).executed()
    low, high = row["quartiles_ms"]
    rates = [1000 * flops / milliseconds for milliseconds in (row["median_ms"], high, low)]
    return Quantity(value=rates[0], low=rates[1], high=rates[2], status="measured", source=f"benchmarks/results/{files[-1].name}, row {_ONE_B!r}, {name}")


def _assumed(peak: float, precision: str) -> Quantity:
    from kan_train.planner.published import calibrated_share  # reads the published runs, which are planned as well

    share = calibrated_share()
    if precision == "fp32":
        share = replace(share, source=f"{share.source}; of bf16 runs, taken for fp32")
    return share.times(peak)


def _with_shares(found: Efficiency, text: str, peak: float | None) -> Efficiency:
    if peak is None:
        raise ConfigError(f"--efficiency {text} is a share of a peak, which is not known for {found.device}; use cluster.peak_tflops")
    products, parts = found.products, dict(found.parts)
    for word in text.split(","):
        part, _, number = word.strip().rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if not 0 < value <= 1 or (part and part not in PARTS):
            law = "must be a share of the peak above 0 and up to 1, for all or for one of"
            raise ConfigError(f"--efficiency {word} {law} {', '.join(PARTS)}; use 0.45,groves=0.3")
        if part:
            parts[part] = given(value * peak, f"--efficiency {word}")
        else:
            products = given(value * peak, f"--efficiency {word}")
    return replace(found, products=products, parts=parts)


def _on_cpu(model: ModelConfig, results: Path, share: str | None, peak_tflops: float | None) -> Efficiency:
    memory = assumed(8e9, 4e9, 16e9, "a core's share of its memory's bandwidth; not measured")
    files = sorted(results.glob("????-??-??-cpu-training-speed.json"))
    place = 0 if model.has_groves else 1
    rows = [row["models"][place] for row in json.loads(files[-1].read_text(encoding="utf-8"))["rows"] if row["threads"] == 1] if files else []
    if rows:
        rates = sorted(1e9 * row["achieved_gflops"] for row in rows)
        source = f"benchmarks/results/{files[-1].name}, {rows[0]['name']} with one thread, its optimizer's step among it"
        products = Quantity(value=rates[len(rates) // 2], low=0.8 * rates[0], high=1.2 * rates[-1], status="measured", source=source)
    elif share is None or peak_tflops is None:
        raise ConfigError("no speed of a CPU was measured here; use --efficiency 0.5 with cluster.peak_tflops=0.1, or --results with a cpu-training-speed.json")
    else:
        products = given(1e12 * peak_tflops, "cluster.peak_tflops")
    block = assumed(2e-3, 1e-3, 4e-3, "PyTorch's calls of a block on a CPU core; not measured")
    found = Efficiency(device="cpu", products=products, memory=memory, block_seconds=block, overlaps=False)
    return found if share is None else _with_shares(found, share, None if peak_tflops is None else 1e12 * peak_tflops)
