"""A real server under load: 64 clients at once, every answer held against the one that `Omni` gives.

    python -m benchmarks serve                      # one minute; MINUTES=10 for the long run

A process of its own serves nano with 8 slots. The clients ask OpenAI's and Mini-Omni's way, streamed and whole; a
quarter of them leave in the middle of every other answer. What is counted: answers, those that differ, refusals, and
the server's memory over time.
"""

from __future__ import annotations

import base64
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
from pathlib import Path

import numpy as np
import psutil

from omni_jax import Omni
from omni_jax.audio import io as audio_io

CLIENTS, SLOTS, WAITING = 64, 8, 48
STEPS = 60
QUESTIONS = sorted(Path("omni_jax/assets/questions").glob("*.wav"))
TEXTS = ("What is two plus three?", "What is your name?", "Say: good morning.")


class Question:
    """A request as the server takes it, and the answer it should get."""

    def __init__(self, path: str, body: dict[str, object], text: str | None, audio: np.ndarray | None):
        self.path, self.body, self.text, self.audio = path, json.dumps(body).encode(), text, audio

    def right(self, text: str | None, audio: bytes) -> bool:
        """Whether an answer is the expected one: the text to the letter, sound up to the rounding of 16 bits."""
        wanted = np.zeros(0, int) if self.audio is None else audio_io.to_pcm16(self.audio).astype(int)
        heard = np.frombuffer(audio, "<i2")
        return text == self.text and heard.shape == wanted.shape and np.abs(heard - wanted).max(initial=0) <= 4


def questions(omni: Omni) -> list[Question]:
    """Every way to ask about everything."""
    found = []
    chat = {"model": "nano", "max_completion_tokens": STEPS}
    loud = {"modalities": ["text", "audio"], "audio": {"voice": "a", "format": "pcm16"}}
    for file in QUESTIONS:
        data = base64.b64encode(file.read_bytes()).decode()
        reply = omni.reply(file, max_steps=STEPS)
        found.append(Question("/chat", {"audio": data, "max_tokens": STEPS, "format": "pcm"}, None, reply.audio))
        message = [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": data}}]}]
        for stream in (False, True):
            body = {**chat, **loud, "messages": message, "stream": stream}
            found.append(Question("/v1/chat/completions", body, reply.text, reply.audio))
        body = {**chat, "messages": message, "stream": True}
        found.append(Question("/v1/chat/completions", body, omni.answer(file, max_steps=STEPS).text, None))
    for text in TEXTS:
        message = [{"role": "user", "content": text}]
        for seed in range(3):
            reply = omni.reply(text=text, max_steps=STEPS, temperature=0.7, seed=seed)
            body = {**chat, **loud, "messages": message, "stream": True, "temperature": 0.7, "seed": seed}
            found.append(Question("/v1/chat/completions", body, reply.text, reply.audio))
    return found


def said(question: Question, content: bytes) -> tuple[str | None, bytes]:
    """Text and samples of a response."""
    if question.path == "/chat":
        return None, content
    if not content.startswith(b"data:"):
        audio = json.loads(content)["choices"][0]["message"]["audio"]
        return audio["transcript"], base64.b64decode(audio["data"])
    lines = content.decode().split("\n\n")
    if lines[-2:] != ["data: [DONE]", ""]:
        return "(broken off)", b""
    text, audio = "", b""
    for line in lines[:-2]:
        delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
        text += delta.get("content") or delta.get("audio", {}).get("transcript") or ""
        audio += base64.b64decode(delta.get("audio", {}).get("data") or "")
    return text, audio


class Load:
    """The clients."""

    def __init__(self, port: int, asked: list[Question], until: float):
        self.port, self.asked, self.until = port, asked, until
        self.lock, self.outcomes = threading.Lock(), Counter[str]()

    def note(self, outcome: str) -> None:
        """Count it."""
        with self.lock:
            self.outcomes[outcome] += 1

    def client(self, number: int) -> None:
        """Ask, one question after the other, until the time is over."""
        rng = random.Random(number)
        while time.monotonic() < self.until:
            question = rng.choice(self.asked)
            leaves = number % 4 == 0 and rng.random() < 0.5
            try:
                self.note(self.ask(question, leaves))
            except (OSError, http.client.HTTPException) as error:
                self.note(f"{type(error).__name__}")

    def ask(self, question: Question, leaves: bool) -> str:
        """Ask once, or leave while it is being answered; what came of it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=180)
        try:
            connection.request("POST", question.path, question.body, {"Content-Type": "application/json"})
            if leaves:
                time.sleep(random.random())
                return "left"
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        if response.status == 429:
            time.sleep(0.5)
            return "refused, as it was full"
        if response.status != 200:
            return f"status {response.status}"
        return "right" if question.right(*said(question, content)) else "WRONG"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def figures(port: int) -> dict[str, float]:
    """The server's metrics without labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        lines = [line.split() for line in response.read().decode().splitlines() if not line.startswith("#")]
    return {line[0]: float(line[1]) for line in lines if len(line) == 2}


def main() -> None:
    minutes = float(os.environ.get("MINUTES", "1"))
    asked = questions(Omni.load("nano"))
    port = free_port()
    command = ["serve", "--port", str(port), "--slots", str(SLOTS), "--waiting", str(WAITING)]
    start = time.monotonic()
    server = subprocess.Popen(
        [Path(sys.executable).with_name("omni-jax"), *command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        while figures_or_none(port).get("omni_ready") != 1:
            assert server.poll() is None, "the server has ended"
            time.sleep(0.5)
        print(f"ready after {time.monotonic() - start:.0f} s", flush=True)
        process, seconds = psutil.Process(server.pid), 60 * minutes
        begun = time.monotonic()
        load = Load(port, asked, begun + seconds)
        threads = [threading.Thread(target=load.client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        memory, longest = [], 0.0
        while any(thread.is_alive() for thread in threads):
            time.sleep(1)
            memory.append(process.memory_info().rss / 2**20)
            longest = max(longest, figures(port)["omni_waiting"])
        took = time.monotonic() - begun
        early = memory[len(memory) // 10]
        found = figures(port)
        rate = found["omni_steps_total"] / took
        print(f"{CLIENTS} clients for {took:.0f} s: " + ", ".join(f"{n} {o}" for o, n in load.outcomes.most_common()))
        print(f"{load.outcomes['right'] / took:.1f} answers/s, {rate:.0f} steps/s; at most {longest:.0f} waited")
        tenths = ", ".join(f"{memory[len(memory) * tenth // 10]:.0f}" for tenth in range(1, 10))
        print(f"memory {early:.0f} MiB after a tenth, {memory[-1]:.0f} at the end: {memory[-1] / early - 1:+.1%}")
        print(f"memory after each tenth: {tenths} MiB")
        print(f"afterwards {found['omni_slots_occupied']:.0f} slots in use, {found['omni_waiting']:.0f} waiting")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def figures_or_none(port: int) -> dict[str, float]:
    """The metrics, none while it does not listen yet."""
    try:
        return figures(port)
    except OSError:
        return {}
