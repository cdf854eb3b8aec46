"""The package's log on a terminal."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

from omni_jax.log import OneLineFormatter

ROOT = Path(__file__).parents[1]


def test_log_to_stderr_shows_a_line_once_if_a_library_logs_to_the_root_logger_later() -> None:
    code = (
        "import logging; from omni_jax.log import log_to_stderr; logger = log_to_stderr(); "
        "logging.warning('root'); logger.info('step 1')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "WARNING:root:root\nstep 1\n"


def test_messages_take_one_line() -> None:
    name = "a.wav\nINFO: all is well\r\x1b[2J\u2028\x85"
    record = logging.LogRecord("omni_jax", logging.WARNING, "", 1, "%s: damaged", (name,), None)
    line = OneLineFormatter().format(record)
    assert line == "a.wav\\nINFO: all is well\\r\\x1b[2J\\u2028\\x85: damaged"
    try:
        raise ValueError("no")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    assert OneLineFormatter().format(record).splitlines()[1] == "Traceback (most recent call last):"
