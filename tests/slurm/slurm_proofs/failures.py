"""The failures of a cluster, each as what is done to a run at the right moment, and what must be true when it trains again."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from kan_train.checkpoint.manifest import MANIFEST
from slurm_proofs.runs import EVERY, VALIDATE_EVERY, Run, send_term, until


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One failure."""

    name: str
    hit: Callable[[Run], Awaitable[float]]
    """Waits for the right moment, and does it; the time at which it was done (unix)."""
    causes: tuple[str, ...]
    """The causes that the launcher may record of it; none where the start goes on."""
    saved: bool = False
    """Whether the trainers were told, so that no step may be repeated."""
    mends: Callable[[Run], Awaitable[None]] | None = None
    """What is to be put in order when the run trains again."""


@dataclass(frozen=True, kw_only=True)
class Suffered:
    """What a failure came to."""

    failure: str
    step: int
    """The last step before it."""
    seconds_to_next_step: float
    """From the failure to the first step that the run finished after it."""
    repeated_steps: int
    """Finished steps that were done again."""
    cause: str | None
    """What the launcher took it for."""
    reason: str
    hosts: list[str]
    """Before it, in the order of ranks."""
    failed_host: str | None

    def as_row(self) -> dict[str, Any]:
        """For a table or a record."""
        return asdict(self)


async def suffer(run: Run, failure: Failure) -> Suffered:
    """Do `failure` to a run that has been submitted, and wait until it trains again. AssertionError where something is not as it must be."""
    ends = len(run.events("ended"))
    at = await failure.hit(run)
    hosts, segment, step = run.hosts(), run.segment(), run.step()
    if failure.causes:
        rows = await run.until(f"a step after: {failure.name}", lambda: _rows_after(run, segment))
        told = run.events("ended")[ends:]
        assert len(told) == 1, f"{failure.name}: the run ended {len(told)} times: {told}"
        assert told[0]["cause"] in failure.causes, f"{failure.name}: {told}\n{run.story()}"
        cause, reason, host = told[0]["cause"], told[0]["reason"], told[0]["failed_host"]
        first = rows[0]["step"]
        step = max((row["step"] for row in run.rows() if row["segment"] <= segment), default=0)
        repeated = max(0, step - first + 1)
    else:
        await run.until(f"a step after: {failure.name}", lambda: run.step() > step)
        assert run.segment() == segment, f"{failure.name} ended a start of the run\n{run.story()}"
        cause, reason, host, repeated = None, "", None, 0
    seconds = time.time() - at
    # One interval, and one more where the newest save was still being written.
    assert repeated <= (0 if failure.saved else 2 * EVERY), f"{failure.name}: {repeated} steps were repeated\n{run.story()}"
    if failure.mends is not None:
        await failure.mends(run)
    return Suffered(
        failure=failure.name, step=step, seconds_to_next_step=round(seconds, 1), repeated_steps=repeated, cause=cause, reason=reason, hosts=hosts,
        failed_host=host,
    )  # fmt: skip


def _rows_after(run: Run, segment: int) -> list[dict[str, Any]]:
    """Rows of the newest start of the run, if it is one after `segment`."""
    newest = run.segment()
    return run.rows(newest) if newest > segment else []


# --- what is done -----------------------------------------------------------------------------------------------------------------------------------------


async def _some_steps(run: Run) -> None:
    """Some steps into this start of the run."""
    await run.until("steps of this start", lambda: len(run.rows(run.segment())) > EVERY)
    assert run.step() < run.steps - EVERY, f"too late: step {run.step()}"


async def _time_limit_signal(run: Run) -> float:
    """What Slurm sends for --signal=B:USR1 ahead of the time limit: SIGUSR1 to the batch script alone."""
    await _some_steps(run)
    at = time.time()
    run.cluster.command("scancel", "--signal=USR1", "--batch", run.job_id)
    return at


async def _time_limit(run: Run) -> float:
    """The limit is brought near; Slurm, which looks every 30 s, sends its signal."""
    await _some_steps(run)
    signals, requeued = len(run.ledger("signal")), len(run.events("requeued"))
    run.cluster.command("scontrol", "update", f"JobId={run.job_id}", "TimeLimit=2")
    await run.until("the signal of the time limit", lambda: len(run.ledger("signal")) > signals)
    # The next start has its time again: it is not to be stopped too.
    await run.until("its place in the queue", lambda: len(run.events("requeued")) > requeued)
    run.cluster.command("scontrol", "update", f"JobId={run.job_id}", "TimeLimit=60")
    return float(run.ledger("signal")[-1]["time"])


async def _requeue(run: Run) -> float:
    await _some_steps(run)
    at = time.time()
    run.cluster.command("scontrol", "requeue", run.job_id)
    return at


async def _preempt(run: Run) -> float:
    """A job of the higher partition that must have the run's own nodes."""
    await _some_steps(run)
    at = time.time()
    nodes = ",".join(run.hosts())
    run.cluster.command("sbatch", "--partition=urgent", "--exclusive", f"--nodelist={nodes}", "--nodes=2", "--output=/dev/null", "--wrap=sleep 0.5")
    return at


async def _restart_controller(run: Run) -> float:
    await _some_steps(run)
    return run.cluster.restart_controller()


async def _kill_rank(run: Run, rank: int = 1) -> float:
    await _some_steps(run)
    process = (await run.until("its processes", lambda: run.ranks() if len(run.ranks()) == 2 else None))[rank]
    at = time.time()
    process.send_signal(signal.SIGKILL)
    return at


async def _cut_worker(run: Run) -> float:
    await _some_steps(run)
    return run.cluster.power_cut(run.hosts()[1])


async def _cut_head(run: Run) -> float:
    await _some_steps(run)
    return run.cluster.power_cut(run.hosts()[0])


async def _power_again(run: Run) -> None:
    """The nodes that were off are switched on. Only now: until here the run had to do without them."""
    for node, state in run.cluster.node_states().items():
        if state.startswith("down"):
            run.cluster.start_node(node)


async def kill_in_start_up(run: Run, start: int, rank: int = 1) -> float:
    """SIGKILL to a rank of start number `start` (from 0) as soon as it is there."""

    def there() -> psutil.Process | None:
        return run.ranks().get(rank) if len(run.events("started")) == start + 1 else None

    process = await run.until(f"rank {rank} of start {start}", there)
    at = time.time()
    process.send_signal(signal.SIGKILL)
    return at


def _term_in_start_up(seconds: float) -> Callable[[Run], Awaitable[float]]:
    async def hit(run: Run) -> float:
        """`seconds` after the trainers were started, and before their first step."""
        restarts, segment = run.restarts(), run.segment()
        await run.until("trainers", lambda: run.restarts() >= restarts and len(run.ranks()) == 2)
        await asyncio.sleep(seconds)
        at = send_term(run)
        assert run.segment() == segment, "too late: it trained already"
        return at

    return hit


async def _term_in_validation(run: Run) -> float:
    """When the row before has been written, the step with the validation begins; its own row comes after the validation."""
    step = next(step for step in range(VALIDATE_EVERY, run.steps, VALIDATE_EVERY) if step > run.step() + 1)
    await run.until(f"step {step - 1}", lambda: run.step() >= step - 1, every=0.01)
    # A step takes some tenths of a second, a validation several times as long: when this step's time is over the validation has begun.
    await asyncio.sleep(2 * run.rows()[-1]["time/step"])
    assert run.step() == step - 1, f"too late: the validation of step {step} is over"
    return send_term(run)


async def _validated_later(run: Run) -> None:
    """The validation was broken off, and done when the run went on."""
    row = next(row for row in reversed(run.rows()) if row["step"] % VALIDATE_EVERY == 0)
    (validation,) = [event for event in run.ledger("validation") if event["step"] == row["step"]]
    assert validation["segment"] == row["segment"] + 1, f"the validation of step {row['step']} was not broken off: {validation}"


async def _term_in_save(run: Run) -> float:
    """While files of a checkpoint are there, but its manifest is not."""
    await _some_steps(run)
    # Found before: then the signals follow within milliseconds.
    checkpoints = run.evidence.checkpoints
    seen = {path.name for path in checkpoints.iterdir()}

    def being_written() -> str | None:
        names = {path.name for path in checkpoints.iterdir()} - seen
        return next((name for name in names if not (checkpoints / name / MANIFEST).exists()), None)

    name = await until("a save", being_written, every=0.002)
    processes = [process.pid for process in run.ranks().values()]
    at = time.time()
    for pid in processes:
        os.kill(pid, signal.SIGTERM)
    send_term(run)
    await until("the save to end", lambda: (checkpoints / name / MANIFEST).exists(), every=0.01)
    written = (checkpoints / name / MANIFEST).stat().st_mtime
    assert written > at, f"missed: {name} was written {at - written:.3f} s before the signal"
    return at


STOPPED = ("preempted", "stopped", "time_limit")

FAILURES = {
    failure.name: failure
    for failure in (
        Failure(name="time limit announced", hit=_time_limit_signal, causes=("time_limit",), saved=True),
        Failure(name="time limit reached", hit=_time_limit, causes=("time_limit",), saved=True),
        Failure(name="scontrol requeue", hit=_requeue, causes=("taken_away", "preempted", "stopped", "lost")),
        Failure(name="preempted by a higher partition", hit=_preempt, causes=("preempted",), saved=True),
        Failure(name="controller restarted", hit=_restart_controller, causes=()),
        Failure(name="rank killed", hit=_kill_rank, causes=("failed",)),
        Failure(name="power cut of a worker node", hit=_cut_worker, causes=("lost", "failed"), mends=_power_again),
        Failure(name="power cut of the head node", hit=_cut_head, causes=("lost", "failed"), mends=_power_again),
        Failure(name="SIGTERM in start-up", hit=_term_in_start_up(0.5), causes=STOPPED, saved=True),
        Failure(name="SIGTERM in late start-up", hit=_term_in_start_up(4.0), causes=STOPPED, saved=True),
        Failure(name="SIGTERM in a validation", hit=_term_in_validation, causes=STOPPED, saved=True, mends=_validated_later),
        Failure(name="SIGTERM in a save", hit=_term_in_save, causes=STOPPED, saved=True),
    )
}
