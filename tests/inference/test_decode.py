"""The decoding programs on their own: state, routing, donation, and what each routing computes."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.inference.decode import MAX_CHUNK_STEPS, DecodeState, Requests, Routing
from omni_jax.inference.runner import ModelRunner
from omni_jax.inference.sampling import Sampling
from omni_jax.model.decoder import cache_length, cache_rows
from omni_jax.vocab import Vocab
from tests.inference.reference_decoder import random_model, small_config

B, S = 3, 24
CONFIG = small_config(tied=False, tts_adapter_layers=1)
V = Vocab(CONFIG.vocab)
BLANK = [V.pad_a] * 7 + [V.pad_t]


@pytest.fixture(scope="module", params=[False, True], ids=["unstacked", "stacked"])
def programs(request: pytest.FixtureRequest) -> ModelRunner:
    return ModelRunner(random_model(CONFIG, stacked=request.param))


def routing(shadows: int = 0, texts: int = B, audios: int = B) -> Routing:
    """All slots where asked for."""
    every = jnp.arange(B, dtype=jnp.int32)
    return Routing(every[:shadows], every[:texts], every[:texts], every[:audios])


def started(programs: ModelRunner, **changes: Any) -> DecodeState:
    """A batch in which every slot runs from an empty prompt."""
    state = programs.empty(programs.weights, B, S)
    requests = dataclasses.replace(state.requests, outputs_audio=jnp.ones(B, bool), limit=jnp.full(B, S))
    changes = {name: jnp.asarray(value) for name, value in changes.items()}
    return dataclasses.replace(
        state, requests=requests, **{"running": jnp.ones(B, bool), "writing": jnp.ones(B, bool)} | changes
    )


def test_an_empty_batch_is_idle(programs: ModelRunner) -> None:
    state = programs.empty(programs.weights, B, S)
    assert not state.running.any()
    assert not state.writing.any()
    assert state.tokens.tolist() == [BLANK] * B
    assert set(state.caches) == {"trunk", "tts_adapter"}
    assert {cache_rows(cache) for cache in state.caches.values()} == {B}
    assert {cache_length(cache) for cache in state.caches.values()} == {S}
    assert state.shadows is None


def tables_in_products(programs: ModelRunner, routes: Routing) -> set[str]:
    """Which of the heads' tables a chunk multiplies anything with, from the program before it is compiled."""
    state = started(programs)
    if len(routes.shadow_slot):
        state = dataclasses.replace(state, shadows=programs.shadows(programs.weights, len(routes.shadow_slot), S))
    text = programs.chunk.lower(programs.weights, state, routes, jnp.int32(1)).as_text()
    D = CONFIG.trunk.hidden_size
    tables = {f"{V.text_rows}x{D}": "text", f"7x{V.audio_rows}x{D}": "audio"}
    found = set()
    for line in text.splitlines():
        if "dot_general" in line:
            found |= {tables[shape] for shape in re.findall(r"tensor<([\dx]+)xf32>", line) if shape in tables}
    return found


def test_a_chunk_leaves_out_the_heads_nobody_reads(programs: ModelRunner) -> None:
    assert tables_in_products(programs, routing(1, 1, 1)) == {"text", "audio"}
    assert tables_in_products(programs, routing(0, B, 0)) == {"text"}
    assert tables_in_products(programs, routing(0, 0, B)) == {"audio"}


def test_a_chunk_without_audio_leaves_out_the_tts_adapter(programs: ModelRunner) -> None:
    def blocks(routes: Routing) -> int:
        text = programs.chunk.lower(programs.weights, started(programs), routes, jnp.int32(1)).as_text()
        F, D = CONFIG.trunk.intermediate_size, CONFIG.trunk.hidden_size
        return len(re.findall(rf"dot_general.*tensor<{D}x{F}xf32>", text))

    assert blocks(routing(0, B, B)) > blocks(routing(0, B, 0)) > 0


def test_slots_that_do_not_run_stand_still_and_say_padding(programs: ModelRunner) -> None:
    tokens = np.arange(B * 8, dtype=np.int32).reshape(B, 8) % 7
    state = started(programs, running=[True, False, True], tokens=tokens, positions=np.array([0, 5, 3], np.int32))
    state, said, status = programs.chunk(programs.weights, state, routing(0, B, B), jnp.int32(3))
    assert state.tokens[1].tolist() == tokens[1].tolist()
    assert (int(state.positions[1]), int(state.step[1])) == (5, 0)
    assert said[:3, 1].tolist() == [BLANK] * 3
    assert said.shape == (MAX_CHUNK_STEPS, B, 8)
    np.testing.assert_array_equal(status, [state.step, state.running, state.writing])
    ran = [slot for slot in (0, 2) if bool(state.running[slot])]
    assert ran
    assert [int(state.step[slot]) for slot in ran] == [3] * len(ran)
    assert [state.tokens[slot].tolist() for slot in ran] == [said[2, slot].tolist() for slot in ran]


def test_a_chunk_of_nothing_running_takes_no_step(programs: ModelRunner) -> None:
    state = started(programs, running=np.zeros(B, bool))
    state, _, status = programs.chunk(programs.weights, state, routing(0, B, B), jnp.int32(60))
    np.testing.assert_array_equal(status, np.array([[0] * B, [0] * B, [1] * B]))


def test_a_chunk_ends_when_nobody_in_its_routing_writes(programs: ModelRunner) -> None:
    """The next chunk then leaves out the text head; a step more would have computed it for nobody."""
    state = started(programs, writing=np.zeros(B, bool))
    state, _, status = programs.chunk(programs.weights, state, routing(0, B, B), jnp.int32(60))
    assert status[0].tolist() == [0] * B


def test_the_state_is_donated(programs: ModelRunner) -> None:
    state = started(programs)
    before = jax.tree.leaves((state.caches, state.tokens, state.step))
    after, _, _ = programs.chunk(programs.weights, state, routing(0, B, B), jnp.int32(2))
    assert all(leaf.is_deleted() for leaf in before)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, programs.weights)))


def test_joining_donates_the_batch_and_touches_only_its_slots(programs: ModelRunner) -> None:
    """Two arrivals and a filler row, whose slot and second row are out of range."""
    state = dataclasses.replace(started(programs), shadows=programs.shadows(programs.weights, 2, S))
    tokens = np.random.default_rng(0).integers(0, 12, (4, 8, 16)).astype(np.int32)
    prompts = programs.prefill(programs.weights, jnp.asarray(tokens), None, None, audio=True)
    arrivals = DecodeState(
        tokens=jnp.full((4, 8), 3),
        positions=jnp.array([9, 8, 7, 6]),
        step=jnp.zeros(4, jnp.int32),
        running=jnp.ones(4, bool),
        writing=jnp.ones(4, bool),
        requests=Requests(
            outputs_audio=jnp.zeros(4, bool),
            limit=jnp.full(4, 5),
            enforce_delay=jnp.ones(4, bool),
            sampling=Sampling(jnp.ones(4), jnp.full(4, 2), jnp.full(4, 0.5), jnp.arange(4, dtype=jnp.uint32)),
        ),
        caches={},
        shadows=None,
    )
    old = jax.tree.leaves(state.caches)
    slots, shadows = jnp.array([2, 0, B, B]), jnp.array([B, 1, B, B])
    state = programs.join(state, prompts, slots, shadows, arrivals)
    assert all(leaf.is_deleted() for leaf in old)
    assert state.positions.tolist() == [8, 0, 9]
    assert state.requests.limit.tolist() == [5, S, 5]
    assert state.requests.sampling.seed.tolist() == [1, 0, 0]

    def layers(cache: Any) -> list[np.ndarray]:
        return [np.asarray(layer) for name in "kv" for layer in cache[name]]

    for name in ("trunk", "tts_adapter"):
        for ours, prompt in zip(layers(state.caches[name]), layers(prompts[name]), strict=True):
            np.testing.assert_array_equal(ours[2, :, :16], prompt[0])
            np.testing.assert_array_equal(ours[0, :, :16], prompt[1])
            assert (ours[1] == 0).all()
            assert (ours[:, :, 16:] == 0).all()
    for ours, prompt in zip(layers(state.shadows), layers(prompts["trunk"]), strict=True):
        assert (ours[0] == 0).all()
        np.testing.assert_array_equal(ours[1, :, :16], prompt[1])


def test_keeping_second_rows(programs: ModelRunner) -> None:
    cache = jax.tree.map(lambda x: x + jnp.arange(3.0).reshape((3, 1, 1, 1)), programs.shadows(programs.weights, 3, 8))
    kept = programs.keep_shadows(cache, jnp.array([2, 0]))
    assert cache_rows(kept) == 2
    for name in "kv":
        for layer in kept[name]:
            assert layer[:, 0, 0, 0].tolist() == [2.0, 0.0]
