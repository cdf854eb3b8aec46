"""How far a run is: a bar on a terminal, lines of the log elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

from tqdm import tqdm

from omni_jax.training.goodput import format_seconds

logger = logging.getLogger(__name__)

SMOOTHING = 0.3
"""Weight of the newest interval in the time of a step, from which the time left is estimated."""
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
"""Without the bar's own times, which have compiling, evaluation and checkpoints in them."""


class Progress:
    """Shows the steps of a run on stderr."""

    def __init__(self, first_step: int, last_step: int):
        self.last_step = last_step
        self.seconds_per_step = 0.0
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=last_step, initial=first_step, dynamic_ncols=True, bar_format=BAR)

    def update(self, step: int, seconds_per_step: float, shown: Mapping[str, str]) -> None:
        """Move on to a step.

        Args:
            step: number of steps done.
            seconds_per_step: since the last update.
            shown: numbers to show, by name.
        """
        before = self.seconds_per_step or seconds_per_step
        self.seconds_per_step = before + SMOOTHING * (seconds_per_step - before)
        shown = {
            **shown,
            "s/step": f"{seconds_per_step:.3g}",
            "left": format_seconds((self.last_step - step) * self.seconds_per_step),
        }
        if self.bar is None:
            logger.info("step %d/%d: %s", step, self.last_step, ", ".join(f"{k} {v}" for k, v in shown.items()))
        else:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(step - self.bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()
