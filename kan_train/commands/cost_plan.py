"""`kan cost plan`: what a run will take and cost before it starts, on the layout that suits it best."""

import argparse
import math
import re
from pathlib import Path
from typing import Any

from kan_train.commands.checkpoint_help import AddCommand

PLAN_TEXT = """\
Plan a run before a device is rented: for every sound layout its memory, its step time and what the whole run costs; the best one ready to paste.

  kan cost plan model=kan_340b cluster=h100_slurm tokens=2T --devices 1024 --price 2.35
  kan cost plan model=kan_340b cluster=h100_slurm tokens=2T --devices 512,1024,2048     which number of devices
  kan cost plan model=kan_1b cluster=h100_slurm tokens=100B parallel.tensor_parallel=8  with a part of the layout as you want it
  kan cost plan model=kan_1b cluster=h100_slurm tokens=100B --efficiency 0.45,groves=0.3 --network 40
  kan cost plan model=kan_1b cluster=h100_slurm tokens=100B --json --plot front.png

It needs no accelerator. What is not given is measured, cited or assumed, and printed with its interval and source.
"""

PLAN_END = """\
How to read it
  tok/s/dev    tokens a second of one device, and in brackets with every assumption at its slow and at its fast end
  $/Mtok       dollars a million tokens, with saves, failures, replayed steps and restarts
  memory       of the fullest rank, beside what is usable of the device
  c x b r o    seconds of a step: computation with waiting for the fullest expert rank, communication, bubble, reduction, optimizer
  front        layouts that none beats in speed and in memory left: take a slower one where yours runs out of memory

Settings are those of `kan train`; tokens=2T (or B, M) stands beside them. Settings of parallel.*, train.micro_batch_size and train.activation_checkpointing
that you give stay as they are, and the rest is searched. Without train.global_batch_size the batch is about 4M tokens, without train.precision bf16: both
are printed as chosen. A CPU is planned with run.device=cpu. docs/planner.md has the formulas.
"""

PINNABLE = (
    "parallel.tensor_parallel", "parallel.sequence_parallel", "parallel.context_parallel", "parallel.pipeline_parallel", "parallel.virtual_pipeline",
    "parallel.expert_parallel", "parallel.expert_tensor_parallel", "parallel.zero_stage", "parallel.offload_optimizer", "train.micro_batch_size",
    "train.activation_checkpointing",
)  # fmt: skip
"""Settings that are searched unless they are given."""
BATCH_TOKENS = 2**22
"""Tokens of a batch that nobody gave."""
_SCALE = {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def add_plan_command(group: Any, add_command: AddCommand) -> None:
    """Add `plan` to the subparsers `group` of `kan cost`."""
    plan = add_command(group, "plan", "what a run will take and cost, and the layout for it", PLAN_TEXT, _plan)
    plan.epilog = PLAN_END
    plan.add_argument("--devices", metavar="N[,N]", help="numbers of devices (default: cluster.nodes * cluster.devices_per_node)")
    plan.add_argument("--price", metavar="NAME|NUMBER", help="price of a device-hour: dollars, or a name in conf/prices")
    plan.add_argument("--top", type=int, default=10, metavar="N", help="layouts shown (default: %(default)s)")
    plan.add_argument("--json", action="store_true", help="JSON on standard output instead of tables")
    plan.add_argument("--plot", type=Path, metavar="FILE", help="the front as a picture (.png, .svg, .pdf)")
    plan.add_argument("--efficiency", metavar="SHARE[,PART=SHARE]", help="share of the peak that products reach, for single parts too")
    plan.add_argument("--memory", type=float, metavar="GB", help="memory of a device (default: its datasheet's)")
    plan.add_argument("--link", type=float, metavar="GB/S", help="GB/s each way between devices of a machine, as large messages reach it")
    plan.add_argument("--network", type=float, metavar="GB/S", help="GB/s each way between machines, of one device")
    plan.add_argument("--failures", type=float, metavar="N", help="failures of one device in 1,000 hours (default: Llama 3's)")
    plan.add_argument("--storage", type=float, metavar="GB/S", help="GB/s that one device writes into a checkpoint while all do")
    plan.add_argument("--restart", type=float, metavar="MINUTES", help="from a failure to the next step")
    where = "folder of benchmark results (default: %(default)s)"
    plan.add_argument("--results", type=Path, default=Path("benchmarks/results"), metavar="DIR", help=where)
    plan.add_argument("--config-dir", action="append", type=Path, default=[], metavar="DIR", help="folder with configuration groups of your own")
    plan.add_argument("overrides", nargs="*", metavar="setting=value", help="settings as Hydra overrides, and tokens=2T")


def _plan(arguments: argparse.Namespace) -> int:
    from kan_train.config import ConfigError
    from kan_train.planner.plan import dump, require_picture, write_front
    from kan_train.planner.plan_table import print_plan

    if arguments.top < 0:
        raise ConfigError(f"--top {arguments.top} must be a number of layouts, 0 or more; use --top 10")
    if arguments.plot is not None:
        require_picture(arguments.plot)
    plan = plan_of(arguments)
    if arguments.plot is not None:
        write_front(plan, arguments.plot)
    if arguments.json:
        print(dump(plan, arguments.top))
    else:
        print_plan(plan, arguments.top, arguments.plot)
    return 0 if plan.best is not None else 1


def plan_of(arguments: argparse.Namespace) -> Any:
    """The plan that the command line asks for."""
    from kan_train.accounting.prices import chosen_price
    from kan_train.planner.cost import reliability_of
    from kan_train.planner.efficiency import efficiency_of
    from kan_train.planner.plan import make_plan

    config, tokens, pinned, given, chosen = composed(arguments.overrides, arguments.config_dir)
    devices = numbers(arguments.devices, config.cluster.world_size)
    device = "cpu" if config.run.device == "cpu" else config.cluster.device_name
    efficiency = efficiency_of(
        config.model, device, config.train.precision, results=arguments.results, share=arguments.efficiency, peak_tflops=config.cluster.peak_tflops
    )
    choice = arguments.price or config.accounting.price
    return make_plan(
        config, devices=devices, tokens=tokens or config.train.steps * config.train.global_batch_size * config.model.sequence_length,
        price=None if choice is None else chosen_price(choice, efficiency.device, setting="--price"), efficiency=efficiency,
        reliability=reliability_of(arguments.results, failures=arguments.failures, storage_gb=arguments.storage, restart_minutes=arguments.restart),
        pinned=pinned, given_overrides=given, chosen=chosen, config_dirs=arguments.config_dir,
        memory_gb=arguments.memory, link_gb=arguments.link, network_gb=arguments.network,
    )  # fmt: skip


def composed(overrides: list[str], config_dirs: list[Path]) -> tuple[Any, float | None, dict[str, int | bool], tuple[str, ...], tuple[str, ...]]:
    """(configuration, tokens if they were given, settings of the layout that stay, other overrides as given, overrides that were chosen)."""
    from kan_train.config import ConfigError
    from kan_train.config.compose import compose_train

    rest: list[str] = []
    pinned: dict[str, int | bool] = {}
    tokens = None
    for word in overrides:
        name, _, value = word.partition("=")
        if name == "tokens":
            tokens = parsed_tokens(value)
        elif name == "parallel":
            raise ConfigError(f"{word} is a layout, which the plan looks for; give the part of it that you want as it is, such as parallel.tensor_parallel=8")
        elif name in PINNABLE:
            pinned[name] = _pin(name, value)
        else:
            rest.append(word)
    names, chosen = {word.partition("=")[0] for word in rest}, []
    on_cpu = any(word == "run.device=cpu" for word in rest)
    if "train.precision" not in names and not on_cpu:
        chosen.append("train.precision=bf16")
    config = compose_train([*rest, *chosen], config_dirs, world_size=1)
    if "train.global_batch_size" not in names:
        chosen.append(f"train.global_batch_size={2 ** round(math.log2(max(1, BATCH_TOKENS / config.model.sequence_length)))}")
        config = compose_train([*rest, *chosen], config_dirs, world_size=1)
    return config, tokens, pinned, tuple(rest), tuple(chosen)


def parsed_tokens(text: str) -> float:
    """2T, 300B, 1.5e9: a number of tokens."""
    from kan_train.config import ConfigError

    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([kMBT]?)", text)
    try:
        number = float(found[1]) * _SCALE[found[2]] if found else 0.0
    except ValueError:
        number = 0.0
    if not number > 0 or not math.isfinite(number):
        raise ConfigError(f"tokens={text} must be a number of tokens above 0; use tokens=2T, tokens=300B or tokens=1.5e9")
    return number


def numbers(text: str | None, default: int) -> list[int]:
    """--devices: 1024, or 512,1024."""
    from kan_train.config import ConfigError

    if text is None:
        return [default]
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(f"--devices {text} must be numbers of devices above 0; use --devices 1024, or --devices 512,1024")
    return sorted({int(word) for word in words})


def _pin(name: str, value: str) -> int | bool:
    from kan_train.config import ConfigError

    truth = {"true": True, "false": False}
    is_truth = name in ("parallel.sequence_parallel", "parallel.offload_optimizer", "train.activation_checkpointing")
    if is_truth and value.lower() in truth:
        return truth[value.lower()]
    if is_truth or not value.isdecimal() or (int(value) < 1 and name != "parallel.zero_stage"):
        raise ConfigError(f"{name}={value}: what the plan keeps must be a plain value; use {name}={'true' if is_truth else 2}")
    return int(value)
