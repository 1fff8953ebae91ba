"""A line for one layout that is about to start: how long it will run, and what for."""

from pathlib import Path

from kan_train.accounting.prices import chosen_price
from kan_train.config import Config
from kan_train.config.layout import Layout
from kan_train.planner.candidate import Candidate
from kan_train.planner.cost import counted, money_at_all_ends, reliability_of
from kan_train.planner.efficiency import efficiency_of
from kan_train.planner.paper.facts import RESULTS
from kan_train.planner.plan import network_of
from kan_train.planner.time import Clock


def foretold(config: Config, layout: Layout, results: Path = RESULTS) -> str:
    """Step, tokens a second, hours and dollars of the whole run. ConfigError where the device's speed or links are not known."""
    device = "cpu" if config.run.device == "cpu" else config.cluster.device_name
    efficiency = efficiency_of(config.model, device, config.train.precision, results=results, peak_tflops=config.cluster.peak_tflops)
    clock = Clock(config, network_of(efficiency.device, config.cluster.devices_per_node), efficiency)
    train, offload = config.train, config.parallel.offload_optimizer
    candidate = Candidate(layout=layout, micro_batch_size=train.micro_batch_size, recompute=train.activation_checkpointing, offload=offload)
    tokens = config.train.steps * config.train.global_batch_size * config.model.sequence_length
    price = None if config.accounting.price is None else chosen_price(config.accounting.price, efficiency.device, setting="accounting.price").per_device_hour
    money = money_at_all_ends(clock, candidate, tokens, reliability_of(results), price)
    fast, slow, expected = money["fast"], money["slow"], money["expected"]
    told = f"planned: {expected.tokens_per_second:,.0f} tokens/s a device, {expected.hours:,.1f} hours ({fast.hours:,.1f} to {counted(slow.hours, '{:,.1f}')})"
    if expected.dollars is None or fast.dollars is None or slow.dollars is None:
        return f"{told}; accounting.price=2.35 would say what for; `kan cost plan` says on what it rests"
    return f"{told}, ${expected.dollars:,.0f} (${fast.dollars:,.0f} to {counted(slow.dollars, '${:,.0f}')}); `kan cost plan` says on what it rests"
