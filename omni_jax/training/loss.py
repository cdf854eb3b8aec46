"""Cross entropy of the eight heads, without ever holding the logits of the whole batch.

The text head alone has 152000 rows: at 8 rows of 2048 positions its float32 logits would take 10 GB. They are
made a few positions at a time, reduced to what the loss needs, and made again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from omni_jax.config import LossConfig
from omni_jax.model.omni import OmniModel
from omni_jax.vocab import STREAMS, TEXT

Array = jax.Array


def head_sums(
    model: OmniModel, text_hidden: Array, audio_hidden: Array, targets: Array, mask: Array, config: LossConfig
) -> dict[str, Array]:
    """Sums over positions, per head; layers 0..6, then text.

    Args:
        model: gives the heads.
        text_hidden: [B, T, D].
        audio_hidden: [B, T, D].
        targets: int32 [B, 8, T].
        mask: bool [B, 8, T].
        config: gives the chunk and whether a z-loss is wanted.

    Returns:
        `loss`: float32 [8], sums of -log p(target); `z`: float32 [8], sums of log^2 of the normaliser;
        `correct` float32 [8], how often the target is the most probable; `count`: float32 [8].
    """
    T = text_hidden.shape[1]
    chunk = min(config.chunk, T)
    # What is left over is filled up with positions that do not count.
    short = -T % chunk
    text_hidden, audio_hidden = (jnp.pad(h, ((0, 0), (0, short), (0, 0))) for h in (text_hidden, audio_hidden))
    targets, mask = (jnp.pad(x, ((0, 0), (0, 0), (0, short))) for x in (targets, mask))

    def pieces(x: Array, axis: int) -> Array:
        shape = (*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    @jax.checkpoint
    def piece(total: dict[str, Array], xs: Any) -> tuple[dict[str, Array], None]:
        text, audio, target, counts = xs
        columns = []
        for logits, goal, where in (
            (model.audio_logits(audio), target[:, :TEXT].swapaxes(1, 2), counts[:, :TEXT].swapaxes(1, 2)),
            (model.text_logits(text)[:, :, None], target[:, TEXT:].swapaxes(1, 2), counts[:, TEXT:].swapaxes(1, 2)),
        ):
            normaliser = jax.nn.logsumexp(logits, axis=-1)
            said = jnp.take_along_axis(logits, goal[..., None], axis=-1)[..., 0]
            # The best logit, not argmax: cheaper, and a tie with the target counts as right.
            right = said >= jax.lax.stop_gradient(logits).max(axis=-1)
            values = {
                "loss": normaliser - said,
                "z": jnp.square(normaliser) if config.z else jnp.zeros_like(normaliser),
                "correct": right.astype(jnp.float32),
                "count": jnp.ones_like(normaliser),
            }
            columns.append({name: jnp.sum(jnp.where(where, v, 0.0), axis=(0, 1)) for name, v in values.items()})
        both = jax.tree.map(lambda a, t: jnp.concatenate([a, t]), *columns)
        return jax.tree.map(jnp.add, total, both), None

    zero = {name: jnp.zeros(STREAMS, jnp.float32) for name in ("loss", "z", "correct", "count")}
    xs = (pieces(text_hidden, 1), pieces(audio_hidden, 1), pieces(targets, 2), pieces(mask, 2))
    return jax.lax.scan(piece, zero, xs)[0]


def total(sums: dict[str, Array], counts: Array, config: LossConfig) -> Array:
    """The loss of a batch, or a part's share of it: each head's mean, summed with the heads' weights.

    Args:
        sums: from `head_sums`, of all or a part of the batch.
        counts: float32 [8], targets per head in the whole batch, so that the parts' losses add up to the whole's.
        config: the weights.
    """
    weights = jnp.array([*config.audio, config.text], jnp.float32)
    return jnp.sum(weights * (sums["loss"] + config.z * sums["z"]) / jnp.maximum(counts, 1.0))
