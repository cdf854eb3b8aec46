"""The package's log on a terminal."""

from __future__ import annotations

import logging
import re
import sys

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def log_to_stderr() -> logging.Logger:
    """Show the package's log from level INFO on, unless the program has a log of its own."""
    logger = logging.getLogger("omni_jax")
    logger.setLevel(logging.INFO)
    if not logging.getLogger().handlers and not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(OneLineFormatter())
        logger.addHandler(handler)
        # A library may add a handler to the root logger later, which would show every line again.
        logger.propagate = False
    return logger


class OneLineFormatter(logging.Formatter):
    """Escapes control characters in messages, so that no name of a file or client can forge a line of the log."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The message in one line; a traceback follows it as it is."""
        return CONTROL.sub(lambda found: repr(found.group())[1:-1], super().formatMessage(record))
