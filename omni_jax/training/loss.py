"""Cross entropy of the eight heads, without ever holding the logits of the whole batch.

The text head alone has 152000 rows: at 8 rows of 2048 positions its float32 logits would take 10 GB. They are computed
a chunk of positions at a time, and their gradient with them, in the forward pass. Computing them again in a backward
pass would be a fourth product with the largest matrix of the model, where three are enough. The technique is known as
fused linear cross entropy (Liger Kernel, arXiv 2410.10989); MaxText calls it vocabulary tiling.

Letters: B rows, T positions, D hidden, C heads that read the same hidden states, V rows of a head's table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from omni_jax import sharding
from omni_jax.config.model import TrunkConfig
from omni_jax.config.run import LossConfig
from omni_jax.model.layers import linear, linear_gradients
from omni_jax.model.omni import OmniModel, scale_logits
from omni_jax.vocab import NUM_CODEBOOKS, NUM_STREAMS, TEXT_STREAM

Array = jax.Array

Sums = dict[str, Array]
"""Sums over positions per head, float32 [C]: `loss`, of -log p(target); `correct`, how often the target is the most
probable token; `count`, of targets."""

HEADS = (*(f"audio_{codebook}" for codebook in range(NUM_CODEBOOKS)), "text")
"""Names of the eight heads, in the order of the arrays."""


def batch_loss(
    model: OmniModel,
    text_hidden: Array,
    audio_hidden: Array,
    targets: Array,
    mask: Array,
    counts: Array,
    config: LossConfig,
) -> tuple[Array, Sums]:
    """The loss of a batch, or the share of it that a micro-batch has: each head's mean, summed with the heads' weights.

    Args:
        model: gives the heads.
        text_hidden: [B, T, D].
        audio_hidden: [B, T, D].
        targets: int32 [B, 8, T].
        mask: bool [B, 8, T].
        counts: float32 [8], targets per head in the whole batch, so that the losses of micro-batches add up to the
            loss of the batch.
        config: weights of the heads, and the chunk size.

    Returns:
        The loss, float32 [], and the sums of the eight heads, codebooks 0..6, then text, without gradients.
    """
    scale = jnp.array([*config.audio, config.text], jnp.float32) / jnp.maximum(counts, 1.0)
    text, audio = model.head_tables()
    total, columns = jnp.float32(0.0), []
    for table, hidden, heads in (
        (audio, audio_hidden, slice(0, TEXT_STREAM)),
        (text, text_hidden, slice(TEXT_STREAM, NUM_STREAMS)),
    ):
        value, sums = _head_loss(
            config.chunk_size, model.config.trunk, table, hidden, targets[:, heads], mask[:, heads], scale[heads]
        )
        total += value
        columns.append(sums)
    return total, jax.tree.map(lambda a, t: jax.lax.stop_gradient(jnp.concatenate([a, t])), *columns)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _head_loss(
    chunk_size: int, trunk: TrunkConfig, table: Array, hidden: Array, targets: Array, mask: Array, scale: Array
) -> tuple[Array, Sums]:
    """Loss and sums of C heads that read the same hidden states.

    Args:
        chunk_size: positions on a device whose logits are held at once.
        trunk: says how logits are scaled.
        table: [C, V, D], or [V, D] for a single head; one row per token.
        hidden: [B, T, D].
        targets: int32 [B, C, T].
        mask: bool [B, C, T].
        scale: float32 [C], weight of a position of each head in the loss.
    """
    value, sums, _, _ = _sweep(chunk_size, trunk, table, hidden, targets, mask, scale)
    return value, sums


def _forward(
    chunk_size: int, trunk: TrunkConfig, *arguments: Any
) -> tuple[tuple[Array, Sums], tuple[Array | None, ...]]:
    table, hidden = arguments[:2]
    value, sums, *gradients = _sweep(
        chunk_size, trunk, *(x.value for x in arguments), of_table=table.perturbed, of_hidden=hidden.perturbed
    )
    return (value, sums), tuple(gradients)


def _backward(chunk_size: int, trunk: TrunkConfig, gradients: Any, cotangents: Any) -> tuple[Array | None, ...]:
    # Nothing asks for the gradient of the sums, and the loss is linear in its own.
    outer = cotangents[0]
    return *(None if x is None else (x * outer).astype(x.dtype) for x in gradients), None, None, None


_head_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _sweep(
    chunk_size: int,
    trunk: TrunkConfig,
    table: Array,
    hidden: Array,
    targets: Array,
    mask: Array,
    scale: Array,
    *,
    of_table: bool = False,
    of_hidden: bool = False,
) -> tuple[Array, Sums, Array | None, Array | None]:
    """One pass over the positions: loss, sums, and the gradients of table and hidden states where they are wanted."""
    B, T, D = hidden.shape
    C, size = targets.shape[1], _chunk_length(chunk_size, B, T)
    table_axes = (*[None] * (table.ndim - 2), "vocab", "embed")

    def add_chunk(carry: tuple[Sums, Array | None], xs: Any) -> tuple[tuple[Sums, Array | None], Array | None]:
        total, table_gradient = carry
        states, goal, where = map(sharding.constrain_rows, xs)
        logits, normalizer, sums, of_logits = _chunk_sums(trunk, table, states, goal, where)
        total = jax.tree.map(jnp.add, total, sums)
        if not (of_table or of_hidden):
            return (total, None), None
        # The gradient of -log p(target) in the logits is p - onehot(target).
        weight = jnp.where(where, scale, 0.0)[..., None]
        hit = goal[..., None] == jnp.arange(logits.shape[-1])
        (error,) = of_logits(jnp.exp(logits - normalizer[..., None]) * weight - jnp.where(hit, weight, 0.0))
        # The axis of heads is kept where there is one: a mesh splits the rows of each.
        error = error.astype(states.dtype).reshape(B * size, *table.shape[:-1])
        of_states, of_rows = linear_gradients(states.reshape(B * size, D), table, error)
        if table_gradient is not None:
            table_gradient = sharding.constrain(table_gradient + of_rows, table_axes)
        return (total, table_gradient), of_states.reshape(B, size, D) if of_hidden else None

    zero = {name: jnp.zeros(C, jnp.float32) for name in ("loss", "correct", "count")}
    start = sharding.constrain(jnp.zeros(table.shape, jnp.float32), table_axes) if of_table else None
    chunks = _chunks(hidden, targets, mask, size)
    (sums, table_gradient), hidden_gradient = jax.lax.scan(add_chunk, (zero, start), chunks)
    if hidden_gradient is not None:
        hidden_gradient = jnp.moveaxis(hidden_gradient, 0, 1).reshape(B, -1, D)[:, :T]
    return jnp.sum(scale * sums["loss"]), sums, table_gradient, hidden_gradient


def _chunk_length(chunk_size: int, B: int, T: int) -> int:
    """Positions of each row in a chunk: as few chunks as `chunk_size` positions per device allow, all of one size."""
    shards = sharding.num_shards("batch")
    held = T * (B // shards if B % shards == 0 else B)
    return -(-T // -(-held // chunk_size))


def _chunks(hidden: Array, targets: Array, mask: Array, size: int) -> tuple[Array, ...]:
    """Cut along the positions: hidden [chunks, B, size, D], targets and mask [chunks, B, size, C].

    The last chunk is padded with positions that do not count.
    """
    B, T, D = hidden.shape
    padding = (0, -T % size)
    return (
        jnp.moveaxis(jnp.pad(hidden, ((0, 0), padding, (0, 0))).reshape(B, -1, size, D), 1, 0),
        *(
            jnp.moveaxis(jnp.pad(x, ((0, 0), (0, 0), padding)).reshape(B, x.shape[1], -1, size), 2, 0).swapaxes(2, 3)
            for x in (targets, mask)
        ),
    )


def _chunk_sums(
    trunk: TrunkConfig, table: Array, states: Array, goal: Array, where: Array
) -> tuple[Array, Array, Sums, Callable[[Array], tuple[Array]]]:
    """Logits of a chunk and their sums.

    Returns:
        Logits float32 [B, T, C, V], the log of their normalizer [B, T, C], the chunk's sums, and what gives the
        gradient in the products of states and table from that in the logits.
    """
    B, T, C = goal.shape
    products = linear(states, table, dtype=jnp.float32).reshape(B, T, C, -1)
    logits, of_logits = jax.vjp(partial(scale_logits, trunk=trunk), products)
    logits = sharding.constrain(logits, ("batch", None, None, "vocab"))
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, goal[..., None], axis=-1)[..., 0]
    values = {
        "loss": normalizer - target,
        # The best logit, not argmax: cheaper, and a tie with the target counts as correct.
        "correct": (target >= logits.max(axis=-1)).astype(jnp.float32),
        "count": jnp.ones_like(normalizer),
    }
    sums = {name: jnp.sum(jnp.where(where, v, 0.0), axis=(0, 1)) for name, v in values.items()}
    return logits, normalizer, sums, of_logits
