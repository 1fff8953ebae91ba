"""What accounting costs the training: the ledger, the account and forecast kept up with it, the budget, energy, meters and metrics.jsonl.

One run whose steps alternate: in one of every two, at random, all of that is left out. Two measures: the difference within a pair, which knows of
everything but is as noisy as steps are; and the time inside the calls, which is exact but knows nothing of what they do to caches and other threads.
Run it on a machine that does nothing else:

    python benchmarks/accounting_overhead.py                   # kan_tiny, steps of about 1 s on two cores; needs corpora/stdlib (`kan data prepare`)
    python benchmarks/accounting_overhead.py --pairs 20 --no-result model.width=64
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import write_result

from kan_train.accounting.watch import default_hooks
from kan_train.config import Config
from kan_train.config.compose import compose_train
from kan_train.engine import run as run_module
from kan_train.engine.trainer import train
from kan_train.parallel.runtime import Runtime

WARM_STEPS = 5
"""Steps before the first pair."""


class Switch:
    """Whether accounting is on in this step, and the seconds that its calls have taken in it."""

    def __init__(self, pairs: int, seed: int) -> None:
        order, generator = [True] * WARM_STEPS, random.Random(seed)
        for _ in range(pairs):
            first = generator.random() < 0.5
            order += [first, not first]
        self.order = order
        self.steps: list[tuple[bool, float, float]] = []
        """On, length and seconds in calls of every step."""
        self._began, self._inside = time.perf_counter(), 0.0

    @property
    def on(self) -> bool:
        """In the step that is under way."""
        return self.order[min(len(self.steps), len(self.order) - 1)]

    def timed(self, call: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
        """`call` where accounting is on, else `otherwise`."""

        def made(*arguments: Any, **named: Any) -> Any:
            if not self.on:
                return otherwise(*arguments, **named)
            started = time.perf_counter()
            result = call(*arguments, **named)
            self._inside += time.perf_counter() - started
            return result

        return made

    def step_done(self) -> None:
        now = time.perf_counter()
        self.steps.append((self.on, now - self._began, self._inside))
        self._began, self._inside = now, 0.0


class Switched:
    """A hook that is there in the steps in which accounting is on; it ends every step."""

    def __init__(self, hook: Any, switch: Switch) -> None:
        self.switch = switch
        self.on_start, self.on_event, self.on_end, self.totals = hook.on_start, hook.on_event, hook.on_end, hook.totals
        self.over_budget = switch.timed(hook.over_budget, lambda: "")
        self._step = switch.timed(hook.on_step, lambda row: None)

    def on_step(self, row: dict[str, Any]) -> None:
        """A step was done."""
        self._step(row)
        self.switch.step_done()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-result", action="store_true", help="print alone")
    parser.add_argument("overrides", nargs="*", help="settings of the run")
    arguments = parser.parse_args()
    switch = Switch(arguments.pairs, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"train.steps={len(switch.order)}", "train.validate_every=0", "checkpoint.every=0", "accounting.price=2", "accounting.budget_usd=1000",
            "accounting.budget_hours=1000", "logging.progress=false", f"run.root={folder}", *arguments.overrides,
        ]  # fmt: skip
        _run(compose_train(settings, []), switch)
    rows = [_row(switch.steps[WARM_STEPS:])]
    print(rows[0])
    if not arguments.no_result:
        claim = "accounting costs the training less than 0.5% of a step, of steps of 1 s and more"
        write_result("accounting-overhead", claim=claim, config={"pairs": arguments.pairs, "seed": arguments.seed, "settings": settings}, rows=rows)


def _run(config: Config, switch: Switch) -> None:
    def hooks(config: Config, run_dir: Path, runtime: Runtime) -> list[Switched]:
        return [Switched(hook, switch) for hook in default_hooks(config, run_dir, runtime)]

    # The row of a step is made for those who account for it; energy is read in the loop, where all ranks meet.
    run_module.step_row = switch.timed(run_module.step_row, lambda *_: {})
    run_module.EnergyReports.count = switch.timed(run_module.EnergyReports.count, lambda *_, **__: None)  # type: ignore[method-assign]
    train(config, hooks)


def _row(steps: Sequence[tuple[bool, float, float]]) -> dict[str, Any]:
    shares, lengths = [], {True: [], False: []}
    for one, other in zip(steps[::2], steps[1::2], strict=True):
        on, off = (one, other) if one[0] else (other, one)
        shares.append(on[1] / off[1] - 1)
        lengths[True].append(on[1])
        lengths[False].append(off[1])
    inside = [seconds for on, _, seconds in steps if on]
    low, high = _interval_of_median(shares)
    return {
        "name": "accounting on against off, neighbouring steps",
        "pairs": len(shares),
        "median_step_s": {"on": statistics.median(lengths[True]), "off": statistics.median(lengths[False])},
        "median_share": statistics.median(shares),
        "interval_95": [low, high],
        "seconds_in_calls": {"mean": statistics.mean(inside), "median": statistics.median(inside), "largest": max(inside)},
        "share_in_calls": statistics.mean(inside) / statistics.mean(lengths[False]),
    }


def _interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """95%, from the order of the values: whatever their distribution."""
    ordered, half = sorted(values), 0.98 * len(values) ** 0.5
    return ordered[max(0, int(len(values) / 2 - half))], ordered[min(len(values) - 1, int(len(values) / 2 + half))]


if __name__ == "__main__":
    main()
