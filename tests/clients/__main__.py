"""Serves nano to the clients in `agents.py`: `python -m tests.clients PYTHON`, where PYTHON has their packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import omni_jax
from omni_jax.api import Omni
from tests.clients.agents import MODELS
from tests.serve.conftest import run_server

if __name__ == "__main__":
    question = Path(omni_jax.__file__).parent / "assets" / "questions" / "sum.wav"
    with run_server(Omni.from_pretrained("nano"), aliases=MODELS, max_batch_size=1) as server:
        command = [sys.argv[1], str(Path(__file__).with_name("agents.py")), server.url, str(question)]
        sys.exit(subprocess.run(command, check=False).returncode)
