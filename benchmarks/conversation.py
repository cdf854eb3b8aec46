"""The prefill of a conversation's second turn, with keys and values of its history and without them.

The published shape with random weights, in float32, one conversation whose system text and first turn take 500
positions, which were remembered when the first turn had ended. Measured is from admission to the end of prefill,
without the audio encoder, which runs in either case.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.decode import ROUNDS, alternate
from omni_jax.config.model import PRESETS
from omni_jax.inference.engine import AHEAD_STEPS, Engine, PreparedRequest
from omni_jax.inference.generation import GenerationConfig
from omni_jax.inference.prefix_cache import PrefixCache
from omni_jax.inference.runner import ModelRunner
from omni_jax.model.omni import OmniModel
from omni_jax.prompts import (
    Prompt,
    after_history,
    make_history,
    max_speech_positions,
    speech_positions,
    speech_prompt,
    text_prompt,
)
from omni_jax.tasks import Task
from omni_jax.vocab import Vocab

CONFIG = PRESETS["mini_omni"]
VOCAB = Vocab(CONFIG.vocab)
HISTORY = 500
"""Positions of system text and first turn."""
WORDS = 16
"""Tokens of the present question, if it is typed."""
SECONDS = 2
"""Of the present question if it is spoken."""
MAX_LEN = 1024


class Encoded(ModelRunner):
    """A runner that has encoded every recording already."""

    def __init__(self, runner: ModelRunner):
        self.__dict__.update(vars(runner))
        shape = (1, max_speech_positions(CONFIG), CONFIG.trunk.hidden_size)
        self.speech = jax.random.normal(jax.random.key(0), shape)

    def encode_audio(self, audio: jax.Array) -> jax.Array:
        """The same embeddings, whatever the recording."""
        return self.speech


def prefill(runner: ModelRunner, request: PreparedRequest, prefixes: PrefixCache) -> Engine:
    """Admit a request to an engine of its own, and wait for its prefill."""
    engine = Engine(runner, 1, MAX_LEN, prefixes=prefixes)
    engine.submit(0, request)
    engine._admit(AHEAD_STEPS)
    jax.block_until_ready(engine.state)
    return engine


def first_tokens(runner: ModelRunner, request: PreparedRequest, prefixes: PrefixCache) -> list[list[int]]:
    engine = Engine(runner, 1, MAX_LEN, prefixes=prefixes)
    engine.submit(0, request)
    return np.concatenate([progress.tokens for progress in engine.run(4)], axis=1).tolist()


def main() -> None:
    model = jax.jit(lambda: OmniModel(CONFIG, stacked=False, dtype=jnp.float32, rngs=nnx.Rngs(0)))()
    runner = Encoded(ModelRunner(model))
    random = np.random.default_rng(0)
    system, question, answer, typed = (
        random.integers(0, CONFIG.vocab.text, count).tolist() for count in (98, 296, 100, WORDS)
    )
    history = make_history(system, [(question, answer)], MAX_LEN, VOCAB)
    assert len(history) == HISTORY
    known, nothing = PrefixCache(), PrefixCache(0)
    engine = Engine(runner, 1, MAX_LEN, prefixes=known)
    engine.remember(history)
    list(engine.run())

    recording = np.zeros(SECONDS * 16_000, np.float32)
    positions = speech_positions(len(recording), CONFIG.audio_encoder.max_position)
    questions: dict[str, tuple[Prompt, np.ndarray | None]] = {
        f"typed, {WORDS} tokens": (text_prompt(Task.T1A2, typed, VOCAB), None),
        f"spoken, {SECONDS} s": (speech_prompt(Task.A1A2, positions, VOCAB), recording),
    }
    print(f"history of {HISTORY} positions; median milliseconds of {ROUNDS} rounds", flush=True)
    print(f"{'question':<18} {'new':>5} {'full':>7} {'reuse':>7} {'full/reuse':>10}  tokens")
    for name, (prompt, sound) in questions.items():
        request = PreparedRequest.of(after_history(history, prompt), sound, GenerationConfig(max_steps=4))
        full, reuse = alternate(
            lambda request=request: prefill(runner, request, nothing),  # type: ignore[misc]
            lambda request=request: prefill(runner, request, known),  # type: ignore[misc]
        )
        same = first_tokens(runner, request, nothing) == first_tokens(runner, request, known)
        ratio, tokens = full / reuse, "same" if same else "differ"
        print(f"{name:<18} {len(prompt):>5} {full:>7.0f} {reuse:>7.0f} {ratio:>9.1f}x  {tokens}", flush=True)


if __name__ == "__main__":
    main()
