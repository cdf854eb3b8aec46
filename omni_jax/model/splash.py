"""Attention of whole sequences on a TPU: JAX's splash kernel, which never writes scores to memory.

Plain attention over 2048 positions writes and reads 4 bytes for every pair of positions and every head, several times
in a training step; the kernel keeps them on the chip and leaves out blocks that no position may see.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from omni_jax import sharding

BLOCKS = (512, 256, 128)
"""Positions that the kernel takes at a time: the largest of these that divides the length."""

Array = jax.Array


def fits(mesh: Mesh | None, length: int) -> bool:
    """Whether the kernel can do it: on a TPU, for sequences that divide into its blocks."""
    return mesh is not None and mesh.devices.flat[0].platform == "tpu" and length % BLOCKS[-1] == 0


def attend(
    query: Array, key: Array, value: Array, segments: Array | None, mesh: Mesh, *, interpret: bool = False
) -> Array:
    """Causal grouped-query attention, each row on its own devices, heads split as the weights are.

    Args:
        query: [B, T, N, H].
        key: [B, T, K, H].
        value: [B, T, K, H].
        segments: int32 [B, T]: a position looks at its own only; None if a row is one sequence.
        mesh: what the arrays are spread over.
        interpret: without a TPU, slowly.

    Returns:
        [B, T, N, H], in query's dtype.
    """
    # Importing these takes two seconds on a CPU, which never needs them.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, T, K, H = key.shape
    block = next(size for size in BLOCKS if T % size == 0)
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
    # Query heads stay with the keys of their group, so both are split as keys can be.
    heads = sharding.spec((B, T, K, H), ("batch", None, "kv_heads", None), mesh)
    rows = sharding.spec((B, T), ("batch", None), mesh)

    def local(query: Array, key: Array, value: Array, *segments: Array) -> Array:
        N = query.shape[2]
        mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * N)
        one = kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)

        def row(query: Array, key: Array, value: Array, *segments: Array) -> Array:
            ids = kernel.SegmentIds(segments[0], segments[0]) if segments else None
            return one(query, key, value, segment_ids=ids)

        by_heads = partial(jnp.swapaxes, axis1=1, axis2=2)
        mixed = jax.vmap(row)(by_heads(query / math.sqrt(H)), by_heads(key), by_heads(value), *segments)
        return by_heads(mixed).astype(query.dtype)

    given = () if segments is None else (segments,)
    specs = (heads, heads, heads, *[rows for _ in given])
    split = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return split(query, key, value, *given)
