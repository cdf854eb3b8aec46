"""The decoding programs on their own: state, routing, donation, and what each routing computes."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.inference.decode import MAX_CHUNK_STEPS, DecodeState, Routing, SlotParams
from omni_jax.inference.runner import ModelRunner
from omni_jax.inference.sampling import Sampling
from omni_jax.model.pages import PageTable, num_pages, page_len
from omni_jax.vocab import Vocab
from tests.inference.reference_decoder import random_model, small_config

B, PAGE, COLUMNS = 3, 8, 3
PAGES = 2 * B * COLUMNS
S = PAGE * COLUMNS
TABLES = np.random.default_rng(0).permutation(PAGES).reshape(2, B, COLUMNS)
"""Pages of the batch slots and of as many companion rows."""
CONFIG = small_config(tied=False, tts_adapter_layers=1)
V = Vocab(CONFIG.vocab)
BLANK = [V.pad_a] * 7 + [V.pad_t]


@pytest.fixture(scope="module", params=[False, True], ids=["unstacked", "stacked"])
def runner(request: pytest.FixtureRequest) -> ModelRunner:
    return ModelRunner(random_model(CONFIG, stacked=request.param))


def routing(companions: int = 0, texts: int = B, audios: int = B) -> Routing:
    """The first of the batch slots, as many of each kind."""
    every = jnp.arange(B, dtype=jnp.int32)
    pages = PageTable.of([TABLES[0], TABLES[1, :companions]] if companions else TABLES[:1], PAGES)
    return Routing(every[:companions], every[:texts], every[:texts], every[:audios], pages)


def started(runner: ModelRunner, **changes: Any) -> DecodeState:
    """A batch in which every slot runs from an empty prompt."""
    state = runner.init_state(B, PAGES, PAGE)
    params = dataclasses.replace(state.params, outputs_audio=jnp.ones(B, bool), max_steps=jnp.full(B, S))
    changes = {name: jnp.asarray(value) for name, value in changes.items()}
    return dataclasses.replace(
        state, params=params, **{"running": jnp.ones(B, bool), "text_pending": jnp.ones(B, bool)} | changes
    )


def test_init_state_is_idle(runner: ModelRunner) -> None:
    state = runner.init_state(B, PAGES, PAGE)
    assert not state.running.any()
    assert not state.text_pending.any()
    assert state.tokens.tolist() == [BLANK] * B
    assert set(state.caches) == {"trunk", "tts_adapter"}
    assert {num_pages(cache) for cache in state.caches.values()} == {PAGES}
    assert {page_len(cache) for cache in state.caches.values()} == {PAGE}


def tables_in_products(runner: ModelRunner, routes: Routing) -> set[str]:
    """Which of the heads' tables a chunk multiplies anything with, from the program before it is compiled."""
    state = started(runner)
    text = runner.jitted.decode_chunk.lower(runner.weights, state, routes, jnp.int32(1)).as_text()
    D = CONFIG.trunk.hidden_size
    tables = {f"{V.text_rows}x{D}": "text", f"7x{V.audio_rows}x{D}": "audio"}
    found = set()
    for line in text.splitlines():
        if "dot_general" in line:
            found |= {tables[shape] for shape in re.findall(r"tensor<([\dx]+)xf32>", line) if shape in tables}
    return found


def test_decode_chunk_skips_heads_outside_the_routing(runner: ModelRunner) -> None:
    assert tables_in_products(runner, routing(1, 1, 1)) == {"text", "audio"}
    assert tables_in_products(runner, routing(0, B, 0)) == {"text"}
    assert tables_in_products(runner, routing(0, 0, B)) == {"audio"}


def test_decode_chunk_without_audio_skips_the_tts_adapter(runner: ModelRunner) -> None:
    def blocks(routes: Routing) -> int:
        text = runner.jitted.decode_chunk.lower(runner.weights, started(runner), routes, jnp.int32(1)).as_text()
        F, D = CONFIG.trunk.intermediate_size, CONFIG.trunk.hidden_size
        return len(re.findall(rf"dot_general.*tensor<{D}x{F}xf32>", text))

    assert blocks(routing(0, B, B)) > blocks(routing(0, B, 0)) > 0


def test_stopped_slots_do_not_change_and_output_padding(runner: ModelRunner) -> None:
    tokens = np.arange(B * 8, dtype=np.int32).reshape(B, 8) % 7
    state = started(runner, running=[True, False, True], tokens=tokens, positions=np.array([0, 5, 3], np.int32))
    state, tokens_out, status = runner.decode_chunk(state, routing(0, B, B), jnp.int32(3))
    assert state.tokens[1].tolist() == tokens[1].tolist()
    assert (int(state.positions[1]), int(state.step[1])) == (5, 0)
    assert tokens_out[:3, 1].tolist() == [BLANK] * 3
    assert tokens_out.shape == (MAX_CHUNK_STEPS, B, 8)
    np.testing.assert_array_equal(status, [state.step, state.running, state.text_pending])
    ran = [slot for slot in (0, 2) if bool(state.running[slot])]
    assert ran
    assert [int(state.step[slot]) for slot in ran] == [3] * len(ran)
    assert [state.tokens[slot].tolist() for slot in ran] == [tokens_out[2, slot].tolist() for slot in ran]


def test_decode_chunk_takes_no_step_when_nothing_runs(runner: ModelRunner) -> None:
    state = started(runner, running=np.zeros(B, bool))
    state, _, status = runner.decode_chunk(state, routing(0, B, B), jnp.int32(60))
    np.testing.assert_array_equal(status, np.array([[0] * B, [0] * B, [1] * B]))


def test_decode_chunk_ends_when_all_text_of_the_routing_has_ended(runner: ModelRunner) -> None:
    """The next chunk then leaves out the text head; one step more would have computed it for nothing."""
    state = started(runner, text_pending=np.zeros(B, bool))
    state, _, status = runner.decode_chunk(state, routing(0, B, B), jnp.int32(60))
    assert status[0].tolist() == [0] * B


def test_decode_chunk_donates_the_state(runner: ModelRunner) -> None:
    state = started(runner)
    before = jax.tree.leaves((state.caches, state.tokens, state.step))
    after, _, _ = runner.decode_chunk(state, routing(0, B, B), jnp.int32(2))
    assert all(leaf.is_deleted() for leaf in before)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, runner.weights)))


def test_insert_donates_the_state_and_changes_only_its_slots(runner: ModelRunner) -> None:
    """Two arrivals, of which the second has a companion row, and filler rows without slots and pages."""
    state = started(runner)
    tokens = np.random.default_rng(0).integers(0, 12, (4, 8, 16)).astype(np.int32)
    prompts = runner.prefill(jnp.asarray(tokens), None, None, audio=True)
    arrivals = DecodeState(
        tokens=jnp.full((4, 8), 3),
        positions=jnp.array([9, 8, 7, 6]),
        step=jnp.zeros(4, jnp.int32),
        running=jnp.ones(4, bool),
        text_pending=jnp.ones(4, bool),
        params=SlotParams(
            outputs_audio=jnp.zeros(4, bool),
            max_steps=jnp.full(4, 5),
            enforce_delay=jnp.ones(4, bool),
            sampling=Sampling(jnp.ones(4), jnp.full(4, 2), jnp.full(4, 0.5), jnp.arange(4, dtype=jnp.uint32)),
        ),
        caches={},
    )
    old = jax.tree.leaves(state.caches)
    batch_slots = jnp.array([2, 0, B, B])
    pages, companion_pages = np.full((2, 4, COLUMNS), PAGES)
    pages[:2], companion_pages[1] = TABLES[0, [2, 0]], TABLES[1, 0]
    # Pages that are behind the prompt's.
    pages[0, 2] = PAGES
    state = runner.insert(state, prompts, batch_slots, jnp.asarray(pages), jnp.asarray(companion_pages), arrivals)
    assert all(leaf.is_deleted() for leaf in old)
    assert state.positions.tolist() == [8, 0, 9]
    assert state.params.max_steps.tolist() == [5, S, 5]
    assert state.params.sampling.seed.tolist() == [1, 0, 0]

    def layers(cache: Any) -> list[np.ndarray]:
        return [np.asarray(layer) for name in "kv" for layer in cache[name]]

    for name in ("trunk", "tts_adapter"):
        for pool, prompt in zip(layers(state.caches[name]), layers(prompts[name]), strict=True):
            expected = np.zeros_like(pool)
            for column in (0, 1):
                span = slice(PAGE * column, PAGE * (column + 1))
                expected[TABLES[0, 2, column]] = prompt[0, :, span]
                expected[TABLES[0, 0, column]] = prompt[1, :, span]
                if name == "trunk":
                    expected[TABLES[1, 0, column]] = prompt[1, :, span]
            np.testing.assert_array_equal(pool, expected)
