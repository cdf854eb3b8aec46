"""Decoding on the device: prefill, and the delay-pattern loop that runs many requests a step at a time.

A batch has B slots, one request each. Its cache and everything else that changes from step to step is one pytree,
`DecodeState`. What a step has to compute is decided by the host between chunks and passed as a `Routing`: which rows
still need the text head, which the audio heads, and which requests have a companion row (batch-parallel decoding
takes the text from a row that answers in text only). The tokens do not depend on it; it only leaves out work whose
result would not be read. Its sizes are part of the compiled shape. It says as well which pages of the cache each row
has.

The prompt's last column is not prefilled: it is the input of step 0, so that prefill never needs a head and the two
rows of a batch-parallel request share one prefill.

Letters: B batch slots, b companion rows, n text rows, m audio rows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from omni_jax import sharding
from omni_jax.inference.sampling import Sampling, sample
from omni_jax.model.omni import OmniModel
from omni_jax.model.pages import Cache, PageTable, page_len
from omni_jax.vocab import NUM_CODEBOOKS, NUM_STREAMS, TEXT_STREAM, Vocab

Array = jax.Array

MAX_CHUNK_STEPS = 64
"""Most steps a chunk can take; the token buffer is this long, shorter chunks use its front."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotParams:
    """What a step needs to know of each request; set when it is inserted, never changed by a step."""

    outputs_audio: Array
    """bool [B], whether the audio streams are decoded."""
    max_steps: Array
    """int32 [B], steps after which it must stop."""
    enforce_delay: Array
    """bool [B], whether a codebook that is not yet due emits padding, whatever the model predicts."""
    sampling: Sampling


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """All that changes from step to step."""

    tokens: Array
    """int32 [B, 8], the next step's input: the last step's tokens, or the prompt's last column."""
    positions: Array
    """int32 [B], the trunk position of that input."""
    step: Array
    """int32 [B], steps done."""
    running: Array
    """bool [B]; a slot that is not running does not change."""
    text_pending: Array
    """bool [B], whether the text has not ended yet."""
    params: SlotParams
    caches: dict[str, Cache]
    """`trunk`, with a TTS adapter also `tts_adapter`: pools of pages, which rows have by the same numbers in both."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Which rows a chunk computes. An entry of B (or, in `text_row`, any value next to it) is unused."""

    companion_slot: Array
    """int32 [b], the batch slot of each companion row."""
    text_slot: Array
    """int32 [n], the batch slots that need the text head."""
    text_row: Array
    """int32 [n], the row their text comes from: the slot itself, or B + its companion row."""
    audio_slot: Array
    """int32 [m], the batch slots that need the audio heads."""
    pages: PageTable
    """Of the batch slots and, if there are any, the companion rows."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(b, n, m)."""
        return self.companion_slot.shape[0], self.text_slot.shape[0], self.audio_slot.shape[0]


def decode_step(model: OmniModel, state: DecodeState, routing: Routing) -> tuple[DecodeState, Array]:
    """One step of every running slot.

    Returns:
        The state after it, and the tokens int32 [B, 8], padding in slots that do not run.
    """
    vocab, params = Vocab(model.config.vocab), state.params
    companions, texts, _ = routing.sizes

    rows, positions = state.tokens, state.positions
    if companions:
        column = jnp.full((companions, NUM_STREAMS), vocab.pad_a, jnp.int32)
        column = column.at[:, TEXT_STREAM].set(state.tokens.at[routing.companion_slot, TEXT_STREAM].get(mode="clip"))
        rows = jnp.concatenate([rows, column])
        positions = jnp.concatenate([positions, positions.at[routing.companion_slot].get(mode="clip")])
    hidden, trunk_cache = model.trunk.decode(model.embed_tokens(rows), positions, state.caches["trunk"], routing.pages)

    text = jnp.full(state.running.shape, vocab.pad_t, jnp.int32)
    if texts:
        text = _sample_text(model, state, routing, hidden)
    audio, tts_cache = _sample_audio(model, state, routing, hidden)
    new_caches = {"trunk": trunk_cache} | ({} if tts_cache is None else {"tts_adapter": tts_cache})

    tokens = jnp.concatenate([audio, text[:, None]], axis=1)
    tokens = jnp.where(state.running[:, None], tokens, vocab.padding)
    ended = jnp.where(params.outputs_audio, audio[:, -1] == vocab.eoa, text == vocab.eot)
    moved = state.running.astype(jnp.int32)
    last_position = routing.pages.rows[0].shape[1] * page_len(trunk_cache) - 1
    return (
        dataclasses.replace(
            state,
            tokens=jnp.where(state.running[:, None], tokens, state.tokens),
            positions=jnp.minimum(state.positions + moved, last_position),
            step=state.step + moved,
            running=state.running & ~ended & (state.step + 1 < params.max_steps),
            text_pending=state.text_pending & ~(state.running & (text == vocab.eot)),
            caches=new_caches,
        ),
        tokens,
    )


def _sample_text(model: OmniModel, state: DecodeState, routing: Routing, hidden: Array) -> Array:
    """The text token of every slot, int32 [B]; padding where the text has ended."""
    vocab, (_, texts, _) = Vocab(model.config.vocab), routing.sizes
    # Rows gathered from anywhere are sharded again, or every device would score all of them.
    chosen = sharding.constrain_rows(hidden.at[routing.text_row].get(mode="clip"))
    logits = model.text_logits(model.norm(chosen))
    steps = state.step.at[routing.text_slot].get(mode="clip")
    sampling = state.params.sampling.take(routing.text_slot)
    sampled = sample(logits, sampling, steps, jnp.full((texts,), TEXT_STREAM))
    text = jnp.full(state.running.shape, vocab.pad_t, jnp.int32).at[routing.text_slot].set(sampled, mode="drop")
    return jnp.where(state.text_pending, text, vocab.pad_t)


def _sample_audio(model: OmniModel, state: DecodeState, routing: Routing, hidden: Array) -> tuple[Array, Cache | None]:
    """The audio tokens of every slot, int32 [B, 7], and the TTS adapter's cache, if there is one."""
    vocab, (_, _, audios) = Vocab(model.config.vocab), routing.sizes
    (B,) = state.running.shape
    audio = jnp.full((B, NUM_CODEBOOKS), vocab.pad_a, jnp.int32)
    cache = state.caches.get("tts_adapter")
    if not audios:
        return audio, cache
    hidden = hidden[:B]
    if model.tts_adapter is None:
        hidden = model.norm(hidden)
    else:
        # Companion rows have pages here as well, which nothing uses.
        pages = dataclasses.replace(routing.pages, rows=routing.pages.rows[:1])
        hidden, cache = model.tts_adapter.blocks.decode(hidden, state.positions, state.caches["tts_adapter"], pages)
        hidden = model.tts_adapter.norm(hidden)
    logits = model.audio_logits(sharding.constrain_rows(hidden.at[routing.audio_slot].get(mode="clip")))
    sampling = state.params.sampling.take(jnp.repeat(routing.audio_slot, NUM_CODEBOOKS))
    steps = jnp.repeat(state.step.at[routing.audio_slot].get(mode="clip"), NUM_CODEBOOKS)
    codebook = jnp.arange(NUM_CODEBOOKS)
    sampled = sample(logits.reshape(audios * NUM_CODEBOOKS, -1), sampling, steps, jnp.tile(codebook, audios))
    audio = audio.at[routing.audio_slot].set(sampled.reshape(audios, NUM_CODEBOOKS), mode="drop")
    due = (state.step[:, None] > codebook) | ~state.params.enforce_delay[:, None]
    return jnp.where(due & state.params.outputs_audio[:, None], audio, vocab.pad_a), cache


def decode_chunk(
    model: OmniModel, state: DecodeState, routing: Routing, steps: Array
) -> tuple[DecodeState, Array, Array]:
    """Up to `steps` steps; returns early when nothing runs, or when the text of all slots of the routing has ended.

    Returns:
        The state, the tokens int32 [MAX_CHUNK_STEPS, B, 8] (slot i's new ones are the first
        `state.step[i] - step before` of them), and int32 [3, B]: step, running, text_pending, for the host to read.
    """
    B = state.tokens.shape[0]
    _, texts, _ = routing.sizes

    def go_on(carry: tuple[Array, DecodeState, Array]) -> Array:
        done, state, _ = carry
        more = (done < steps) & jnp.any(state.running)
        if texts:
            pending = (state.running & state.text_pending).at[routing.text_slot].get(mode="fill", fill_value=False)
            # Where no text is expected, there is none to wait for the end of.
            more = more & (jnp.any(pending) | (routing.text_slot >= B).all())
        return more

    def body(carry: tuple[Array, DecodeState, Array]) -> tuple[Array, DecodeState, Array]:
        done, state, tokens = carry
        state, new = decode_step(model, state, routing)
        return done + 1, state, tokens.at[done].set(new)

    tokens = jnp.zeros((MAX_CHUNK_STEPS, B, NUM_STREAMS), jnp.int32)
    _, state, tokens = jax.lax.while_loop(go_on, body, (jnp.int32(0), state, tokens))
    return state, tokens, jnp.stack([state.step, state.running.astype(jnp.int32), state.text_pending.astype(jnp.int32)])


def prefill(
    model: OmniModel,
    tokens: Array,
    speech: Array | None,
    speech_positions: Array | None,
    speech_start: Array | None = None,
    prefix: dict[str, Cache] | None = None,
    prefix_lengths: Array | None = None,
    *,
    audio: bool,
) -> dict[str, Cache]:
    """Keys and values of prompts without their last column.

    Positions beyond a prompt's own length are computed too and never attended to: decoding overwrites a cache
    position before it may be read.

    Args:
        model: the model.
        tokens: int32 [n, 8, T], padded at the end; with a prefix, what follows it.
        speech: [n, A, D] from `OmniModel.encode_audio`, or None.
        speech_positions: int32 [n]: so many prompt positions take the first that many embeddings.
        speech_start: int32 [n], the first of these positions; None: 1, of prompts without a history.
        prefix: caches of n rows and S positions, which hold the beginnings of the prompts; None: there are none.
        prefix_lengths: int32 [n], positions of each that are filled.
        audio: whether any of them will output audio.

    Returns:
        Caches of n rows and T positions, with a prefix S positions.
    """
    n, _, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T), (n, T))
    if prefix is not None:
        assert prefix_lengths is not None
        positions = positions + prefix_lengths[:, None]
    index = None
    if speech is not None:
        assert speech_positions is not None
        frames = positions - (1 if speech_start is None else speech_start[:, None])
        index = jnp.where((frames >= 0) & (frames < speech_positions[:, None]), frames, -1)
    _, _, caches = model(tokens, positions, speech, index, audio=audio, prefix=prefix)
    return caches


def insert(
    state: DecodeState,
    prefilled: dict[str, Cache],
    batch_slots: Array,
    pages: Array,
    companion_pages: Array,
    arrivals: DecodeState,
) -> DecodeState:
    """Put prefilled requests into the running batch.

    Args:
        state: the running batch, donated.
        prefilled: caches of n rows from `prefill`.
        batch_slots: int32 [n]; B for a row that only pads the prefill's shape.
        pages: int32 [n, M], the pages of each in the order of their positions, numbered over all groups; any number
            out of range for none.
        companion_pages: int32 [n, M], those of its companion row.
        arrivals: the new entries, n of each, without caches.
    """

    def place(old: Array, new: Array, pages: Array) -> Array:
        S = old.shape[-2]
        padding = [(0, 0)] * new.ndim
        padding[-2] = (0, -new.shape[-2] % S)
        new = jnp.pad(new, padding)
        # A stacked cache has its layers in front of the rows.
        *layers, n, K, length, H = new.shape
        new = jnp.swapaxes(new.reshape(*layers, n, K, length // S, S, H), -4, -3)
        return old.at[..., pages[:, : length // S], :, :, :].set(new.astype(old.dtype), mode="drop")

    caches = dict(state.caches)
    for name, prompt in prefilled.items():
        caches[name] = jax.tree.map(partial(place, pages=pages), caches[name], prompt)
    caches["trunk"] = jax.tree.map(partial(place, pages=companion_pages), caches["trunk"], prefilled["trunk"])
    bare = dataclasses.replace(state, caches={})
    inserted = jax.tree.map(lambda old, new: old.at[batch_slots].set(new, mode="drop"), bare, arrivals)
    return dataclasses.replace(inserted, caches=caches)


def stop(state: DecodeState, batch_slot: Array) -> DecodeState:
    """Stop the request in a batch slot; what it leaves in the caches is overwritten by the next."""
    return dataclasses.replace(state, running=state.running.at[batch_slot].set(False))


def init_state(model: OmniModel, max_batch_size: int, num_pages: int, page_len: int) -> DecodeState:
    """A batch of idle slots, and pools of so many pages of `page_len` positions."""
    vocab, B = Vocab(model.config.vocab), max_batch_size
    caches = {"trunk": model.trunk.init_cache(num_pages, page_len)}
    if model.tts_adapter is not None:
        caches["tts_adapter"] = model.tts_adapter.blocks.init_cache(num_pages, page_len)
    zeros, false = partial(jnp.zeros, (B,), jnp.int32), partial(jnp.zeros, (B,), bool)
    return DecodeState(
        tokens=jnp.tile(vocab.padding, (B, 1)),
        positions=zeros(),
        step=zeros(),
        running=false(),
        text_pending=false(),
        params=SlotParams(
            outputs_audio=false(),
            max_steps=zeros(),
            enforce_delay=false(),
            sampling=Sampling(
                temperature=jnp.zeros((B,), jnp.float32),
                top_k=zeros(),
                top_p=jnp.ones((B,), jnp.float32),
                seed=jnp.zeros((B,), jnp.uint32),
            ),
        ),
        caches=caches,
    )
