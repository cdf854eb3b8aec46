"""From the command to the first answer: `omni-jax serve` and `omni-jax ask` with nano, cold and warm.

Cold, nothing is compiled; warm, the cache on disk has what the run before compiled. The processor time depends less on
what else runs on the machine than the time on the clock.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

from benchmarks.serve import free_port

QUESTION = Path("omni_jax/assets/questions/sum.wav")
COMMAND = [sys.executable, "-m", "omni_jax.cli"]


class Clock:
    """Time since a process was started, and the processor time that it has taken."""

    def __init__(self, process: subprocess.Popen[bytes]):
        self.process, self.start = psutil.Process(process.pid), time.perf_counter()

    def show(self) -> str:
        """Both, in seconds."""
        times = self.process.cpu_times()
        return f"{time.perf_counter() - self.start:.1f} s (processor {times.user + times.system:.1f} s)"


def call(port: int, path: str, body: object | None = None) -> bytes:
    """The response of the server."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        content: bytes = response.read()
        return content


def until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until the server answers requests."""
    while True:
        try:
            call(port, "/readyz")
            return
        except (urllib.error.URLError, ConnectionError):
            if process.poll() is not None:
                sys.exit("the server has ended")
            time.sleep(0.1)


def serve(environment: dict[str, str]) -> str:
    """Start a server, ask one spoken question, wait until everything is compiled, and stop it."""
    audio = {"data": base64.b64encode(QUESTION.read_bytes()).decode(), "format": "wav"}
    body = {
        "model": "nano",
        "modalities": ["text", "audio"],
        "audio": {"voice": "nano", "format": "wav"},
        "messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": audio}]}],
    }
    port = free_port()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*COMMAND, "serve", "--port", str(port)], env=environment, stdout=log, stderr=log)
        clock = Clock(process)
        try:
            until_ready(process, port)
            ready = clock.show()
            call(port, "/v1/chat/completions", body)
            answered = clock.show()
            while log.seek(0) or b"every program is compiled" not in log.read():
                time.sleep(0.5)
            return f"ready after {ready}, first answer after {answered}, everything compiled after {clock.show()}"
        finally:
            process.terminate()
            process.wait()


def ask(environment: dict[str, str], folder: Path) -> str:
    """Ask one spoken question."""
    command = [*COMMAND, "ask", str(QUESTION), "--out", str(folder / "answer.wav")]
    start, before = time.perf_counter(), os.times()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return f"{time.perf_counter() - start:.1f} s (processor {processor:.1f} s)"


def main() -> None:
    """Print a line for each."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        for command in ("ask", "serve"):
            environment["XDG_CACHE_HOME"] = f"{folder}/{command}"
            for state in ("cold", "warm"):
                found = ask(environment, Path(folder)) if command == "ask" else serve(environment)
                print(f"{command}, {state}: {found}", flush=True)


if __name__ == "__main__":
    main()
