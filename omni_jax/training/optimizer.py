"""AdamW (arXiv 1711.05101) behind a clip of the global gradient norm, with linear warm-up and cosine decay.

It computes what `optax.chain(clip_by_global_norm(...), adamw(...))` does, but in two passes: new moments from the old
ones and the gradient, then updates from the new moments. Each pass overwrites what it replaces. Optax derives moments
and updates both from the old moments, of which XLA then keeps a copy until the parameters are updated:
`python -m benchmarks train` prints what that costs, in memory and time of a step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from omni_jax.config.run import OptimizerConfig
from omni_jax.training.stages import Params

Array = jax.Array


class AdamWState(NamedTuple):
    """Optimizer state of the trainable parameters."""

    num_updates: Array
    """int32 []."""
    mu: Any
    """First moments, float32, as the parameters."""
    nu: Any
    """Second moments, float32, as the parameters."""


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate by number of updates: linear up to `peak_lr`, then half a cosine down to `end_lr`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.peak_lr,
        peak_value=config.peak_lr,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.steps, config.warmup_steps + 1),
        end_value=config.end_lr,
    )


def decay_mask(params: Params) -> dict[str, Any]:
    """Which parameters have weight decay: all but norms and biases."""
    flat = traverse_util.flatten_dict(dict(params))
    return traverse_util.unflatten_dict({path: path[-1] not in ("scale", "bias") for path in flat})


def adamw(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run.

    `update(gradient, state, params, grad_norm=..., is_finite=...)` takes the global norm of the gradient, float32 [],
    which the step reports anyway, and whether to use the gradient at all, bool []: otherwise the updates are zero and
    the state stays exactly as it is.
    """

    def init(params: Params) -> AdamWState:
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return AdamWState(jnp.zeros([], jnp.int32), mu, nu)

    def update(
        gradient: Params,
        state: AdamWState,
        params: Params | None = None,
        *,
        grad_norm: Array,
        is_finite: Array,
        **_: Any,
    ) -> tuple[Params, AdamWState]:
        assert params is not None, "weight decay needs the parameters"
        state = _update_moments(config, state, gradient, grad_norm, is_finite)
        return zero_unless(is_finite, param_updates(config, state, params)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _update_moments(
    config: OptimizerConfig, state: AdamWState, gradient: Params, grad_norm: Array, is_finite: Array
) -> AdamWState:
    """The state after a gradient that is not yet clipped; the same state if it is not finite."""
    scale = jnp.where(grad_norm < config.max_grad_norm, 1.0, config.max_grad_norm / grad_norm)

    def blend(decay: float, power: int, moments: Any) -> Any:
        def of_leaf(g: Array, m: Array) -> Array:
            return jnp.where(is_finite, decay * m + (1.0 - decay) * (g * scale) ** power, m)

        return jax.tree.map(of_leaf, gradient, moments)

    num_updates = state.num_updates + is_finite.astype(jnp.int32)
    state = AdamWState(num_updates, blend(config.b1, 1, state.mu), blend(config.b2, 2, state.nu))
    # Without the barrier XLA would compute the updates from the old moments.
    return jax.lax.optimization_barrier(state)


def param_updates(config: OptimizerConfig, state: AdamWState, params: Params) -> Params:
    """What `update` of `adamw` adds to the parameters, from the state that it returns."""
    # The schedule counts from 0.
    rate = learning_rate(config)(state.num_updates - 1)
    mu_bias, nu_bias = (1.0 - b**state.num_updates for b in (config.b1, config.b2))

    def update(m: Array, v: Array, param: Array, decays: bool) -> Array:
        direction = (m / mu_bias) / (jnp.sqrt(v / nu_bias) + config.eps)
        return -rate * (direction + config.weight_decay * param if decays else direction)

    return jax.tree.map(update, state.mu, state.nu, params, decay_mask(params))


def zero_unless(is_finite: Array, updates: Params) -> Params:
    """The updates, or minus zero; adding that changes no number, while plus zero would change -0.0."""
    return jax.tree.map(lambda u: jnp.where(is_finite, u, -0.0), updates)
