"""Sessions of the Realtime API held at once for a long time, every answer compared with that of `Omni`.

    python -m benchmarks sessions                      # one minute; MINUTES=10 for longer

A process of its own serves nano with a batch size of 8. Each of 64 sessions asks recorded and typed questions, one
after another, and deletes its conversation after the last; a quarter of them vanish during every other answer, without
a word, and begin again. Counted are answers, wrong answers and the server's memory; at the end all vanish.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import soxr
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from benchmarks.serve import is_same_audio, metrics, serving
from omni_jax import Omni, Request, Turn
from omni_jax.audio.io import SAMPLE_RATE, read_audio, to_pcm16

SESSIONS, MAX_BATCH_SIZE = 64, 8
RATE, PACKET = 24_000, 9600
"""Samples per second, and bytes of a packet: 0.2 s."""
STEPS = 24
SYSTEM = "Be brief."
WARM_UP = 0.3
"""Share of the time after which memory has to stay level."""


@dataclass(frozen=True)
class Question:
    """What is asked, and the answer that it should get."""

    asked: bytes | str
    """16-bit samples at `RATE`, or a text."""
    text: str
    audio: np.ndarray


@dataclass
class Result:
    """What was seen."""

    outcomes: Counter[str] = field(default_factory=Counter)
    memory: list[float] = field(default_factory=list)
    """MiB of the server, once a second."""
    left: dict[str, float] = field(default_factory=dict)
    """Metrics after all sessions have vanished."""

    @property
    def growth(self) -> float:
        """Of memory, from the end of the warm-up to the end of the time."""
        tenth = max(1, len(self.memory) // 10)
        start = int(WARM_UP * len(self.memory))
        return statistics.median(self.memory[-tenth:]) / statistics.median(self.memory[start : start + tenth]) - 1


def conversation(omni: Omni, asked: Sequence[np.ndarray | str]) -> list[Question]:
    """A conversation of recordings, int16 at `RATE`, and texts, as `Omni` answers it."""
    found, turns = [], list[Turn]()
    for question in asked:
        source: Any = {"text": question} if isinstance(question, str) else {"audio": (RATE, question)}
        remembered: Any = {"system": SYSTEM, "history": turns} if omni.config.conversation else {}
        reply = omni.generate(Request(**source, **remembered), max_steps=STEPS)
        assert reply.audio is not None
        found.append(Question(question if isinstance(question, str) else question.tobytes(), reply.text, reply.audio))
        if isinstance(question, str):
            turns.append(Turn(question, reply.text))
        else:
            turns.append(Turn(omni.transcribe((RATE, question), truncate=True).text, reply.text))
    return found


class VanishedError(Exception):
    """A session has ended without a word."""


@dataclass
class Load:
    """The sessions.

    Attributes:
        port: of the server.
        conversations: that they hold.
        until: when they end, on the clock of `time.monotonic`.
        pause: seconds between two questions of a session, at most.
        outcomes: of all questions.
    """

    port: int
    conversations: list[list[Question]]
    until: float
    pause: float
    outcomes: Counter[str] = field(default_factory=Counter)

    async def hold(self, number: int) -> None:
        """Talk until the time is over; begin again where the session has vanished."""
        rng = random.Random(number)
        while time.monotonic() < self.until:
            try:
                await self._session(rng, vanishes=number % 4 == 0)
            except VanishedError:
                self.outcomes["vanished"] += 1
            except (OSError, ConnectionClosed, TimeoutError) as error:
                self.outcomes[f"{type(error).__name__}: {error}"] += 1

    async def _session(self, rng: random.Random, *, vanishes: bool) -> None:
        async with connect(f"ws://127.0.0.1:{self.port}/v1/realtime", max_size=None, open_timeout=60) as socket:
            detection = {"input": {"turn_detection": None}}
            session = {"type": "realtime", "instructions": SYSTEM, "max_output_tokens": STEPS, "audio": detection}
            await send(socket, "session.update", session=session)
            while time.monotonic() < self.until:
                items = []
                for question in rng.choice(self.conversations):
                    await asyncio.sleep(rng.uniform(0, self.pause))
                    vanish = vanishes and rng.random() < 0.5
                    items += await self._ask(socket, question, vanish=vanish)
                for item in items:
                    await send(socket, "conversation.item.delete", item_id=item)
            # The others, too, end without a word.
            socket.transport.abort()

    async def _ask(self, socket: ClientConnection, question: Question, *, vanish: bool) -> list[str]:
        """Ask once; the ids of the items that this has added."""
        if isinstance(question.asked, str):
            content = [{"type": "input_text", "text": question.asked}]
            await send(socket, "conversation.item.create", item={"type": "message", "role": "user", "content": content})
        else:
            for start in range(0, len(question.asked), PACKET):
                packet = base64.b64encode(question.asked[start : start + PACKET]).decode()
                await send(socket, "input_audio_buffer.append", audio=packet)
            await send(socket, "input_audio_buffer.commit")
        await send(socket, "response.create")
        items, text, audio = [], "", b""
        while True:
            async with asyncio.timeout(120):
                event = json.loads(await socket.recv())
            match event["type"]:
                case "conversation.item.added":
                    items.append(event["item"]["id"])
                case "response.output_audio_transcript.delta":
                    text += event["delta"]
                case "response.output_audio.delta":
                    audio += base64.b64decode(event["delta"])
                    if vanish:
                        socket.transport.abort()
                        raise VanishedError
                case "response.done":
                    self.outcomes[self._outcome(question, event["response"], text, audio)] += 1
                    return items
                case "error":
                    self.outcomes[f"error: {event['error']['message']}"] += 1

    def _outcome(self, question: Question, response: dict[str, Any], text: str, audio: bytes) -> str:
        if response["status"] not in ("completed", "incomplete"):
            return f"{response['status']}: {response['status_details']}"
        same = text == question.text and is_same_audio(audio, question.audio)
        return "correct" if same else "WRONG"


async def send(socket: ClientConnection, type: str, **fields: Any) -> None:
    """Send an event."""
    await socket.send(json.dumps({"type": type, **fields}))


async def hold(port: int, pid: int, conversations: list[list[Question]], seconds: float, pause: float = 4.0) -> Result:
    """Hold the sessions for some time.

    Args:
        port: of the server.
        pid: of its process, whose memory is measured.
        conversations: that the sessions choose from.
        seconds: that they are held.
        pause: seconds between two questions of a session, at most.
    """
    process, result = psutil.Process(pid), Result()
    load = Load(port, conversations, time.monotonic() + seconds, pause, result.outcomes)
    sessions = asyncio.gather(*(load.hold(number) for number in range(SESSIONS)))
    while not sessions.done():
        await asyncio.sleep(1)
        result.memory.append(process.memory_info().rss / 2**20)
    await sessions
    deadline = time.monotonic() + 60
    names = ("omni_realtime_sessions", "omni_batch_slots_in_use", "omni_queue_length")
    while True:
        found = await asyncio.to_thread(metrics, port)
        result.left = {name: found[name] for name in names}
        if not any(result.left.values()) or time.monotonic() > deadline:
            return result
        await asyncio.sleep(0.5)


def main() -> None:
    omni = Omni.from_pretrained("nano")
    spoken = [
        to_pcm16(soxr.resample(read_audio(file), SAMPLE_RATE, RATE))
        for file in sorted(Path("omni_jax/assets/questions").glob("*.wav"))
    ]
    scripts: list[list[np.ndarray | str]] = [
        [spoken[0], "What is two plus three?"],
        ["What is your name?", spoken[1], spoken[2]],
    ]
    conversations = [conversation(omni, asked) for asked in scripts]
    seconds = 60 * float(os.environ.get("MINUTES", "1"))
    with serving("--max-batch-size", str(MAX_BATCH_SIZE)) as (port, pid):
        result = asyncio.run(hold(port, pid, conversations, seconds))
    print(
        f"{SESSIONS} sessions for {seconds:.0f} s: " + ", ".join(f"{n} {o}" for o, n in result.outcomes.most_common())
    )
    tenths = ", ".join(f"{result.memory[len(result.memory) * tenth // 10]:.0f}" for tenth in range(10))
    print(f"memory at each tenth of the time: {tenths}, {result.memory[-1]:.0f} MiB")
    print(f"memory after the warm-up: {result.growth:+.1%}")
    print("afterwards " + ", ".join(f"{name} {value:.0f}" for name, value in result.left.items()))
