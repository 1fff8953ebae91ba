import os
import signal
import threading

import pytest

from kan_train.engine.signals import StopSignals, exit_code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_remembered(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received == 0
        os.kill(os.getpid(), number)
        assert signals.received == number
    assert signal.getsignal(number) == before


def test_the_second_one_has_its_usual_effect():
    """A run that hangs can still be stopped by hand."""
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_exit_status_is_that_of_a_shell():
    assert (exit_code(signal.SIGTERM), exit_code(signal.SIGINT)) == (143, 130)


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
