"""Ask a question through the microphone and play the answer while it is decoded.

    pip install sounddevice
    python examples/microphone.py              # press Enter, speak, press Enter again; Ctrl-C ends

A longer question than the model takes is shortened to its beginning.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from omni_jax import AsyncEngine, AudioError, Chunk, Omni, Request

INPUT_RATE = 16_000
"""Samples per second of the recording, which is what the model takes."""


def import_sounddevice() -> Any:
    """The package that reaches microphone and loudspeaker."""
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: its library PortAudio is missing
        raise SystemExit(f"microphone and loudspeaker need sounddevice ({error}): pip install sounddevice") from None
    return sounddevice


def record(sounddevice: Any) -> np.ndarray:
    """Record until Enter is pressed; float32 [samples]."""
    blocks: list[np.ndarray] = []

    def add(block: np.ndarray, *_: object) -> None:
        blocks.append(block[:, 0].copy())

    with sounddevice.InputStream(samplerate=INPUT_RATE, channels=1, dtype="float32", callback=add):
        input("Recording. Press Enter to send.")
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def play(sounddevice: Any, chunks: Iterable[Chunk], sample_rate: int) -> None:
    """Print the text and play the audio of an answer as they arrive."""
    with sounddevice.OutputStream(samplerate=sample_rate, channels=1, dtype="float32") as speaker:
        for chunk in chunks:
            print(chunk.text, end="", flush=True)
            if len(chunk.audio):
                speaker.write(chunk.audio[:, None])
    print()


def main(arguments: list[str] | None = None) -> None:
    """Load the model, then answer questions until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="name, release folder or hub id")
    model = parser.parse_args(arguments).model
    sounddevice = import_sounddevice()
    omni = Omni.from_pretrained(model)
    print("Compiling ...", file=sys.stderr)
    omni.warm_up()
    # The engine decodes in a thread of its own, so that decoding goes on while `play` waits for the loudspeaker.
    with AsyncEngine(omni, max_batch_size=1) as engine:
        try:
            while True:
                input("Press Enter and speak.")
                question = Request(record(sounddevice), sample_rate=INPUT_RATE, truncate=True, name="recording")
                try:
                    request = omni.prepare(question)
                except AudioError as error:
                    print(error, file=sys.stderr)
                    continue
                play(sounddevice, engine.submit(request), omni.sample_rate)
        except (KeyboardInterrupt, EOFError):
            print()


if __name__ == "__main__":
    main()
