"""How processes that decode together end: the first that fails says why, and the others are told through the store, in whatever collective they wait."""

import os
import sys
import threading
import time
import traceback
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist
from torch.distributed import distributed_c10d

from kan_train.config import ConfigError

_ENDED, _TOLD, _LEFT = "kan/ended", "kan/told", "kan/left"  # keys of the store: who failed first, that he has said why, how many others know it
_LOOK_SECONDS, _TOLD_SECONDS, _LEFT_SECONDS = 0.2, 10.0, 2.0
INTERRUPTED = 130
"""Exit status after Ctrl-C, as a shell gives it."""


class Ending:
    """Watches, from a thread, whether another process has failed: this one then ends with its status, silently. Left, it watches no more."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.store: dist.Store = distributed_c10d._get_default_store()
        self._stop, self._leaving = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="ending", daemon=True)

    def __enter__(self) -> "Ending":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        # The interpreter aborts where it ends while a thread is in a call of the store.
        self._thread.join(_TOLD_SECONDS)

    def failed(self, error: BaseException) -> int:
        """Say why this process ends, if it is the first that fails. Returns the exit status of all."""
        status = 2 if isinstance(error, ConfigError) else INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
        said = False
        with self._leaving:  # kept by the other thread where that ends the process
            try:
                rank, status = map(int, self.store.compare_set(_ENDED, "", f"{self.rank} {status}").decode().split())
                if rank != self.rank:
                    said = True
                    self._left()
                else:
                    self._say(error)
                    said = True
                    self.store.set(_TOLD, "1")
                self._wait_for_the_others()
            except (dist.DistError, RuntimeError):  # the process that kept the store is gone
                if not said:
                    self._say(error)
        return status

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            try:
                ended = self.store.check([_ENDED])
            except (dist.DistError, RuntimeError):
                # Whoever kept the store is gone. What waits for him raises an error, which says so; but not with every backend.
                if not self._stop.wait(_LEFT_SECONDS):
                    print(f"kan: rank {self.rank}: the first process has ended without a word", file=sys.stderr, flush=True)
                    os._exit(1)
                return
            if ended:
                self._end()
                return

    def _end(self) -> None:
        with self._leaving:
            rank, status = map(int, self.store.get(_ENDED).decode().split())
            if rank != self.rank and not self._stop.is_set():
                self._left()
                self._wait_for_the_others()
                os._exit(status)

    def _left(self) -> None:
        # A launcher ends all when one has ended: not before the one that knows why has said so.
        self.store.wait([_TOLD], timedelta(seconds=_TOLD_SECONDS))
        self.store.add(_LEFT, 1)

    def _wait_for_the_others(self) -> None:
        """The store may go with this process, and they are to read it."""
        until = time.monotonic() + _LEFT_SECONDS
        while self.store.add(_LEFT, 0) < self.size - 1 and time.monotonic() < until:
            time.sleep(0.02)
        if self.rank == 0:  # it may keep the store, of which the others are about to read the same
            time.sleep(0.1)

    def _say(self, error: BaseException) -> None:
        if isinstance(error, ConfigError):
            text = f"kan: {error}"
        elif isinstance(error, KeyboardInterrupt):
            text = "kan: interrupted"
        elif _is_lost(error):
            why = next(iter(str(error).splitlines()), type(error).__name__)
            text = f"kan: rank {self.rank}: another process has ended without a word (killed, or out of memory?): {why}"
        else:
            traceback.print_exception(error)
            text = f"kan: rank {self.rank} has failed, and all end: {type(error).__name__}: {error}"
        print(text, file=sys.stderr, flush=True)


def _is_lost(error: BaseException) -> bool:
    """Whether it is what a collective raises for want of another process."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and ("gloo" in str(error) or "closed by peer" in str(error)))
