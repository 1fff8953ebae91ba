"""A process that has imported everything heavy once, and forks the processes of one row after the other.

    python server.py        one JSON request a line on standard input, one JSON answer a line on the descriptor of its own

Nothing here starts a thread or a process group: a fork copies the calling thread alone.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

GRACE_SECONDS = 3.0
"""After one process of a row failed, the others wait in a collective: they get this long to fail too."""


def import_all() -> float:
    """Import what every process of a row needs; seconds that it took."""
    started = time.perf_counter()
    import torch

    from kan_train.parallel.cpu import prepare_libraries
    from kan_train.parallel.runtime import Runtime

    torch.set_num_threads(1)
    prepare_libraries(Runtime())
    import deepspeed  # noqa: F401
    import torch.distributed.checkpoint
    from megatron.core import parallel_state, tensor_parallel  # noqa: F401
    from megatron.core.pipeline_parallel import schedules  # noqa: F401

    import kan_train.engine.zero
    import kan_train.parallel.groups  # noqa: F401
    from layout_matrix import member  # noqa: F401

    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise RuntimeError(f"the imports left {threads} threads: their locks would be held for ever in a forked process")
    return time.perf_counter() - started


def serve_rank(request: dict, rank: int, port: int) -> None:
    """One process of a row, from the fork to its end."""
    folder, world = Path(request["folder"]), request["world"]
    output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in sizes.items()})
    code = 1
    try:
        from kan_train.parallel.runtime import runtime
        from layout_matrix.member import train_row
        from layout_matrix.rows import find

        (row,) = find([request["row"]])
        config = row.config()
        config.validate(world)
        choices = Path(request["choices"]) if request["choices"] else None
        with runtime(config) as process:
            train_row(row, process, folder, config=config, steps=request["steps"], choices=choices, fault=request["fault"])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_row(request: dict) -> dict:
    """Fork the processes of a row and wait for them: {"codes": one a rank, "seconds"}; a rank that was ended by force has a code below 0."""
    started = time.monotonic()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks: dict[int, int] = {}
    for rank in range(request["world"]):
        process = os.fork()
        if process == 0:
            serve_rank(request, rank, port)
        ranks[process] = rank
    codes: dict[int, int] = {}
    deadline = started + request["seconds"]
    while len(codes) < len(ranks):
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            codes[process] = os.waitstatus_to_exitcode(status)
            if codes[process]:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            continue
        if time.monotonic() > deadline:
            for late in ranks.keys() - codes.keys():
                os.kill(late, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.01)
    return {"codes": [codes[process] for process in sorted(ranks, key=ranks.__getitem__)], "seconds": time.monotonic() - started}


def main() -> None:
    # What a library prints must not reach the answers: they go over a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    print(json.dumps({"import_seconds": import_all()}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run_row(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
