"""Sampling: which tokens may be drawn, how often, and with whose noise."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.inference.sampling import Sampling, sample, truncate

sample = jax.jit(sample)
truncate = jax.jit(truncate)


def settings(n: int, temperature: Any = 1.0, top_k: Any = 0, top_p: Any = 1.0, seed: Any = 0) -> Sampling:
    def column(value: Any, dtype: Any) -> jax.Array:
        return jnp.asarray(np.broadcast_to(value, n).astype(dtype))

    return Sampling(
        column(temperature, np.float32), column(top_k, np.int32), column(top_p, np.float32), column(seed, np.uint32)
    )


def draw(logits: np.ndarray, sampling: Sampling, step: Any = 0, stream: Any = 0) -> np.ndarray:
    n = len(logits)
    columns = [jnp.asarray(np.broadcast_to(x, n).astype(np.int32)) for x in (step, stream)]
    tokens = sample(jnp.asarray(logits, jnp.float32), sampling, *columns)
    assert tokens.dtype == jnp.int32
    return np.asarray(tokens)


def kept(logits: list[float], **of: Any) -> list[int]:
    """Tokens that may still be drawn; the others' logits must be -inf, theirs unchanged."""
    out = np.asarray(truncate(jnp.asarray([logits], jnp.float32), settings(1, **of)))[0]
    left = np.flatnonzero(out > -np.inf)
    np.testing.assert_array_equal(out[left], np.asarray(logits, np.float32)[left])
    return left.tolist()


RANDOM = np.random.default_rng(0).normal(size=(64, 23)).astype(np.float32)


def test_temperature_zero_is_greedy_whatever_the_rest_says() -> None:
    for top_k, top_p in ((0, 1.0), (5, 1.0), (0, 0.3)):
        of = settings(64, 0.0, top_k, top_p, seed=np.arange(64))
        np.testing.assert_array_equal(draw(RANDOM, of, step=np.arange(64)), RANDOM.argmax(1))


def test_top_k_of_one_is_greedy() -> None:
    of = settings(64, 5.0, 1, seed=np.arange(64))
    np.testing.assert_array_equal(draw(RANDOM, of), RANDOM.argmax(1))


def test_a_tiny_top_p_is_greedy() -> None:
    of = settings(64, 5.0, 0, 1e-9, seed=np.arange(64))
    np.testing.assert_array_equal(draw(RANDOM, of), RANDOM.argmax(1))


def test_the_first_of_equals_wins_when_greedy() -> None:
    assert draw(np.array([[1.0, 3.0, 3.0]]), settings(1, 0.0)).tolist() == [1]


LOGITS = [0.0, 3.0, 1.0, 2.0, -1.0]


@pytest.mark.parametrize(
    ("k", "expected"),
    [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4]), (0, [0, 1, 2, 3, 4])],
)
def test_top_k_keeps_k(k: int, expected: list[int]) -> None:
    assert kept(LOGITS, top_k=k) == expected


def test_top_k_keeps_ties_at_the_border() -> None:
    assert kept([2.0, 1.0, 1.0, 0.0, 1.0], top_k=2) == [0, 1, 2, 4]


HALVES = [math.log(p) for p in (0.125, 0.5, 0.25, 0.0625, 0.0625)]


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (1e-9, [1]),
        (0.45, [1]),
        (0.51, [1, 2]),
        (0.74, [1, 2]),
        (0.76, [0, 1, 2]),
        (0.86, [0, 1, 2]),
        (0.9, [0, 1, 2, 3, 4]),  # the last two are equals
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_p(p: float, expected: list[int]) -> None:
    assert kept(HALVES, top_p=p) == expected


def test_top_p_of_one_keeps_even_what_rounds_to_nothing() -> None:
    assert kept([0.0, -50.0, -80.0], top_p=1.0, top_k=3) == [0, 1, 2]


def test_top_p_counts_within_top_k() -> None:
    """Among the best two of 0.5 and 0.25 the first has two thirds."""
    assert kept(HALVES, top_k=2, top_p=0.6) == [1]
    assert kept(HALVES, top_k=2, top_p=0.7) == [1, 2]


def test_top_p_is_taken_at_the_temperature() -> None:
    """At temperature 2 the probabilities are their square roots, normed: 0.33, 0.23, 0.17, ..."""
    assert kept(HALVES, top_p=0.45) == [1]
    assert kept(HALVES, top_p=0.45, temperature=2.0) == [1, 2]
    assert kept(HALVES, top_p=0.55, temperature=0.5) == [1]


def test_each_row_is_cut_by_its_own_settings() -> None:
    logits = jnp.asarray([LOGITS] * 4, jnp.float32)
    of = settings(4, [1.0, 1.0, 0.0, 1.0], [2, 0, 1, 0], [1.0, 1e-9, 1.0, 1.0])
    out = np.asarray(truncate(logits, of)) > -np.inf
    np.testing.assert_array_equal(out[0], [False, True, False, True, False])
    np.testing.assert_array_equal(out[1], [False, True, False, False, False])
    assert out[3].all()


@pytest.mark.parametrize(
    ("of", "keep"),
    [({}, 5), ({"temperature": 0.5}, 5), ({"temperature": 2.0}, 5), ({"top_k": 3}, 3), ({"top_p": 0.8}, 2)],
)
def test_draws_follow_the_softmax(of: dict[str, Any], keep: int) -> None:
    n = 20_000
    tokens = draw(np.tile(np.float32(LOGITS), (n, 1)), settings(n, **of), step=np.arange(n))
    scaled = np.array(LOGITS) / of.get("temperature", 1.0)
    weights = np.exp(scaled) * (scaled >= np.sort(scaled)[-keep])
    expected = weights / weights.sum()
    found = np.bincount(tokens, minlength=5) / n
    assert (found[expected == 0] == 0).all()
    # Five standard deviations of a share.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / n)).all()


def test_a_row_draws_the_same_wherever_it_stands() -> None:
    of = settings(64, np.linspace(0.5, 3, 64), np.arange(64) % 7, np.linspace(0.5, 1, 64), np.arange(64) + 5)
    step, stream = np.arange(64) * 3, np.arange(64) % 8
    together = draw(RANDOM, of, step, stream)
    order = np.random.default_rng(1).permutation(64)
    shuffled = draw(RANDOM[order], jax.tree.map(lambda x: x[order], of), step[order], stream[order])
    np.testing.assert_array_equal(shuffled, together[order])
    for row in (0, 17, 63):
        alone = draw(RANDOM[row : row + 1], of.take(jnp.array([row])), step[row : row + 1], stream[row : row + 1])
        assert alone[0] == together[row]


def test_seed_step_and_stream_each_change_the_draw() -> None:
    n = 200
    flat = np.zeros((n, 50), np.float32)
    same = draw(flat, settings(n, seed=3), step=4, stream=5)
    assert len(set(same.tolist())) == 1
    for tokens in (
        draw(flat, settings(n, seed=np.arange(n)), step=4, stream=5),
        draw(flat, settings(n, seed=3), step=np.arange(n), stream=5),
        draw(flat[:8], settings(8, seed=3), step=4, stream=np.arange(8)),
    ):
        assert len(set(tokens.tolist())) > min(len(tokens), 50) * 0.7
    # The two are not added up: (step 1, stream 0) is another draw than (step 0, stream 1).
    pairs = [(a, b) for a in range(8) for b in range(8)]
    tokens = draw(flat[:64], settings(64, seed=3), *np.array(pairs).T).reshape(8, 8)
    assert (tokens != tokens.T).sum() > 40


def test_seeds_use_all_32_bits() -> None:
    seeds = np.array([0, 2**31, 2**32 - 1], np.uint32)
    flat = np.zeros((3, 1000), np.float32)
    assert len(set(draw(flat, settings(3, seed=seeds)).tolist())) == 3


def test_greedy_and_sampled_rows_mix() -> None:
    temperature = np.where(np.arange(64) % 2 == 0, 0.0, 3.0)
    mixed = draw(RANDOM, settings(64, temperature, seed=np.arange(64)))
    all_sampled = draw(RANDOM, settings(64, 3.0, seed=np.arange(64)))
    np.testing.assert_array_equal(mixed[::2], RANDOM.argmax(1)[::2])
    np.testing.assert_array_equal(mixed[1::2], all_sampled[1::2])
    assert (mixed[1::2] != RANDOM.argmax(1)[1::2]).any()


def test_take_gives_rows_out_of_range_the_last() -> None:
    of = settings(3, seed=[5, 6, 7]).take(jnp.array([2, 0, 3]))
    assert of.seed.tolist() == [7, 5, 7]
