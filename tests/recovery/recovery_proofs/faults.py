"""What a load could forget, planted in the processes of the layout that goes on: a pair must find every one."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch


@dataclass(frozen=True)
class Fault:
    """A mistake, and where it must show."""

    plant: Callable[[], AbstractContextManager[None]]
    """Makes it, in the calling process."""
    shows: str
    """How a failure of `verdict.judge` must begin (there may be others)."""
    layout: str = "plain"
    """Key of LAYOUTS, where it is planted."""


MEMBER = "recovery_proofs.member"
"""Where what a load does is called; it imports this module."""


@contextmanager
def optimizer_steps_start_anew() -> Iterator[None]:
    """AdamW's bias correction counts from 0: the moments are right and the first updates are too large."""
    with mock.patch("kan_train.engine.engine.set_optimizer_steps"):
        yield


@contextmanager
def weights_stay_as_built() -> Iterator[None]:
    """The fp32 masters are loaded, and what computes is not made equal to them."""
    from kan_train.engine.sharded import ShardedEngine

    with mock.patch.object(ShardedEngine, "after_load"):
        yield


@contextmanager
def samples_start_one_late() -> Iterator[None]:
    """One sample of the global order is never read."""

    def late(engine: Any, loader: Any) -> None:
        loader.cursor += 1

    with _after_restore(late):
        yield


@contextmanager
def random_states_are_forgotten() -> Iterator[None]:
    """Every rank keeps the random state that it was started with."""
    with mock.patch(f"{MEMBER}.restore_random_states"):
        yield


@contextmanager
def last_bit_is_another() -> Iterator[None]:
    """One element of each rank's second moments is the next number: no loss shows it within 1e-5."""

    def moved(engine: Any, loader: Any) -> None:
        flat = next(f.flat for f in engine.named_fragments() if f.name.startswith("exp_avg_sq/") and f.write).view(-1)
        flat[0] = torch.nextafter(flat[0], flat[0] + 1)

    with _after_restore(moved):
        yield


@contextmanager
def _after_restore(spoil: Callable[[Any, Any], None]) -> Iterator[None]:
    from kan_train.engine.progress import restore

    def restored(origin: Any, config: Any, engine: Any, loader: Any, **more: Any) -> Any:
        progress = restore(origin, config, engine, loader, **more)
        spoil(engine, loader)
        return progress

    with mock.patch(f"{MEMBER}.restore", restored):
        yield


FAULTS: dict[str, Fault] = {
    "optimizer steps": Fault(optimizer_steps_start_anew, "loss"),
    "weights": Fault(weights_stay_as_built, "loss", layout="dp2-zero3"),
    "samples": Fault(samples_start_one_late, "samples"),
    "random states": Fault(random_states_are_forgotten, "random states"),
    "one bit": Fault(last_bit_is_another, "tensors"),
}
