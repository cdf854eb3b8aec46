"""A spoken answer of the published shape, from prompt to audio: this project against the published algorithm.

A prompt of 150 positions, 15 text tokens, 60 frames, batch-parallel, codec included. Float32, random weights. Audio
encoder and adapter are left out on both sides, which use them alike. Random weights do not end where a trained model
would, so both sides are made to end the text after 15 tokens and the audio after 60 frames.

Published: two rows through all 150 prompt positions with the whole head, two rows and the whole head for every step,
torch SNAC on chunks of 4 frames without their neighbors. Ours: one prefill for both rows without a head; text head
and companion row until the text ends; the native codec, which streams exactly.
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
from omni_jax.inference.decode import DecodeState, Routing
from omni_jax.inference.engine import PROMPT_BUCKETS
from omni_jax.inference.runner import ModelRunner
from omni_jax.model.omni import OmniModel
from omni_jax.model.pages import PAGE_LEN, PageTable, pages_for
from omni_jax.prompts import speech_prompt
from omni_jax.tasks import Task
from omni_jax.vocab import NUM_CODEBOOKS, NUM_STREAMS, Vocab

PROMPT, TEXT_TOKENS, FRAMES, MAX_LEN = 150, 15, 60, 256
STEPS = FRAMES + 8
CHUNKS = (2, 2, 2, 2, 2, 6, 16, 36)
"""Steps of the chunks, about as `Omni.stream` takes them: few until the first audio, then more."""
ROUNDS = 3


class Ours:
    """The compiled programs in the order of `Omni.stream`, with forced ends."""

    def __init__(self) -> None:
        config = PRESETS["mini_omni"]
        self.config, self.vocab = config, Vocab(config.vocab)
        make = jax.jit(lambda: OmniModel(config, stacked=False, dtype=jnp.float32, rngs=nnx.Rngs(0)))
        self.runner = ModelRunner(make())
        self.codec = Snac(config.codec, rngs=nnx.Rngs(0))
        self.decode = make_decoder(self.codec)
        StreamDecoder(self.decode, config.codec).warm_up()
        columns = pages_for(MAX_LEN)
        # The pages of the batch slot and of its companion row; all are in use, as the prompt is longer than a page.
        self.tables = np.arange(2 * columns).reshape(2, 1, columns)
        self.prompt = speech_prompt(Task.A1A2, PROMPT - 3, self.vocab)
        self.speech = jnp.asarray(
            np.random.default_rng(0).standard_normal((1, 1500, config.trunk.hidden_size), dtype=np.float32)
        )

    def prefill(self) -> DecodeState:
        """A running batch of one A1A2 request with its companion row."""
        runner, zero, yes = self.runner, jnp.zeros(1, jnp.int32), jnp.ones(1, bool)
        columns = pages_for(MAX_LEN)
        state = runner.init_state(1, 2 * columns, PAGE_LEN)
        # Arrays of its own: the running batch is donated.
        arrivals = runner.init_state(1, 1, 1)
        params = dataclasses.replace(
            arrivals.params, outputs_audio=yes, max_steps=jnp.full(1, STEPS, jnp.int32), enforce_delay=yes
        )
        arrivals = dataclasses.replace(
            arrivals,
            tokens=jnp.asarray(self.prompt.tokens[None, :, -1]),
            positions=jnp.full(1, PROMPT - 1, jnp.int32),
            running=yes,
            text_pending=yes,
            params=params,
            caches={},
        )
        length = next(size for size in PROMPT_BUCKETS if size >= PROMPT - 1)
        tokens = np.zeros((1, NUM_STREAMS, length), np.int32)
        tokens[0, :, : PROMPT - 1] = self.prompt.tokens[:, :-1]
        positions = jnp.full(1, PROMPT - 3, jnp.int32)
        caches = runner.prefill(jnp.asarray(tokens), self.speech, positions, audio=True)
        row, companion = (jnp.asarray(table) for table in self.tables)
        return runner.insert(state, caches, zero, row, companion, arrivals)

    def answer(self) -> tuple[float, float]:
        """Seconds to the first audio and to the last."""
        start, first = time.perf_counter(), None
        state = self.prefill()
        slot, none = jnp.zeros(1, jnp.int32), jnp.zeros(0, jnp.int32)
        pages = PageTable.of(list(self.tables), self.tables.size)
        routing = Routing(slot, text_slot=slot, text_row=jnp.ones(1, jnp.int32), audio_slot=slot, pages=pages)
        stream = StreamDecoder(self.decode, self.config.codec)
        tokens, frames, done = np.zeros((NUM_STREAMS, 0), np.int32), 0, 0
        for steps in CHUNKS:
            text_pending = done <= TEXT_TOKENS
            if not text_pending:
                # The text has ended: no text head, no companion row.
                pages = PageTable.of([self.tables[0]], self.tables.size)
                routing = Routing(none, none, none, audio_slot=slot, pages=pages)
            # Arrays of their own: the state is donated.
            state = dataclasses.replace(state, running=jnp.ones(1, bool), text_pending=jnp.full(1, text_pending))
            state, new, _ = self.runner.decode_chunk(state, routing, jnp.int32(steps))
            tokens = np.concatenate([tokens, np.asarray(new)[:steps, 0].T], axis=1)
            done += steps
            # An untrained model may emit an end of audio anywhere.
            audio = tokens[:NUM_CODEBOOKS]
            audio = np.where(audio == self.vocab.eoa, self.vocab.pad_a, audio)
            codes = fill_invalid_codes(undelay(audio, self.vocab), self.vocab)[:FRAMES]
            sound = stream.push(codes[frames:], last=len(codes) == FRAMES and frames < FRAMES)
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
        # Its cache always has the length of the whole context.
        self.torch = TorchOmni(config, config.trunk.max_position)
        self.codec = TorchSnac(to_torch_module(config.codec, codec.params()), config.codec)

    def answer(self) -> tuple[float, float]:
        """Seconds to the first audio and to the last."""
        start, first = time.perf_counter(), None
        self.torch.start(2, PROMPT)
        tokens = torch.zeros(2, NUM_STREAMS, dtype=torch.long)
        audio = [tokens[0, :NUM_CODEBOOKS].numpy()]
        frames = 0
        for step in range(1, STEPS):
            tokens = self.torch.step(tokens)
            audio.append(tokens[0, :NUM_CODEBOOKS].numpy() % 4096)
            ready = step - 6
            if ready > 0 and ready - frames == 4:
                codes = np.stack([[audio[f + k + 1][k] for k in range(NUM_CODEBOOKS)] for f in range(frames, ready)])
                np.asarray(self.codec.decode(codes[None].astype(np.int32)))
                frames = ready
                first = first or time.perf_counter() - start
        assert frames == FRAMES
        assert first is not None
        return first, time.perf_counter() - start


def main() -> None:
    ours = Ours()
    published = Published(ours.codec)
    runs: dict[str, list[tuple[float, float]]] = {"ours": [], "published": []}
    ours.answer()  # compiles
    published.answer()
    for _ in range(ROUNDS):
        runs["ours"].append(ours.answer())
        runs["published"].append(published.answer())
    (a_first, a_all), (b_first, b_all) = (np.median(runs[name], axis=0) for name in ("ours", "published"))
    print(f"prompt {PROMPT} positions, {TEXT_TOKENS} text tokens, {FRAMES} frames; median of {ROUNDS} rounds")
    print(f"{'':>14} {'ours s':>8} {'published s':>12} {'ratio':>7}")
    print(f"{'first audio':>14} {a_first:>8.2f} {b_first:>12.2f} {b_first / a_first:>6.2f}x")
    print(f"{'whole answer':>14} {a_all:>8.2f} {b_all:>12.2f} {b_all / a_all:>6.2f}x")


if __name__ == "__main__":
    main()
