"""The jitted training step: forward, backward, AdamW; sharded, donated, the same for one device and a pod."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util

from omni_jax.config import OptimizerConfig, RunConfig
from omni_jax.model.omni import OmniModel
from omni_jax.prompts import Task
from omni_jax.training import loss
from omni_jax.training.stages import Params, unite

Array = jax.Array
Batch = dict[str, Array]
"""`tokens`, `targets` int32 and `mask` bool [B, 8, T]; `positions`, `segments`, `speech_index` int32 [B, T]; `sound`
int16 [B, clips, samples] at 16 kHz. See `omni_jax.data.pipeline`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes. Holds arrays, or their shapes, or their shardings."""

    step: Any
    """int32 []: steps done, skipped ones included."""
    learning: Any
    """Parameters that learn, float32, nested dict."""
    moments: Any
    """Of the parameters that learn, no others."""
    skipped: Any
    """int32 []: steps left out because the loss or its gradient was not finite."""
    skipped_in_a_row: Any
    """int32 []: how many of them came last."""


def schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate by step: linear up to `peak`, then half a cosine down to `final`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup else config.peak,
        peak_value=config.peak,
        warmup_steps=config.warmup,
        decay_steps=max(config.steps, config.warmup + 1),
        end_value=config.final,
    )


def optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) behind a clip of the global norm; norms and biases do not decay."""

    def decays(params: Params) -> dict[str, Any]:
        flat = traverse_util.flatten_dict(dict(params))
        return traverse_util.unflatten_dict(
            {path: not (path[-1] == "scale" or str(path[-1]).endswith("bias")) for path in flat}
        )

    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(schedule(config), config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decays),
    )


def forward_sums(model: OmniModel, batch: Batch, config: RunConfig) -> dict[str, Array]:
    """What `loss.head_sums` gives for a batch."""
    heard = None
    if any(Task(task).hears for task in config.data.tasks):
        B, clips, samples = batch["sound"].shape
        heard = model.hear(batch["sound"].reshape(B * clips, samples).astype(jnp.float32) / 32768.0)
        heard = heard.reshape(B, -1, heard.shape[-1])
    text_hidden, audio_hidden, _ = model(
        batch["tokens"],
        batch["positions"],
        heard,
        batch["speech_index"],
        batch["segments"],
        remat=config.remat,
    )
    return loss.head_sums(model, text_hidden, audio_hidden, batch["targets"], batch["mask"], config.loss)


def train_step(
    graph: nnx.GraphDef, config: RunConfig, state: TrainState, frozen: Params, batch: Batch
) -> tuple[TrainState, dict[str, Array]]:
    """One step.

    A loss or gradient that is not finite leaves parameters and moments exactly as they were.

    Returns:
        The state after it and metrics: `loss` [], `heads` [8] (mean loss per head, layers then text), `accuracy` [8],
        `counts` [8], `gradient_norm`, `update_norm`, `parameter_norm`, `learning_rate`, `skipped`,
        `skipped_in_a_row`, all float32.
    """
    parts = config.optimizer.accumulate
    counts = jnp.sum(batch["mask"], axis=(0, 2)).astype(jnp.float32)

    def part_loss(learning: Params, part: Batch) -> tuple[Array, dict[str, Array]]:
        sums = forward_sums(nnx.merge(graph, unite(learning, frozen)), part, config)
        return loss.total(sums, counts, config.loss), sums

    compute = jax.value_and_grad(part_loss, has_aux=True)
    if parts == 1:
        (value, sums), gradient = compute(state.learning, batch)
    else:
        # Every part takes some rows of every device, so that nothing moves between devices.
        split = {
            name: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0) for name, x in batch.items()
        }

        def add(carry: Any, part: Batch) -> tuple[Any, None]:
            (value, sums), gradient = compute(state.learning, part)
            return jax.tree.map(jnp.add, carry, (value, sums, gradient)), None

        shapes = jax.eval_shape(compute, state.learning, jax.tree.map(lambda x: x[0], split))
        ((value, sums), gradient) = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (value, sums, gradient), _ = jax.lax.scan(add, (value, sums, gradient), split)

    norm = optax.tree.norm(gradient)
    fine = jnp.isfinite(value) & jnp.isfinite(norm)
    updates, moments = optimizer(config.optimizer).update(gradient, state.moments, state.learning)
    learning = optax.apply_updates(state.learning, updates)

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(fine, n, o), new, old)

    bad = (~fine).astype(jnp.int32)
    after = TrainState(
        step=state.step + 1,
        learning=keep(learning, state.learning),
        moments=keep(moments, state.moments),
        skipped=state.skipped + bad,
        skipped_in_a_row=(state.skipped_in_a_row + bad) * bad,
    )
    counted = jnp.maximum(counts, 1.0)
    return after, {
        "loss": value,
        "heads": sums["loss"] / counted,
        "accuracy": sums["correct"] / counted,
        "counts": counts,
        "gradient_norm": norm,
        "update_norm": optax.tree.norm(updates),
        "parameter_norm": optax.tree.norm(learning),
        "learning_rate": jnp.asarray(schedule(config.optimizer)(state.step - state.skipped), jnp.float32),
        "skipped": after.skipped.astype(jnp.float32),
        "skipped_in_a_row": after.skipped_in_a_row.astype(jnp.float32),
    }
