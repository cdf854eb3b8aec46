"""The training step: forward, backward, AdamW. Sharded and donated; the same for one device and a pod.

It is traced and run within `jax.set_mesh(mesh)`; without a mesh nothing is constrained.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from omni_jax import sharding
from omni_jax.audio.features import spec_augment
from omni_jax.config.run import RunConfig, SpecAugmentConfig
from omni_jax.model.lora import use_dropout
from omni_jax.model.omni import OmniModel
from omni_jax.tasks import Task
from omni_jax.training.loss import Sums, batch_loss
from omni_jax.training.optimizer import AdamWState, adamw, learning_rate, param_updates, zero_unless
from omni_jax.training.stages import Params, combine
from omni_jax.vocab import TEXT_STREAM

Array = jax.Array

Batch = dict[str, Array]
"""`tokens`, `targets` int32 and `mask` bool [B, 8, T]; `positions`, `segments`, `speech_index` int32 [B, T]; `sound`
int16 [B, clips, samples] at 16 kHz, or `features` [B, clips, frames, encoder hidden]. See `omni_jax.data.pipeline`."""

INT16_SCALE = 1 / 32768


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes. Holds arrays, or their shapes, or their shardings."""

    step: Any
    """int32 []: number of steps done, skipped ones included."""
    trainable: Any
    """Trainable parameters, float32, nested dict."""
    opt_state: Any
    """`omni_jax.training.optimizer.AdamWState` of the trainable parameters."""
    num_skipped: Any
    """int32 []: steps skipped because the loss or its gradient was not finite."""
    num_skipped_in_a_row: Any
    """int32 []: how many of the last steps were skipped without one in between that was not."""


def train_step(
    graph: nnx.GraphDef, config: RunConfig, state: TrainState, frozen: Params, batch: Batch
) -> tuple[TrainState, dict[str, Array]]:
    """One step.

    A loss or gradient that is not finite leaves parameters and optimizer state exactly as they were.

    Args:
        graph: of the model.
        config: of the run.
        state: before the step.
        frozen: parameters that are not trained.
        batch: of all devices.

    Returns:
        The state after it and metrics, all float32: `loss` []; `head_losses` [8] (mean per head, codebooks then text),
        `head_accuracies` [8] and `counts` [8] (targets); `grad_norm`, `update_norm` and `param_norm` (of the parameters
        before the step; the latter two are NaN in steps that `config.log_interval_steps` leaves out),
        `learning_rate`, `num_skipped`, `num_skipped_in_a_row`.
    """
    counts = jnp.sum(batch["mask"], axis=(0, 2)).astype(jnp.float32)
    (loss, sums), gradient = loss_and_gradient(graph, config, state, frozen, batch, counts)
    grad_norm = optax.tree.norm(gradient)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    trainable, opt_state, update_norm, param_norm = apply_gradient(config, state, gradient, grad_norm, is_finite)
    skipped = (~is_finite).astype(jnp.int32)
    after = TrainState(
        step=state.step + 1,
        trainable=trainable,
        opt_state=opt_state,
        num_skipped=state.num_skipped + skipped,
        num_skipped_in_a_row=(state.num_skipped_in_a_row + skipped) * skipped,
    )
    at_least_one = jnp.maximum(counts, 1.0)
    return after, {
        "loss": loss,
        "head_losses": sums["loss"] / at_least_one,
        "head_accuracies": sums["correct"] / at_least_one,
        "counts": counts,
        "grad_norm": grad_norm,
        "update_norm": update_norm,
        "param_norm": param_norm,
        "learning_rate": jnp.asarray(learning_rate(config.optimizer)(state.step - state.num_skipped), jnp.float32),
        "num_skipped": after.num_skipped.astype(jnp.float32),
        "num_skipped_in_a_row": after.num_skipped_in_a_row.astype(jnp.float32),
    }


def loss_and_gradient(
    graph: nnx.GraphDef, config: RunConfig, state: TrainState, frozen: Params, batch: Batch, counts: Array
) -> tuple[tuple[Array, Sums], Params]:
    """Loss and sums of `omni_jax.training.loss.batch_loss`, and the gradient in the trainable parameters.

    The batch is computed in `gradient_accumulation_steps` micro-batches, one after the other, whose gradients are added
    up in `gradient_accumulation_dtype`. Augmentation and dropout draw from the seed of the run and the step.
    """
    micro_batches = config.optimizer.gradient_accumulation_steps
    keys = None
    if config.data.spec_augment is not None or config.data.audio_token_noise or _dropout(config):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step), micro_batches)

    def micro_batch_loss(trainable: Params, batch: Batch, key: Array | None) -> tuple[Array, Sums]:
        return forward(nnx.merge(graph, combine(trainable, frozen)), batch, counts, config, key)

    compute = partial(jax.value_and_grad(micro_batch_loss, has_aux=True), state.trainable)
    if micro_batches == 1:
        return compute(batch, None if keys is None else keys[0])

    def split(x: Array) -> Array:
        """Take some rows of every device for each micro-batch, so that nothing moves between devices."""
        return jnp.moveaxis(x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]), 1, 0)

    def add(total: Any, micro_batch: tuple[Batch, Array | None]) -> tuple[Any, None]:
        return jax.tree.map(lambda before, x: (before + x).astype(before.dtype), total, compute(*micro_batch)), None

    inputs = (jax.tree.map(split, batch), keys)
    losses, gradient = jax.eval_shape(compute, *jax.tree.map(lambda x: x[0], inputs))
    nothing = (
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), losses),
        jax.tree.map(lambda x: jnp.zeros(x.shape, config.optimizer.gradient_accumulation_dtype), gradient),
    )
    (summed, gradient), _ = jax.lax.scan(add, nothing, inputs)
    return summed, jax.tree.map(lambda x: x.astype(jnp.float32), gradient)


def apply_gradient(
    config: RunConfig, state: TrainState, gradient: Params, grad_norm: Array, is_finite: Array
) -> tuple[Params, AdamWState, Array, Array]:
    """Update parameters and optimizer state, unless the gradient is not finite.

    Returns:
        Trainable parameters, optimizer state, and the norms of the update and of the parameters before it, float32 [];
        NaN in a step that is not logged.
    """
    _, opt_state = adamw(config.optimizer).update(
        gradient, state.opt_state, state.trainable, grad_norm=grad_norm, is_finite=is_finite
    )

    def norms_of(opt_state: AdamWState, trainable: Params) -> tuple[Array, Array]:
        # Computed again, so that in other steps the updates are never in memory.
        updates = param_updates(config.optimizer, opt_state, trainable)
        return optax.tree.norm(updates), optax.tree.norm(trainable)

    # A pass over optimizer state and parameters, a third of the optimizer's time: only for a step that is logged.
    step = state.step + 1
    is_logged = (step % config.log_interval_steps == 0) | (step == config.optimizer.steps)
    unknown = (jnp.float32(jnp.nan), jnp.float32(jnp.nan))
    norms = jax.lax.cond(is_logged, norms_of, lambda *_: unknown, opt_state, state.trainable)
    # The parameters are overwritten after their norm has been computed, so that no copy is needed.
    norms, trainable = jax.lax.optimization_barrier((norms, state.trainable))
    # From here, not from above the barrier: otherwise every parameter would be read twice.
    updates = zero_unless(is_finite, param_updates(config.optimizer, opt_state, trainable))
    return optax.apply_updates(trainable, updates), opt_state, *norms


def forward(
    model: OmniModel, batch: Batch, counts: Array, config: RunConfig, key: Array | None = None
) -> tuple[Array, Sums]:
    """Loss and sums of a batch, as `omni_jax.training.loss.batch_loss` gives them.

    Args:
        model: with all parameters.
        batch: or a micro-batch.
        counts: float32 [8], targets per head in the whole batch.
        config: of the run.
        key: of dropout and of the augmentation that `config.data` describes; None: neither.
    """
    data, tokens = config.data, batch["tokens"]
    if key is not None and _dropout(config):
        use_dropout(model, jax.random.fold_in(key, 2))
    if key is not None and data.audio_token_noise:
        tokens = corrupt_codes(tokens, data.audio_token_noise, model.config.vocab.audio, jax.random.fold_in(key, 1))
    speech = None
    if any(Task(task).takes_audio for task in data.tasks):
        if "features" in batch:
            speech = adapt(model, batch["features"])
        else:
            speech = encode_audio(model, batch["sound"], data.spec_augment, key)
    text_hidden, audio_hidden, _ = model(
        tokens, batch["positions"], speech, batch["speech_index"], batch["segments"], remat=config.remat
    )
    return batch_loss(model, text_hidden, audio_hidden, batch["targets"], batch["mask"], counts, config.loss)


def _dropout(config: RunConfig) -> float:
    return 0.0 if config.lora is None else config.lora.dropout


def corrupt_codes(tokens: Array, probability: float, num_codes: int, key: Array) -> Array:
    """Replace each code independently with this probability by a code drawn uniformly; text and specials stay.

    Args:
        tokens: int32 [B, 8, T], the input.
        probability: 0 to 1.
        num_codes: size of a codebook.
        key: of the draws.

    Returns:
        int32 [B, 8, T].
    """
    where_key, code_key = jax.random.split(key)
    audio = tokens[:, :TEXT_STREAM]
    replaced = (audio < num_codes) & jax.random.bernoulli(where_key, probability, audio.shape)
    codes = jax.random.randint(code_key, audio.shape, 0, num_codes)
    return tokens.at[:, :TEXT_STREAM].set(jnp.where(replaced, codes, audio))


def encode_audio(
    model: OmniModel, sound: Array, augment: SpecAugmentConfig | None = None, key: Array | None = None
) -> Array:
    """Speech embeddings of a batch's recordings.

    Args:
        model: with its audio encoder and adapter.
        sound: int16 [B, clips, samples] at 16 kHz.
        augment: augmentation of the log-mel features; used together with a key.
        key: of its draws.

    Returns:
        [B, clips * A, D], A speech positions of each clip.
    """
    B, clips, samples = sound.shape
    keys = None if augment is None or key is None else jax.random.split(key, clips)

    def encode(sound: Array, key: Array | None) -> Array:
        change = None if augment is None or key is None else partial(spec_augment, key=key, config=augment)
        return model.encode_audio(sound.astype(jnp.float32) * INT16_SCALE, change)

    if encodes_clips_in_turn():
        speech = jax.lax.map(lambda clip: encode(*clip), (sound.swapaxes(0, 1), keys)).swapaxes(0, 1)
    else:
        speech = encode(sound.reshape(B * clips, samples), key)
    return speech.reshape(B, -1, speech.shape[-1])


def adapt(model: OmniModel, features: Array) -> Array:
    """Speech embeddings [B, clips * A, D] of cached features [B, clips, frames, encoder hidden]."""
    B, clips, *shape = features.shape
    speech = model.adapter(features.reshape(B * clips, *shape).astype(model.dtype))
    return speech.reshape(B, -1, speech.shape[-1])


def encodes_clips_in_turn() -> bool:
    """Whether one clip of every row is encoded at a time, in turn.

    That is a third faster on a CPU, whose cache it fits. On TPUs the encoder's weights would be gathered for each clip.
    """
    return sharding.platform() in (None, "cpu")
