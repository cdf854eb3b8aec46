"""A server under load: 64 clients at once, every answer compared with that of `Omni`.

    python -m benchmarks serve                      # one minute; MINUTES=10 for longer

A process of its own serves nano with a batch size of 8. The clients use the protocols of OpenAI and of Mini-Omni,
streaming or not; a quarter of them disconnect during every other answer. Counted are answers, wrong answers, refused
requests, and the server's memory over time.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from omni_jax import Omni
from omni_jax.audio import io as audio_io

CLIENTS, MAX_BATCH_SIZE, MAX_QUEUE_SIZE = 64, 8, 48
STEPS = 60
QUESTIONS = sorted(Path("omni_jax/assets/questions").glob("*.wav"))
TEXTS = ("What is two plus three?", "What is your name?", "Say: good morning.")


class Question:
    """A request to the server and the answer that it should get."""

    def __init__(self, path: str, body: dict[str, object], text: str | None, audio: np.ndarray | None):
        self.path, self.body, self.text, self.audio = path, json.dumps(body).encode(), text, audio

    def is_correct(self, text: str | None, audio: bytes) -> bool:
        """Whether an answer is the expected one: the same text, the same audio up to rounding to 16 bits."""
        return text == self.text and is_same_audio(audio, self.audio)


def questions(omni: Omni) -> list[Question]:
    """Every question in every protocol."""
    found = []
    chat = {"model": "nano", "max_completion_tokens": STEPS}
    spoken = {"modalities": ["text", "audio"], "audio": {"voice": "a", "format": "pcm16"}}
    for file in QUESTIONS:
        data = base64.b64encode(file.read_bytes()).decode()
        reply = omni.reply(file, max_steps=STEPS)
        found.append(Question("/chat", {"audio": data, "max_tokens": STEPS, "format": "pcm"}, None, reply.audio))
        message = [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": data}}]}]
        for stream in (False, True):
            body = {**chat, **spoken, "messages": message, "stream": stream}
            found.append(Question("/v1/chat/completions", body, reply.text, reply.audio))
        body = {**chat, "messages": message, "stream": True}
        found.append(Question("/v1/chat/completions", body, omni.answer(file, max_steps=STEPS).text, None))
    for text in TEXTS:
        message = [{"role": "user", "content": text}]
        for seed in range(3):
            reply = omni.reply(text=text, max_steps=STEPS, temperature=0.7, seed=seed)
            body = {**chat, **spoken, "messages": message, "stream": True, "temperature": 0.7, "seed": seed}
            found.append(Question("/v1/chat/completions", body, reply.text, reply.audio))
    return found


def parse_answer(question: Question, content: bytes) -> tuple[str | None, bytes]:
    """Text and 16-bit samples of a response."""
    if question.path == "/chat":
        return None, content
    if not content.startswith(b"data:"):
        audio = json.loads(content)["choices"][0]["message"]["audio"]
        return audio["transcript"], base64.b64decode(audio["data"])
    lines = content.decode().split("\n\n")
    if lines[-2:] != ["data: [DONE]", ""]:
        return "(incomplete)", b""
    text, audio = "", b""
    for line in lines[:-2]:
        delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
        text += delta.get("content") or delta.get("audio", {}).get("transcript") or ""
        audio += base64.b64decode(delta.get("audio", {}).get("data") or "")
    return text, audio


class Load:
    """The clients."""

    def __init__(self, port: int, questions: list[Question], until: float):
        self.port, self.questions, self.until = port, questions, until
        self.lock, self.outcomes = threading.Lock(), Counter[str]()

    def count(self, outcome: str) -> None:
        """Count one request."""
        with self.lock:
            self.outcomes[outcome] += 1

    def client(self, number: int) -> None:
        """Ask one question after another until the time is over."""
        rng = random.Random(number)
        while time.monotonic() < self.until:
            question = rng.choice(self.questions)
            disconnect = number % 4 == 0 and rng.random() < 0.5
            try:
                self.count(self.ask(question, disconnect))
            except (OSError, http.client.HTTPException) as error:
                self.count(f"{type(error).__name__}")

    def ask(self, question: Question, disconnect: bool) -> str:
        """Ask once, or disconnect during the answer. Returns the outcome."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=180)
        try:
            connection.request("POST", question.path, question.body, {"Content-Type": "application/json"})
            if disconnect:
                time.sleep(random.random())
                return "disconnected"
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        if response.status == 429:
            time.sleep(0.5)
            return "refused (queue full)"
        if response.status != 200:
            return f"status {response.status}"
        return "correct" if question.is_correct(*parse_answer(question, content)) else "WRONG"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def metrics(port: int) -> dict[str, float]:
    """The server's metrics that have no labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        lines = [line.split() for line in response.read().decode().splitlines() if not line.startswith("#")]
    return {line[0]: float(line[1]) for line in lines if len(line) == 2}


def is_same_audio(found: bytes, expected: np.ndarray | None) -> bool:
    """Whether 16-bit samples are those of float audio, or none, up to rounding."""
    samples = np.frombuffer(found, "<i2").astype(int)
    wanted = np.zeros(0, int) if expected is None else audio_io.to_pcm16(expected).astype(int)
    return samples.shape == wanted.shape and bool(np.abs(samples - wanted).max(initial=0) <= 4)


@contextlib.contextmanager
def serving(*options: str) -> Iterator[tuple[int, int]]:
    """Port and process id of an `omni-jax serve` with these options, once it is ready."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("omni-jax")), "serve", "--port", str(port), *options]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        while _metrics_or_none(port).get("omni_ready") != 1:
            assert server.poll() is None, "the server has exited"
            time.sleep(0.5)
        yield port, server.pid
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def _metrics_or_none(port: int) -> dict[str, float]:
    """The metrics; empty while the server does not listen yet."""
    try:
        return metrics(port)
    except OSError:
        return {}


def main() -> None:
    minutes = float(os.environ.get("MINUTES", "1"))
    asked = questions(Omni.from_pretrained("nano"))
    start = time.monotonic()
    sizes = ["--max-batch-size", str(MAX_BATCH_SIZE), "--max-queue-size", str(MAX_QUEUE_SIZE)]
    with serving(*sizes) as (port, pid):
        print(f"ready after {time.monotonic() - start:.0f} s", flush=True)
        process, seconds = psutil.Process(pid), 60 * minutes
        started = time.monotonic()
        load = Load(port, asked, started + seconds)
        threads = [threading.Thread(target=load.client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        memory, longest = [], 0.0
        while any(thread.is_alive() for thread in threads):
            time.sleep(1)
            memory.append(process.memory_info().rss / 2**20)
            longest = max(longest, metrics(port)["omni_queue_length"])
        took = time.monotonic() - started
        early = memory[len(memory) // 10]
        found = metrics(port)
        rate = found["omni_decode_steps_total"] / took
        print(f"{CLIENTS} clients for {took:.0f} s: " + ", ".join(f"{n} {o}" for o, n in load.outcomes.most_common()))
        print(f"{load.outcomes['correct'] / took:.1f} answers/s, {rate:.0f} steps/s; at most {longest:.0f} queued")
        tenths = ", ".join(f"{memory[len(memory) * tenth // 10]:.0f}" for tenth in range(1, 10))
        growth = memory[-1] / early - 1
        print(f"memory {early:.0f} MiB after a tenth of the time, {memory[-1]:.0f} at the end: {growth:+.1%}")
        print(f"memory after each tenth: {tenths} MiB")
        in_use, queued = found["omni_batch_slots_in_use"], found["omni_queue_length"]
        print(f"afterwards {in_use:.0f} batch slots in use, {queued:.0f} requests queued")
