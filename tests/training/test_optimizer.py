"""The optimizer against optax."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from omni_jax.config.run import OptimizerConfig
from omni_jax.training.optimizer import adamw, decay_mask, learning_rate

CONFIG = OptimizerConfig(steps=50, peak_lr=3e-3, warmup_steps=2, eps=1e-8, weight_decay=0.5, max_grad_norm=2.0)
FINITE = jnp.array(True)


def params() -> dict:
    rng = np.random.default_rng(0)
    return {"norm": {"scale": jnp.ones(3)}, "q": {"weight": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)}}


@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_adamw_equals_optax(warmup_steps: int):
    config = replace(CONFIG, warmup_steps=warmup_steps)
    rng = np.random.default_rng(1)
    tx = adamw(config)
    reference = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate(config),
            config.b1,
            config.b2,
            config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
    mine = theirs = params()
    state, reference_state = tx.init(mine), reference.init(theirs)
    # The norms of these gradients are below and above the clip.
    for size in (0.1, 1.0, 10.0, 0.5):
        gradient = jax.tree.map(lambda x, size=size: jnp.asarray(size * rng.standard_normal(x.shape), x.dtype), mine)
        updates, state = tx.update(gradient, state, mine, grad_norm=optax.tree.norm(gradient), is_finite=FINITE)
        mine = optax.apply_updates(mine, updates)
        updates, reference_state = reference.update(gradient, reference_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        moments = [optax.tree.get(reference_state, name) for name in ("mu", "nu")]
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
            (mine, state.mu, state.nu),
            (theirs, *moments),
        )
    assert int(state.num_updates) == 4


def test_adamw_leaves_params_and_state_bit_identical_when_not_finite():
    tx, before = adamw(CONFIG), params()
    before["q"]["weight"] = before["q"]["weight"].at[0, 0].set(-0.0)
    state = tx.init(before)
    gradient = jax.tree.map(jnp.ones_like, before)
    _, state = tx.update(gradient, state, before, grad_norm=optax.tree.norm(gradient), is_finite=FINITE)
    infinite = jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), before)
    updates, after = tx.update(infinite, state, before, grad_norm=jnp.float32(jnp.nan), is_finite=jnp.array(False))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    for x, y in zip(jax.tree.leaves(optax.apply_updates(before, updates)), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(np.asarray(x).view(np.int32), np.asarray(y).view(np.int32))


def test_adamw_does_not_decay_norms_and_biases():
    config = replace(CONFIG, warmup_steps=0)
    tx = adamw(config)
    ones = {"a": {"scale": jnp.ones(3), "bias": jnp.ones(3), "weight": jnp.ones((3, 3))}}
    zeros = jax.tree.map(jnp.zeros_like, ones)
    updates, _ = tx.update(zeros, tx.init(ones), ones, grad_norm=jnp.float32(0.0), is_finite=FINITE)
    assert float(abs(updates["a"]["scale"]).max()) == 0.0
    assert float(abs(updates["a"]["bias"]).max()) == 0.0
    assert float(updates["a"]["weight"].max()) < 0.0


def test_learning_rate_warms_up_and_decays():
    rate = learning_rate(replace(CONFIG, end_lr=1e-4))
    np.testing.assert_allclose([rate(0), rate(2), rate(50)], [0.0, 3e-3, 1e-4], rtol=1e-6)
