"""StopSignal handles SIGINT and SIGTERM during a run, and no longer."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from omni_jax.training.stop_signal import EXIT_STOPPED, SIGNALS, StopSignal


@pytest.mark.parametrize("number", SIGNALS)
def test_stop_signal_is_requested_by_signal_and_restores_handlers(number: signal.Signals):
    received: list[int] = []
    previous = {signal_number: signal.getsignal(signal_number) for signal_number in SIGNALS}
    signal.signal(number, lambda caught, _: received.append(caught))
    own = signal.getsignal(number)
    try:
        with StopSignal() as stop:
            stop.started()
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


def test_stop_signal_before_the_first_step_ends_the_process_in_the_middle_of_c_code(tmp_path: Path):
    code = f"""
import hashlib, multiprocessing, pathlib, time
from omni_jax.training.stop_signal import StopSignal

if __name__ == "__main__":
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,)).start()
    with StopSignal(pathlib.Path({str(tmp_path / "cleaned")!r}).touch):
        print("ready", flush=True)
        # Minutes, and as in a compilation Python runs no handler.
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    # The end of the output is that of the child process, too.
    _, shown = process.communicate(timeout=30)
    assert process.returncode == EXIT_STOPPED
    assert time.monotonic() - start < 5
    assert "stopped before the first step" in shown
    assert (tmp_path / "cleaned").exists()
