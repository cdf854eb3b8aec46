"""Where the time of a run goes: steps, and all that is not a step."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import jax

logger = logging.getLogger(__name__)

WAITING = "waiting for data"
"""Part of a step's time; what else is measured is not."""


class Goodput:
    """Measures the parts of a run's time, from its construction on. They do not overlap."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Of each part."""

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count the time within as a part."""
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    @contextmanager
    def phase(self, part: str, what: str) -> Iterator[None]:
        """`measure`, with a line in the log before it, and one after it that has the duration."""
        log_once(f"{what} ...")
        start = time.perf_counter()
        with self.measure(part):
            yield
        log_once(f"{what}: {time.perf_counter() - start:.1f} s")

    def step_seconds(self) -> float:
        """Seconds so far that are not of another part; the steps have waited for data in some of them."""
        return time.perf_counter() - self.start - sum(self.seconds.values()) + self.seconds[WAITING]

    def summary(self) -> str:
        """The share of each part, in one line."""
        total = time.perf_counter() - self.start
        parts = {"steps": self.step_seconds() - self.seconds[WAITING], **self.seconds}
        shares = ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in parts.items() if seconds)
        return f"goodput of {format_seconds(total)}: {shares}"


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds, such as `0:03:20`."""
    return str(timedelta(seconds=round(seconds)))


def log_once(message: str) -> None:
    """A line in the log of process 0."""
    if jax.process_index() == 0:
        logger.info(message)
