"""Runs jobs of several processes for test_parallel.py: libraries are imported once, then each job forks its ranks.

    python parallel_ranks.py FOLDER JOB...      JOB: a key of JOBS; writes FOLDER/JOB.json, and what each rank wrote and saw
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parallel_cases as cases
import torch
import torch.distributed.checkpoint  # what loading imports: once, not in every rank
from free_ports import free_port

from kan_train.cli import main
from kan_train.config import GenerateConfig
from kan_train.data_tools.tokenizer import Tokenizer
from kan_train.inference.layout import decode_layout, start_groups
from kan_train.inference.load import find_source
from kan_train.inference.lockstep import Lockstep
from kan_train.inference.shares import build_share, load_share
from kan_train.inference.together import together

PATIENCE = 60.0
CPU = torch.device("cpu")


def decode(folder: Path, lockstep: Lockstep) -> None:
    """Every case of so many processes; and, from its run directory and its exported file, what a share of the weights is."""
    tokenizer, found = Tokenizer(folder / "runs" / "first" / "tokenizer.model"), {}
    for name, layout in cases.CASES[lockstep.size]:
        shape = decode_layout(cases.parallel(layout), cases.model_config(name), lockstep.size)
        found[f"{name}, {layout}"] = cases.seen(cases.build(name, start_groups(shape)), tokenizer, lockstep)
    shape = decode_layout(cases.parallel("tp2 ep2"), cases.model_config("gated"), lockstep.size)
    place = start_groups(shape)
    expected = cases.build("gated", place, torch.float32).state_dict()
    for source in ("first", "first.safetensors"):
        model = build_share(cases.model_config("gated"), place, find_source(source, str(folder / "runs")), CPU, lockstep)
        same = all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
        found[f"share of {source}"] = {"same": same and model.state_dict().keys() == expected.keys() and not model.training}
    half = load_share(settings(folder, dtype="bf16", active_groves=1, parallel=cases.parallel("tp2" if lockstep.size == 2 else "tp2 ep2")), CPU, lockstep).model
    found["adjusted"] = {"dtypes": {parameter.dtype for parameter in half.parameters()}, "active": {layer.router.active for layer in half.grove_layers()}}
    torch.save(found, folder / f"seen-{lockstep.size}-{lockstep.rank}.pt")


def settings(folder: Path, **changes: Any) -> GenerateConfig:
    shared = {"run": "first", "root": str(folder / "runs"), "device": "cpu", "max_tokens": 400, "parallel": cases.parallel("tp2")}
    return GenerateConfig(**{**shared, **changes})


def broken(folder: Path, lockstep: Lockstep, rank: int, fail: Callable[[], None]) -> int:
    """Decode for ever, and let `rank` fail in its fifth step, in the middle of a layer."""
    from kan_train.inference.commands import _run

    config = settings(folder, max_tokens=100_000, stop=["\0"])
    loaded = load_share(config, CPU, lockstep)
    steps, second = [0], loaded.model.layers[1]

    def count(*_: Any) -> None:
        steps[0] += 1
        if steps[0] == 5 and lockstep.rank == rank:
            fail()

    second.mixer_norm.register_forward_hook(count)
    if rank == -1 and lockstep.is_first:  # a rank that draws: its logits are no numbers from some step on
        second.mixer_norm.register_forward_hook(lambda module, inputs, output: output * (float("nan") if steps[0] > 5 else 1))
    return _run(config, lockstep, lambda _: loaded)


def out_of_memory() -> None:
    raise MemoryError("no memory left on this rank")


def interrupted() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def generate(folder: Path, *overrides: str) -> int:
    fixed = ["generate", "run=first", f"root={folder / 'runs'}", "device=cpu", "temperature=0", "max_tokens=12"]
    return main([*fixed, *overrides])


def pair(folder: Path, work: Callable[[Lockstep], Any]) -> int:
    return together(settings(folder, max_rows=16), lambda _, lockstep: work(lockstep) or 0)


JOBS: dict[str, tuple[int, Callable[[Path], int]]] = {
    "two": (2, lambda folder: pair(folder, lambda lockstep: decode(folder, lockstep))),
    "four": (4, lambda folder: pair(folder, lambda lockstep: decode(folder, lockstep))),
    "prompts": (2, lambda folder: generate(folder, "prompts=-", "samples=2", "max_rows=3", "parallel.tensor_parallel=2")),
    "several samples": (2, lambda folder: generate(folder, "prompt=for", "samples=2", "parallel.expert_parallel=2")),
    "exported, fewer groves": (2, lambda folder: generate(folder, "prompt=for", "run=first.safetensors", "active_groves=1", "parallel.tensor_parallel=2")),
    "pipe closed": (2, lambda folder: generate(folder, "max_tokens=100000", "stop=['\0']", "parallel.tensor_parallel=2")),
    "one fails": (2, lambda folder: pair(folder, lambda lockstep: broken(folder, lockstep, 1, out_of_memory))),
    "first fails": (2, lambda folder: pair(folder, lambda lockstep: broken(folder, lockstep, 0, out_of_memory))),
    "one is killed": (2, lambda folder: pair(folder, lambda lockstep: broken(folder, lockstep, 1, lambda: os.kill(os.getpid(), signal.SIGKILL)))),
    "one is interrupted": (2, lambda folder: pair(folder, lambda lockstep: broken(folder, lockstep, 1, interrupted))),
    "not finite": (2, lambda folder: pair(folder, lambda lockstep: broken(folder, lockstep, -1, out_of_memory))),
    "no such run": (2, lambda folder: generate(folder, "run=second", "parallel.tensor_parallel=2")),
    "a pipeline": (2, lambda folder: generate(folder, "parallel.pipeline_parallel=2")),
    "no layout asked for": (2, lambda folder: generate(folder)),
    "parted": (2, lambda folder: pair(folder, lambda lockstep: lockstep.begin(lockstep.rank, 7))),
}


def run_job(folder: Path, name: str) -> None:
    """Fork the ranks of a job, and note exit statuses and seconds; stdin is FOLDER/stdin, and of each rank stdout and stderr are files."""
    size, work = JOBS[name]
    port, children, started = free_port(), [], time.monotonic()
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            streams(folder, name, rank)
            status = 99
            try:
                status = work(folder)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    codes: dict[int, int | None] = dict.fromkeys(children)
    while None in codes.values() and time.monotonic() - started < PATIENCE:
        for child in children:
            if codes[child] is None and (done := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(done[1])
        time.sleep(0.02)
    for child, code in codes.items():
        if code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    result = {"codes": list(codes.values()), "seconds": time.monotonic() - started}
    result |= {stream: [(folder / f"{name}-{rank}.{stream}").read_text() for rank in range(size)] for stream in ("out", "err")}
    (folder / f"{name}.json").write_text(json.dumps(result))


def streams(folder: Path, name: str, rank: int) -> None:
    os.dup2(os.open(folder / "stdin", os.O_RDONLY), 0)
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}-{rank}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    if name == "pipe closed":
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)


if __name__ == "__main__":
    for job in sys.argv[2:]:
        run_job(Path(sys.argv[1]), job)
