"""The whole job of `kan train` in each process: refuse what cannot be, then start or resume, and train (kan_train.engine.run)."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kan_train.accounting.budget import caps_of, refusal
from kan_train.accounting.meters import device_name, devices_of
from kan_train.accounting.prices import chosen_price
from kan_train.config import Config, ConfigError
from kan_train.engine.examination import MakeEvaluator
from kan_train.engine.hooks import Hook, Hooks
from kan_train.engine.profile import profile_hooks
from kan_train.engine.progress import progress_of, run_directory, starting_point
from kan_train.engine.result import RunResult, result_of
from kan_train.engine.run import PATIENCE, Run
from kan_train.engine.signals import StopSignals
from kan_train.engine.watchdog import Watchdog
from kan_train.kernels.backend import use_triton
from kan_train.parallel.runtime import Runtime, launch_rank, launch_size, runtime

HANGS = "hangs"
"""Folder of a run directory with what every rank was doing when the run hung."""

MakeHooks = Callable[[Config, Path, Runtime], Sequence[Hook]]


def train(config: Config, make_hooks: MakeHooks | None = None, make_evaluator: MakeEvaluator | None = None) -> RunResult:
    """Train as `config` says. Called in every process of the run; returns the same in all.

    make_hooks: what watches the run; unset: metrics.jsonl, ledger, console and W&B as `config.logging` says.
    make_evaluator: what measures train.evaluate_tasks (kan_train.evaluation.during.task_evaluator); asked for where train.evaluate_every is above 0.
    Raises ConfigError before any work where a setting, the data or the checkpoint does not allow the run.
    """
    config.validate(launch_size())
    run_dir, watching = run_directory(config), Hooks([])
    with StopSignals() as signals, _watchdog(config, run_dir, watching) as watchdog, runtime(config) as started:
        a_second = _refuse_what_this_device_cannot(config, started.device)
        _refuse_what_is_used_up(config, run_dir, started, a_second)
        with watchdog.patience(PATIENCE):
            own = starting_point(config)
        if own is not None and (done := progress_of(own)).step >= config.train.steps and not done.examination_due:
            if started.is_first:
                print(
                    f"kan: run {config.run.name} has finished its {done.step} steps already; for more, use train.steps={2 * done.step}",
                    file=sys.stderr,
                )
            return result_of(run_dir, done, finished=True, code=0)
        hooks = Hooks([*(make_hooks or _default_hooks)(config, run_dir, started), *profile_hooks(config.profile, run_dir, started)])
        with watchdog.patience(PATIENCE):
            run = Run(config, run_dir, started, signals, own, watchdog, make_evaluator)
        try:
            return run.train(hooks, watching)
        finally:
            run.close()


def _refuse_what_this_device_cannot(config: Config, device: torch.device) -> float | None:
    """On every rank alike: one that left alone would leave the others waiting. Returns the dollars of a device and a second, where they are known."""
    try:
        use_triton(config.model.kernels, device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.accounting.price is None:
        return None
    return chosen_price(config.accounting.price, device_name(config, device), setting="accounting.price").per_second


def _refuse_what_is_used_up(config: Config, run_dir: Path, started: Runtime, a_second: float | None) -> None:
    """Before anything is read but the ledger. The first process decides for all: only it is sure to see what the one before it wrote."""
    if not caps_of(config.accounting):
        return
    devices = devices_of(config, started.world_size, started.local_world_size)
    error = refusal(config, run_dir, devices, a_second) if started.is_first else None
    if started.largest(int(error is not None)):
        raise error or ConfigError("a limit of accounting is used up; the first process says which, and what would work")


def _watchdog(config: Config, run_dir: Path, watching: Hooks) -> Watchdog:
    """Watches from the start of the process group on; tells `watching`, which has its hooks while the loop runs."""

    def told(report: dict[str, Any]) -> None:
        watching.on_event("hang", {"report": report["hang"], "summary": report["summary"]})

    return Watchdog(run_dir / HANGS, launch_rank(), launch_size(), 60 * config.recovery.hang_minutes, on_hang=told)


def _default_hooks(config: Config, run_dir: Path, runtime: Runtime) -> Sequence[Hook]:
    from kan_train.accounting.watch import default_hooks

    return default_hooks(config, run_dir, runtime)
