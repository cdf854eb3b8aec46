"""Weights in eight bits: quantization, and that decoding with them equals decoding with dequantized weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from omni_jax.config.model import ModelConfig
from omni_jax.inference.engine import Engine, PreparedRequest
from omni_jax.inference.runner import ModelRunner, quantize_weights
from omni_jax.model.layers import Int8, linear
from omni_jax.tasks import Task
from tests.inference.reference_decoder import random_model, random_request, small_config
from tests.models import quick_compile

RANDOM = np.random.default_rng(0)


def dequantized(weight: Int8) -> np.ndarray:
    """The weight that values and scales stand for."""
    values, scale = np.asarray(weight.values, np.float32), np.asarray(weight.scale)
    return values * scale.reshape(scale.shape + (1,) * (values.ndim - scale.ndim))


def test_int8_of_is_off_by_half_a_step_at_most_and_keeps_zeros() -> None:
    weight = RANDOM.normal(size=(5, 3, 4)).astype(np.float32)
    weight[1] *= 1000
    weight[2] = 0
    for inputs in (1, 2):
        rounded = Int8.of(jnp.asarray(weight), inputs)
        assert rounded.values.dtype == jnp.int8
        assert rounded.scale.shape == weight.shape[:-inputs]
        step = np.abs(weight).max(axis=tuple(range(3 - inputs, 3)), keepdims=True) / 127
        assert (np.abs(dequantized(rounded) - weight) <= step * 0.501).all()
        assert not dequantized(rounded)[2].any()


@pytest.mark.parametrize("rows", [2, 50])
def test_linear_and_lookup_of_int8_equal_those_of_the_dequantized_weight(rows: int) -> None:
    weight = Int8.of(jnp.asarray(RANDOM.normal(size=(6, 3, 4)), jnp.float32), 2)
    x = RANDOM.normal(size=(rows, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(
        linear(jnp.asarray(x), weight, 2), np.einsum("rhd,ohd->ro", x, dequantized(weight)), atol=1e-5
    )
    half = linear(jnp.asarray(x, jnp.bfloat16), weight, 2)
    assert half.dtype == jnp.bfloat16
    assert linear(jnp.asarray(x, jnp.bfloat16), weight, 2, jnp.float32).dtype == jnp.float32

    table = Int8.of(jnp.asarray(RANDOM.normal(size=(7, 4)), jnp.float32))
    np.testing.assert_allclose(table[jnp.array([[3], [0]])], dequantized(table)[[[3], [0]]], rtol=1e-6)
    assert table[...] is table


def decode(runner: ModelRunner, config: ModelConfig, requests: list[PreparedRequest]) -> list[Any]:
    engine = Engine(runner, 2, max(request.cache_len(config.trunk.max_position) for request in requests))
    for key, request in enumerate(requests):
        engine.submit(key, request)
    tokens: dict[int, list[np.ndarray]] = {key: [] for key in range(len(requests))}
    while engine.busy:
        for progress in engine.advance(8):
            tokens[progress.key].append(progress.tokens)
    return [np.concatenate(parts, axis=1).tolist() for parts in tokens.values()]


@pytest.mark.parametrize(
    ("shape", "stacked"),
    [({}, False), pytest.param({"tied": False, "tts_adapter_layers": 1}, True, marks=pytest.mark.nightly)],
    ids=["tied, unstacked", "tts adapter, stacked"],
)
def test_int8_decoding_equals_decoding_with_dequantized_weights(shape: dict[str, Any], stacked: bool) -> None:
    config = small_config(**shape)
    rounded, floats = (ModelRunner(random_model(config, stacked=stacked), int8=int8) for int8 in (True, False))
    flat = traverse_util.flatten_dict(rounded.weights)
    eight = {keys[-2] if keys[-1] == "weight" else keys[-1] for keys, leaf in flat.items() if isinstance(leaf, Int8)}
    assert eight >= {"q", "k", "v", "out", "gate", "up", "down", "text", "audio"}
    assert {keys[0] for keys, leaf in flat.items() if isinstance(leaf, Int8)}.isdisjoint(
        {"audio_encoder", "adapter", "norm"}
    )
    floats.weights = traverse_util.unflatten_dict(
        {keys: jnp.asarray(dequantized(leaf)) if isinstance(leaf, Int8) else leaf for keys, leaf in flat.items()}
    )
    requests = [random_request(config, task, 7) for task in (Task.A1A2, Task.T1A2, Task.T1T2)]
    with quick_compile():
        assert decode(rounded, config, requests) == decode(floats, config, requests)


def test_quantize_weights_halves_bfloat16() -> None:
    weights: Any = {
        "trunk": {"layers": {"mlp": {"up": {"weight": jnp.ones((4, 256, 128), jnp.bfloat16)}}}},
        "norm": {"scale": jnp.ones(9)},
    }
    rounded = quantize_weights(weights)
    assert rounded["norm"]["scale"] is weights["norm"]["scale"]
    up = rounded["trunk"]["layers"]["mlp"]["up"]["weight"]
    assert up.scale.shape == (4, 256)
    assert (
        sum(leaf.nbytes for leaf in jax.tree.leaves(up))
        < 0.52 * weights["trunk"]["layers"]["mlp"]["up"]["weight"].nbytes
    )
