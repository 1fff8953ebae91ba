"""Processes that take training steps and tally their memory; the peak of every rank goes to a JSON file.

    python footprint_ranks.py FOLDER DEVICE NAME NAME ..        a name is a case's of footprint_rows; DEVICE: cpu, or cuda with a device a process

On a CPU all live tensor bytes are tallied, storage by storage; on a GPU torch's allocator says the most that it gave out.
"""

import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from footprint_rows import Case, named
from free_ports import free_port
from layout_matrix.rows import BALANCE_RATE
from layout_matrix.server import import_all
from live_bytes import LiveBytes

WARM_UP = 2
"""Steps before the one that is measured: optimizer state appears in the first, and DeepSpeed's stage 3 learns the order of modules in two."""


def measure(case: Case, process, reset: Callable[[], None], peak: Callable[[], int]) -> dict:
    """Peak of one step on this rank. reset: forgets the peak so far."""
    from kan_train.engine import build_engine

    engine = build_engine(case.config(process.device.type), process)
    for step in range(WARM_UP + 1):
        batches = case.batches(process.rank, step)
        gc.collect()
        reset()
        engine.train_step(batches, 1e-3, BALANCE_RATE)
    found = {"peak": peak()}
    engine.close()
    return found


def serve(rank: int, folder: Path, port: int, case: Case, device: str) -> None:
    from kan_train.parallel.runtime import runtime

    world = case.row.world
    sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in sizes.items()})
    with ExitStack() as stack:
        if device == "cpu":
            tally = stack.enter_context(LiveBytes())
            reset, peak = tally.restart, lambda: tally.peak
        else:
            reset, peak = torch.cuda.reset_peak_memory_stats, torch.cuda.max_memory_allocated
        process = stack.enter_context(runtime(case.config(device)))
        (folder / f"{case.name}-rank-{rank}.json").write_text(json.dumps(measure(case, process, reset, peak)))


def run(folder: Path, case: Case, device: str) -> None:
    """One case in processes of its own."""
    ranks, port = set(), free_port()
    for rank in range(case.row.world):
        process = os.fork()
        if process == 0:
            try:
                serve(rank, folder, port, case, device)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        ranks.add(process)
    while ranks:
        process, status = os.wait()
        ranks.discard(process)
        if status:  # the others would wait for it, for as long as a collective may take
            for other in ranks:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            raise SystemExit(f"{case.name}: a rank ended with exit code {os.waitstatus_to_exitcode(status)}")


def main() -> None:
    folder, device, *names = sys.argv[1:]
    import_all()
    for case in named(names):
        run(Path(folder), case, device)


if __name__ == "__main__":
    main()
