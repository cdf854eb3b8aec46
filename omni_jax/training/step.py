"""The jitted training step: forward, backward, AdamW; sharded, donated, the same for one device and a pod."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util

from omni_jax.audio.features import spec_augment
from omni_jax.config.run import OptimizerConfig, RunConfig, SpecAugmentConfig
from omni_jax.model.layers import traced_for
from omni_jax.model.omni import OmniModel
from omni_jax.tasks import Task
from omni_jax.training import loss
from omni_jax.training.stages import Params, combine
from omni_jax.vocab import TEXT_STREAM

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
        init_value=0.0 if config.warmup_steps else config.peak_lr,
        peak_value=config.peak_lr,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.steps, config.warmup_steps + 1),
        end_value=config.end_lr,
    )


def decays(params: Params) -> dict[str, Any]:
    """Which parameters weight decay pulls to zero: not norms and biases."""
    flat = traverse_util.flatten_dict(dict(params))
    return traverse_util.unflatten_dict(
        {path: not (path[-1] == "scale" or str(path[-1]).endswith("bias")) for path in flat}
    )


def optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) behind a clip of the global norm: the definition, and what begins the moments.

    The step itself computes it with `advance` and `updates`.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(schedule(config), config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decays),
    )


def advance(config: OptimizerConfig, moments: Any, gradient: Params, norm: Array, fine: Array) -> Any:
    """The first half of `optimizer(config).update`: the moments with a gradient in them.

    As two halves, each overwrites what it changes: moments without parameters, then parameters from moments. XLA
    fuses the whole into parameters from the old moments, of which it must then keep a copy.

    Args:
        config: rates of decay and the clip.
        moments: from `optimizer(config).init`, or from here.
        gradient: not yet clipped.
        norm: of the whole gradient, float32 [].
        fine: bool []; False leaves the moments exactly as they are.
    """
    clip, (adam, decay, scheduled) = moments
    shrink = jnp.where(norm < config.max_grad_norm, 1.0, config.max_grad_norm / norm)

    def blend(rate: float, power: int, old: Any) -> Any:
        return jax.tree.map(
            lambda g, m: jnp.where(fine, rate * m + (1.0 - rate) * (g * shrink) ** power, m), gradient, old
        )

    done = fine.astype(jnp.int32)
    adam = adam._replace(count=adam.count + done, mu=blend(config.b1, 1, adam.mu), nu=blend(config.b2, 2, adam.nu))
    scheduled = scheduled._replace(count=scheduled.count + done)
    return jax.lax.optimization_barrier((clip, (adam, decay, scheduled)))


def updates(config: OptimizerConfig, moments: Any, learning: Params) -> Params:
    """The second half: what to add to the parameters, given the moments of `advance`."""
    _, (adam, _, scheduled) = moments
    # The schedule counts from 0.
    rate = schedule(config)(scheduled.count - 1)
    first, second = (1.0 - b**adam.count for b in (config.b1, config.b2))

    def update(m: Array, v: Array, weight: Array, decay: bool) -> Array:
        direction = (m / first) / (jnp.sqrt(v / second) + config.eps)
        return -rate * (direction + config.weight_decay * weight if decay else direction)

    return jax.tree.map(update, adam.mu, adam.nu, learning, decays(learning))


def forward(
    model: OmniModel, batch: Batch, counts: Array, config: RunConfig, key: Array | None = None
) -> tuple[Array, loss.Sums]:
    """What `loss.of_batch` gives for a batch whose heads have `counts` float32 [8] targets in all.

    With a key, recordings are heard as `config.data.spec_augment` varies them, and codes read as `audio_token_noise` does.
    """
    data, tokens = config.data, batch["tokens"]
    if key is not None and data.audio_token_noise:
        tokens = corrupt_codes(tokens, data.audio_token_noise, model.config.vocab.audio, jax.random.fold_in(key, 1))
    with traced_for(model.mesh):
        heard = None
        if any(Task(task).takes_audio for task in data.tasks):
            heard = hear(model, batch["sound"], data.spec_augment, key)
        text_hidden, audio_hidden, _ = model(
            tokens,
            batch["positions"],
            heard,
            batch["speech_index"],
            batch["segments"],
            remat=config.remat,
        )
        return loss.of_batch(model, text_hidden, audio_hidden, batch["targets"], batch["mask"], counts, config.loss)


def corrupt_codes(tokens: Array, share: float, codes: int, key: Array) -> Array:
    """Input tokens int32 [B, 8, T] with about this share of the codes replaced by any of `codes`, each on its own.

    Text and special tokens stay.
    """
    chosen, drawn = jax.random.split(key)
    audio = tokens[:, :TEXT_STREAM]
    wrong = (audio < codes) & jax.random.bernoulli(chosen, share, audio.shape)
    return tokens.at[:, :TEXT_STREAM].set(jnp.where(wrong, jax.random.randint(drawn, audio.shape, 0, codes), audio))


def hear(model: OmniModel, sound: Array, augment: SpecAugmentConfig | None = None, key: Array | None = None) -> Array:
    """What a batch's rows hear: recordings int16 [B, clips, samples] -> [B, clips * positions, D].

    They are varied where there are both `augment` and a key.
    """
    B, clips, samples = sound.shape
    keys = None if augment is None or key is None else jax.random.split(key, clips)

    def features(sound: Array, key: Array | None) -> Array:
        vary = None if augment is None or key is None else partial(spec_augment, key=key, config=augment)
        return model.hear(sound.astype(jnp.float32) / 32768.0, vary)

    if clips_apart(model):
        heard = jax.lax.map(lambda one: features(*one), (sound.swapaxes(0, 1), keys)).swapaxes(0, 1)
    else:
        heard = features(sound.reshape(B * clips, samples), key)
    return heard.reshape(B, -1, heard.shape[-1])


def clips_apart(model: OmniModel) -> bool:
    """Whether one clip of every row is heard at a time.

    That is a third faster on a CPU, whose cache it fits. On TPUs the ear's weights would be gathered for every clip.
    """
    return model.mesh is None or model.mesh.devices.flat[0].platform == "cpu"


def train_step(
    graph: nnx.GraphDef, config: RunConfig, state: TrainState, frozen: Params, batch: Batch
) -> tuple[TrainState, dict[str, Array]]:
    """One step.

    A loss or gradient that is not finite leaves parameters and moments exactly as they were.

    Returns:
        The state after it and metrics: `loss` [], `heads` [8] (mean loss per head, layers then text), `accuracy` [8],
        `counts` [8], `gradient_norm`, `update_norm` and `parameter_norm` (of the parameters before the step; both NaN
        in a step that `config.log_interval_steps` leaves out), `learning_rate`, `skipped`, `skipped_in_a_row`, all float32.
    """
    parts = config.optimizer.gradient_accumulation_steps
    counts = jnp.sum(batch["mask"], axis=(0, 2)).astype(jnp.float32)

    keys = None
    if config.data.spec_augment is not None or config.data.audio_token_noise:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step), parts)

    def part_loss(learning: Params, part: Batch, key: Array | None) -> tuple[Array, dict[str, Array]]:
        return forward(nnx.merge(graph, combine(learning, frozen)), part, counts, config, key)

    compute = jax.value_and_grad(part_loss, has_aux=True)
    if parts == 1:
        (value, sums), gradient = compute(state.learning, batch, None if keys is None else keys[0])
    else:
        # Every part takes some rows of every device, so that nothing moves between devices.
        split = {
            name: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0) for name, x in batch.items()
        }

        def add(carry: Any, part: tuple[Batch, Array | None]) -> tuple[Any, None]:
            (value, sums), gradient = compute(state.learning, *part)
            return jax.tree.map(jnp.add, carry, (value, sums, gradient)), None

        shapes = jax.eval_shape(compute, state.learning, *jax.tree.map(lambda x: x[0], (split, keys)))
        ((value, sums), gradient) = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (value, sums, gradient), _ = jax.lax.scan(add, (value, sums, gradient), (split, keys))

    norm = optax.tree.norm(gradient)
    fine = jnp.isfinite(value) & jnp.isfinite(norm)
    moments = advance(config.optimizer, state.moments, gradient, norm, fine)

    def measure(moments: Any, learning: Params) -> tuple[Array, Array]:
        return optax.tree.norm(updates(config.optimizer, moments, learning)), optax.tree.norm(learning)

    # A whole pass over moments and parameters, so only for a step that is logged.
    logged = ((state.step + 1) % config.log_interval_steps == 0) | (state.step + 1 == config.optimizer.steps)
    unknown = (jnp.float32(jnp.nan), jnp.float32(jnp.nan))
    norms = jax.lax.cond(logged, measure, lambda *_: unknown, moments, state.learning)
    # The parameters are overwritten after they have been measured, and so need no copy.
    norms, old = jax.lax.optimization_barrier((norms, state.learning))
    learning = jax.tree.map(lambda x, u: jnp.where(fine, x + u, x), old, updates(config.optimizer, moments, old))

    bad = (~fine).astype(jnp.int32)
    after = TrainState(
        step=state.step + 1,
        learning=learning,
        moments=moments,
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
        "update_norm": norms[0],
        "parameter_norm": norms[1],
        "learning_rate": jnp.asarray(schedule(config.optimizer)(state.step - state.skipped), jnp.float32),
        "skipped": after.skipped.astype(jnp.float32),
        "skipped_in_a_row": after.skipped_in_a_row.astype(jnp.float32),
    }
