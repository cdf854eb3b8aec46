"""Serves nano to clients of others: `python -m tests.clients NAME=PYTHON ...`, as `make test-clients` calls it.

NAME is an example of `examples/realtime`, PYTHON one that has its packages and not omni_jax. Each has to ask and answer
what nano knows.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from omni_jax.serve.binding import bind
from tests.clients.services import MODELS

ROOT = Path(__file__).parents[2]
QUESTION = ROOT / "omni_jax" / "assets" / "questions" / "sum.wav"
SPOKEN = ("asked:    What is seven plus five?", "answered: Seven plus five is twelve.")
TYPED = ("asked:    What is two plus two?", "answered: Two plus two is four.")
EXPECTED = {"openai_client": SPOKEN, "agents_sdk": SPOKEN + TYPED, "pipecat_service": SPOKEN + TYPED}
EXPECTED |= {"livekit_plugin": SPOKEN + TYPED}
OPTIONS: dict[str, list[list[str]]] = {"openai_client": [[], ["--push-to-talk"]]}
"""What the example is called with, once each; by default once without."""
SERVICES = {"pipecat_service": "pipecat", "livekit_plugin": "livekit"}
"""Clients that have services for transcription and speech, too."""


def run(python: str, *arguments: str | Path) -> str:
    """The output of a command of a client, which is shown."""
    print(f"\n$ {' '.join(map(str, ['python', *arguments]))}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [Path(python).absolute(), *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=300
        )
    print(done.stdout, flush=True)
    if done.returncode:
        sys.exit(f"{done.stderr}\nexpected status 0, found {done.returncode}")
    return done.stdout


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The address of `omni-jax serve`, once it is ready."""
    with bind("127.0.0.1", 0) as sockets:
        port = sockets[0].getsockname()[1]
    aliases = [option for name in MODELS for option in ("--model-alias", f"{name}=nano")]
    command = [
        Path(sys.executable).with_name("omni-jax"),
        "serve",
        "--port",
        str(port),
        "--max-batch-size",
        "2",
        *aliases,
    ]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(command)
    try:
        while not is_ready(url):
            if server.poll() is not None:
                sys.exit("the server has ended")
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=10):
            return True
    except OSError:
        return False


def main() -> None:
    with served() as url:
        for name, python in (argument.split("=", 1) for argument in sys.argv[1:]):
            example = ROOT / "examples" / "realtime" / f"{name}.py"
            for options in OPTIONS.get(name, [[]]):
                found = run(python, example, QUESTION, "answer.wav", "--url", url, *options)
                for line in EXPECTED[name]:
                    if line not in found:
                        sys.exit(f"{name}: expected the line {line!r}")
            if name in SERVICES:
                run(python, Path(__file__).with_name("services.py"), SERVICES[name], url, QUESTION)


if __name__ == "__main__":
    main()
