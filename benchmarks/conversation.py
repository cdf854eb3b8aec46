"""The prefill of a conversation's second turn, with the keys and values that the first has left and without them.

The published shape with random weights, in float32, one conversation whose system text and first turns take 500
positions. New are the last turn's text and the present question. Measured is from admission to the end of prefill,
without the audio encoder, which runs in either case.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.decode import ROUNDS, alternate
from omni_jax.config.model import PRESETS
from omni_jax.inference.engine import Engine, PreparedRequest
from omni_jax.inference.generation import GenerationConfig
from omni_jax.inference.prefix_cache import PrefixCache
from omni_jax.inference.runner import ModelRunner
from omni_jax.model.omni import OmniModel
from omni_jax.prompts import History, Prompt, after_history, make_history, speech_positions, speech_prompt, text_prompt
from omni_jax.tasks import Task
from omni_jax.vocab import Vocab

CONFIG = PRESETS["mini_omni"]
VOCAB = Vocab(CONFIG.vocab)
HISTORY = 500
"""Positions whose keys and values the turn before has left."""
WORDS = 16
"""Tokens of the last question, of its answer, and of the present question if it is typed."""
SECONDS = 2
"""Of the present question if it is spoken."""
MAX_LEN = 1024


class Encoded(ModelRunner):
    """A runner that has encoded every recording already."""

    def __init__(self, runner: ModelRunner, speech: jax.Array):
        self.__dict__.update(vars(runner))
        self.speech = speech

    def encode_audio(self, audio: jax.Array) -> jax.Array:
        """The same embeddings, whatever the recording."""
        return self.speech


class Unchanging(PrefixCache):
    """What the turn before has left, however often the next one is prefilled."""

    def keep(self, *args: Any) -> None:
        """Keep nothing more."""


def prefill(runner: ModelRunner, request: PreparedRequest, prefixes: PrefixCache) -> Engine:
    """Admit a request to an engine of its own, and wait for its prefill."""
    engine = Engine(runner, 1, MAX_LEN, prefixes=prefixes)
    engine.submit(0, request)
    engine._admit()
    jax.block_until_ready(engine.state)
    return engine


def first_tokens(runner: ModelRunner, request: PreparedRequest, prefixes: PrefixCache) -> list[list[int]]:
    engine = Engine(runner, 1, MAX_LEN, prefixes=prefixes)
    engine.submit(0, request)
    return np.concatenate([progress.tokens for progress in engine.run(4)], axis=1).tolist()


def turn(history: History, prompt: Prompt, recording: np.ndarray | None) -> PreparedRequest:
    return PreparedRequest.of(after_history(history, prompt), recording, GenerationConfig(max_steps=4))


def main() -> None:
    runner = ModelRunner(jax.jit(lambda: OmniModel(CONFIG, stacked=False, dtype=jnp.float32, rngs=nnx.Rngs(0)))())
    silence = np.zeros((1, CONFIG.audio_encoder.max_samples), np.float32)
    speech = runner.encode_audio(jnp.asarray(silence))
    (encoder,) = alternate(lambda: runner.encode_audio(jnp.asarray(silence)).block_until_ready())
    runner = Encoded(runner, speech)

    random = np.random.default_rng(0)
    system, *texts = (random.integers(0, CONFIG.vocab.text, count).tolist() for count in (98, 296, 100, *[WORDS] * 3))
    first, last = (texts[0], texts[1]), (texts[2], texts[3])
    before, after = (make_history(system, turns, MAX_LEN, VOCAB) for turns in ([first], [first, last]))
    assert len(before) == after.ends[1] == HISTORY
    recording = silence[0, : SECONDS * 16_000]
    positions = speech_positions(len(recording), CONFIG.audio_encoder.max_position)
    questions: dict[str, tuple[Prompt, np.ndarray | None]] = {
        f"typed, {WORDS} tokens": (text_prompt(Task.T1A2, texts[4], VOCAB), None),
        f"spoken, {SECONDS} s": (speech_prompt(Task.A1A2, positions, VOCAB), recording),
    }
    new = len(after) - HISTORY
    print(f"{HISTORY} positions of history, {new} of the last turn; median milliseconds of {ROUNDS} rounds", flush=True)
    print(f"{'question':<18} {'new':>5} {'full':>7} {'reuse':>7} {'full/reuse':>10}  tokens")
    for name, (prompt, sound) in questions.items():
        known = PrefixCache()
        prefill(runner, turn(before, prompt, sound), known)._keep_histories()
        reused = Unchanging()
        reused.__dict__.update(vars(known))
        request = turn(after, prompt, sound)
        full, reuse = alternate(
            lambda request=request: prefill(runner, request, PrefixCache(0)),  # type: ignore[misc]
            lambda request=request, reused=reused: prefill(runner, request, reused),  # type: ignore[misc]
        )
        same = first_tokens(runner, request, PrefixCache(0)) == first_tokens(runner, request, reused)
        new = len(request.prompt) - HISTORY
        print(
            f"{name:<18} {new:>5} {full:>7.0f} {reuse:>7.0f} {full / reuse:>9.1f}x  {'same' if same else 'differ'}",
            flush=True,
        )
    print(f"audio encoder: {encoder:.0f} ms")


if __name__ == "__main__":
    main()
