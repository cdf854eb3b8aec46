"""What the examples in this folder share: a recorded question as a microphone sends it, and a saved answer."""

from __future__ import annotations

import argparse
import array
import asyncio
import wave
from collections.abc import AsyncIterator
from pathlib import Path

RATE = 24_000
"""Samples per second in both directions, which is what the Realtime API takes."""
PACKET_SECONDS = 0.02
QUESTION = Path(__file__).parents[2] / "omni_jax" / "assets" / "questions" / "sum.wav"


def arguments(description: str | None, answer: str) -> argparse.ArgumentParser:
    """The command line of an example: server, model, question and where the answer goes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", type=Path, default=QUESTION, help="wav file, mono, 16 bits")
    parser.add_argument("answer", nargs="?", type=Path, default=Path(answer), help="wav file to write")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
    parser.add_argument("--model", default="nano", help="name that the server knows")
    parser.add_argument("--key", default="none", help="API key, if the server needs one")
    return parser


def read(path: Path) -> bytes:
    """A recording as 16-bit samples at `RATE`, brought there by linear interpolation, which is enough for speech."""
    with wave.open(str(path)) as file:
        if (file.getnchannels(), file.getsampwidth()) != (1, 2):
            raise SystemExit(f"{path}: expected a wav file of one channel and 16 bits")
        rate, samples = file.getframerate(), array.array("h", file.readframes(file.getnframes()))
    if rate == RATE:
        return samples.tobytes()
    found = array.array("h")
    for number in range(len(samples) * RATE // rate):
        place, rest = divmod(number * rate, RATE)
        after = samples[min(place + 1, len(samples) - 1)]
        found.append(samples[place] + (after - samples[place]) * rest // RATE)
    return found.tobytes()


async def microphone(speech: bytes) -> AsyncIterator[bytes]:
    """Packets of a recording at the pace of a microphone, and then of silence without end: turns end in silence."""
    size = int(PACKET_SECONDS * RATE) * 2
    loop = asyncio.get_running_loop()
    start, position = loop.time(), 0
    while True:
        yield speech[position : position + size].ljust(size, b"\0")
        position += size
        await asyncio.sleep(start + position / 2 / RATE - loop.time())


def save(path: Path, samples: bytes) -> float:
    """Write 16-bit samples at `RATE` as a wav file; its seconds."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(samples)
    return len(samples) / 2 / RATE


def report(client: str, asked: str, answered: str, samples: bytes, path: Path) -> None:
    """Print what was asked and answered, and save the sound."""
    seconds = save(path, samples)
    print(f"{client}\n  asked:    {asked}\n  answered: {answered}\n  sound:    {seconds:.2f} s in {path}")
