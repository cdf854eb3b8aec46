"""Stopping a run from outside, with all processes at the same step."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Self

import jax
from jax.experimental import multihost_utils

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_STOPPED = 75
"""Exit code of a run that was stopped before its end: `EX_TEMPFAIL`, the same command resumes it."""


class StopSignal:
    """Whether the run should stop: SIGTERM, which a preempted machine gets, or SIGINT (Ctrl-C).

    As a context manager it handles these signals, and restores the previous handlers at its end. Outside the main
    thread, where Python allows no handlers, it changes nothing.

    Before the first step there is nothing to save: a signal ends the process at once, with `EXIT_STOPPED`, also in the
    middle of a compilation, in which Python runs no handlers. After `started`, the loop asks and stops. Several
    processes must stop at the same step: they ask JAX's coordination service, which handles SIGTERM in each of them.

    Args:
        cleanup: called in another thread before the process ends.
    """

    def __init__(self, cleanup: Callable[[], object] | None = None) -> None:
        self.received = False
        self._cleanup = cleanup
        self._started = False
        self._restore: list[Callable[[], object]] = []

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            reader, writer = socket.socketpair()
            writer.setblocking(False)
            # Python writes the number of a signal to the socket when it arrives, even while C++ code runs.
            before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
            self._restore = [writer.close, lambda: signal.set_wakeup_fd(before), *self._install_handlers()]
            threading.Thread(target=self._end_before_start, args=(reader,), name="stop_signal", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        while self._restore:
            self._restore.pop()()

    def started(self) -> None:
        """The first step is done: from now on a signal is for the loop."""
        if self._started:
            return
        self._started = True
        if jax.process_count() > 1:
            self.__exit__()
            if self.received:
                os.kill(os.getpid(), signal.SIGTERM)

    def requested(self, step: int) -> bool:
        """Whether to stop before the next step; all processes get the same answer."""
        if jax.process_count() == 1:
            return self.received
        return multihost_utils.reached_preemption_sync_point(step)

    def _install_handlers(self) -> Iterator[Callable[[], object]]:
        """Install them; yields what restores the previous ones."""
        if jax.process_count() > 1:
            # Python neither knows nor restores the handler of JAX's coordination service.
            handler = _set_c_handler(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, self._receive)
            yield partial(_set_c_handler, signal.SIGTERM, handler)
            return
        for number in SIGNALS:
            previous = signal.signal(number, self._receive)
            # None is a handler that was not installed from Python, and cannot be restored from it.
            yield partial(signal.signal, number, signal.SIG_DFL if previous is None else previous)

    def _receive(self, *_: object) -> None:
        self.received = True

    def _end_before_start(self, reader: socket.socket) -> None:
        with reader:
            while number := reader.recv(1):
                if number[0] in SIGNALS and not self._started:
                    break
            else:
                return
        try:
            logger.warning("stopped before the first step: nothing is lost, and the same command starts it again")
            if self._cleanup is not None:
                self._cleanup()
            for child in multiprocessing.active_children():
                child.kill()
        finally:
            os._exit(EXIT_STOPPED)


def _set_c_handler(number: int, handler: int | None) -> int | None:
    """Set a signal's handler by its address, and return that of the previous one."""
    function = ctypes.CDLL(None).signal
    function.restype, function.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    previous: int | None = function(number, handler)
    return previous
