"""When the first sound of nano's answer is there: three ways of the same model, in turns, on the same questions.

`streamed` is ours: a frame is decoded once it is whole, exactly. `strided` gathers four frames and decodes them on
their own, without what stands around them, as Mini-Omni's streaming does; it clicks where pieces meet. `whole` decodes
when all has been said. Typed and spoken questions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from omni_jax import Omni
from omni_jax.delay import fill_invalid_codes, undelay
from omni_jax.inference.engine import Engine, PreparedRequest
from omni_jax.vocab import TEXT_STREAM

STEPS, STRIDE, ROUNDS = 60, 4, 5
QUESTION = "omni_jax/assets/questions/sum.wav"


def streamed(omni: Omni, request: PreparedRequest) -> float:
    """Seconds to the first sound."""
    start, first = time.perf_counter(), None
    for part in omni._stream(request):
        if first is None and len(part.audio):
            first = time.perf_counter() - start
    assert first is not None
    return first


def strided(omni: Omni, request: PreparedRequest) -> float:
    """Seconds to the first `STRIDE` frames, decoded alone."""
    start = time.perf_counter()
    engine = Engine(omni.programs, 1, request.cache_length(omni.config.trunk.max_position))
    engine.submit(0, request)
    tokens, first = np.zeros((TEXT_STREAM + 1, 0), np.int32), None
    while engine.busy:
        for progress in engine.advance(STRIDE):
            tokens = np.concatenate([tokens, progress.tokens], axis=1)
            frames = fill_invalid_codes(undelay(tokens[:TEXT_STREAM], omni.vocab), omni.vocab)
            if first is None and len(frames) >= STRIDE:
                np.asarray(omni.codec(frames[None, :STRIDE]))
                first = time.perf_counter() - start
    assert first is not None
    return first


def whole(omni: Omni, request: PreparedRequest) -> float:
    """Seconds until everything is said and decoded."""
    start = time.perf_counter()
    omni.run([request])
    return time.perf_counter() - start


def main() -> None:
    omni = Omni.load("nano")
    ways: dict[str, Callable[[Omni, PreparedRequest], float]] = {
        "streamed": streamed,
        "strided": strided,
        "whole": whole,
    }
    for name, ask in (("spoken", {"audio": QUESTION}), ("typed", {"text": "What is two plus three?"})):
        request = omni.prepare({**ask, "options": {"max_steps": STEPS}})
        times: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(ROUNDS + 1):  # the first compiles
            for way, run in ways.items():
                seconds = run(omni, request)
                if turn:
                    times[way].append(seconds)
        medians = {way: statistics.median(found) for way, found in times.items()}
        said = ", ".join(
            f"{way} {seconds:.3f} s ({seconds / medians['streamed']:.2f}x)" for way, seconds in medians.items()
        )
        print(f"{name} question, at most {STEPS} steps, first sound after: {said}")
