"""Asked to stop (Ctrl-C, a scheduler's SIGTERM), a run finishes its step, saves and leaves."""

import signal
import threading
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """While entered, the first SIGTERM or SIGINT is remembered instead of ending the process; a second one has its usual effect."""

    def __init__(self) -> None:
        self.received: int = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}


def exit_code(number: int) -> int:
    """The exit status a shell gives a process that ended by signal `number`."""
    return 128 + number
