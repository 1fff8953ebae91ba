"""What each process of benchmarks/saving.py does: a model in training is saved and read back in one way, with a clock and an eye on memory."""

import ctypes
import hashlib
import json
import mmap
import os
import shutil
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from kan_train.checkpoint import Fragment, Ranks, load, newest_valid
from kan_train.config import CheckpointConfig, Config
from kan_train.config.compose import compose_train
from kan_train.data import Batch
from kan_train.engine import build_engine
from kan_train.engine.engine import Engine
from kan_train.engine.saving import Saver, Snapshot
from kan_train.parallel.runtime import Runtime, runtime

WARM_STEPS, STEPS, SAVES, FIRST_SAVES = 2, 5, 4, 2
"""Steps before the clock, steps that say how long one takes, saves, and how many of them do not count: the first finds no buffers, and the first two, which
lie side by side, go to blocks that a virtual disk may have to find first (on one they took up to six times as long)."""

PORTION = 8 << 20
"""Bytes of a plain write or read at a time."""


def measure(folder: Path, method: str, overrides: list[str]) -> None:
    """Leave rank-N.json in `folder`: bytes of this rank, and seconds and memory of `method`."""
    started = time.monotonic()
    world = int(os.environ["WORLD_SIZE"])
    config = compose_train(overrides, [], world_size=world)
    config.validate(world)
    with runtime(config) as process:
        engine = build_engine(config, process)
        training = Training(config, engine, process)
        fragments = list(engine.named_fragments())
        seen: dict[str, Any] = {"bytes": sum(f.flat.numel() * f.flat.element_size() for f in fragments if f.write)}
        if method == "plain":
            seen |= _plain(folder, process, fragments)
        elif method == "restart":
            seen |= _restart(folder, process, engine, fragments, training, started)
        else:
            seen |= _saves(WAYS[method](folder, process, fragments), training, process, fragments)
        (folder / f"rank-{process.rank}.json").write_text(json.dumps(seen))
        engine.close()


class Training:
    """Steps on random tokens."""

    def __init__(self, config: Config, engine: Engine, process: Runtime) -> None:
        self.config, self.engine, self.process = config, engine, process
        self.seconds: list[float] = []
        self.micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * engine.place.data.size)

    def step(self) -> None:
        """One step, timed."""
        shape = (self.config.train.micro_batch_size, self.config.model.sequence_length + 1)
        batches = []
        for _ in range(self.micro_batches):
            tokens = torch.randint(0, self.config.model.vocab_size, shape)
            batches.append(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None))
        started = time.perf_counter()
        self.engine.train_step(batches, 1e-4)
        self.seconds.append(time.perf_counter() - started)


class Way(ABC):
    """A way to save, and to read back what was saved."""

    def __init__(self, folder: Path, process: Runtime, fragments: list[Fragment]) -> None:
        self.folder, self.process, self.fragments = folder, process, fragments
        # Of plain torch.distributed.checkpoint and torch.save: what this rank owns, under names that no other rank has.
        self.own: dict[str, Tensor] = {f"{process.rank}/{f.name}/{f.start}": f.flat for f in fragments if f.write}

    @abstractmethod
    def start(self, number: int) -> None:
        """Save; returns when training may go on."""

    def finished(self) -> float | None:
        """Seconds from `start`'s beginning to the end of the write; None while it goes on. Not called before `start` has returned."""
        return self._seconds

    @abstractmethod
    def read(self) -> None:
        """Read the last save back into the fragments."""

    _seconds: float | None = None


class Kan(Way):
    """This project's saver, in the foreground."""

    asynchronous = False

    def __init__(self, folder: Path, process: Runtime, fragments: list[Fragment]) -> None:
        super().__init__(folder, process, fragments)
        self.saver = Saver(CheckpointConfig(asynchronous=self.asynchronous, keep=1), folder / "checkpoints", process, lambda manifest: None)

    def start(self, number: int) -> None:
        self._seconds = None
        snapshot = Snapshot(step=number + 1, state={}, rank_tensors={}, about={})
        self.stalled = self.saver.save(snapshot, self.fragments)["seconds"]

    def finished(self) -> float | None:
        for kind, fields in self.saver.events():
            if kind != "saved":
                raise RuntimeError(f"{kind}: {fields}")
            self._seconds = fields["seconds_writing"] + (self.stalled if self.asynchronous else 0.0)
        return self._seconds

    def read(self) -> None:
        load(self.folder / "checkpoints" / f"step-{SAVES:08d}", self.fragments)


class KanInBackground(Kan):
    """This project's saver."""

    asynchronous = True


class TorchSave(Way):
    """A file a rank, with pickle; forced to disk, as the others do. The one before goes when it is there."""

    def start(self, number: int) -> None:
        started = time.perf_counter()
        with self._place(number).open("wb") as file:
            torch.save(self.own, file)
            file.flush()
            os.fsync(file.fileno())
        self._place(number - 1).unlink(missing_ok=True)
        self._seconds = time.perf_counter() - started

    def read(self) -> None:
        for name, tensor in torch.load(self._place(SAVES - 1), weights_only=True).items():
            self.own[name].copy_(tensor)

    def _place(self, number: int) -> Path:
        return self.folder / f"torch-{self.process.rank}-{number}"


class Dcp(Way):
    """torch.distributed.checkpoint with its own storage, which forces its files to disk too."""

    def start(self, number: int) -> None:
        started = time.perf_counter()
        self._make_room(number)
        dcp.save(self.own, checkpoint_id=self._place(number), no_dist=not self.process.distributed)
        self._seconds = time.perf_counter() - started

    def read(self) -> None:
        dcp.load(self.own, checkpoint_id=self._place(SAVES - 1), no_dist=not self.process.distributed)

    def _place(self, number: int) -> Path:
        return self.folder / f"dcp-{number}"

    def _make_room(self, number: int) -> None:
        """Of the saves before the last one nothing is kept, as by the others."""
        self.process.barrier()
        if self.process.is_first:
            shutil.rmtree(self._place(number - 2), ignore_errors=True)


class DcpInBackground(Dcp):
    """The same in a thread, after a copy."""

    def start(self, number: int) -> None:
        self._seconds = None
        started = time.perf_counter()
        self._make_room(number)
        future = dcp.async_save(self.own, checkpoint_id=self._place(number), no_dist=not self.process.distributed)
        assert isinstance(future, Future)
        future.add_done_callback(lambda done: setattr(self, "_seconds", time.perf_counter() - started if done.exception() is None else float("nan")))


WAYS: dict[str, Callable[[Path, Runtime, list[Fragment]], Way]] = {
    "kan": Kan, "kan, background": KanInBackground, "torch.save": TorchSave, "dcp.save": Dcp, "dcp.async_save": DcpInBackground,
}  # fmt: skip


def _saves(way: Way, training: Training, process: Runtime, fragments: list[Fragment]) -> dict[str, Any]:
    for _ in range(WARM_STEPS + STEPS):
        training.step()
    step_seconds = statistics.median(training.seconds[WARM_STEPS:])
    owned = sum(f.flat.numel() * f.flat.element_size() for f in fragments if f.write)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    seen: dict[str, Any] = {"step_seconds": step_seconds}
    saves: list[dict[str, float]] = []
    for number in range(SAVES):
        os.sync()
        process.barrier()
        started = time.perf_counter()
        way.start(number)
        stall = time.perf_counter() - started
        training.seconds.clear()
        # In the steps all ranks work together: all go on until the last one has written.
        while process.largest(int(way.finished() is None)):
            training.step()
        seconds = way.finished()
        assert seconds is not None
        slowed = max(0.0, sum(training.seconds) - len(training.seconds) * step_seconds)
        saves.append({"stall_seconds": stall, "write_io_seconds": seconds, "slowed_seconds": slowed})
    seen |= {name: statistics.median(save[name] for save in saves[FIRST_SAVES:]) for name in saves[0]}
    seen |= {"first_stall_seconds": saves[0]["stall_seconds"], "first_write_seconds": saves[0]["write_io_seconds"]}
    seen["memory_per_byte"] = (_memory("VmHWM") - before) / owned
    seen["left_in_page_cache"] = _drop_from_page_cache(way.folder, process)
    seen["read_io_seconds"] = _timed(process, way.read)
    return seen


def _restart(folder: Path, process: Runtime, engine: Engine, fragments: list[Fragment], training: Training, started: float) -> dict[str, Any]:
    built = time.monotonic() - started
    way = Kan(folder, process, fragments)
    way.start(0)
    way.finished()
    _drop_from_page_cache(folder, process)
    process.barrier()
    begun = time.monotonic()
    found = newest_valid(folder / "checkpoints", Ranks())
    assert found is not None
    load(found, fragments, verify=False)
    engine.after_load()
    training.step()
    read = time.monotonic() - begun
    return {"build_seconds": built, "load_and_step_seconds": read, "restart_seconds": built + read}


def _plain(folder: Path, process: Runtime, fragments: list[Fragment]) -> dict[str, Any]:
    owned = [fragment.flat.detach() for fragment in fragments if fragment.write]
    copies = [torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda).zero_() for flat in owned]
    views = [memoryview(copy.view(-1).view(torch.uint8).numpy()) for copy in copies]
    paths = [folder / f"plain-{process.rank}-{number}" for number in range(SAVES)]

    def copy() -> None:
        for source, target in zip(owned, copies, strict=True):
            target.copy_(source, non_blocking=True)
        process.synchronise()

    def write(number: int) -> None:
        with paths[number].open("wb", buffering=0) as file:
            for view in views:
                for start in range(0, len(view), PORTION):
                    file.write(view[start : start + PORTION])
            os.fsync(file.fileno())
        if number:
            paths[number - 1].unlink()

    def read() -> None:
        with paths[-1].open("rb", buffering=0) as file:
            for view in views:
                for start in range(0, len(view), PORTION):
                    part = view[start : start + PORTION]
                    assert file.readinto(part) == len(part)

    def digest() -> None:
        found = hashlib.sha256()
        for view in views:
            found.update(view)

    copy()
    seen: dict[str, Any] = {"copy_seconds": statistics.median(_timed(process, copy) for _ in range(3))}
    seen["sha256_io_seconds"] = _timed(process, digest)
    seconds = []
    for number in range(SAVES):  # into new files, as every save that must not harm the one before
        os.sync()
        seconds.append(_timed(process, lambda number=number: write(number)))
    seen["write_io_seconds"] = statistics.median(seconds[FIRST_SAVES:])
    seen["left_in_page_cache"] = _drop_from_page_cache(folder, process)
    seen["read_io_seconds"] = _timed(process, read)
    seen["cached_read_io_seconds"] = _timed(process, read)
    return seen


def _timed(process: Runtime, action: Callable[[], None]) -> float:
    process.barrier()
    started = time.perf_counter()
    action()
    process.barrier()
    return time.perf_counter() - started


def _memory(name: str) -> int:
    """VmRSS or VmHWM (the most there was) of this process, bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition(f"{name}:")[2].split()[0])


def _drop_from_page_cache(folder: Path, process: Runtime) -> float:
    """Ask the kernel to forget the contents of all files below `folder`; the share of their bytes that it kept all the same. Collective."""
    process.barrier()
    paths = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    process.barrier()
    return sum(_cached_bytes(path) for path in paths) / sum(path.stat().st_size for path in paths)


def _cached_bytes(path: Path) -> int:
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    resident = (ctypes.c_ubyte * pages)()
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as view:
        first = ctypes.c_char.from_buffer(view)
        failed = ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), resident)
        del first
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in resident) * mmap.PAGESIZE
