"""Models made from a config, and the names of their parameters in a release."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni_jax import sharding
from omni_jax.checkpoint.tensors import (
    abstract_model,
    init_model,
    is_stacked,
    model_tensors,
    parameter_shapes,
    tensor_name,
    tensor_names,
)
from tests import models


def arrays(model):
    return {tensor_name(path): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


def test_tensor_names_of_stacked_and_single_layers():
    assert tensor_names(("trunk", "layers", "mlp", "up", "weight"), (2, 3, 4)) == [
        "trunk.layers.0.mlp.up.weight",
        "trunk.layers.1.mlp.up.weight",
    ]
    assert tensor_names(("trunk", "layers", 1, "mlp", "up", "weight"), (3, 4)) == ["trunk.layers.1.mlp.up.weight"]
    assert tensor_names(("norm", "scale"), (3,)) == ["norm.scale"]
    assert [is_stacked(path) for path in (("layers", "x"), ("layers", 0, "x"), ("x",))] == [True, False, False]


@pytest.mark.parametrize("stacked", [False, True])
def test_model_tensors_have_the_parameter_shapes(stacked):
    config = models.tiny_config(tts_adapter_layers=1)
    tensors = model_tensors(init_model(config, stacked=stacked, dtype=jnp.float32, seed=0))
    assert {name: tensor.shape for name, tensor in tensors.items()} == parameter_shapes(config)
    assert all(tensors[name].read().shape == tensors[name].shape for name in tensors)


@pytest.mark.parametrize("stacked", [False, True])
def test_abstract_model_has_the_shapes_of_the_real_one(stacked):
    config = models.tiny_config()
    shapes = {
        path: variable.shape
        for path, variable in nnx.to_flat_state(nnx.state(abstract_model(config, stacked=stacked, dtype=jnp.float32)))
    }
    real = nnx.to_flat_state(nnx.state(init_model(config, stacked=stacked, dtype=jnp.float32, seed=0)))
    assert shapes == {path: variable.shape for path, variable in real}


def test_init_model_gives_the_same_weights_on_any_mesh():
    config = models.tiny_config()
    config = replace(
        config, trunk=replace(config.trunk, num_layers=1), audio_encoder=replace(config.audio_encoder, num_layers=1)
    )
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    sharded = arrays(init_model(config, stacked=True, dtype=jnp.float32, seed=3, mesh=mesh))
    single = arrays(init_model(config, stacked=True, dtype=jnp.float32, seed=3))
    other = arrays(init_model(config, stacked=True, dtype=jnp.float32, seed=4))
    for name, array in sharded.items():
        np.testing.assert_allclose(array, single[name], atol=1e-6, err_msg=name)
    assert not np.array_equal(single["embed.text"], other["embed.text"])
