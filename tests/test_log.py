"""The package's log on a terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_log_to_stderr_shows_a_line_once_if_a_library_logs_to_the_root_logger_later() -> None:
    code = (
        "import logging; from omni_jax.log import log_to_stderr; logger = log_to_stderr(); "
        "logging.warning('root'); logger.info('step 1')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "WARNING:root:root\nstep 1\n"
