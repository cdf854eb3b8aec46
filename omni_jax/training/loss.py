"""Cross entropy of the eight heads, without ever holding the logits of the whole batch.

The text head alone has 152000 rows: at 8 rows of 2048 positions its float32 logits would take 10 GB. They are
made a few positions at a time, and what the gradient needs of them is taken while they are there: making them again in
a backward pass would be a fourth product with the largest matrix of the model, where three are enough.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from omni_jax import sharding
from omni_jax.config.run import LossConfig
from omni_jax.model.layers import linear, linear_gradients
from omni_jax.model.omni import OmniModel
from omni_jax.vocab import NUM_STREAMS, TEXT_STREAM

Array = jax.Array
Sums = dict[str, Array]


def of_batch(
    model: OmniModel,
    text_hidden: Array,
    audio_hidden: Array,
    targets: Array,
    mask: Array,
    counts: Array,
    config: LossConfig,
) -> tuple[Array, Sums]:
    """The loss of a batch, or a part's share of it: each head's mean, summed with the heads' weights.

    Args:
        model: gives the heads.
        text_hidden: [B, T, D].
        audio_hidden: [B, T, D].
        targets: int32 [B, 8, T].
        mask: bool [B, 8, T].
        counts: float32 [8], targets per head in the whole batch, so that the parts' losses add up to the whole's.
        config: weights of the heads and of the z-loss, and the chunk.

    Returns:
        The loss, float32 [], and sums over positions per head, layers 0..6, then text, without gradients:
        `loss`: float32 [8], sums of -log p(target); `z`: float32 [8], sums of log^2 of the normalizer;
        `correct`: float32 [8], how often the target is the most probable; `count`: float32 [8].
    """
    scale = jnp.array([*config.audio, config.text], jnp.float32) / jnp.maximum(counts, 1.0)
    text, audio = model.head_tables()
    total, columns = jnp.float32(0.0), []
    for table, hidden, heads in (
        (audio, audio_hidden, slice(0, TEXT_STREAM)),
        (text, text_hidden, slice(TEXT_STREAM, NUM_STREAMS)),
    ):
        value, sums = _head_loss(
            config.chunk_size, config.z, model.mesh, table, hidden, targets[:, heads], mask[:, heads], scale[heads]
        )
        total += value
        columns.append(sums)
    return total, jax.tree.map(lambda a, t: jax.lax.stop_gradient(jnp.concatenate([a, t])), *columns)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _head_loss(
    chunk: int, z: float, mesh: Mesh | None, table: Array, hidden: Array, targets: Array, mask: Array, scale: Array
) -> tuple[Array, Sums]:
    """Loss and sums of C heads that read the same hidden states.

    Args:
        chunk: positions on a device whose logits are held at once.
        z: weight of the z-loss.
        mesh: what it runs on, if that is known.
        table: [C, V, D], or [V, D] for a single head; one row per token.
        hidden: [B, T, D].
        targets: int32 [B, C, T].
        mask: bool [B, C, T].
        scale: float32 [C], what a position of each head weighs in the loss.
    """
    value, sums, _, _ = _sweep(chunk, z, mesh, table, hidden, targets, mask, scale)
    return value, sums


def _forward(
    chunk: int, z: float, mesh: Mesh | None, *arguments: Any
) -> tuple[tuple[Array, Sums], tuple[Array | None, ...]]:
    table, hidden = arguments[:2]
    value, sums, *gradients = _sweep(
        chunk, z, mesh, *(x.value for x in arguments), of_table=table.perturbed, of_hidden=hidden.perturbed
    )
    return (value, sums), tuple(gradients)


def _backward(chunk: int, z: float, mesh: Mesh | None, gradients: Any, cotangents: Any) -> tuple[Array | None, ...]:
    # Nothing asks for the gradient of the sums, and the loss is linear in its own.
    outer = cotangents[0]
    return *(None if x is None else (x * outer).astype(x.dtype) for x in gradients), None, None, None


_head_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _sweep(
    chunk: int,
    z: float,
    mesh: Mesh | None,
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
    # The axis of heads is kept where there is one: a mesh splits the rows of each.
    rows, C = table.shape[:-1], targets.shape[1]
    ways = sharding.ways("batch", mesh)
    held = T * (B // ways if B % ways == 0 else B)
    # As few pieces as that takes, all of one size.
    chunk = -(-T // -(-held // chunk))
    # What is left over is filled up with positions that do not count.
    short = -T % chunk
    pieces = (
        jnp.moveaxis(jnp.pad(hidden, ((0, 0), (0, short), (0, 0))).reshape(B, -1, chunk, D), 1, 0),
        *(
            jnp.moveaxis(jnp.pad(x, ((0, 0), (0, 0), (0, short))).reshape(B, C, -1, chunk), 2, 0).swapaxes(2, 3)
            for x in (targets, mask)
        ),
    )

    def piece(carry: tuple[Sums, Array | None], xs: Any) -> tuple[tuple[Sums, Array | None], Array | None]:
        total, table_gradient = carry
        states, goal, where = (sharding.by_rows(x, mesh) for x in xs)
        logits = linear(states, table, dtype=jnp.float32).reshape(B, chunk, C, -1)
        logits = sharding.constrain(logits, ("batch", None, None, "vocab"), mesh)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        said = jnp.take_along_axis(logits, goal[..., None], axis=-1)[..., 0]
        # The best logit, not argmax: cheaper, and a tie with the target counts as right.
        right = said >= logits.max(axis=-1)
        values = {
            "loss": normalizer - said,
            "z": jnp.square(normalizer) if z else jnp.zeros_like(normalizer),
            "correct": right.astype(jnp.float32),
            "count": jnp.ones_like(normalizer),
        }
        total = {name: total[name] + jnp.sum(jnp.where(where, v, 0.0), axis=(0, 1)) for name, v in values.items()}
        if not (of_table or of_hidden):
            return (total, None), None
        # d/dlogits of -log p(target) is p - onehot(target), that of z log^2 is 2 z log p.
        weight = jnp.where(where, scale, 0.0)
        pull = weight * (1.0 + 2.0 * z * normalizer)
        hit = goal[..., None] == jnp.arange(logits.shape[-1])
        error = jnp.exp(logits - normalizer[..., None]) * pull[..., None] - jnp.where(hit, weight[..., None], 0.0)
        error = error.astype(states.dtype).reshape(B * chunk, *rows)
        of_states, of_rows = linear_gradients(states.reshape(B * chunk, D), table, error)
        if table_gradient is not None:
            table_gradient = sharding.constrain(table_gradient + of_rows, table_axes, mesh)
        return (total, table_gradient), of_states.reshape(B, chunk, D) if of_hidden else None

    zero = {name: jnp.zeros(C, jnp.float32) for name in ("loss", "z", "correct", "count")}
    table_axes = (*[None] * (table.ndim - 2), "vocab", "embed")
    start = sharding.constrain(jnp.zeros(table.shape, jnp.float32), table_axes, mesh) if of_table else None
    (sums, table_gradient), hidden_gradient = jax.lax.scan(piece, (zero, start), pieces)
    if hidden_gradient is not None:
        hidden_gradient = jnp.moveaxis(hidden_gradient, 0, 1).reshape(B, T + short, D)[:, :T]
    return jnp.sum(scale * (sums["loss"] + z * sums["z"])), sums, table_gradient, hidden_gradient
