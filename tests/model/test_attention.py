"""The TPU's kernel, interpreted, against plain attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax import sharding
from omni_jax.model import attention
from omni_jax.model.layers import attend

B, T, N, K, H = 4, 256, 4, 2, 64


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
def test_it_attends_as_plain_attention_does(sizes: tuple[int, int, int], packed: bool) -> None:
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

    expected = run(lambda *arrays: plain(*arrays, segments))
    found = run(lambda *arrays: attention.attend(*arrays, segments, mesh, interpret=True))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)


def test_where_it_fits() -> None:
    assert not attention.fits(None, 256)
    assert not attention.fits(sharding.make_mesh(), 256), "only a TPU has the kernel"
