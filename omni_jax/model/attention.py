"""Attention of whole sequences, plain or by a TPU's or GPU's kernel; see `omni_jax.model.pages` for that to a cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from omni_jax import sharding

Array = jax.Array

MAX_UNBLOCKED = 512
"""Positions up to which attention without a mask takes all queries at once."""
QUERY_BLOCK = 150
"""Query positions per step of longer ones. Whisper's 1500 positions are ten blocks without a remainder."""
SPLASH_BLOCKS = (512, 256, 128)
"""Positions that the splash kernel takes at a time: the largest of these that divides the length."""
CUDNN_MAX_HEAD_DIM, CUDNN_HEAD_DIM_STEP = 128, 8
"""Head dimensions that cuDNN's kernel takes on every GPU since Ampere."""


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Array:
    """Grouped-query attention with a float32 softmax.

    Without a mask, queries of a long sequence are taken a block at a time: all scores of a 30 s recording at once are
    108 MB at whisper-small's shape. In blocks they stay in a CPU's cache (three times as fast) and do not bound a TPU's
    batch. A short sequence's scores fit as they are, and without blocks their gradient is four times as fast.

    Args:
        query: [B, T, N, H].
        key: [B, S, K, H].
        value: [B, S, K, H].
        mask: bool, broadcastable to [B, T, S], True where a position may attend; None: every position to every other.
        scale: what products are multiplied with; None: 1 / sqrt(H).
        softcap: bound of the scores s, which become softcap * tanh(s / softcap); None: unbounded.

    Returns:
        [B, T, N, H], in query's dtype.
    """
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    G = N // K
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)

    def attend_rows(rows: Array, mask: Array | None) -> Array:
        """Rows [B, K, R, H] against all keys; mask broadcastable to [B, 1, R, S]."""
        products = jnp.einsum("bkrh,bksh->bkrs", rows, key, preferred_element_type=jnp.float32)
        scores = soft_cap(products / math.sqrt(H) if scale is None else products * scale, softcap)
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        # The maximum cancels out, and so does its gradient; dividing after the sum over S is the same softmax.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        mixed = jnp.einsum("bkrs,bksh->bkrh", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return (mixed / weights.sum(axis=-1, keepdims=True)).astype(query.dtype)

    def as_rows(query: Array) -> Array:
        # The query heads of a group are one long sequence to their keys: products of two matrices, no copies of keys.
        return query.reshape(B, -1, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)

    def as_heads(rows: Array) -> Array:
        return rows.reshape(B, K, G, -1, H).transpose(0, 3, 1, 2, 4).reshape(B, -1, N, H)

    if mask is not None:
        mask = jnp.broadcast_to(mask[:, None], (mask.shape[0], G, T, S)).reshape(mask.shape[0], 1, -1, S)
        return as_heads(attend_rows(as_rows(query), mask))
    if T <= MAX_UNBLOCKED:
        return as_heads(attend_rows(as_rows(query), None))
    # The last block is padded with queries of zeros, whose results are dropped.
    blocks = -(-T // QUERY_BLOCK)
    query = jnp.pad(query, ((0, 0), (0, blocks * QUERY_BLOCK - T), (0, 0), (0, 0)))
    mixed = jax.lax.map(
        lambda block: as_heads(attend_rows(as_rows(block), None)),
        query.reshape(B, blocks, QUERY_BLOCK, N, H).swapaxes(0, 1),
    )
    return mixed.swapaxes(0, 1).reshape(B, blocks * QUERY_BLOCK, N, H)[:, :T]


def soft_cap(x: Array, softcap: float | None) -> Array:
    """Bound x: softcap * tanh(x / softcap) (Gemma 2, arXiv 2408.00118); None: x."""
    return x if softcap is None else softcap * jnp.tanh(x / softcap)


def can_use_splash(length: int) -> bool:
    """Whether `attend_splash` can be used: within the mesh of a TPU, for sequences that divide into its blocks."""
    return sharding.platform() == "tpu" and length % SPLASH_BLOCKS[-1] == 0


def attend_splash(
    query: Array,
    key: Array,
    value: Array,
    segments: Array | None,
    window: int | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> Array:
    """Causal grouped-query attention of whole sequences on a TPU, by JAX's splash kernel.

    Plain attention over 2048 positions writes and reads 4 bytes for every pair of positions and every head, several
    times in a training step; the kernel keeps them on the chip and skips blocks that no position may attend to. Each
    row is on its own devices, heads are split as the weights are.

    Args:
        query: [B, T, N, H].
        key: [B, T, K, H].
        value: [B, T, K, H].
        segments: int32 [B, T]: a position attends to its own segment only; None if a row is one sequence.
        window: how many positions are attended to at most, the own one and those before it; None: all.
        scale: see `attend`.
        softcap: see `attend`.
        interpret: run without a TPU, slowly.

    Returns:
        [B, T, N, H], in query's dtype.
    """
    # Importing these takes two seconds on a CPU, which never needs them.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, H = key.shape[1], key.shape[3]
    block = next(size for size in SPLASH_BLOCKS if T % size == 0)
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def local(query: Array, key: Array, value: Array, *segments: Array) -> Array:
        N = query.shape[2]
        seen = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
        one = kernel.make_splash_mha(
            masks.MultiHeadMask([seen] * N),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap,
            interpret=interpret,
        )

        def row(query: Array, key: Array, value: Array, *segments: Array) -> Array:
            ids = kernel.SegmentIds(segments[0], segments[0]) if segments else None
            return one(query, key, value, segment_ids=ids)

        by_heads = partial(jnp.swapaxes, axis1=1, axis2=2)
        scaled = query / math.sqrt(H) if scale is None else query * scale
        mixed = jax.vmap(row)(by_heads(scaled), by_heads(key), by_heads(value), *segments)
        return by_heads(mixed).astype(query.dtype)

    return _on_each_device(local, query, key, value, segments)


def can_use_cudnn(length: int, dtype: DTypeLike, head_dim: int, softcap: float | None) -> bool:
    """Whether `attend_cudnn` can be used: within the mesh of a GPU, for what cuDNN's kernel takes."""
    return (
        sharding.platform() == "gpu"
        and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
        and head_dim <= CUDNN_MAX_HEAD_DIM
        and head_dim % CUDNN_HEAD_DIM_STEP == 0
        # With a mask, as packed rows need one.
        and length % 2 == 0
        and softcap is None
    )


def attend_cudnn(
    query: Array,
    key: Array,
    value: Array,
    segments: Array | None,
    window: int | None = None,
    *,
    scale: float | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Array:
    """Causal grouped-query attention of whole sequences on an NVIDIA GPU, by cuDNN's flash attention.

    Scores stay on the chip, as in `attend_splash`. Packed rows need a mask of 2 bytes for each pair of positions, which
    all heads share. Arguments and result are those of `attend_splash`, but for `implementation`: `xla` computes the
    same on any device, without the kernel.
    """

    def local(query: Array, key: Array, value: Array, *segments: Array) -> Array:
        mask, size = None, None if window is None else (window - 1, 0)
        if segments:
            mask = segments[0][:, None, :, None] == segments[0][:, None, None, :]
            if window is not None:
                # Versions of cuDNN before 9.10.2 take no window with a mask.
                positions = jnp.arange(query.shape[1])
                mask, size = mask & (positions[:, None] - positions < window), None
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            scale=scale,
            is_causal=True,
            local_window_size=size,
            implementation=implementation,
        )

    return _on_each_device(local, query, key, value, segments)


def _on_each_device(
    attend: Callable[..., Array], query: Array, key: Array, value: Array, segments: Array | None
) -> Array:
    """Attention by a kernel that knows no mesh: each device has whole rows, or whole groups of heads of them."""
    mesh = jax.sharding.get_abstract_mesh()
    # Query heads stay with the keys of their group, so both are split as keys can be.
    heads = sharding.spec(key.shape, ("batch", None, "kv_heads", None), mesh)
    rows = sharding.spec(key.shape[:2], ("batch", None), mesh)
    given: tuple[Any, ...] = () if segments is None else (segments,)
    specs = (heads, heads, heads, *[rows for _ in given])
    return jax.shard_map(attend, in_specs=specs, out_specs=heads, check_vma=False)(query, key, value, *given)
