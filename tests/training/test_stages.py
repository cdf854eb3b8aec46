import jax.numpy as jnp
import pytest
from flax import nnx, traverse_util

from omni_jax.checkpoint.release import abstract_model
from omni_jax.config.run import MODULES
from omni_jax.errors import ConfigError
from omni_jax.training.stages import combine, module_of, partition
from tests.models import tiny_config


def params(**changes):
    model = abstract_model(tiny_config(**changes), stacked=True, dtype=jnp.float32)
    return nnx.to_pure_dict(nnx.state(model))


def test_module_of_names_a_module_for_every_parameter():
    untied = tiny_config(tts_adapter_layers=1).trunk.__class__(
        **{**tiny_config().trunk.__dict__, "tie_word_embeddings": False}
    )
    flat = traverse_util.flatten_dict(params(tts_adapter_layers=1, trunk=untied))
    assert {module_of(path) for path in flat} == set(MODULES)


def test_partition_takes_the_named_modules_and_combine_inverts_it():
    whole = params()
    trainable, frozen = partition(whole, ["adapter", "audio_embedding"])
    assert set(trainable) == {"adapter", "embed"}
    assert set(trainable["embed"]) == {"audio"}
    assert set(frozen["embed"]) == {"text"}
    assert set(frozen) == {"audio_encoder", "embed", "norm", "trunk"}
    combined = combine(trainable, frozen)
    assert set(traverse_util.flatten_dict(combined)) == set(traverse_util.flatten_dict(whole))


def test_partition_refuses_a_module_that_the_model_lacks():
    with pytest.raises(ConfigError, match="tts_adapter"):
        partition(params(), ["adapter", "tts_adapter"])
    with pytest.raises(ConfigError, match="text_head"):
        partition(params(), ["text_head"])


def test_partition_accepts_a_tied_head_together_with_its_embedding():
    trainable, _ = partition(params(), ["text_embedding", "text_head"])
    assert set(trainable["embed"]) == {"text"}
