"""Decoding on the device: prefill, and the delay-pattern loop that runs many requests a step at a time.

A batch has B slots, one request each. Its cache and everything else that changes from step to step is one pytree,
`DecodeState`. What a step has to compute is decided by the host between chunks and handed over as a `Routing`:
which rows still need the text head, which the audio heads, and which requests have a second row (batch-parallel
decoding takes the text from a row that answers in text only). The tokens do not depend on it; it only leaves
out work whose result nobody would read. Its sizes are part of the compiled shape.

The prompt's last column is not prefilled: it is the input of step 0, so that prefill never touches a head and the
two rows of a batch-parallel request share one prefill.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import Mesh

from omni_jax import sharding
from omni_jax.inference.sampling import Sampling, sample
from omni_jax.model.layers import Int8
from omni_jax.model.omni import OmniModel
from omni_jax.model.trunk import Cache, cache_slots
from omni_jax.vocab import LAYERS, STREAMS, TEXT, Vocab

Array = jax.Array

LONGEST_CHUNK = 64
"""Most steps a chunk can take; the token buffer is this long, shorter chunks use its front."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Requests:
    """What a step needs to know of each request; set when it joins, never changed by a step."""

    speaks: Array
    """bool [B], whether the audio streams speak."""
    limit: Array
    """int32 [B], steps after which it must stop."""
    enforce_delay: Array
    """bool [B], whether a layer that is not yet due emits padding, whatever the model says."""
    sampling: Sampling


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """All that changes from step to step."""

    tokens: Array
    """int32 [B, 8], the next step's input: what was said last, or the prompt's last column."""
    positions: Array
    """int32 [B], the trunk position of that input."""
    step: Array
    """int32 [B], steps done."""
    running: Array
    """bool [B]; a slot that is not running stands still."""
    writing: Array
    """bool [B], whether text is still to come."""
    requests: Requests
    caches: dict[str, Cache]
    """`trunk`, with a TTS adapter also `tts_adapter`: B rows each."""
    shadows: Cache | None
    """Trunk cache of the second rows, as many as the routing has; None when it has none."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Which rows a chunk computes. An entry of B (or, in `text_row`, anything beside it) is an idle place."""

    shadow_slot: Array
    """int32 [b], the slot each second row belongs to."""
    text_slot: Array
    """int32 [n], the slots that need the text head."""
    text_row: Array
    """int32 [n], the row their text comes from: the slot itself, or B + its second row."""
    audio_slot: Array
    """int32 [m], the slots that need the audio heads."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(b, n, m)."""
        return self.shadow_slot.shape[0], self.text_slot.shape[0], self.audio_slot.shape[0]


def step(model: OmniModel, state: DecodeState, routing: Routing) -> tuple[DecodeState, Array]:
    """One step of every running slot.

    Returns:
        The state after it, and what was said: int32 [B, 8], padding in slots that do not run.
    """
    vocab = Vocab(model.config.vocab)
    B = state.tokens.shape[0]
    shadows, texts, audios = routing.sizes
    ask = state.requests

    rows, positions, caches = state.tokens, state.positions, [state.caches["trunk"]]
    if shadows:
        assert state.shadows is not None
        column = jnp.full((shadows, STREAMS), vocab.pad_a, jnp.int32)
        column = column.at[:, TEXT].set(state.tokens.at[routing.shadow_slot, TEXT].get(mode="clip"))
        rows = jnp.concatenate([rows, column])
        positions = jnp.concatenate([positions, positions.at[routing.shadow_slot].get(mode="clip")])
        caches.append(state.shadows)
    hidden, caches = model.trunk.decode(model.embed_tokens(rows), positions, caches)

    text = jnp.full((B,), vocab.pad_t, jnp.int32)
    if texts:
        # Rows taken from anywhere are spread again, or every device would score all of them.
        chosen = sharding.by_rows(hidden.at[routing.text_row].get(mode="clip"), model.mesh)
        logits = model.text_logits(model.norm(chosen))
        settings = ask.sampling.take(routing.text_slot)
        steps = state.step.at[routing.text_slot].get(mode="clip")
        said = sample(logits, settings, steps, jnp.full((texts,), TEXT))
        text = text.at[routing.text_slot].set(said, mode="drop")
        text = jnp.where(state.writing, text, vocab.pad_t)

    new_caches = {"trunk": caches[0]}
    audio = jnp.full((B, LAYERS), vocab.pad_a, jnp.int32)
    if audios:
        voice = hidden[:B]
        if model.tts_adapter is not None:
            voice, adapted = model.tts_adapter.blocks.decode(voice, state.positions, [state.caches["tts_adapter"]])
            voice, new_caches["tts_adapter"] = model.tts_adapter.norm(voice), adapted[0]
        else:
            voice = model.norm(voice)
        logits = model.audio_logits(sharding.by_rows(voice.at[routing.audio_slot].get(mode="clip"), model.mesh))
        settings = ask.sampling.take(jnp.repeat(routing.audio_slot, LAYERS))
        steps = jnp.repeat(state.step.at[routing.audio_slot].get(mode="clip"), LAYERS)
        layer = jnp.arange(LAYERS)
        said = sample(logits.reshape(audios * LAYERS, -1), settings, steps, jnp.tile(layer, audios))
        audio = audio.at[routing.audio_slot].set(said.reshape(audios, LAYERS), mode="drop")
        due = (state.step[:, None] > layer) | ~ask.enforce_delay[:, None]
        audio = jnp.where(due & ask.speaks[:, None], audio, vocab.pad_a)
    elif model.tts_adapter is not None:
        new_caches["tts_adapter"] = state.caches["tts_adapter"]

    said = jnp.concatenate([audio, text[:, None]], axis=1)
    blank = jnp.full((STREAMS,), vocab.pad_a, jnp.int32).at[TEXT].set(vocab.pad_t)
    said = jnp.where(state.running[:, None], said, blank)
    ended = jnp.where(ask.speaks, audio[:, -1] == vocab.eoa, text == vocab.eot)
    moved = state.running.astype(jnp.int32)
    last_slot = cache_slots(state.caches["trunk"]) - 1
    return (
        dataclasses.replace(
            state,
            tokens=jnp.where(state.running[:, None], said, state.tokens),
            positions=jnp.minimum(state.positions + moved, last_slot),
            step=state.step + moved,
            running=state.running & ~ended & (state.step + 1 < ask.limit),
            writing=state.writing & ~(state.running & (text == vocab.eot)),
            caches=new_caches,
            shadows=caches[1] if shadows else None,
        ),
        said,
    )


def chunk(model: OmniModel, state: DecodeState, routing: Routing, steps: Array) -> tuple[DecodeState, Array, Array]:
    """Up to `steps` steps; returns early when nothing runs, or when no slot of the routing writes any more.

    Returns:
        The state, the tokens int32 [LONGEST_CHUNK, B, 8] (slot i's new ones are the first
        `state.step[i] - step before` of them), and int32 [3, B]: step, running, writing, for the host to read.
    """
    B = state.tokens.shape[0]
    _, texts, _ = routing.sizes

    def go_on(carry: tuple[Array, DecodeState, Array]) -> Array:
        done, state, _ = carry
        more = (done < steps) & jnp.any(state.running)
        if texts:
            writing = (state.running & state.writing).at[routing.text_slot].get(mode="fill", fill_value=False)
            more = more & jnp.any(writing)
        return more

    def body(carry: tuple[Array, DecodeState, Array]) -> tuple[Array, DecodeState, Array]:
        done, state, tokens = carry
        state, said = step(model, state, routing)
        return done + 1, state, tokens.at[done].set(said)

    tokens = jnp.zeros((LONGEST_CHUNK, B, STREAMS), jnp.int32)
    _, state, tokens = jax.lax.while_loop(go_on, body, (jnp.int32(0), state, tokens))
    return state, tokens, jnp.stack([state.step, state.running.astype(jnp.int32), state.writing.astype(jnp.int32)])


def prefill(
    model: OmniModel, tokens: Array, speech: Array | None, speech_positions: Array | None, *, audio: bool
) -> dict[str, Cache]:
    """Keys and values of prompts without their last column.

    What stands beyond a prompt's own length is computed too and never looked at: decoding overwrites a slot before
    it may be seen.

    Args:
        model: the model.
        tokens: int32 [n, 8, T], padded at the end.
        speech: [n, A, D] from `OmniModel.hear`, or None.
        speech_positions: int32 [n]: prompt positions 1..speech_positions hear the first that many embeddings.
        audio: whether any of them will speak.

    Returns:
        Caches of n rows and T slots.
    """
    n, _, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T), (n, T))
    index = None
    if speech is not None:
        assert speech_positions is not None
        index = jnp.where((positions >= 1) & (positions <= speech_positions[:, None]), positions - 1, -1)
    _, _, caches = model(tokens, positions, speech, index, audio=audio)
    return caches


def join(
    state: DecodeState, prompts: dict[str, Cache], slots: Array, shadow_rows: Array, arrivals: DecodeState
) -> DecodeState:
    """Put prefilled requests into slots.

    Args:
        state: the running batch, donated.
        prompts: caches of n rows from `prefill`.
        slots: int32 [n]; B for a row that is only there to fill the prefill's shape.
        shadow_rows: int32 [n], the second row of each; any number out of range for none.
        arrivals: the new entries, n of each, without caches.
    """

    def place(old: Any, new: Any, rows: Array) -> Any:
        where = (slice(None), rows) if isinstance(old, jax.Array) and old.ndim == 5 else (rows,)
        slots = new.shape[-2]
        return old.at[(*where, slice(None), slice(0, slots))].set(new.astype(old.dtype), mode="drop")

    caches = dict(state.caches)
    for name, prompt in prompts.items():
        caches[name] = jax.tree.map(partial(place, rows=slots), caches[name], prompt)
    shadows = state.shadows
    if shadows is not None:
        shadows = jax.tree.map(partial(place, rows=shadow_rows), shadows, prompts["trunk"])
    bare = dataclasses.replace(state, caches={}, shadows=None)
    joined = jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), bare, arrivals)
    return dataclasses.replace(joined, caches=caches, shadows=shadows)


def halt(state: DecodeState, slot: Array) -> DecodeState:
    """Let the request in a slot stand still from here on; what it leaves in the caches is overwritten by the next."""
    return dataclasses.replace(state, running=state.running.at[slot].set(False))


def empty(model: OmniModel, slots: int, length: int) -> DecodeState:
    """A batch of `slots` idle slots whose caches hold `length` positions."""
    vocab = Vocab(model.config.vocab)
    caches = {"trunk": model.trunk.cache(slots, length)}
    if model.tts_adapter is not None:
        caches["tts_adapter"] = model.tts_adapter.blocks.cache(slots, length)
    zeros, false = partial(jnp.zeros, (slots,), jnp.int32), partial(jnp.zeros, (slots,), bool)
    return DecodeState(
        tokens=jnp.full((slots, STREAMS), vocab.pad_a, jnp.int32).at[:, TEXT].set(vocab.pad_t),
        positions=zeros(),
        step=zeros(),
        running=false(),
        writing=false(),
        requests=Requests(
            speaks=false(),
            limit=zeros(),
            enforce_delay=false(),
            sampling=Sampling(
                temperature=jnp.zeros((slots,), jnp.float32),
                top_k=zeros(),
                top_p=jnp.ones((slots,), jnp.float32),
                seed=jnp.zeros((slots,), jnp.uint32),
            ),
        ),
        caches=caches,
        shadows=None,
    )


DECODED = ("trunk", "tts_adapter", "embed", "head")
"""Parts that a step of decoding reads."""
INPUT_AXES = dict.fromkeys(("q", "k", "v", "gate", "up", "down", "text", "audio", "head"), 1) | {"out": 2}
"""Of their matrices, how many axes are multiplied."""
CACHE_AXES = ("batch", "kv_heads", None, None)
"""Logical axes of a layer's keys or values [R, K / P, S, P * H]."""


def spread(tree: Any, mesh: Mesh) -> Any:
    """Settle where caches and everything else that has a row per request live: each row on its own devices."""

    def place(x: Array) -> Array:
        return sharding.constrain(x, CACHE_AXES if x.ndim >= 4 else ("batch", *[None] * (x.ndim - 1)), mesh)

    return jax.tree.map(place, tree)


class Programs:
    """The compiled programs of one model, over its weights as a plain dict (cheap to dispatch).

    Each is compiled once per shape: `hear` per batch of recordings, `prefill` per rows and padded length, `chunk`
    per slots, cache length and routing sizes. If the weights are spread over a mesh, so is the running batch.

    Args:
        model: its weights are taken as they are.
        int8: round those that decoding reads to eight bits: half the bytes a step, good where they are what a step
            waits for. A CPU's products want floats and become slower.
    """

    def __init__(self, model: OmniModel, *, int8: bool = False):
        mesh = sharding.of_array(jax.tree.leaves(nnx.state(model))[0])
        model = nnx.merge(*nnx.split(model))
        model.lay_on(mesh)
        graph, state = nnx.split(model)
        self.config = model.config
        self.weights: Any = nnx.to_pure_dict(state)
        if int8:
            self.weights = in_int8(self.weights)

        def settle(out: Any) -> Any:
            return out if mesh.size == 1 else spread(out, mesh)

        def bind(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
            def call(weights: Any, *args: Any, **kwargs: Any) -> Any:
                return function(nnx.merge(graph, weights), *args, **kwargs)

            return jax.jit(call, **options)

        def settled_chunk(model: OmniModel, *args: Any) -> tuple[DecodeState, Array, Array]:
            state, tokens, status = chunk(model, *args)
            return settle(state), tokens, status

        def settled(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: settle(function(*args, **kwargs))

        self.hear = bind(OmniModel.hear)
        self.prefill = bind(settled(prefill), static_argnames="audio")
        self.chunk = bind(settled_chunk, donate_argnums=1)
        self.empty = bind(settled(empty), static_argnums=(1, 2))
        self.shadows = bind(settled(lambda model, *shape: model.trunk.cache(*shape)), static_argnums=(1, 2))
        self.join = jax.jit(settled(join), donate_argnums=0)
        self.halt = jax.jit(settled(halt), donate_argnums=0)
        self.keep_shadows = jax.jit(settled(take_rows))


def in_int8(weights: Any, round_to: Callable[[Any, int], Int8] = Int8.of) -> Any:
    """The matrices of trunk, TTS adapter, embedding and heads as `Int8`; the rest of a model's weights as it is.

    Args:
        weights: nested, as `Programs` has them.
        round_to: what makes one of a weight and the number of its input axes.
    """
    flat = traverse_util.flatten_dict(weights)
    for keys, weight in flat.items():
        if keys[0] in DECODED and keys[-1] in INPUT_AXES:
            flat[keys] = round_to(weight, INPUT_AXES[keys[-1]])
    return traverse_util.unflatten_dict(flat)


def take_rows(cache: Cache, rows: Array) -> Cache:
    """The cache of `rows` alone."""
    axis = 0 if isinstance(cache["k"], tuple) else 1
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=axis, mode="clip"), cache)
