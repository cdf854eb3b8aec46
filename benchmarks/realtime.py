"""How soon nano answers over the Realtime API, and how well the server finds speech.

    python -m benchmarks realtime

Sessions talk at the pace of a microphone, in packets of 20 ms, with turns found by the server after 300 ms of silence.
Measured is the time from the last sample of speech, as it is sent, to the first sound of the answer, for one session
and for sixteen at once, with every program compiled. For the marks, clean recordings are placed between silence; speech
is taken to be where one is louder than 30 dB below its loud parts. espeak-ng and flite speak most of them (`make
synthesizers`).
"""

from __future__ import annotations

import asyncio
import base64
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import soxr
from websockets.asyncio.client import connect

from benchmarks.serve import metrics, serving
from omni_jax.audio.io import SAMPLE_RATE, read_audio, to_pcm16
from omni_jax.audio.vad import SpeechDetector

RATE, PACKET, SILENCE_MS = 24_000, 0.02, 300
TURNS = 8
SESSIONS = (1, 16)
QUESTIONS = ("name", "day", "sum")
ANSWER_STEPS = 60
SYNTHESIZED = (
    "What is seven plus five?",
    "Tell me the capital of France.",
    "How are you today?",
    "Please stop.",
    "What day comes after Monday?",
    "Say that again.",
    "And what comes after that?",
    "Thank you very much.",
)
VOICES = ("espeak-ng -v en-us", "espeak-ng -v en-gb", "espeak-ng -v en-us+f3", "flite -voice slt", "flite -voice rms")


def marks(speech: np.ndarray) -> tuple[float, float]:
    """Seconds at which a clean recording, f32 [samples] at 16 kHz, begins and ends to be loud."""
    size = 80
    rms = np.sqrt(np.mean(np.square(speech[: len(speech) // size * size].reshape(-1, size)), axis=1))
    loud = np.flatnonzero(rms > np.quantile(rms, 0.95) * 10 ** (-30 / 20))
    return loud[0] * size / SAMPLE_RATE, (loud[-1] + 1) * size / SAMPLE_RATE


def recordings(folder: Path) -> list[np.ndarray]:
    """Recordings of clean speech: those of the tests, the shipped questions, and synthesized ones."""
    files = [
        *sorted(Path("tests/assets/exchanges").glob("*.flac")),
        *sorted(Path("omni_jax/assets/questions").glob("*.wav")),
    ]
    for number, text in enumerate(SYNTHESIZED):
        for voice in VOICES:
            program, *options = voice.split()
            file = folder / f"{number}.{'.'.join(options)}.wav"
            output = ["-w", str(file), text] if program == "espeak-ng" else ["-t", text, "-o", str(file)]
            subprocess.run([program, *options, *output], check=True, capture_output=True)
            files.append(file)
    return [read_audio(file) for file in files]


def measure_marks() -> None:
    errors: dict[str, list[float]] = {"started": [], "stopped": []}
    room = np.random.default_rng(0).normal(size=60 * SAMPLE_RATE).astype(np.float32) * 10 ** (-65 / 20)
    with tempfile.TemporaryDirectory() as folder:
        clips = recordings(Path(folder))
    split = 0
    for clip in clips:
        stream = np.pad(clip, SAMPLE_RATE)
        stream = stream + room[: len(stream)]
        detector = SpeechDetector(silence_seconds=0.5)
        edges = [edge for start in range(0, len(stream), 320) for edge in detector.push(stream[start : start + 320])]
        split += len(edges) != 2
        for edge, mark in ((edges[0], marks(clip)[0]), (edges[-1], marks(clip)[1])):
            errors[edge.kind].append((edge.sample / SAMPLE_RATE - 1 - mark) * 1000)
    print(f"{len(clips)} recordings, {split} of them not found as one piece of speech; ms from the mark:")
    for kind, found in errors.items():
        near = [np.mean(np.abs(found) <= limit) for limit in (100, 150)]
        print(
            f"{kind}: median {statistics.median(found):+.0f}, 5 % below {np.quantile(found, 0.05):+.0f}, 5 % above "
            f"{np.quantile(found, 0.95):+.0f}; {near[0]:.0%} within 100 ms, {near[1]:.0%} within 150 ms"
        )


async def talk(port: int, number: int, turns: int) -> list[float]:
    """Seconds from the last sample of speech to the first sound of the answer, of each turn."""
    found = []
    async with connect(f"ws://127.0.0.1:{port}/v1/realtime?model=nano", max_size=None) as socket:
        detection = {"type": "server_vad", "silence_duration_ms": SILENCE_MS}
        session = {
            "type": "realtime",
            "max_output_tokens": ANSWER_STEPS,
            "audio": {"input": {"turn_detection": detection}},
        }
        await socket.send(json.dumps({"type": "session.update", "session": session}))
        first_sound: asyncio.Event = asyncio.Event()
        done: asyncio.Event = asyncio.Event()
        sound_at = 0.0

        async def read() -> None:
            nonlocal sound_at
            async for message in socket:
                event = json.loads(message)
                if event["type"] == "response.output_audio.delta" and not first_sound.is_set():
                    sound_at = time.perf_counter()
                    first_sound.set()
                elif event["type"] == "response.done":
                    assert event["response"]["status"] in ("completed", "incomplete"), event
                    done.set()
                elif event["type"] == "error":
                    raise AssertionError(event)

        reader = asyncio.create_task(read())
        # Sessions do not speak in step.
        await asyncio.sleep(number * 0.13)
        for turn in range(turns):
            speech = read_audio(f"omni_jax/assets/questions/{QUESTIONS[(number + turn) % 3]}.wav")
            last = marks(speech)[1]
            samples = to_pcm16(soxr.resample(np.pad(speech, (SAMPLE_RATE // 2, 0)), SAMPLE_RATE, RATE)).tobytes()
            first_sound.clear()
            done.clear()
            start, size, position, ended = time.perf_counter(), int(PACKET * RATE) * 2, 0, 0.0
            while not done.is_set():
                packet = samples[position : position + size].ljust(size, b"\0")
                position += size
                await socket.send(
                    json.dumps({"type": "input_audio_buffer.append", "audio": base64.b64encode(packet).decode()})
                )
                if not ended and position / 2 / RATE >= last + 0.5:
                    ended = time.perf_counter()
                await asyncio.sleep(max(0.0, start + position / 2 / RATE - time.perf_counter()))
                assert time.perf_counter() < start + 60, "no answer within a minute"
            found.append(sound_at - ended)
        reader.cancel()
    return found


async def measure_sessions(port: int, sessions: int) -> None:
    turns = TURNS if sessions == 1 else TURNS // 2
    found = await asyncio.gather(*(talk(port, number, turns) for number in range(sessions)))
    seconds = [second for session in found for second in session]
    print(
        f"{sessions} at once, {len(seconds)} turns, first sound after the end of speech: "
        f"median {statistics.median(seconds):.3f} s, 90 % within {np.quantile(seconds, 0.9):.3f} s, "
        f"at most {max(seconds):.3f} s"
    )


def main() -> None:
    measure_marks()
    with serving("--max-batch-size", "16") as (port, _):
        while metrics(port)["omni_compiled"] != 1:
            time.sleep(1)
        for sessions in SESSIONS:
            asyncio.run(measure_sessions(port, sessions))
