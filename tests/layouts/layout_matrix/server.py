"""A process that has imported everything heavy once, and forks the processes of one job after the other.

    python server.py [MODULE...]    one JSON request a line on standard input, JSON answers a line each on the descriptor of its own

A request: {"task": "module:function", "arguments", "world", "folder", "seconds", "grace", "terminate"}. Every process of the job gets a launcher's
environment and calls function(folder, **arguments), whose result is its exit code (None is 0). Answers: {"pids": one a rank} at once, and at the end
{"codes": one a rank, "seconds"}. Until then {"kill": rank} ends that rank by force. MODULE: further modules to import beforehand.

Nothing here starts a thread or a process group: a fork copies the calling thread alone.
"""

import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from free_ports import free_port


def import_all(more: Sequence[str] = ()) -> float:
    """Import what every process of a row needs, and `more`; seconds that it took."""
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

    for name in more:
        importlib.import_module(name)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise RuntimeError(f"the imports left {threads} threads: their locks would be held for ever in a forked process")
    return time.perf_counter() - started


def serve_rank(request: dict, rank: int, port: int) -> None:
    """One process of a job, from the fork to its end."""
    folder, world = Path(request["folder"]), request["world"]
    output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # the requests are the server's
    sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in sizes.items()})
    code = 1
    try:
        module, _, name = request["task"].partition(":")
        code = getattr(importlib.import_module(module), name)(folder, **request["arguments"]) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_job(request: dict, answers: "Answers") -> dict:
    """Fork the processes of a job and wait for them: {"codes": one a rank, "seconds"}; a rank that was ended by force has a code below 0.

    After one failed, the others get `grace` seconds to fail too (terminate: after SIGTERM, as torchrun sends it), and are then ended by force.
    """
    started = time.monotonic()
    port = free_port()
    ranks: dict[int, int] = {}
    for rank in range(request["world"]):
        process = os.fork()
        if process == 0:
            serve_rank(request, rank, port)
        ranks[process] = rank
    answers.give({"pids": list(ranks)})
    codes: dict[int, int] = {}
    deadline, failed = started + request["seconds"], False
    while len(codes) < len(ranks):
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            codes[process] = os.waitstatus_to_exitcode(status)
            if codes[process] and not failed:
                failed, deadline = True, min(deadline, time.monotonic() + request["grace"])
                if request["terminate"]:
                    _signal(ranks.keys() - codes.keys(), signal.SIGTERM)
            continue
        if time.monotonic() >= deadline:
            _signal(ranks.keys() - codes.keys(), signal.SIGKILL)
            deadline = float("inf")
        # Nothing else is asked for while a job runs, so no further request can lie in a buffer here.
        if select.select([sys.stdin], [], [], 0.005)[0]:
            wanted = json.loads(sys.stdin.readline() or "null")
            if wanted is None:  # the caller is gone
                _signal(ranks.keys() - codes.keys(), signal.SIGKILL)
                raise SystemExit(1)
            # Only this process reaps its children: the number cannot have become another process's.
            _signal({process for process, rank in ranks.items() if rank == wanted["kill"]} - codes.keys(), signal.SIGKILL)
    return {"codes": [codes[process] for process in ranks], "seconds": time.monotonic() - started}


def _signal(processes: set[int], number: signal.Signals) -> None:
    for process in processes:
        os.kill(process, number)


class Answers:
    """What goes back to the caller, over a descriptor of its own: what a library prints must not reach it."""

    def __init__(self) -> None:
        self.file = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def give(self, answer: dict) -> None:
        print(json.dumps(answer), file=self.file, flush=True)


def main() -> None:
    answers = Answers()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    answers.give({"import_seconds": import_all(sys.argv[1:])})
    while line := sys.stdin.readline():
        answers.give(run_job(json.loads(line), answers))
    os._exit(0)  # nothing is open here, and taking the libraries down takes seconds


if __name__ == "__main__":
    main()
