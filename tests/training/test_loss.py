"""The chunked cross entropy against whole logits."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.config.model import ModelConfig
from omni_jax.config.run import LossConfig
from omni_jax.training.loss import batch_loss
from tests.inference.reference_decoder import random_model
from tests.training.test_step import LENGTH, MODEL, ROWS, batch


def test_batch_loss_is_cross_entropy_per_head_for_any_chunk_size():
    """Against whole logits and a log-softmax in numpy."""
    model = random_model(MODEL)
    arrays = batch()
    rng = np.random.default_rng(1)
    text, audio = (rng.standard_normal((ROWS, LENGTH, MODEL.trunk.hidden_size)).astype(np.float32) for _ in range(2))
    logits = [np.asarray(model.audio_logits(jnp.asarray(audio)))[..., k, :] for k in range(7)]
    logits.append(np.asarray(model.text_logits(jnp.asarray(text))))
    expected, correct = np.zeros(8), np.zeros(8)
    for k, scores in enumerate(logits):
        scores = scores.astype(np.float64)
        normalizer = np.log(np.exp(scores).sum(-1))
        target = np.take_along_axis(scores, arrays["targets"][:, k, :, None], -1)[..., 0]
        where = arrays["mask"][:, k]
        expected[k] = (normalizer - target)[where].sum()
        correct[k] = (scores.argmax(-1) == arrays["targets"][:, k])[where].sum()
    counts = arrays["mask"].sum((0, 2))
    for chunk_size in (ROWS * LENGTH, ROWS * 16, ROWS * 7):
        config = LossConfig(chunk_size=chunk_size, text=2.0, audio=(1.0, 0.5, 0.0, 1.0, 1.0, 1.0, 1.0))
        value, sums = batch_loss(
            model, text, audio, arrays["targets"], arrays["mask"], counts.astype(np.float32), config
        )
        np.testing.assert_allclose(sums["loss"], expected, rtol=1e-5)
        np.testing.assert_array_equal(sums["correct"], correct)
        np.testing.assert_array_equal(sums["count"], counts)
        weights = np.array([*config.audio, config.text])
        np.testing.assert_allclose(value, (weights * expected / counts).sum(), rtol=1e-5)


def test_batch_loss_of_a_head_without_targets_is_zero():
    model = random_model(MODEL)
    arrays = batch()
    hidden = np.ones((ROWS, LENGTH, MODEL.trunk.hidden_size), np.float32)
    nothing = np.zeros((ROWS, 8, LENGTH), bool)

    def value(hidden):
        return batch_loss(model, hidden, hidden, arrays["targets"], nothing, jnp.zeros(8), LossConfig())[0]

    found, gradient = jax.value_and_grad(value)(hidden)
    assert float(found) == 0.0
    assert not np.asarray(gradient).any()


SCALED = replace(MODEL, trunk=replace(MODEL.trunk, logits_scaling=0.5, logits_softcap=3.0))


@pytest.mark.parametrize(
    ("chunk_size", "shape"), [(ROWS * LENGTH, MODEL), (ROWS * 16, MODEL), (ROWS * 7, MODEL), (ROWS * 16, SCALED)]
)
def test_batch_loss_gradient_equals_autodiff_of_whole_logits(chunk_size: int, shape: ModelConfig):
    model = random_model(shape)
    arrays = batch()
    config = LossConfig(chunk_size=chunk_size, text=2.0, audio=(1.0, 0.5, 0.0, 1.0, 1.0, 1.0, 1.0))
    rng = np.random.default_rng(1)
    hidden = [rng.standard_normal((ROWS, LENGTH, MODEL.trunk.hidden_size)).astype(np.float32) for _ in range(2)]
    counts = arrays["mask"].sum((0, 2)).astype(np.float32)
    tables = model.head_tables()
    weights = np.array([*config.audio, config.text], np.float32) / counts

    def chunked(tables, text, audio):
        heads = SimpleNamespace(head_tables=lambda: tables, config=shape)
        return 3.0 * batch_loss(heads, text, audio, arrays["targets"], arrays["mask"], counts, config)[0]

    def whole(tables, text, audio):
        logits = [*jnp.moveaxis(jnp.einsum("btd,cvd->btcv", audio, tables[1]), 2, 0), text @ tables[0].T]
        value = 0.0
        for head, scores in enumerate(logits):
            if shape is SCALED:
                scores = 3.0 * jnp.tanh(2 * scores / 3.0)
            target = jnp.take_along_axis(scores, arrays["targets"][:, head, :, None], -1)[..., 0]
            each = jax.nn.logsumexp(scores, axis=-1) - target
            value += weights[head] * jnp.where(arrays["mask"][:, head], each, 0.0).sum()
        return 3.0 * value

    found, expected = (jax.grad(function, (0, 1, 2))(tables, *hidden) for function in (chunked, whole))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, expected)
