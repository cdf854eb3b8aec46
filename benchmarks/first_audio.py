"""Time to the first audio of nano's answer: three ways to decode the same tokens, in turns.

`streamed` is `Omni.stream`: decodes each frame once it is complete, exactly. `strided` collects four frames and decodes
them without their neighbors, as Mini-Omni's streaming does; the chunks click where they meet. `whole` decodes after the
last step. One spoken and one typed question.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from omni_jax import Omni
from omni_jax.delay import fill_invalid_codes
from omni_jax.inference.engine import Engine, PreparedRequest
from omni_jax.vocab import NUM_STREAMS

STEPS, STRIDE, ROUNDS = 60, 4, 5
QUESTION = "omni_jax/assets/questions/sum.wav"


def streamed(omni: Omni, request: PreparedRequest) -> float:
    """Seconds to the first audio."""
    start, first = time.perf_counter(), None
    for chunk in omni.stream_prepared(request):
        if first is None and len(chunk.audio):
            first = time.perf_counter() - start
    assert first is not None
    return first


def strided(omni: Omni, request: PreparedRequest) -> float:
    """Seconds to the first `STRIDE` frames, decoded alone."""
    start, outputs = time.perf_counter(), omni.outputs
    engine = Engine(omni.runner, 1, request.cache_len(omni.config.trunk.max_position))
    engine.submit(0, request)
    tokens, first = np.zeros((NUM_STREAMS, 0), np.int32), None
    while engine.busy:
        for progress in engine.advance(STRIDE):
            tokens = np.concatenate([tokens, progress.tokens], axis=1)
            frames = fill_invalid_codes(outputs.frames(tokens), outputs.vocab)
            if first is None and len(frames) >= STRIDE:
                np.asarray(outputs.codec(frames[None, :STRIDE]))
                first = time.perf_counter() - start
    assert first is not None
    return first


def whole(omni: Omni, request: PreparedRequest) -> float:
    """Seconds until all tokens and all audio are decoded."""
    start = time.perf_counter()
    omni.run([request])
    return time.perf_counter() - start


def main() -> None:
    omni = Omni.from_pretrained("nano")
    ways: dict[str, Callable[[Omni, PreparedRequest], float]] = {
        "streamed": streamed,
        "strided": strided,
        "whole": whole,
    }
    for name, question in (("spoken", {"audio": QUESTION}), ("typed", {"text": "What is two plus three?"})):
        request = omni.prepare(question, max_steps=STEPS)
        times: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(ROUNDS + 1):  # the first compiles
            for way, run in ways.items():
                seconds = run(omni, request)
                if turn:
                    times[way].append(seconds)
        medians = {way: statistics.median(found) for way, found in times.items()}
        shown = ", ".join(
            f"{way} {seconds:.3f} s ({seconds / medians['streamed']:.2f}x)" for way, seconds in medians.items()
        )
        print(f"{name} question, at most {STEPS} steps, first audio after: {shown}")


if __name__ == "__main__":
    main()
