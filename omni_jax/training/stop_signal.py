"""Stopping a run from outside, with all processes at the same step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Whether the run should stop: SIGTERM, which a preempted machine gets, or SIGINT (Ctrl-C).

    As a context manager it handles these signals, and restores the previous handlers at its end. Outside the main
    thread, where Python allows no handlers, it changes nothing. Several processes must stop at the same step: they
    ask JAX's coordination service, which handles SIGTERM in each of them.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> Self:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None is a handler that was not installed from Python, and cannot be restored from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _receive(self, *_: object) -> None:
        self.received = True

    def requested(self, step: int) -> bool:
        """Whether to stop before the next step; all processes get the same answer."""
        if jax.process_count() == 1:
            return self.received
        return multihost_utils.reached_preemption_sync_point(step)
