"""Two models on one cluster, planned: how many times as many tokens a second the first trains."""

from functools import cache

from kan_train.accounting.peaks import peak_flops
from kan_train.config.compose import compose_train
from kan_train.config.layout import layout_of
from kan_train.planner.efficiency import MEMORY_BANDWIDTH, Efficiency
from kan_train.planner.plan import network_of
from kan_train.planner.published import calibrated_share
from kan_train.planner.quantity import ENDS, assumed
from kan_train.planner.time import Clock

DEVICES_PER_NODE = 8
Layouts = tuple[tuple[str, tuple[tuple[str, int | bool], ...]], ...]
"""(model, its settings of `parallel`, with micro_batch_size and activation_checkpointing of `train` among them), the one and the other."""


@cache
def planned_ratio(layouts: Layouts, device: str, devices: int, batch: int) -> tuple[float, float, float]:
    """(expected, lowest, highest) ratio of the speeds of two models in bf16. batch: sequences a step. ConfigError where a layout is not sound.

    Everything is assumed alike for both: a fast network is fast for both.
    """
    speeds = [_speeds(model, dict(layout), device, devices, batch) for model, layout in layouts]
    ratios = [first / second for first, second in zip(*speeds, strict=True)]
    return ratios[ENDS.index("expected")], min(ratios), max(ratios)


def _speeds(model: str, settings: dict[str, int | bool], device: str, devices: int, batch: int) -> list[float]:
    train = ("micro_batch_size", "activation_checkpointing")
    words = [f"{'train' if name in train else 'parallel'}.{name}={str(value).lower()}" for name, value in settings.items()]
    config = compose_train([f"model={model}", "train.precision=bf16", f"train.global_batch_size={batch}", *words], world_size=devices)
    bandwidth = MEMORY_BANDWIDTH[device]
    efficiency = Efficiency(
        device=device, products=calibrated_share().times(peak_flops(device, "bf16")),
        memory=assumed(0.8 * bandwidth, 0.6 * bandwidth, 0.92 * bandwidth, "80% of the datasheet"),
    )  # fmt: skip
    clock, layout, again = Clock(config, network_of(device, DEVICES_PER_NODE), efficiency), layout_of(config, devices), config.train.activation_checkpointing
    tokens = batch * config.model.sequence_length / devices
    return [tokens / clock.step(layout, config.train.micro_batch_size, recompute=again, end=end).total for end in ENDS]
