"""The language model: a stack of pre-norm blocks of the Qwen2 or Llama family, with a key/value cache.

The blocks are kept either stacked (one array per weight with a leading layer axis, run by `lax.scan`: compiles
fast and moves fewest bytes on TPU) or one by one (XLA:CPU would copy every layer's slice out of a stack). Both
give the same results; `stacked` decides, for the parameters and the cache alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from omni_jax import sharding
from omni_jax.config import TrunkConfig
from omni_jax.model import splash
from omni_jax.model.layers import Array, Attention, GatedMLP, Keys, RMSNorm, attend, attend_cache, rope

Remat = Literal["none", "dots", "full"]
Cache = dict[str, Any]
"""`k` and `v`: stacked [L, R, K / P, S, P * H], or a tuple of L arrays [R, K, S, H]. R rows, S slots (one a position),
P heads side by side."""
LANES = 128
"""Numbers that a TPU handles at once: an array's last axis is filled up to a multiple of it, in memory too."""


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TrunkConfig, rngs: Keys):
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = GatedMLP(config.width, config.ffn, config.width, rngs)


class Blocks(nnx.Module):
    """`count` blocks in a row. The trunk is one such row, the TTS adapter another."""

    def __init__(self, config: TrunkConfig, count: int, *, stacked: bool, dtype: Any, rngs: nnx.Rngs):
        self.config, self.count, self.stacked, self.dtype = config, count, stacked, dtype
        self.mesh: Mesh | None = None
        """What it will run on, where that is known beforehand."""
        # Drawn from the same keys either way, so that a seed means the same weights on every backend.
        keys = jax.random.split(rngs.params(), count)

        def make(key: Array) -> Block:
            return Block(config, Keys(key))

        self.layers: Any = nnx.vmap(make)(keys) if stacked else nnx.List([make(key) for key in keys])

    @property
    def packed(self) -> int:
        """How many heads stand side by side in the cache (P): where layers are stacked, as many as fill the lanes.

        Only heads that the same chip holds, so that a cache can be split by heads as the weights are.
        """
        heads = self.config.kv_heads
        ways = sharding.ways("kv_heads", self.mesh)
        together = heads // ways if heads % ways == 0 else heads
        return math.gcd(together, max(1, LANES // self.config.head_size)) if self.stacked else 1

    def pack(self, heads: Array) -> Array:
        """Keys or values [..., K, H] as the cache has them, [..., K / P, P * H]."""
        return heads.reshape(*heads.shape[:-2], self.config.kv_heads // self.packed, -1)

    def cache(self, rows: int, slots: int) -> Cache:
        """An empty cache for `rows` rows of up to `slots` positions."""
        config, P = self.config, self.packed
        shape = (rows, config.kv_heads // P, slots, P * config.head_size)
        if self.stacked:
            return {name: jnp.zeros((self.count, *shape), self.dtype) for name in "kv"}
        return {name: tuple(jnp.zeros(shape, self.dtype) for _ in range(self.count)) for name in "kv"}

    def __call__(
        self, x: Array, positions: Array, segments: Array | None = None, remat: Remat = "none"
    ) -> tuple[Array, Cache]:
        """Run whole sequences: training and prefill.

        Args:
            x: [B, T, D] embeddings.
            positions: int32 [B, T], counted from 0 within each sequence.
            segments: int32 [B, T] when several sequences are packed into a row: each looks only at its own. Pad
                positions form a segment of their own.
            remat: what a backward pass computes again: nothing, all but matrix products, or whole blocks.

        Returns:
            [B, T, D] and the keys and values of these T positions as a cache.
        """
        T = x.shape[1]
        cos, sin = rope(positions, self.config)
        attention: Callable[[Array, Array, Array], Array]
        if splash.fits(self.mesh, T):
            assert self.mesh is not None
            attention = partial(splash.attend, segments=segments, mesh=self.mesh)
        else:
            mask = jnp.tril(jnp.ones((1, T, T), bool))
            if segments is not None:
                mask = mask & (segments[:, :, None] == segments[:, None, :])
            attention = partial(attend, mask=mask)

        def block(layer: Block, x: Array) -> tuple[Array, tuple[Array, Array]]:
            x = sharding.by_rows(x, self.mesh)
            query, key, value = layer.attention.project(layer.attention_norm(x), cos, sin)
            x = x + layer.attention.merge(attention(query, key, value))
            x = x + layer.mlp(layer.mlp_norm(x))
            return x, (self.pack(key).swapaxes(1, 2), self.pack(value).swapaxes(1, 2))

        def run(graph: nnx.GraphDef, weights: Any, x: Array) -> tuple[Array, tuple[Array, Array]]:
            return block(nnx.merge(graph, weights), x)

        if remat != "none":
            # Inside a scan the compiler cannot undo the recomputation, so it needs no barriers against that.
            policy = None if remat == "full" else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            run = jax.checkpoint(run, policy=policy, prevent_cse=not self.stacked, static_argnums=0)
        if self.stacked:
            graph, weights = nnx.split(self.layers)
            x, (keys, values) = jax.lax.scan(lambda x, w: run(graph, w, x), x, weights)
            return x, {"k": keys, "v": values}
        pairs = []
        for layer in self.layers:
            x, pair = run(*nnx.split(layer), x)
            pairs.append(pair)
        return x, {"k": tuple(k for k, _ in pairs), "v": tuple(v for _, v in pairs)}

    def decode(self, x: Array, positions: Array, caches: Sequence[Cache]) -> tuple[Array, list[Cache]]:
        """Run one position of many rows against their caches.

        The rows may live in several caches (the batch, and the second rows of batch-parallel decoding); every
        weight is read once for all of them.

        Args:
            x: [R, D] embeddings, rows in the order of the caches.
            positions: int32 [R], the slot each row writes; it looks at slots 0..position.
            caches: together R rows.

        Returns:
            [R, D] and the caches with this position in.
        """
        cos, sin = rope(positions[:, None], self.config)
        ends = np.cumsum([cache_rows(cache) for cache in caches])
        groups = [slice(end - cache_rows(cache), end) for end, cache in zip(ends, caches, strict=True)]

        def block(layer: Block, index: Any, x: Array, caches: list[Cache]) -> tuple[Array, list[Cache]]:
            query, key, value = (y[:, 0] for y in layer.attention.project(layer.attention_norm(x)[:, None], cos, sin))
            heads, updated = [], []
            for rows, cache in zip(groups, caches, strict=True):
                new = self.pack(key[rows]), self.pack(value[rows])
                cache, keys, values = write(cache, index, positions[rows], *new)
                heads.append(attend_cache(query[rows], keys, values, positions[rows]))
                updated.append(cache)
            x = x + layer.attention.merge(jnp.concatenate(heads))
            return x + layer.mlp(layer.mlp_norm(x)), updated

        state = list(caches)
        if self.stacked:
            graph, weights = nnx.split(self.layers)

            def body(carry: tuple[Array, list[Cache]], xs: tuple[Any, Array]) -> tuple[tuple[Array, list[Cache]], None]:
                return block(nnx.merge(graph, xs[0]), xs[1], *carry), None

            (x, state), _ = jax.lax.scan(body, (x, state), (weights, jnp.arange(self.count)))
            return x, state
        for index, layer in enumerate(self.layers):
            x, state = block(layer, index, x, state)
        return x, state


def cache_rows(cache: Cache) -> int:
    """How many rows a cache has (R)."""
    return cache["k"][0].shape[0] if isinstance(cache["k"], tuple) else cache["k"].shape[1]


def cache_slots(cache: Cache) -> int:
    """How many positions a row of a cache holds (S)."""
    return cache["k"][0].shape[-2] if isinstance(cache["k"], tuple) else cache["k"].shape[-2]


def write(cache: Cache, layer: Any, positions: Array, key: Array, value: Array) -> tuple[Cache, Array, Array]:
    """Put one position of every row into a layer's cache, in place when the cache is donated.

    Args:
        cache: the whole cache.
        layer: which layer; a traced index if the cache is stacked.
        positions: int32 [R].
        key: [R, K / P, P * H].
        value: [R, K / P, P * H].

    Returns:
        The cache, and the layer's keys and values [R, K / P, S, P * H].
    """
    R, K, H = key.shape
    if isinstance(cache["k"], tuple):
        # Rows and heads are written as one axis: for a single row XLA:CPU would otherwise turn the scatter into
        # an update that it fuses twice, and copy the whole cache at every layer.
        at = (jnp.arange(R * K), jnp.repeat(positions, K))
        new = {}
        for name, item in (("k", key), ("v", value)):
            old = cache[name][layer]
            flat = old.reshape(R * K, -1, H).at[at].set(item.reshape(R * K, H), mode="promise_in_bounds")
            new[name] = (*cache[name][:layer], flat.reshape(old.shape), *cache[name][layer + 1 :])
        return new, new["k"][layer], new["v"][layer]
    where = (layer, jnp.arange(R)[:, None], jnp.arange(K), positions[:, None])
    keys = cache["k"].at[where].set(key, mode="promise_in_bounds")
    values = cache["v"].at[where].set(value, mode="promise_in_bounds")
    return {"k": keys, "v": values}, keys[layer], values[layer]
