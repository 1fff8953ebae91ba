"""Runs that suffer one failure after another and must end as the run that suffered none."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from slurm_proofs.failures import FAILURES, Suffered, suffer
from slurm_proofs.runs import Run

AT_ONCE = 2
"""Runs that are under way at the same time: while one waits for Slurm the other computes."""

NODES = 6
"""Two for each of these runs, and one in the place of each that has lost one."""


@dataclass
class Journey:
    """A run, what it suffered, and how it ended."""

    run: Run
    suffered: list[Suffered] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """What was not as it must be; empty: nothing."""


async def undisturbed(run: Run) -> Run:
    """The run that all others must equal."""
    await run.submitted()
    await run.until_finished()
    return run


async def travel(run: Run, names: Sequence[str]) -> Journey:
    """Submit `run`, let it suffer the failures of these names in turn, and wait for its end."""
    journey = Journey(run)
    try:
        await run.submitted()
        for name in names:
            journey.suffered.append(await suffer(run, FAILURES[name]))
        await run.until_finished()
    except (AssertionError, RuntimeError) as error:
        journey.failures.append(f"{type(error).__name__}: {error}")
        give_way(run)
    return journey


async def all_of(scenes: dict[str, Callable[[], Awaitable[Any]]]) -> dict[str, Any]:
    """What came of every scene, AT_ONCE at a time, in this order; by its name, the error in the place of one that failed."""
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(scene: Callable[[], Awaitable[Any]]) -> Any:
        async with turn:
            try:
                return await scene()
            except Exception as error:
                return error

    return dict(zip(scenes, await asyncio.gather(*map(one, scenes.values())), strict=True))


def judge(journey: Journey, whole: Run) -> list[str]:
    """What is wrong with a journey, and where its run is not `whole`; empty: nothing, nowhere."""
    found = journey.failures or journey.run.differences(whole)
    starts, restarts = (len(journey.run.ledger(kind)) for kind in ("segment_start", "restart"))
    return found + ([] if restarts == starts - 1 else [f"ledger: {starts} starts, but {restarts} restarts"])


def give_way(run: Run) -> None:
    """Others need the nodes of a run that failed."""
    if run.events("submitted"):
        run.cluster.command("scancel", run.job_id)
