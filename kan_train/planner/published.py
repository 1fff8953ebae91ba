"""Published training runs, planned: on some the speed of the products is calibrated, the others are predicted.

One number is fitted: the share of its peak that a device reaches in the products of a large model. The rows, their layouts and sources are in
conf/table/published.yaml, their speeds in the cells of conf/table. Beside it stands the predictor without a planner: the same MFU for every run.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from kan_train.accounting.flops import flops_per_token
from kan_train.accounting.peaks import peak_flops
from kan_train.config import AttentionConfig, Config, GroveConfig, ModelConfig, ParallelConfig, TrainConfig
from kan_train.config.compose import compose_train
from kan_train.config.layout import Layout, layout_of
from kan_train.planner.efficiency import MEMORY_BANDWIDTH, Efficiency
from kan_train.planner.links import GB, INSIDE, NETWORK, Network
from kan_train.planner.paper.table import cells_of, published_rows
from kan_train.planner.quantity import Quantity, assumed
from kan_train.planner.time import Clock

DEVICES_PER_NODE = 8
"""Of all these runs."""
BRACKET = (0.05, 0.98)
"""Shares of the peak between which the fitted one is looked for."""


@dataclass(frozen=True)
class Row:
    """A published run."""

    name: str
    speed: float
    """Tokens a second and device, as published or computed from what was published."""
    peak: float
    """Dense FLOP/s that both predictors count with: of bf16, or of FP8 where the run used it."""
    flops: float
    """Training FLOPs of a token."""
    fp8: bool
    """Whether the run used FP8."""
    calibrates: bool
    """Whether the one number is fitted on it, where the others are predicted."""
    clock: Clock
    layout: Layout
    micro_batch_size: int
    source: str
    """Of the speed, and of the layout."""

    @property
    def mfu(self) -> float:
        """Of the published speed."""
        return self.speed * self.flops / self.peak

    def predicted(self, share: float) -> float:
        """Tokens a second and device, planned with products at `share` of the peak."""
        efficiency = dataclasses.replace(self.clock.efficiency, products=assumed(share * self.peak, share * self.peak, share * self.peak, "a trial"))
        seconds = self.clock.at(efficiency).step(self.layout, self.micro_batch_size).total
        return self.clock.config.train.global_batch_size * self.clock.config.model.sequence_length / seconds / self.layout.world_size


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A run that was predicted from others."""

    name: str
    published: float
    """Tokens a second and device."""
    planned: float
    """By the planner."""
    constant: float
    """By the same MFU for all."""
    share: float
    """Of the peak, fitted on the others."""

    @property
    def planned_error(self) -> float:
        """Planned over published, less 1."""
        return self.planned / self.published - 1

    @property
    def constant_error(self) -> float:
        """Constant MFU over published, less 1."""
        return self.constant / self.published - 1


@cache
def rows() -> tuple[Row, ...]:
    """All published rows, ready to be planned."""
    published, shapes = published_rows()
    cells = cells_of([row["speed"]["cell"] for row in published.values() if "cell" in row["speed"]])
    found = []
    for name, row in published.items():
        model, device = _model(name, row["model"], shapes), row["device"]
        config = Config(
            model=model, train=TrainConfig(global_batch_size=row["batch"], micro_batch_size=row["micro_batch"], precision="bf16"),
            parallel=ParallelConfig(**row["layout"]),
        )  # fmt: skip
        flops, peak = flops_per_token(model).training, 1e12 * row["fp8_peak"] if "fp8_peak" in row else peak_flops(device, "bf16")
        speed, source = row["speed"], row["speed"].get("source")
        if "cell" in speed:
            source = f"cell {speed['cell']} of conf/table"
        tokens = cells[speed["cell"]].value if "cell" in speed else 1e12 * speed["tflops"] / flops if "tflops" in speed else speed["value"]
        inside = INSIDE[device]
        if "link_gb" in row:
            value, low, high = (share * row["link_gb"] * GB for share in (0.8, 0.6, 0.92))
            inside = dataclasses.replace(inside, bandwidth=assumed(value, low, high, row["link_source"]))
        memory = 0.8 * MEMORY_BANDWIDTH[device]
        bandwidth = assumed(memory, memory, memory, "80% of the datasheet")
        start = Efficiency(device=device, products=assumed(peak, peak, peak, "to be fitted"), memory=bandwidth)
        network = Network(devices_per_node=DEVICES_PER_NODE, inside=inside, between=NETWORK)
        clock = Clock(config, network, start, hides=row.get("hides", ()))
        layout = layout_of(config, row["gpus"])
        assert tokens is not None
        calibrates = bool(row.get("calibrates", False))
        source = f"{source}; layout: {row['layout_source']}"
        found.append(Row(name, tokens, peak, flops, "fp8_peak" in row, calibrates, clock, layout, row["micro_batch"], source))
    return tuple(found)


def fitted_share(chosen: Sequence[Row]) -> float:
    """The share of the peak at which the planned speeds of `chosen` are right in the geometric mean."""

    def error(share: float) -> float:
        return sum(math.log(row.predicted(share) / row.speed) for row in chosen)

    low, high = BRACKET
    for _ in range(16):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if error(middle) < 0 else (low, middle)
    return math.sqrt(low * high)


def predictions(*, leave_one_out: bool) -> list[Prediction]:
    """Every row predicted from others: from all the rest, or from those that calibrate (which are left out then)."""
    everything = rows()
    fixed = [row for row in everything if row.calibrates]
    share = None if leave_one_out else fitted_share(fixed)
    found = []
    for row in everything:
        if not leave_one_out and row.calibrates:
            continue
        others = [other for other in everything if other is not row] if leave_one_out else fixed
        own = fitted_share(others) if share is None else share
        mfu = math.exp(sum(math.log(other.mfu) for other in others) / len(others))
        found.append(Prediction(name=row.name, published=row.speed, planned=row.predicted(own), constant=mfu * row.peak / row.flops, share=own))
    return found


def mean_error(errors: Sequence[float]) -> float:
    """Mean absolute logarithm of predicted over published: 0.1 is 10% either way."""
    return sum(abs(math.log1p(error)) for error in errors) / len(errors)


@cache
def calibrated_share() -> Quantity:
    """Share of a device's peak that the products reach, by the published runs that calibrate; the interval spans what any run in bf16 alone would give."""
    chosen = [row for row in rows() if row.calibrates]
    single = [fitted_share([row]) for row in rows() if not row.fp8]
    source = f"fitted on published runs ({', '.join(row.name for row in chosen)}: conf/table/published.yaml); "
    source += "the ends are those of all runs in bf16; not measured here"
    return assumed(fitted_share(chosen), min(single), max(single), source)


def _model(name: str, given: str | dict[str, Any], shapes: dict[str, Any]) -> ModelConfig:
    if isinstance(given, str) and given not in shapes:
        return compose_train([f"model={given}"], world_size=1).model
    shape = dict(shapes[given] if isinstance(given, str) else given)
    shape.pop("source", None)
    attention, grove = AttentionConfig(**shape.pop("attention", {})), GroveConfig(**shape.pop("grove", {}))
    model = ModelConfig(name=name, attention=attention, grove=grove, **shape)
    model.validate()
    return model
