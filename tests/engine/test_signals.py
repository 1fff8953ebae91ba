import os
import signal
import threading

import pytest

from kan_train.engine.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_the_first_signal_is_remembered(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received == 0
        os.kill(os.getpid(), number)
        assert signals.received == number
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_may_repeat_itself(number):
    """A second signal must not end the process in the middle of the save that the first one asked for."""
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), number)
        assert signals.received == number


@pytest.fixture
def usual_interrupt():
    """Ctrl-C raises: a shell that starts the tests in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_has_its_usual_effect(usual_interrupt):
    """A run that hangs can still be stopped by hand."""
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_thread_that_may_not_handle_signals_trains_without():
    before, failures = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        try:
            with StopSignals() as signals:
                assert signals.received == 0
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []
    assert signal.getsignal(signal.SIGTERM) == before
