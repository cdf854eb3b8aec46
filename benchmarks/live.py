"""Sixteen spoken questions to one running batch of nano: one after another, four and sixteen at once.

The answers have the same number of steps in every way, and the same tokens.
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


def ask(live: AsyncEngine, requests: list[PreparedRequest], at_once: int) -> tuple[float, list[bytes]]:
    """Seconds until all are answered, and the answers' tokens."""
    start, tokens = time.perf_counter(), []
    for first in range(0, len(requests), at_once):
        talks = [live.ask(request) for request in requests[first : first + at_once]]
        for talk in talks:
            replies = [part.reply for part in talk if part.reply is not None]
            tokens.append(replies[-1].tokens.tobytes())
    return time.perf_counter() - start, tokens


def main() -> None:
    omni = Omni.load("nano")
    requests = [omni.prepare(QUESTION, max_steps=STEPS, temperature=1.0, seed=seed) for seed in range(QUESTIONS)]
    ways = (1, 4, 16)
    times: dict[int, list[float]] = {way: [] for way in ways}
    with AsyncEngine(omni, slots=QUESTIONS) as live:
        for turn in range(ROUNDS + 1):  # the first compiles
            said = {}
            for way in ways:
                seconds, said[way] = ask(live, requests, way)
                if turn:
                    times[way].append(seconds)
            assert said[1] == said[4] == said[16]
    alone = statistics.median(times[1])
    print(f"{QUESTIONS} answers of at most {STEPS} steps; medians of {ROUNDS} rounds")
    print(f"{'at once':>8} {'seconds':>8} {'of one after another':>21}")
    for way in ways:
        seconds = statistics.median(times[way])
        print(f"{way:8} {seconds:8.2f} {alone / seconds:20.2f}x")
