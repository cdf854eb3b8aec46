"""StopSignal handles SIGINT and SIGTERM during a run, and no longer."""

import os
import signal
import threading

import pytest

from omni_jax.training.stop_signal import SIGNALS, StopSignal


@pytest.mark.parametrize("number", SIGNALS)
def test_stop_signal_is_requested_by_signal_and_restores_handlers(number: signal.Signals):
    received: list[int] = []
    previous = {signal_number: signal.getsignal(signal_number) for signal_number in SIGNALS}
    signal.signal(number, lambda caught, _: received.append(caught))
    own = signal.getsignal(number)
    try:
        with StopSignal() as stop:
            assert not stop.requested(0)
            os.kill(os.getpid(), number)
            assert stop.requested(1)
        assert signal.getsignal(number) is own
        os.kill(os.getpid(), number)
        assert received == [number]
    finally:
        for signal_number, handler in previous.items():
            signal.signal(signal_number, handler)


def test_stop_signal_restores_handlers_after_an_error():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(RuntimeError), StopSignal():
        raise RuntimeError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_stop_signal_outside_the_main_thread_changes_nothing() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    found: list[bool] = []

    def run() -> None:
        with StopSignal() as stop:
            found.append([signal.getsignal(number) for number in SIGNALS] == before and not stop.requested(0))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [True]
