"""A whole spoken answer of the real shape: ours against the same work done as the published code does it.

A prompt of 150 positions, 15 text tokens, 60 frames, batch-parallel, codec included. Float32, random weights.
The ear and adapter are left out on both sides: they do the same work. Random weights do not stop where a trained
model would, so both sides are told: text ends after 15 tokens, sound after 60 frames.

Published: both rows through all 150 prompt positions and the whole head, two rows and the whole head to the end,
torch SNAC on chunks of 4 frames of their own. Ours: one prefill for both rows, no head; the text head and the second
row until the text ends; the native codec, exact streaming.
"""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from benchmarks.torch_reference import TorchOmni
from omni_jax.codec.snac import Snac, make_decoder
from omni_jax.codec.stream import StreamDecoder
from omni_jax.codec.torch_snac import TorchSnac
from omni_jax.config.model import PRESETS
from omni_jax.convert.snac import to_torch_module
from omni_jax.delay import fill_invalid_codes, undelay
from omni_jax.inference.decode import DecodeState, Requests, Routing
from omni_jax.inference.engine import PROMPT_BUCKETS
from omni_jax.inference.runner import ModelRunner
from omni_jax.inference.sampling import Sampling
from omni_jax.model.omni import OmniModel
from omni_jax.prompts import speech_prompt
from omni_jax.tasks import Task
from omni_jax.vocab import Vocab

PROMPT, TEXT_TOKENS, FRAMES, SLOTS = 150, 15, 60, 256
STEPS = FRAMES + 8
ROUNDS = 3


class Ours:
    """The programs as `Omni.stream` drives them, with the ends put in by hand."""

    def __init__(self) -> None:
        config = PRESETS["mini_omni"]
        self.config, self.vocab = config, Vocab(config.vocab)
        make = jax.jit(lambda: OmniModel(config, stacked=False, dtype=jnp.float32, rngs=nnx.Rngs(0)))
        self.programs = ModelRunner(make())
        self.codec = Snac(config.codec, rngs=nnx.Rngs(0))
        self.decode = make_decoder(self.codec)
        StreamDecoder(self.decode, config.codec).warm_up()
        self.prompt = speech_prompt(Task.A1A2, PROMPT - 3, self.vocab)
        self.speech = jnp.asarray(
            np.random.default_rng(0).standard_normal((1, 1500, config.trunk.hidden_size), dtype=np.float32)
        )

    def answer(self) -> tuple[float, float]:
        """Seconds to the first sound and to the last."""
        programs, weights = self.programs, self.programs.weights
        start, first = time.perf_counter(), None
        state = programs.empty(weights, 1, SLOTS)
        state = dataclasses.replace(state, shadows=programs.shadows(weights, 1, SLOTS))
        bucket = next(size for size in PROMPT_BUCKETS if size >= PROMPT - 1)
        tokens = np.zeros((1, 8, bucket), np.int32)
        tokens[0, :, : PROMPT - 1] = self.prompt.tokens[:, :-1]
        positions = jnp.full(1, PROMPT - 3, jnp.int32)
        caches = programs.prefill(weights, jnp.asarray(tokens), self.speech, positions, audio=True)
        zero, yes = jnp.zeros(1, jnp.int32), jnp.ones(1, bool)
        arrivals = DecodeState(
            tokens=jnp.asarray(self.prompt.tokens[None, :, -1]),
            positions=jnp.full(1, PROMPT - 1, jnp.int32),
            step=zero,
            running=yes,
            writing=yes,
            requests=Requests(yes, jnp.full(1, STEPS, jnp.int32), yes, greedy(1)),
            caches={},
            shadows=None,
        )
        state = programs.join(state, caches, zero, zero, arrivals)
        here, none = jnp.zeros(1, jnp.int32), jnp.zeros(0, jnp.int32)
        writing = Routing(here, here, jnp.ones(1, jnp.int32), here)
        speaking = Routing(none, none, none, here)
        voice = StreamDecoder(self.decode, self.config.codec)
        said, frames, done = np.zeros((8, 0), np.int32), 0, 0
        routing, outputs_text = writing, True
        for steps in (2, 2, 2, 2, 2, 6, 16, 36):
            # The text has ended: no text head, no second row.
            if outputs_text and done > TEXT_TOKENS:
                state = dataclasses.replace(state, writing=~yes, shadows=None)
                routing, outputs_text = speaking, False
            state = dataclasses.replace(state, running=jnp.ones(1, bool), writing=jnp.full(1, outputs_text))
            state, new, _ = programs.chunk(weights, state, routing, jnp.int32(steps))
            said = np.concatenate([said, np.asarray(new)[:steps, 0].T], axis=1)
            done += steps
            # Codes of an untrained model may be anything: an end of audio, which stops nothing here, included.
            audio = np.where(said[:7] == self.vocab.eoa, self.vocab.pad_a, said[:7])
            codes = fill_invalid_codes(undelay(audio, self.vocab), self.vocab)[:FRAMES]
            sound = voice.push(codes[frames:], last=len(codes) == FRAMES and frames < FRAMES)
            frames = len(codes)
            if first is None and len(sound):
                first = time.perf_counter() - start
        assert done == STEPS
        assert frames == FRAMES
        assert first is not None
        return first, time.perf_counter() - start


class Published:
    """The published loop over torch: `stream_stride` 4, every chunk decoded on its own."""

    def __init__(self, codec: Snac):
        config = PRESETS["mini_omni"]
        # Its cache is always that of the whole context.
        self.torch = TorchOmni(config, config.trunk.max_position)
        self.codec = TorchSnac(to_torch_module(config.codec, codec.params()), config.codec)

    def answer(self) -> tuple[float, float]:
        """Seconds to the first sound and to the last."""
        start, first = time.perf_counter(), None
        self.torch.start(2, PROMPT)
        tokens = torch.zeros(2, 8, dtype=torch.long)
        said = [tokens[0, :7].numpy()]
        frames = 0
        for step in range(1, STEPS):
            tokens = self.torch.step(tokens)
            said.append(tokens[0, :7].numpy() % 4096)
            ready = step - 6
            if ready > 0 and ready - frames == 4:
                codes = np.stack([[said[f + k + 1][k] for k in range(7)] for f in range(frames, ready)])
                np.asarray(self.codec.decode(codes[None].astype(np.int32)))
                frames = ready
                first = first or time.perf_counter() - start
        assert frames == FRAMES
        assert first is not None
        return first, time.perf_counter() - start


def greedy(rows: int) -> Sampling:
    """Settings of greedy requests."""
    zeros = jnp.zeros(rows, jnp.int32)
    return Sampling(jnp.zeros(rows), zeros, jnp.ones(rows), jnp.zeros(rows, jnp.uint32))


def main() -> None:
    ours = Ours()
    theirs = Published(ours.codec)
    runs: dict[str, list[tuple[float, float]]] = {"ours": [], "published": []}
    ours.answer()  # compiles
    theirs.answer()
    for _ in range(ROUNDS):
        runs["ours"].append(ours.answer())
        runs["published"].append(theirs.answer())
    (a_first, a_all), (b_first, b_all) = (np.median(runs[name], axis=0) for name in ("ours", "published"))
    print(f"prompt {PROMPT} positions, {TEXT_TOKENS} text tokens, {FRAMES} frames; median of {ROUNDS} rounds")
    print(f"{'':>14} {'ours s':>8} {'published s':>12} {'ratio':>7}")
    print(f"{'first sound':>14} {a_first:>8.2f} {b_first:>12.2f} {b_first / a_first:>6.2f}x")
    print(f"{'whole answer':>14} {a_all:>8.2f} {b_all:>12.2f} {b_all / a_all:>6.2f}x")


if __name__ == "__main__":
    main()
