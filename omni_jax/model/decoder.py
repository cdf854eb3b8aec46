"""The language model: a stack of pre-norm blocks of the Qwen2 or Llama family, with a key/value cache.

Layers are either stacked (one array per weight with a leading layer axis, run by `lax.scan`: compiles fast and moves
the fewest bytes on TPU) or separate (XLA:CPU would copy every layer's slice out of a stack). Both give the same
results; `stacked` decides, for the parameters and the cache alike.
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

from omni_jax import sharding
from omni_jax.config.model import TrunkConfig
from omni_jax.model.attention import attend, attend_cache, attend_splash, can_use_splash
from omni_jax.model.layers import Array, Attention, GatedMLP, Keys, RMSNorm, make_layers, rope

Remat = Literal["none", "dots", "full"]
Cache = dict[str, Any]
"""`k` and `v`: stacked [L, R, K / P, S, P * H], or a tuple of L arrays [R, K, S, H]. R rows of S positions, P heads
side by side."""
LANES = 128
"""Numbers that a TPU handles at once: an array's last axis is padded to a multiple of it, in memory too."""


class DecoderBlock(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TrunkConfig, rngs: Keys):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_size, rngs)


class Decoder(nnx.Module):
    """A stack of `num_layers` blocks. The trunk is one, the TTS adapter another."""

    def __init__(self, config: TrunkConfig, num_layers: int, *, stacked: bool, dtype: Any, rngs: nnx.Rngs):
        self.config, self.num_layers, self.stacked, self.dtype = config, num_layers, stacked, dtype
        keys = jax.random.split(rngs.params(), num_layers)
        self.layers: Any = make_layers(lambda keys: DecoderBlock(config, keys), keys, stacked=stacked)

    @property
    def packed_heads(self) -> int:
        """How many heads share the cache's last axis (P): where layers are stacked, as many as fill the lanes.

        Only heads of the same chip, so that a cache can be split by heads as the weights are.
        """
        heads = self.config.num_kv_heads
        shards = sharding.num_shards("kv_heads")
        local = heads // shards if heads % shards == 0 else heads
        return math.gcd(local, max(1, LANES // self.config.head_dim)) if self.stacked else 1

    def pack(self, heads: Array) -> Array:
        """Keys or values [..., K, H] as the cache has them, [..., K / P, P * H]."""
        return heads.reshape(*heads.shape[:-2], self.config.num_kv_heads // self.packed_heads, -1)

    def init_cache(self, rows: int, max_len: int) -> Cache:
        """An empty cache for `rows` rows of up to `max_len` positions."""
        config, P = self.config, self.packed_heads
        shape = (rows, config.num_kv_heads // P, max_len, P * config.head_dim)
        if self.stacked:
            return {name: jnp.zeros((self.num_layers, *shape), self.dtype) for name in "kv"}
        return {name: tuple(jnp.zeros(shape, self.dtype) for _ in range(self.num_layers)) for name in "kv"}

    def __call__(
        self, x: Array, positions: Array, segments: Array | None = None, remat: Remat = "none"
    ) -> tuple[Array, Cache]:
        """Run whole sequences: training and prefill.

        Args:
            x: [B, T, D] embeddings.
            positions: int32 [B, T], counted from 0 within each sequence.
            segments: int32 [B, T] when several sequences are packed into a row: each attends only to its own. Padding
                forms a segment of its own.
            remat: what a backward pass computes again: nothing, all but matrix products, or whole blocks.

        Returns:
            [B, T, D] and the keys and values of these T positions as a cache.
        """
        T = x.shape[1]
        cos, sin = rope(positions, self.config)
        attention: Callable[[Array, Array, Array], Array]
        if can_use_splash(T):
            attention = partial(attend_splash, segments=segments)
        else:
            mask = jnp.tril(jnp.ones((1, T, T), bool))
            if segments is not None:
                mask = mask & (segments[:, :, None] == segments[:, None, :])
            attention = partial(attend, mask=mask)

        def block(layer: DecoderBlock, x: Array) -> tuple[Array, tuple[Array, Array]]:
            x = sharding.constrain_rows(x)
            query, key, value = layer.attention.project(layer.attention_norm(x), cos, sin)
            x = x + layer.attention.out(attention(query, key, value))
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

    def decode(self, x: Array, positions: Array, caches: Sequence[Cache], live: Array) -> tuple[Array, list[Cache]]:
        """Run one position of many rows against their caches.

        The rows may be in several caches (the batch, and the companion rows of batch-parallel decoding); every
        weight is read once for all of them.

        Args:
            x: [R, D] embeddings, rows in the order of the caches.
            positions: int32 [R], the cache position each row writes; it attends to 0..position.
            caches: together R rows.
            live: int32 [], how many positions attention must read: results of rows at later positions are wrong.

        Returns:
            [R, D] and the caches with this position in.
        """
        cos, sin = rope(positions[:, None], self.config)
        ends = np.cumsum([cache_rows(cache) for cache in caches])
        groups = [slice(end - cache_rows(cache), end) for end, cache in zip(ends, caches, strict=True)]

        def block(layer: DecoderBlock, index: Any, x: Array, caches: list[Cache]) -> tuple[Array, list[Cache]]:
            query, key, value = (y[:, 0] for y in layer.attention.project(layer.attention_norm(x)[:, None], cos, sin))
            heads, updated = [], []
            for rows, cache in zip(groups, caches, strict=True):
                new = self.pack(key[rows]), self.pack(value[rows])
                cache = write_cache(cache, index, positions[rows], *new)
                heads.append(attend_prefix(query[rows], cache, index, positions[rows], live))
                updated.append(cache)
            x = x + layer.attention.out(jnp.concatenate(heads))
            return x + layer.mlp(layer.mlp_norm(x)), updated

        state = list(caches)
        if self.stacked:
            graph, weights = nnx.split(self.layers)

            def body(carry: tuple[Array, list[Cache]], xs: tuple[Any, Array]) -> tuple[tuple[Array, list[Cache]], None]:
                return block(nnx.merge(graph, xs[0]), xs[1], *carry), None

            (x, state), _ = jax.lax.scan(body, (x, state), (weights, jnp.arange(self.num_layers)))
            return x, state
        for index, layer in enumerate(self.layers):
            x, state = block(layer, index, x, state)
        return x, state


def cache_rows(cache: Cache) -> int:
    """Rows of a cache (R)."""
    return jax.tree.leaves(cache)[0].shape[-4]


def cache_length(cache: Cache) -> int:
    """Positions of a row of a cache (S)."""
    return jax.tree.leaves(cache)[0].shape[-2]


def prefix_lengths(cache: Cache) -> tuple[int, ...]:
    """The numbers of positions that attention can read of a cache's rows, the last of them all.

    From an eighth, the short ones close together. Layers that are not stacked are compiled one by one, each for all
    lengths: there are three of them, from a quarter.
    """
    eighths = (2, 4, 8) if isinstance(cache["k"], tuple) else (1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8)
    return tuple(sorted({math.ceil(cache_length(cache) * part / 8) for part in eighths}))


def attend_prefix(query: Array, cache: Cache, layer: Any, positions: Array, live: Array) -> Array:
    """`attend_cache` to a layer of a cache: of `prefix_lengths`, the shortest that has all live positions is read.

    Args:
        query: [R, N, H].
        cache: the whole cache.
        layer: which layer; a traced index if the cache is stacked.
        positions: int32 [R].
        live: int32 [], positions that are in use.

    Returns:
        [R, N, H].
    """

    def attend_to(length: int) -> Callable[[], Array]:
        def attend() -> Array:
            if isinstance(cache["k"], tuple):
                keys, values = (cache[name][layer][:, :, :length] for name in "kv")
            else:
                start, size = (layer, 0, 0, 0, 0), (1, *cache["k"].shape[1:3], length, cache["k"].shape[4])
                keys, values = (jax.lax.dynamic_slice(cache[name], start, size)[0] for name in "kv")
            return attend_cache(query, keys, values, positions)

        return attend

    lengths = prefix_lengths(cache)
    index = (live > jnp.array(lengths[:-1])).sum()
    return jax.lax.switch(index, [attend_to(length) for length in lengths])


def write_cache(cache: Cache, layer: Any, positions: Array, key: Array, value: Array) -> Cache:
    """Put one position of every row into a layer's cache, in place when the cache is donated.

    Args:
        cache: the whole cache.
        layer: which layer; a traced index if the cache is stacked.
        positions: int32 [R].
        key: [R, K / P, P * H].
        value: [R, K / P, P * H].

    Returns:
        The cache.
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
        return new
    where = (layer, jnp.arange(R)[:, None], jnp.arange(K), positions[:, None])
    keys = cache["k"].at[where].set(key, mode="promise_in_bounds")
    values = cache["v"].at[where].set(value, mode="promise_in_bounds")
    return {"k": keys, "v": values}
