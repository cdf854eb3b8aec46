"""Sixteen spoken questions to one running batch of nano: one after another, four and sixteen at once.

The answers have the same tokens in every way, which is checked.
"""

from __future__ import annotations

import statistics
import time

from omni_jax import Omni
from omni_jax.inference.async_engine import AsyncEngine
from omni_jax.inference.engine import PreparedRequest

QUESTIONS = 16
STEPS = 60
ROUNDS = 3
QUESTION = "omni_jax/assets/questions/sum.wav"


def ask(engine: AsyncEngine, requests: list[PreparedRequest], at_once: int) -> tuple[float, list[bytes]]:
    """Seconds until all are answered, and the answers' tokens."""
    start, tokens = time.perf_counter(), []
    for first in range(0, len(requests), at_once):
        handles = [engine.submit(request) for request in requests[first : first + at_once]]
        for handle in handles:
            replies = [chunk.reply for chunk in handle if chunk.reply is not None]
            tokens.append(replies[-1].tokens.tobytes())
    return time.perf_counter() - start, tokens


def main() -> None:
    omni = Omni.from_pretrained("nano")
    requests = [omni.prepare(QUESTION, max_steps=STEPS, temperature=1.0, seed=seed) for seed in range(QUESTIONS)]
    ways = (1, 4, 16)
    times: dict[int, list[float]] = {way: [] for way in ways}
    with AsyncEngine(omni, max_batch_size=QUESTIONS) as engine:
        for turn in range(ROUNDS + 1):  # the first compiles
            tokens = {}
            for way in ways:
                seconds, tokens[way] = ask(engine, requests, way)
                if turn:
                    times[way].append(seconds)
            assert tokens[1] == tokens[4] == tokens[16]
    alone = statistics.median(times[1])
    print(f"{QUESTIONS} answers of at most {STEPS} steps; medians of {ROUNDS} rounds")
    print(f"{'at once':>8} {'seconds':>8} {'speed-up':>9}")
    for way in ways:
        seconds = statistics.median(times[way])
        print(f"{way:8} {seconds:8.2f} {alone / seconds:8.2f}x")


if __name__ == "__main__":
    main()
