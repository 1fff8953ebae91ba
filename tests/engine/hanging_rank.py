"""Run by test_watchdog.py: starts the ranks of a scenario and says how each of them ended.

One JSON object a line on standard input: {scenario, world, folder, seconds}; one a line on standard output: {codes, seconds, stderr}, a list over ranks each.
The ranks are forked from this process, so that torch is imported once for all scenarios.
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from kan_train.engine.collectives import CollectiveClock
from kan_train.engine.watchdog import Watchdog

STEP = 17
SUSPENDED_SECONDS = 2.0


class Transfer:
    """A collective under way, waited for elsewhere."""

    def __init__(self, work: dist.Work) -> None:
        self.work = work

    def wait(self) -> None:
        self.work.wait()


def read_sample(seconds: float = 60.0) -> None:
    time.sleep(seconds)


def data(watchdog: Watchdog, rank: int) -> None:
    """The last rank lives and reads data for ever; the others average gradients, and only their time runs out."""
    while rank == dist.get_world_size() - 1:
        watchdog.beat("data", STEP)
        read_sample(0.1)
    dist.all_reduce(torch.ones(4))


def stopped(watchdog: Watchdog, rank: int) -> None:
    """Rank 1 is stopped; the others wait for rows that they asked for earlier."""
    group = dist.new_group([0, 1, 2], group_desc="experts")
    watchdog.beat("step", STEP)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    rows = torch.ones(3)
    with CollectiveClock(torch.device("cpu")):  # as in a training step
        Transfer(dist.all_to_all_single(torch.empty(3), rows, group=group, async_op=True)).wait()


def mismatch(watchdog: Watchdog, rank: int) -> None:
    """Rank 0 gathers in its pair, whose other rank is in a barrier of all."""
    pairs = [dist.new_group(ranks, group_desc=f"pair {ranks[0]}") for ranks in ([0, 1], [2, 3])]
    watchdog.beat("validation", STEP)
    if rank == 0:
        dist.all_gather_into_tensor(torch.empty(8), torch.ones(4), group=pairs[0])
    dist.barrier()


def other_call(watchdog: Watchdog, rank: int) -> None:
    """All are in the same group, one of them in another collective."""
    dist.all_reduce(torch.ones(4))
    watchdog.beat("step", STEP)
    if rank == 2:
        dist.broadcast(torch.ones(4), src=0)
    dist.all_reduce(torch.ones(4))


def chain(watchdog: Watchdog, rank: int) -> None:
    """Rank 0 waits for rank 1, which waits for what rank 2 should send."""
    pair = dist.new_group([0, 1], group_desc="data parallel")
    watchdog.beat("step", STEP)
    if rank == 2:
        read_sample()
    if rank == 1:
        dist.recv(torch.empty(4), src=2)
    dist.all_reduce(torch.ones(4), group=pair)


def count(watchdog: Watchdog, rank: int) -> None:
    """Ranks 1 and 2 are in the same place, but rank 1 has started the collective that rank 0 waits for, and rank 2 has not."""
    works = [dist.all_reduce(torch.ones(4), async_op=True) for _ in range(1 if rank == 2 else 2)]
    watchdog.beat("step", STEP)
    if rank == 0:
        for work in works:
            work.wait()
    read_sample()


def pipeline(watchdog: Watchdog, rank: int) -> None:
    """Megatron's transfers: both neighbours wait for rank 1. One of them in a batch, which keeps its requests in another form."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    torch.cuda.current_device = lambda: torch.device("cpu")
    batched = rank == 0
    config = ModelParallelConfig(pipeline_dtype=torch.float32, batch_p2p_comm=batched, overlap_p2p_comm=not batched, batch_p2p_sync=False)
    stages = P2PCommunicator(dist.new_group([0, 1, 2], group_desc="pipeline"), config)
    watchdog.beat("step", STEP)
    if rank == 0:
        stages.recv_backward((4,), is_last_stage=False)
    if rank == 2:
        stages.recv_forward((4,), is_first_stage=False)
    read_sample()


def full_pipe(watchdog: Watchdog, rank: int) -> None:
    """Nobody reads what the run writes, and the thread that writes holds the lock of standard error."""
    watchdog.beat("log", STEP)
    _, write = os.pipe()
    os.dup2(write, 2)
    while True:
        sys.stderr.write("x" * 4096)


def lost_reporter(watchdog: Watchdog, rank: int) -> None:
    """Rank 0 begins the report and is stopped before it has written it; rank 1, whose own time does not run out, ends it."""
    watchdog.answer_seconds = 0.4
    if rank == 0:
        watchdog._publish = lambda folder: os.kill(os.getpid(), signal.SIGSTOP)
    while rank == 1:
        watchdog.beat("data", STEP)
        read_sample(0.1)
    read_sample()


def slow(watchdog: Watchdog, rank: int) -> None:
    """Far longer than the watchdog's time altogether, never between two beats; a rank that an earlier start left behind reports meanwhile."""
    for step in range(12):
        if step == 2:
            (watchdog.folder / "hang-0009-deadbeef").mkdir(exist_ok=True)
        watchdog.beat("data", step)
        read_sample(0.3)
        watchdog.beat("step", step)
        dist.all_reduce(torch.ones(4))


def suspended(watchdog: Watchdog, rank: int) -> None:
    """In many small pieces: a process that goes on after a stop is still far from its next beat."""
    for step in range(4):
        watchdog.beat("step", step)
        for _ in range(40):
            read_sample(0.02)


def alone(watchdog: Watchdog, rank: int) -> None:
    """A long phase that was announced, and then one that was not."""
    with watchdog.patience(3):
        read_sample(1.7 * watchdog.seconds)
    watchdog.beat("save", STEP)
    read_sample()


HANGING = (data, stopped, mismatch, other_call, chain, count, pipeline, full_pipe, lost_reporter, alone)
SCENARIOS = {function.__name__: function for function in (*HANGING, slow, suspended)}


def one_rank(job: dict, rank: int, store: Path, stderr: Path) -> None:
    """The child's life; never returns."""
    code = 1
    try:
        os.dup2(os.open(stderr, os.O_CREAT | os.O_WRONLY), 2)
        torch.set_num_threads(1)
        folder = Path(job["folder"])

        def on_hang(report: dict) -> None:
            with open(folder.parent / "on_hang", "a") as file:
                file.write(f"{rank} {report['did_not_arrive']}\n")
            raise RuntimeError("a ledger that cannot be written")

        with Watchdog(folder, rank, job["world"], job["seconds"], on_hang=on_hang) as watchdog:
            if job["world"] > 1:
                with watchdog.patience(10):
                    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=job["world"])
            SCENARIOS[job["scenario"]](watchdog, rank)
        code = 0
    finally:
        os._exit(code)


def run(job: dict, folder: Path) -> dict:
    started = time.monotonic()
    errors = [folder / f"stderr-{rank}" for rank in range(job["world"])]
    ranks: dict[int, int] = {}
    if job["scenario"] == "pipeline":
        import megatron.core.pipeline_parallel.p2p_communication  # noqa: F401 - seconds that the ranks need not spend each
    for rank, stderr in enumerate(errors):
        pid = os.fork()
        if pid == 0:
            one_rank(job, rank, folder / "store", stderr)
        ranks[pid] = rank
    if job["scenario"] == "suspended":
        time.sleep(1.0)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in ranks:
                os.kill(pid, number)
            time.sleep(SUSPENDED_SECONDS if number == signal.SIGSTOP else 0)
    codes, seconds, still = {}, {}, set()
    left = set(ranks)
    while left:
        for pid in sorted(left):
            done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if done and os.WIFSTOPPED(status):
                still.add(pid)
            elif done:
                codes[ranks[pid]], seconds[ranks[pid]] = os.waitstatus_to_exitcode(status), time.monotonic() - started
                left.discard(pid)
        if left and (left <= still or time.monotonic() - started > 40):  # a stopped one goes last, as a launcher would end it
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            still.clear()
        time.sleep(0.02)
    order = range(job["world"])
    return {"codes": [codes[rank] for rank in order], "seconds": [seconds[rank] for rank in order], "stderr": [path.read_text() for path in errors]}


if __name__ == "__main__":
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as temporary:
            print(json.dumps(run(json.loads(line), Path(temporary))), flush=True)
