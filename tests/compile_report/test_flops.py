"""Floating-point operations against counts by hand."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from omni_jax.compile_report import flops

X, W = jnp.ones((2, 3, 4)), jnp.ones((4, 5))


def count(function: Callable[..., jax.Array], *arguments: jax.Array, loop_trips: int = 1) -> float:
    return flops.count(jax.make_jaxpr(function)(*arguments), loop_trips)


def test_count_products_and_convolutions() -> None:
    assert count(lambda x, w: x @ w, X, W) == 2 * 2 * 3 * 4 * 5
    assert count(lambda x: jnp.einsum("bij,bkj->bik", x, x), X) == 2 * 2 * 3 * 3 * 4

    def convolve(x: jax.Array, k: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, k, (2,), [(1, 1)], dimension_numbers=("NWC", "WIO", "NWC"))

    assert count(convolve, jnp.ones((2, 10, 4)), jnp.ones((3, 4, 7))) == 2 * (2 * 5 * 7) * 3 * 4


def test_count_passes_of_float32_products() -> None:
    once = 2 * 2 * 3 * 4 * 5
    for precision, passes in (("default", 1), ("high", 3), ("highest", 6)):
        assert count(lambda x, w, p=precision: jnp.matmul(x, w, precision=p), X, W) == passes * once
    half = X.astype(jnp.bfloat16), W.astype(jnp.bfloat16)
    assert count(lambda x, w: jnp.matmul(x, w, precision="highest"), *half) == once


def test_count_loops_and_branches() -> None:
    def scanned(w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x @ w, None), jnp.ones((3, 4)), None, length=11)[0]

    square = jnp.ones((4, 4))
    assert count(jax.jit(scanned), square) == 11 * 2 * 3 * 4 * 4

    def looped(w: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ w, jnp.ones((3, 4)))

    assert count(looped, square, loop_trips=5) == 5 * 2 * 3 * 4 * 4

    def branched(w: jax.Array) -> jax.Array:
        return jax.lax.cond(w[0, 0] > 0, lambda w: w @ w, lambda w: w @ w @ w, w)

    assert count(branched, square) == 2 * 2 * 4**3

    def switched(w: jax.Array) -> jax.Array:
        return jax.lax.switch(2, [lambda w: w, lambda w: w @ w, lambda w: w @ w @ w], w)

    traced = jax.make_jaxpr(switched)(square)
    assert [flops.count(traced, branch=branch) for branch in (0, 1, -1)] == [0, 2 * 4**3, 2 * 2 * 4**3]


@pytest.mark.parametrize(("remat", "products"), [(False, 5), (True, 6)])
def test_count_includes_recomputation(remat: bool, products: int) -> None:
    def loss(w: jax.Array, v: jax.Array) -> jax.Array:
        def inner(w: jax.Array) -> jax.Array:
            return jnp.sin(jnp.ones((4, 4)) @ w)

        return jnp.sum(jnp.sin((jax.checkpoint(inner) if remat else inner)(w) @ v))

    square = jnp.ones((4, 4))
    # Forward two; backward the gradients of w, of v, and of the input of the product with v.
    assert count(jax.grad(loss, argnums=(0, 1)), square, square) == products * 2 * 4**3
