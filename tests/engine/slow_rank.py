"""Run by test_stragglers.py: a run of four ranks on two hosts (by name), one of which becomes slow, with one slow link.

    python slow_rank.py FOLDER SETTING...

The ranks are forked from this process, so that what they import is imported once. Their output goes to FOLDER/output-RANK.
"""

import importlib
import os
import socket
import sys
import time
from pathlib import Path

import torch.distributed as dist
from free_ports import free_port

from kan_train.config.compose import compose_train
from kan_train.engine.engine import Engine
from kan_train.engine.trainer import train
from kan_train.parallel.cpu import prepare_libraries
from kan_train.parallel.runtime import Runtime

RANKS, SLOW_RANK, SLOW_FROM = 4, 3, 10
SLEEP, SLOW_SEND = 0.4, 0.3


def slow_down_from(step: int) -> None:
    """This rank sleeps before it computes, in every step from `step` on."""
    taken, train_step = [0], Engine.train_step

    def slowed(engine, *args):
        taken[0] += 1
        if taken[0] >= step:
            time.sleep(SLEEP)
        return train_step(engine, *args)

    Engine.train_step = slowed


def slow_down_sending() -> None:
    """What this rank sends and gets takes long."""
    exchange = dist.batch_isend_irecv

    def slowed(operations):
        time.sleep(SLOW_SEND)
        return exchange(operations)

    dist.batch_isend_irecv = slowed


def rank_of_a_run(rank: int, folder: Path, overrides: list[str]) -> int:
    output = os.open(folder / f"output-{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    socket.gethostname = lambda: "node-a" if rank < RANKS // 2 else "node-b"
    if rank == SLOW_RANK:
        slow_down_from(SLOW_FROM)
        slow_down_sending()
    return train(compose_train(overrides)).exit_code


def main(folder: Path, overrides: list[str]) -> int:
    prepare_libraries(Runtime())
    for name in ("deepspeed", "kan_train.parallel.groups", "kan_train.engine.zero"):  # once for all ranks
        importlib.import_module(name)
    os.environ |= {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    children = []
    for rank in range(RANKS):
        if (child := os.fork()) == 0:
            code = 1
            try:
                code = rank_of_a_run(rank, folder, overrides)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
