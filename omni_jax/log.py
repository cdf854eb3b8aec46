"""The package's log on a terminal."""

from __future__ import annotations

import logging
import sys


def log_to_stderr() -> logging.Logger:
    """Show the package's log from level INFO on, unless the program has a log of its own."""
    logger = logging.getLogger("omni_jax")
    logger.setLevel(logging.INFO)
    if not logging.getLogger().handlers and not logger.handlers:
        logger.addHandler(logging.StreamHandler(sys.stderr))
        # A library may add a handler to the root logger later, which would show every line again.
        logger.propagate = False
    return logger
