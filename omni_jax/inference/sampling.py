"""Choosing tokens from logits: greedy, temperature, top-k, top-p, each row with settings and a seed of its own."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """Settings of B requests, one entry each."""

    temperature: Array
    """float32 [B]; 0 is greedy, whatever the rest says."""
    top_k: Array
    """int32 [B]; keep the k most probable tokens, 0 keeps all."""
    top_p: Array
    """float32 [B]; of those keep the fewest whose probability reaches p, 1 keeps all."""
    seed: Array
    """uint32 [B]."""

    def take(self, rows: Array) -> Sampling:
        """The settings of `rows`; a row out of range gets those of the last."""
        return jax.tree.map(lambda x: x.at[rows].get(mode="clip"), self)


def sample(logits: Array, sampling: Sampling, step: Array, stream: Array) -> Array:
    """One token per row.

    The noise of a row depends on its seed, its step and the stream alone, so a request draws the same tokens
    whatever else is in the batch. Noise and sorting are skipped when every row is greedy.

    Args:
        logits: float32 [B, V].
        sampling: settings of these rows.
        step: int32 [B], steps decoded before this one.
        stream: int32 [B], which of the eight streams the row belongs to.

    Returns:
        int32 [B].
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Array:
        def noise(seed: Array, step: Array, stream: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), stream)
            return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

        kept = truncate(logits, sampling)
        # The Gumbel trick: the argmax of scaled logits plus noise is a draw from their softmax.
        scaled = kept / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
        drawn = jnp.argmax(scaled + jax.vmap(noise)(sampling.seed, step, stream), axis=-1).astype(jnp.int32)
        return jnp.where(sampling.temperature > 0, drawn, greedy)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: greedy)


def truncate(logits: Array, sampling: Sampling) -> Array:
    """Set the logits that top-k, then top-p at the row's temperature, leave out to -inf.

    Ties at the border stay in. The most probable token always stays.

    Args:
        logits: float32 [B, V].
        sampling: settings of these rows.

    Returns:
        float32 [B, V].
    """
    V = logits.shape[-1]

    def cut() -> Array:
        ordered = -jnp.sort(-logits, axis=-1)
        k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V)
        in_k = jnp.arange(V) < k[:, None]
        scale = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
        probability = jax.nn.softmax(jnp.where(in_k, ordered / scale, -jnp.inf), axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        # A p of 1 or more keeps all even where the sum of probabilities rounds to 1 early.
        in_p = (before < sampling.top_p[:, None]) | (sampling.top_p >= 1)[:, None]
        count = jnp.maximum(jnp.sum(in_k & in_p, axis=-1), 1)
        border = jnp.take_along_axis(ordered, count[:, None] - 1, axis=-1)
        return jnp.where(logits >= border, logits, -jnp.inf)

    active = (sampling.temperature > 0) & ((sampling.top_k > 0) | (sampling.top_p < 1))
    return jax.lax.cond(jnp.any(active), cut, lambda: logits)
