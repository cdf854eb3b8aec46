"""Attention against plain numpy, to a cache, in blocks, and by the kernels of TPUs and GPUs, without these."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax import sharding
from omni_jax.model.attention import attend, attend_cudnn, attend_splash, can_use_cudnn, can_use_splash

B, T, N, K, H = 4, 256, 4, 2, 64


RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def close(ours: object, theirs: object, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=tolerance, rtol=0)


def reference_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    mask: np.ndarray,
    scale: float | None = None,
    softcap: float | None = None,
) -> np.ndarray:
    """One query head at a time; [B, T, N, H]."""
    out = np.zeros_like(query)
    B, T, N, H = query.shape
    group = N // key.shape[2]
    for b, t, n in itertools.product(range(B), range(T), range(N)):
        seen = np.flatnonzero(mask[b, t])
        scores = key[b, seen, n // group] @ query[b, t, n] * (scale or 1 / math.sqrt(H))
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ value[b, seen, n // group]
    return out


def test_attend_with_a_mask() -> None:
    query, key, value = normal(2, 4, 6, 3), normal(2, 5, 2, 3), normal(2, 5, 2, 3)
    mask = RANDOM.random((2, 4, 5)) < 0.5
    mask[:, :, 1] = True
    close(attend(query, key, value, mask), reference_attention(query, key, value, mask))


def test_attend_with_scale_and_softcap() -> None:
    query, key, value = normal(2, 5, 4, 3), normal(2, 5, 2, 3), normal(2, 5, 2, 3)
    mask = np.tril(np.ones((2, 5, 5), bool))
    options = {"scale": 1.7, "softcap": 2.0}
    expected = reference_attention(query, key, value, mask, **options)
    close(attend(query, key, value, mask, **options), expected)


def test_attend_to_one_position_copies_its_value() -> None:
    value = jnp.arange(6.0).reshape(1, 3, 1, 2)
    mask = jnp.eye(3, dtype=bool)[None]
    close(attend(jnp.ones((1, 3, 2, 2)), jnp.ones((1, 3, 1, 2)), value, mask), jnp.repeat(value, 2, axis=2))


@pytest.mark.parametrize("positions", [1, 7, 512, 513, 600])
def test_attend_in_query_blocks(positions: int) -> None:
    query, key, value = (2 * normal(2, positions, 3, 8) for _ in range(3))
    mask = np.ones((2, positions, positions), bool)
    scores = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), value)
    close(attend(*map(jnp.asarray, (query, key, value))), expected)
    close(attend(query, key, value, mask), expected)


def inputs() -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H))
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def plain(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None) -> jax.Array:
    mask = jnp.tril(jnp.ones((1, T, T), bool))
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    return attend(query, key, value, mask)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "kernel", [partial(attend_splash, interpret=True), partial(attend_cudnn, implementation="xla")], ids=["tpu", "gpu"]
)
def test_kernel_equals_attend(kernel: Callable[..., jax.Array], sizes: tuple[int, int, int], packed: bool) -> None:
    """Values and gradients; rows and heads split over a mesh or not; sequences packed into rows or not."""
    mesh = sharding.make_mesh(*sizes)
    arrays = inputs()
    segments = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 4, (B, T))), jnp.int32) if packed else None
    weight = jnp.asarray(np.random.default_rng(2).standard_normal((B, T, N, H)), jnp.float32)

    def loss(attention: object, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        mixed = attention(*arrays)  # type: ignore[operator]
        return jnp.sum(mixed * weight), mixed

    def run(attention: object) -> tuple[jax.Array, ...]:
        compute = jax.jit(jax.grad(lambda *arrays: loss(attention, *arrays), argnums=(0, 1, 2), has_aux=True))
        gradients, mixed = compute(*arrays)
        return mixed, *gradients

    expected = run(lambda q, k, v: plain(q, k, v, segments))
    with jax.set_mesh(mesh):
        found = run(lambda q, k, v: kernel(q, k, v, segments))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)


def test_attend_splash_with_window_scale_and_softcap() -> None:
    query, key, value = inputs()
    distance = jnp.arange(T)[:, None] - jnp.arange(T)
    options = {"scale": 0.3, "softcap": 2.0}
    expected = attend(query, key, value, ((distance >= 0) & (distance < 70))[None], **options)
    with jax.set_mesh(sharding.make_mesh()):
        splash = partial(attend_splash, segments=None, window=70, **options, interpret=True)
        found = jax.jit(splash)(query, key, value)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [1, 70])
def test_attend_cudnn_with_window_and_scale(window: int, packed: bool) -> None:
    query, key, value = inputs()
    distance = jnp.arange(T)[:, None] - jnp.arange(T)
    segments = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 4, (B, T))), jnp.int32) if packed else None
    mask = ((distance >= 0) & (distance < window))[None]
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    expected = attend(query, key, value, mask, scale=0.3)
    with jax.set_mesh(sharding.make_mesh()):
        windowed = partial(attend_cudnn, segments=segments, window=window, scale=0.3, implementation="xla")
        found = jax.jit(windowed)(query, key, value)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_can_use_cudnn_for_what_its_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not can_use_cudnn(256, jnp.bfloat16, 64, None), "not on a CPU"
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    assert can_use_cudnn(256, jnp.bfloat16, 64, None)
    for length, dtype, head_dim, softcap in (
        (256, jnp.float32, 64, None),
        (256, jnp.bfloat16, 256, None),
        (256, jnp.bfloat16, 12, None),
        (255, jnp.bfloat16, 64, None),
        (256, jnp.bfloat16, 64, 50.0),
    ):
        assert not can_use_cudnn(length, dtype, head_dim, softcap)


def test_can_use_splash_only_on_a_tpu() -> None:
    assert not can_use_splash(256)
    with jax.set_mesh(sharding.make_mesh()):
        assert not can_use_splash(256)
