"""A plan: the search over layouts with its assumptions, its money and its front, for people, for programs and as a picture."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kan_train.accounting.flops import flops_per_token
from kan_train.accounting.peaks import known_peak_flops
from kan_train.accounting.prices import Price
from kan_train.config import Config, ConfigError
from kan_train.planner.cost import Money, Reliability, money_at_all_ends, require_positive
from kan_train.planner.devices import device_memory
from kan_train.planner.efficiency import Efficiency
from kan_train.planner.links import GB, INSIDE, NETWORK, Link, Network
from kan_train.planner.quantity import given
from kan_train.planner.search import NOT_SEARCHED, Planned, Result, Space, search
from kan_train.planner.time import NOT_MODELLED, SKEW, Clock

LABELLED = 8
"""Layouts of a front that the picture names."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was planned, and on what it rests."""

    config: Config
    device: str
    memory: int | None
    """Bytes of a device's memory; None: not looked at."""
    tokens: float
    """Of the whole run."""
    price: Price | None
    network: Network
    efficiency: Efficiency
    reliability: Reliability
    clock: Clock
    results: list[Result]
    """One a number of devices."""
    given: tuple[str, ...]
    """Overrides that the user gave, without those of the layout."""
    chosen: tuple[str, ...]
    """Settings that the plan chose because nobody gave them, as overrides."""
    config_dirs: tuple[Path, ...] = ()
    """Folders with configuration groups that the user gave."""
    seconds: float
    """That planning took."""

    @property
    def best(self) -> Planned | None:
        """Cheapest a token, of the fastest layouts of each number of devices: saves and failures, which grow with devices, are counted. None: nothing fits."""
        fitting = [result.fitting[0] for result in self.results if result.fitting]
        return min(fitting, key=lambda one: (self.money(one)["expected"].device_hours, -one.tokens_per_second), default=None)

    def money(self, one: Planned) -> dict[str, Money]:
        """Of a layout, at every end."""
        return money_at_all_ends(self.clock, one.candidate, self.tokens, self.reliability, None if self.price is None else self.price.per_device_hour)

    def mfu(self, one: Planned) -> float | None:
        """Of a layout, as expected; None where the peak is not known."""
        peak = known_peak_flops(self.device, self.config.train.precision, self.config.cluster.peak_tflops)
        return None if peak is None else one.tokens_per_second * flops_per_token(self.config.model).training / peak

    def overrides(self, one: Planned) -> list[str]:
        """A whole run, ready to paste behind `kan train`: folders and settings given, the layout, what was chosen, its steps, and how often to save."""
        batch = self.config.train.global_batch_size * self.config.model.sequence_length
        steps = math.ceil(self.tokens / batch)
        every = min(steps, self.money(one)["expected"].save_every_steps)
        cluster, world = self.config.cluster, one.candidate.layout.world_size
        nodes = [f"cluster.nodes={max(1, world // cluster.devices_per_node)}"] if cluster.scheduler == "slurm" else []
        if nodes and world < cluster.devices_per_node:
            nodes.append(f"cluster.devices_per_node={world}")
        own = {"train.steps", "checkpoint.every", "cluster.nodes", *(word.partition("=")[0] for word in nodes)}
        given = [word for word in self.given if word.partition("=")[0] not in own]
        folders = [word for folder in self.config_dirs for word in ("--config-dir", str(folder))]
        return [*folders, *given, *nodes, *one.candidate.overrides(self.config), *self.chosen, f"train.steps={steps}", f"checkpoint.every={every}"]


def make_plan(
    config: Config, *, devices: Sequence[int], tokens: float, price: Price | None, efficiency: Efficiency, reliability: Reliability,
    pinned: dict[str, int | bool], given_overrides: tuple[str, ...] = (), chosen: tuple[str, ...] = (), config_dirs: Sequence[Path] = (),
    memory_gb: float | None = None, link_gb: float | None = None, network_gb: float | None = None,
) -> Plan:  # fmt: skip
    """Search the layouts of `config` on each number of `devices`. link_gb and network_gb: GB/s each way that large messages reach, of one device.

    ConfigError where the device's link is not known, nodes are not filled, or nothing is sound.
    """
    started = time.perf_counter()
    device, cluster = efficiency.device, config.cluster
    require_positive("--memory", memory_gb, 80)
    _require_whole_nodes(config, devices)
    network = network_of(device, cluster.devices_per_node if cluster.scheduler != "local" else max(devices), link_gb, network_gb)
    memory = round(memory_gb * 1e9) if memory_gb is not None else device_memory(device)
    clock = Clock(config, network, efficiency)
    results = [search(clock, Space(world_size=size, devices_per_node=network.devices_per_node, pinned=pinned), memory) for size in devices]
    return Plan(
        config=config, device=device, memory=memory, tokens=tokens, price=price, network=network, efficiency=efficiency, reliability=reliability, clock=clock,
        results=results, given=given_overrides, chosen=chosen, config_dirs=tuple(config_dirs), seconds=time.perf_counter() - started,
    )  # fmt: skip


def _require_whole_nodes(config: Config, devices: Sequence[int]) -> None:
    node = config.cluster.devices_per_node
    for size in devices:
        if config.cluster.scheduler != "local" and size > node and size % node:
            law = f"--devices {size} must be a multiple of cluster.devices_per_node={node}: machines are rented whole"
            raise ConfigError(f"{law}; use --devices {math.ceil(size / node) * node}")


def network_of(device: str, devices_per_node: int, link_gb: float | None = None, network_gb: float | None = None) -> Network:
    """The links of a cluster of `device`; ConfigError where the one inside a machine is neither known nor given."""
    require_positive("--link", link_gb, 300)
    require_positive("--network", network_gb, 40)
    if link_gb is not None:
        inside = Link(name="given", bandwidth=given(link_gb * GB, f"--link {link_gb:g}"), latency=NETWORK.latency)
    elif device in INSIDE:
        inside = INSIDE[device]
    else:
        raise ConfigError(f"the link between devices {device!r} of a machine is not known; use --link 300: GB/s each way that large messages reach")
    between = NETWORK
    if network_gb is not None:
        between = Link(name="given", bandwidth=given(network_gb * GB, f"--network {network_gb:g}"), latency=NETWORK.latency)
    return Network(devices_per_node=devices_per_node, inside=inside, between=between)


def plan_as_json(plan: Plan, top: int) -> dict[str, Any]:
    """As JSON can hold it."""
    return {
        "model": plan.config.model.name, "device": plan.device, "precision": plan.config.train.precision, "tokens": plan.tokens,
        "global_batch_size": plan.config.train.global_batch_size, "price": None if plan.price is None else plan.price.as_row(),
        "chosen": list(plan.chosen), "seconds": plan.seconds, "assumptions": assumptions(plan),
        "best": None if plan.best is None else _layout_as_json(plan, plan.best) | {"overrides": plan.overrides(plan.best)},
        "devices": [
            {
                "devices": result.world_size, "looked_at": result.looked_at, "timed": result.timed, "weighed": result.weighed, "fitting": len(result.fitting),
                "layouts": [_layout_as_json(plan, one) for one in result.fitting[:top]], "front": [_layout_as_json(plan, one) for one in result.front()],
                "rejected": [{"reason": name, "layouts": count, "example": result.rejected.examples[name]} for name, count in result.rejected.counts.items()],
            }
            for result in plan.results
        ],
        "not_modelled": [*NOT_MODELLED, *NOT_SEARCHED],
    }  # fmt: skip


def assumptions(plan: Plan) -> dict[str, dict[str, object]]:
    """Every quantity that the plan rests on, by name."""
    reliability, network, efficiency = plan.reliability, plan.network, plan.efficiency
    found = {
        "FLOP/s of products": efficiency.products, **{f"FLOP/s of {part}": one for part, one in efficiency.parts.items()},
        "seconds a block besides": efficiency.block_seconds, "bytes/s of memory": efficiency.memory,
        "bytes/s inside a machine": network.inside.bandwidth, "seconds a hop inside": network.inside.latency,
        "bytes/s between machines": network.between.bandwidth, "seconds a hop between": network.between.latency, "skew of routing": SKEW,
        "failures a device-hour": reliability.failures, "bytes/s of storage, a device": reliability.storage,
        "seconds of a restart": reliability.restart, "stall, seconds a GB": reliability.stall,
    }  # fmt: skip
    return {name: one.as_json() for name, one in found.items()}


def _layout_as_json(plan: Plan, one: Planned) -> dict[str, Any]:
    money = plan.money(one)
    return {
        "layout": str(one.candidate.layout), "micro_batch_size": one.candidate.micro_batch_size, "recompute": one.candidate.recompute,
        "offload": one.candidate.offload, "devices": one.candidate.layout.world_size, "step_seconds": one.step.total, "step": dict(vars(one.step)),
        "tokens_per_second": one.tokens_per_second, "mfu": plan.mfu(one), "memory_bytes": one.memory.total, "memory": one.memory.parts,
        "headroom_bytes": one.headroom, "money": {end: _money_as_json(found) for end, found in money.items()},
    }  # fmt: skip


def _money_as_json(money: Money) -> dict[str, float | None]:
    # JSON has no infinity: a run without an end has no hours.
    return {name: None if value is not None and math.isinf(value) else value for name, value in (vars(money) | {"goodput": money.goodput}).items()}


def require_picture(path: Path) -> None:
    """ConfigError unless `write_front` can write to `path`: a format of Matplotlib's, in a folder that there is."""
    from matplotlib.figure import Figure

    formats = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in formats or path.is_dir():
        raise ConfigError(f"--plot {path} must be a file that ends with one of {', '.join(f'.{name}' for name in formats)}; use --plot {path.stem}.png")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: {path.parent} is not a folder; use --plot {path.name}")


def write_front(plan: Plan, path: Path) -> None:
    """The layouts that fit and their front, as a picture in the format that the file's name ends with: tokens a second against memory left."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    for number, result in enumerate(plan.results):
        color = f"C{number}"
        left, speeds = [one.headroom / 1e9 for one in result.fitting], [one.tokens_per_second for one in result.fitting]
        axes.scatter(left, speeds, s=8, alpha=0.3, color=color)
        front = result.front()
        axes.plot([one.headroom / 1e9 for one in front], [one.tokens_per_second for one in front], "o-", color=color, label=f"{result.world_size:,} devices")
        for place, one in enumerate(front[:LABELLED], start=1):
            axes.annotate(f"{place}", (one.headroom / 1e9, one.tokens_per_second), fontsize=9, xytext=(5, 5), textcoords="offset points", color=color)
            axes.plot([], [], " ", label=f"{place}  {one.candidate}")
    axes.set(title=f"{plan.config.model.name} on {plan.device}", xlabel="memory left on a device, GB", ylabel="tokens a second and device")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def dump(plan: Plan, top: int) -> str:
    """`plan_as_json` as text."""
    return json.dumps(plan_as_json(plan, top), indent=1)
