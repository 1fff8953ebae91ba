"""Saving while training goes on: a copy in host memory, then a thread that writes it and tries again where that fails.

Training waits for the copy alone. At most one save is in flight: where the one before has not ended yet, the next waits for it, so that host
memory holds one copy of what this rank writes and no more. The buffers of the copy are kept from save to save.
"""

import dataclasses
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kan_train.checkpoint import CheckpointError, Fragment, Manifest, Policy, prune, save
from kan_train.config import CheckpointConfig
from kan_train.parallel.runtime import Runtime

WRITE_MINUTES = 60
"""How long a rank of a background save waits for the others: they may have more to write, on a slower disk."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a checkpoint holds besides tensors of the engine; everything the same on every rank but `rank_tensors`."""

    step: int
    state: dict[str, Any]
    """JSON state, see `checkpoint.save`."""
    rank_tensors: dict[str, Tensor]
    """This rank's own tensors."""
    about: dict[str, Any]
    """Keyword arguments of `checkpoint.save` for the manifest: config, tokens, layout, data_index, ledger."""


class Saver:
    """Saves a run's checkpoints, one after the other. Every method but `events` is collective: called on every rank alike."""

    def __init__(self, config: CheckpointConfig, directory: Path, runtime: Runtime, metric: Callable[[Manifest], float | None]) -> None:
        """metric: what checkpoint.keep_best goes by, lowest first."""
        self.config, self.directory, self.runtime, self.metric = config, directory, runtime, metric
        # A group of its own: messages of the writing thread must not mix with those of training, and are about things in host memory.
        timeout = timedelta(minutes=WRITE_MINUTES)
        self.group = dist.new_group(backend="gloo", timeout=timeout) if runtime.distributed and runtime.world_size > 1 else None
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self._events: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def save(self, snapshot: Snapshot, fragments: Iterable[Fragment]) -> dict[str, float]:
        """Save; with checkpoint.asynchronous this returns when the copy is taken. Returns the seconds that training waited: "seconds", and of
        them "seconds_waiting" for the save before.

        A failure is told at once on standard error and in `events`, and is no error here: a healthy run goes on.
        """
        started = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - started
        if self.config.asynchronous:
            copies = self._copied(fragments)
            self._thread = threading.Thread(target=self._attempts, args=(snapshot, copies), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._attempts(snapshot, list(fragments))
        return {"seconds": time.perf_counter() - started, "seconds_waiting": waited}

    def save_now(self, snapshot: Snapshot, fragments: Iterable[Fragment]) -> dict[str, float]:
        """Save and be done with it when this returns. CheckpointError on every rank where it failed, after all tries."""
        started = time.perf_counter()
        self.wait()
        error = self._attempts(snapshot, list(fragments))
        if error is not None:
            raise error
        return {"seconds": time.perf_counter() - started, "seconds_waiting": 0.0}

    def wait(self) -> float:
        """Until no save is in flight; returns the seconds that it took, 0 where there was none."""
        if self._thread is None:
            return 0.0
        started = time.perf_counter()
        self._thread.join()
        self._thread = None
        return time.perf_counter() - started

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """What happened in the background since the last call: (kind, fields) of "saved", "save_failed" and "prune_failed"."""
        found = []
        while not self._events.empty():
            found.append(self._events.get())
        return found

    def _copied(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        copies = []
        for fragment in fragments:
            flat = fragment.flat
            if not fragment.write:  # of a replica the others need the shape alone
                copies.append(dataclasses.replace(fragment, flat=torch.empty_like(flat, device="meta")))
                continue
            key = (fragment.name, fragment.start)
            if key not in self._buffers:
                self._buffers[key] = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda)
            copies.append(dataclasses.replace(fragment, flat=self._buffers[key].copy_(flat, non_blocking=True)))
        self.runtime.synchronise()
        return copies

    def _attempts(self, snapshot: Snapshot, fragments: list[Fragment]) -> Exception | None:
        """Write until it succeeds or checkpoint.retries are used up; the last error, the same kind on every rank."""
        for attempt in range(self.config.retries + 1):
            started = time.perf_counter()
            try:
                path = save(
                    self.directory,
                    step=snapshot.step,
                    fragments=fragments,
                    state=snapshot.state,
                    rank_tensors=snapshot.rank_tensors,
                    group=self.group,
                    **snapshot.about,
                )
            except CheckpointError as error:  # the same on every rank: all try again, or none
                last = attempt == self.config.retries
                self._failed(snapshot.step, attempt, error, "no more tries; training goes on without this checkpoint" if last else "trying again")
                if last:
                    return error
                time.sleep(min(2.0**attempt, 30.0))
            except Exception as error:  # the group itself broke: a rank is gone, which training will meet too
                self._failed(snapshot.step, attempt, error, "not tried again")
                return error
            else:
                self._events.put(("saved", {"saved_step": snapshot.step, "path": str(path), "seconds_writing": time.perf_counter() - started}))
                self._prune()
                return None
        raise AssertionError("unreachable: the last try returns")

    def _failed(self, step: int, attempt: int, error: Exception, outlook: str) -> None:
        self._events.put(("save_failed", {"saved_step": step, "attempt": attempt + 1, "error": str(error)}))
        if self.runtime.is_first:
            print(f"kan: the checkpoint of step {step} could not be written: {error}; {outlook}", file=sys.stderr, flush=True)

    def _prune(self) -> None:
        if not self.runtime.is_first:
            return
        try:
            prune(self.directory, Policy(keep=self.config.keep, every=self.config.keep_every, best=self.config.keep_best), metric=self.metric)
        except CheckpointError as error:
            self._events.put(("prune_failed", {"error": str(error)}))
            print(f"kan: old checkpoints could not be deleted: {error}", file=sys.stderr, flush=True)
