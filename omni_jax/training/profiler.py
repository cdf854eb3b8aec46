"""A profiler trace of a few training steps."""

from __future__ import annotations

from typing import Any, Self

import jax

TRACED_STEPS = 5
"""Steps in a trace."""


class ProfilerTrace:
    """Traces `TRACED_STEPS` steps of this process, for TensorBoard's profiler or xprof.

    It begins after `log_interval` steps of this process, when everything is compiled, or earlier in a shorter run. As
    a context manager it ends a trace that is still running.
    """

    def __init__(self, folder: str | None, first_step: int, last_step: int, log_interval: int):
        """Plan a trace.

        Args:
            folder: where it is written; None: no trace.
            first_step: steps that are done when this process begins.
            last_step: steps that are done when the run ends.
            log_interval: steps between two log steps.
        """
        self.folder = folder
        self.begin = max(first_step, min(first_step + log_interval, last_step - TRACED_STEPS))
        self.end = self.begin + TRACED_STEPS
        self.running = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def update(self, step: int, state: Any) -> None:
        """Start or stop the trace where it is due.

        Args:
            step: number of steps done; called before each step and after the last one.
            state: what these steps return; a trace ends when it has been computed.
        """
        if self.folder is not None and step == self.begin:
            jax.profiler.start_trace(self.folder)
            self.running = True
        elif step == self.end and self.running:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
