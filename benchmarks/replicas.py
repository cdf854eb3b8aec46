"""Two replicas of `deploy/ray_serve.py` on one machine under load, one of them killed. Needs `ray[serve]`.

    ray start --head --num-cpus 4 --object-store-memory 100000000 --include-dashboard=false
    python -m benchmarks.replicas
    ray stop

The model is `tiny`, with random weights. Every answer is compared with that of `Omni`. There is one replica at first;
the load makes Ray add another. One is killed, Ray starts one in its place, and the application is shut down while it
answers.
"""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable

import psutil
import ray
import websockets.sync.client
from ray import serve

from benchmarks.serve import free_port, is_same_audio
from deploy.ray_serve import Arguments, build
from omni_jax import Omni

CLIENTS, MAX_BATCH_SIZE, STEPS = 12, 4, 100
TEXTS = ("What is your name?", "Say: good morning.", "What is two plus three?")
PATIENCE = 1200
"""Seconds: a replica compiles before it is ready."""


class Load:
    """Clients that ask one question after another."""

    def __init__(self, port: int):
        self.port = port
        self.lock, self.outcomes = threading.Lock(), Counter[str]()
        self.stop = threading.Event()
        with warnings.catch_warnings(action="ignore"):
            omni = Omni.untrained("tiny")
        self.expected = {
            (text, seed): omni.reply(text=text, max_steps=STEPS, temperature=0.7, seed=seed)
            for text, seed in itertools.product(TEXTS, range(3))
        }

    def ask(self, text: str, seed: int) -> str:
        """Ask once; the outcome."""
        body = {
            "model": "tiny",
            "max_completion_tokens": STEPS,
            "temperature": 0.7,
            "seed": seed,
            "modalities": ["text", "audio"],
            "audio": {"voice": "tiny", "format": "pcm16"},
            "messages": [{"role": "user", "content": text}],
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__
        finally:
            connection.close()
        if response.status != 200:
            return f"status {response.status}"
        answer, expected = json.loads(content)["choices"][0]["message"]["audio"], self.expected[text, seed]
        same = answer["transcript"] == expected.text and is_same_audio(base64.b64decode(answer["data"]), expected.audio)
        return "correct" if same else "WRONG"

    def client(self, number: int) -> None:
        """Ask until it is stopped."""
        for text, seed in itertools.islice(itertools.cycle(self.expected), number, None):
            if self.stop.is_set():
                return
            outcome = self.ask(text, seed)
            with self.lock:
                self.outcomes[outcome] += 1

    def show(self, phase: str) -> None:
        """Print the outcomes since the last call."""
        with self.lock:
            found, self.outcomes = self.outcomes, Counter()
        outcomes = ", ".join(f"{number} {outcome}" for outcome, number in found.most_common())
        print(f"{phase}: {outcomes or 'none'}", flush=True)


def num_running() -> int:
    """Replicas that answer."""
    deployment = serve.status().applications["default"].deployments["OmniServer"]
    return deployment.replica_states.get("RUNNING", 0)


def replica_processes() -> list[psutil.Process]:
    """On this machine; the oldest first."""
    found = [process for process in psutil.process_iter(["cmdline"]) if _is_replica(process.info["cmdline"])]
    return sorted(found, key=lambda process: process.create_time())


def _is_replica(command: list[str] | None) -> bool:
    return "ray::ServeReplica:default:OmniServer" in " ".join(command or [])


def wait_until(condition: Callable[[], bool]) -> float:
    """Wait; the seconds that it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < PATIENCE, "waited for too long"
        time.sleep(0.5)
    return time.monotonic() - start


def greet(port: int) -> str:
    """Open the WebSocket; the type of the server's first message."""
    with websockets.sync.client.connect(f"ws://127.0.0.1:{port}/v1/realtime?model=tiny", open_timeout=60) as socket:
        return str(json.loads(socket.recv(timeout=60))["type"])


def main() -> None:
    """Print what became of the requests in each phase."""
    port = free_port()
    # Before JAX starts its threads: Ray forks.
    ray.init(address="auto", log_to_driver=False)
    load = Load(port)
    try:
        start = time.monotonic()
        serve.start(http_options={"port": port})
        arguments = Arguments(model="tiny", max_batch_size=MAX_BATCH_SIZE, max_replicas=2, upscale_delay=2)
        serve.run(build(arguments), name="default")
        print(f"one replica ready after {time.monotonic() - start:.0f} s; WebSocket: {greet(port)}", flush=True)
        threads = [threading.Thread(target=load.client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        print(f"two replicas after {wait_until(lambda: num_running() == 2):.0f} s of load", flush=True)
        load.show("until then")
        time.sleep(20)
        load.show("two replicas, 20 s")
        replica_processes()[0].kill()
        time.sleep(10)
        load.show("one killed, 10 s")
        print(f"two replicas again after {10 + wait_until(lambda: num_running() == 2):.0f} s", flush=True)
        load.show("until then")
        time.sleep(10)
        load.stop.set()
        for thread in threads:
            thread.join()
        load.show("two replicas, 10 s and the rest")
        # Told to end, replicas finish what they answer.
        load.stop.clear()
        last = [threading.Thread(target=lambda: load.outcomes.update([load.ask(TEXTS[0], 0)])) for _ in range(4)]
        for thread in last:
            thread.start()
        time.sleep(0.2)
        serve.delete("default")
        for thread in last:
            thread.join()
        load.show("shut down while 4 are answered")
    finally:
        load.stop.set()
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
