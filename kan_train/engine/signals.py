"""Asked to stop (Ctrl-C, a scheduler's SIGTERM or its SIGUSR1 ahead of the time limit), a run finishes its step, saves and leaves."""

import signal
import threading
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """While entered, a stop signal is remembered instead of ending the process.

    A scheduler may send several, one after the other, to every process of a job: they must not interrupt the save that the first one asked
    for. Only a second Ctrl-C has its usual effect, so that a person can still end a run that hangs.
    """

    def __init__(self) -> None:
        self.received: int = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number in list(self._before):
            self._restore(number)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            self._restore(number)

    def _restore(self, number: int) -> None:
        signal.signal(number, self._before.pop(number))  # type: ignore[arg-type]
