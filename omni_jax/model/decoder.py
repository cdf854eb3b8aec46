"""The language model: a stack of blocks whose config states what differs between families, with a key/value cache.

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
from flax import nnx

from omni_jax import sharding
from omni_jax.config.model import LayerKind, TrunkConfig
from omni_jax.model.attention import attend, attend_cudnn, attend_splash, can_use_cudnn, can_use_splash
from omni_jax.model.layers import Array, Attention, GatedMLP, Keys, RMSNorm, make_layers, rope, trunk_norm
from omni_jax.model.pages import Cache, PageTable, attend_and_write, page_len

Remat = Literal["none", "dots", "full"]
LANES = 128
"""Numbers that a TPU handles at once: an array's last axis is padded to a multiple of it, in memory too."""


class DecoderBlock(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); norms may also, or instead, follow attention and MLP."""

    def __init__(self, config: TrunkConfig, rngs: Keys):
        self.residual_multiplier = config.residual_multiplier
        self.attention_norm = trunk_norm(config) if config.norms_before else None
        self.attention = Attention(config, rngs)
        self.attention_post_norm = trunk_norm(config) if config.norms_after else None
        self.mlp_norm = trunk_norm(config) if config.norms_before else None
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_size,
            rngs,
            bias=config.mlp_bias,
            activation=config.hidden_act,
        )
        self.mlp_post_norm = trunk_norm(config) if config.norms_after else None

    def project(self, x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """Query, key and value of hidden states [B, T, D]; see `Attention.project`."""
        return self.attention.project(_norm(self.attention_norm, x), cos, sin)

    def finish(self, x: Array, heads: Array) -> Array:
        """Hidden states [..., D] after this block, from those before it and its attention's heads [..., N, H]."""
        x = self._add(x, _norm(self.attention_post_norm, self.attention.out(heads)))
        return self._add(x, _norm(self.mlp_post_norm, self.mlp(_norm(self.mlp_norm, x))))

    def _add(self, x: Array, change: Array) -> Array:
        return x + (change if self.residual_multiplier == 1 else change * self.residual_multiplier)


def _norm(norm: RMSNorm | None, x: Array) -> Array:
    return x if norm is None else norm(x)


class Decoder(nnx.Module):
    """A stack of `num_layers` blocks. The trunk is one, the TTS adapter another."""

    def __init__(self, config: TrunkConfig, num_layers: int, *, stacked: bool, dtype: Any, rngs: nnx.Rngs):
        self.config, self.num_layers, self.stacked, self.dtype = config, num_layers, stacked, dtype
        keys = jax.random.split(rngs.params(), num_layers)
        self.layers: Any = make_layers(lambda keys: DecoderBlock(config, keys), keys, stacked=stacked)

    @property
    def kinds(self) -> list[LayerKind]:
        """The kinds of its layers, each once."""
        return list(dict.fromkeys(map(self.config.layer_kind, range(self.num_layers))))

    @property
    def kind_of_layer(self) -> list[int]:
        """For each layer the number of its kind."""
        kinds = self.kinds
        return [kinds.index(self.config.layer_kind(layer)) for layer in range(self.num_layers)]

    def _of_kind(self, options: Sequence[Any]) -> Callable[[Any], Any]:
        """What gives one of several trees of equal shapes, one for each of `kinds`, by the number of a layer's kind.

        The number is traced where layers are scanned; with a single kind there is nothing to select.
        """
        if len(options) == 1:
            return lambda kind: options[0]
        if not self.stacked:
            return lambda kind: options[kind]
        together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *options)
        return lambda kind: jax.tree.map(lambda leaf: leaf[kind], together)

    def _windows(self, length: int) -> tuple[int, ...] | None:
        """How many positions a layer of each kind attends to at most; None: all layers to all of `length`."""
        window = min(length, self.config.sliding_window or length)
        sliding = any(kind.sliding for kind in self.kinds) and window < length
        return tuple(window if kind.sliding else length for kind in self.kinds) if sliding else None

    @property
    def _score_options(self) -> dict[str, Any]:
        return {"scale": self.config.attention_scale, "softcap": self.config.attention_softcap}

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
        """An empty cache for `rows` rows of up to `max_len` positions, or a pool of `rows` pages."""
        config, P = self.config, self.packed_heads
        shape = (rows, config.num_kv_heads // P, max_len, P * config.head_dim)
        if self.stacked:
            return {name: jnp.zeros((self.num_layers, *shape), self.dtype) for name in "kv"}
        return {name: tuple(jnp.zeros(shape, self.dtype) for _ in range(self.num_layers)) for name in "kv"}

    def __call__(
        self,
        x: Array,
        positions: Array,
        segments: Array | None = None,
        remat: Remat = "none",
        prefix: Cache | None = None,
    ) -> tuple[Array, Cache]:
        """Run whole sequences, or what follows the beginnings of some: training and prefill.

        Args:
            x: [B, T, D] embeddings.
            positions: int32 [B, T], counted from 0 within each sequence.
            segments: int32 [B, T] when several sequences are packed into a row: each attends only to its own. Padding
                forms a segment of its own.
            remat: what a backward pass computes again: nothing, all but matrix products, or whole blocks.
            prefix: keys and values of the positions before each row's first, B rows of S positions; what it has at
                others is not used. Not with segments.

        Returns:
            [B, T, D] and the keys and values of these T positions as a cache; with a prefix, the prefix with them in.
        """
        B, T, _ = x.shape
        angles = self._of_kind([rope(positions, self.config, kind) for kind in self.kinds])
        if prefix is None:
            attention = self._attention(T, segments)
        else:
            attention = self._attention_to_prefix(positions, page_len(prefix))

        def cached(new: Array, before: Array | None) -> Array:
            """Keys or values [B, T, K, H] as the cache has them, [B, K / P, S or T, P * H]."""
            if before is None:
                return self.pack(new).swapaxes(1, 2)
            # A row's padding may go beyond the cache.
            return before.at[jnp.arange(B)[:, None], :, positions].set(self.pack(new), mode="drop")

        def attended(new: Array, cache: Array) -> Array:
            """Keys or values that are attended to: [B, S or T, K, H]."""
            return new if prefix is None else cache.swapaxes(1, 2).reshape(B, -1, *new.shape[2:])

        def block(layer: DecoderBlock, kind: Any, x: Array, before: Any) -> tuple[Array, tuple[Array, Array]]:
            x = sharding.constrain_rows(x)
            query, key, value = layer.project(x, *angles(kind))
            keys, values = cached(key, before[0]), cached(value, before[1])
            x = layer.finish(x, attention(kind, query, attended(key, keys), attended(value, values)))
            return x, (keys, values)

        def run(kind: Any) -> Callable[[nnx.GraphDef, Any, Array, Any], tuple[Array, tuple[Array, Array]]]:
            def of_weights(
                graph: nnx.GraphDef, weights: Any, x: Array, before: Any
            ) -> tuple[Array, tuple[Array, Array]]:
                return block(nnx.merge(graph, weights), kind, x, before)

            if remat == "none":
                return of_weights
            # Inside a scan the compiler cannot undo the recomputation, so it needs no barriers against that.
            policy = None if remat == "full" else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            return jax.checkpoint(of_weights, policy=policy, prevent_cse=not self.stacked, static_argnums=0)

        nothing = (None, None)
        if self.stacked:
            graph, weights = nnx.split(self.layers)
            xs = (weights, self._scanned_kinds(), nothing if prefix is None else (prefix["k"], prefix["v"]))
            x, (keys, values) = jax.lax.scan(lambda x, xs: run(xs[1])(graph, xs[0], x, xs[2]), x, xs)
            return x, {"k": keys, "v": values}
        pairs = []
        for index, (kind, layer) in enumerate(zip(self.kind_of_layer, self.layers, strict=True)):
            before = nothing if prefix is None else (prefix["k"][index], prefix["v"][index])
            x, pair = run(kind)(*nnx.split(layer), x, before)
            pairs.append(pair)
        return x, {"k": tuple(k for k, _ in pairs), "v": tuple(v for _, v in pairs)}

    def _scanned_kinds(self) -> Array | None:
        """The kind of each layer, int32 [L], for a scan over layers; None if there is one kind."""
        return None if len(self.kinds) == 1 else jnp.array(self.kind_of_layer, jnp.int32)

    def _attention(self, T: int, segments: Array | None) -> Callable[[Any, Array, Array, Array], Array]:
        """Causal attention of whole sequences in a layer of a kind: (kind, query, key, value) -> heads [B, T, N, H]."""
        windows, config = self._windows(T), self.config
        kernel: Callable[..., Array] | None = None
        if can_use_splash(T):
            kernel = partial(attend_splash, segments=segments, **self._score_options)
        elif can_use_cudnn(T, self.dtype, config.head_dim, config.attention_softcap):
            kernel = partial(attend_cudnn, segments=segments, scale=config.attention_scale)
        if kernel is not None:
            if windows is None:
                return lambda kind, *qkv: kernel(*qkv)
            kernels = [partial(kernel, window=None if window == T else window) for window in windows]
            if len(kernels) == 1:
                return lambda kind, *qkv: kernels[0](*qkv)
            return lambda kind, *qkv: jax.lax.switch(kind, kernels, *qkv)
        mask = jnp.tril(jnp.ones((1, T, T), bool))
        if segments is not None:
            mask = mask & (segments[:, :, None] == segments[:, None, :])
        if windows is None:
            whole = partial(attend, mask=mask, **self._score_options)
            return lambda kind, *qkv: whole(*qkv)
        # Neighbors in a row are neighbors in their sequence, wherever it starts.
        distance = jnp.arange(T)[:, None] - jnp.arange(T)
        window_of = self._of_kind(windows)

        def windowed(kind: Any, query: Array, key: Array, value: Array) -> Array:
            return attend(query, key, value, mask & (distance < window_of(kind)), **self._score_options)

        return windowed

    def _attention_to_prefix(self, positions: Array, S: int) -> Callable[[Any, Array, Array, Array], Array]:
        """The same for positions [B, T] of a cache of S positions, keys and values of the whole cache."""
        distance = positions[:, :, None] - jnp.arange(S)
        windows = self._windows(S)
        window_of = self._of_kind([S] if windows is None else windows)

        def seen(kind: Any, query: Array, key: Array, value: Array) -> Array:
            mask = (distance >= 0) & (distance < window_of(kind))
            return attend(query, key, value, mask, **self._score_options)

        return seen

    def decode(self, x: Array, positions: Array, cache: Cache, pages: PageTable) -> tuple[Array, Cache]:
        """Run one position of many rows against their pages of a pool.

        Args:
            x: [R, D] embeddings, rows in the order of `pages.rows`.
            positions: int32 [R], the cache position each row writes; it attends to 0..position.
            cache: the pool.
            pages: which pages each row has; one without a page for its position has results of no use.

        Returns:
            [R, D] and the pool with this position in.
        """
        angles = self._of_kind([rope(positions[:, None], self.config, kind) for kind in self.kinds])
        windows = self._windows(pages.rows[0].shape[1] * page_len(cache))
        window_of = self._of_kind([None] if windows is None else windows)

        def block(layer: DecoderBlock, index: Any, kind: Any, x: Array, cache: Cache) -> tuple[Array, Cache]:
            query, key, value = (y[:, 0] for y in layer.project(x[:, None], *angles(kind)))
            heads, cache = attend_and_write(
                query,
                self.pack(key),
                self.pack(value),
                cache,
                index,
                positions,
                pages,
                window_of(kind),
                **self._score_options,
            )
            return layer.finish(x, heads), cache

        if self.stacked:
            graph, weights = nnx.split(self.layers)

            def body(carry: tuple[Array, Cache], xs: tuple[Any, ...]) -> tuple[tuple[Array, Cache], None]:
                weights, index, kind = xs
                return block(nnx.merge(graph, weights), index, kind, *carry), None

            layers = (weights, jnp.arange(self.num_layers), self._scanned_kinds())
            (x, cache), _ = jax.lax.scan(body, (x, cache), layers)
            return x, cache
        for index, layer in enumerate(self.layers):
            x, cache = block(layer, index, self.kind_of_layer[index], x, cache)
        return x, cache
