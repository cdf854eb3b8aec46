import jax.numpy as jnp
import pytest
from flax import nnx, traverse_util

from omni_jax.checkpoint.tensors import abstract_model
from omni_jax.config.run import MODULES
from omni_jax.errors import ConfigError
from omni_jax.training.stages import combine, module_of, partition
from tests.models import tiny_config


def params(**changes):
    model = abstract_model(tiny_config(**changes), stacked=True, dtype=jnp.float32)
    return nnx.to_pure_dict(nnx.state(model))


def test_every_parameter_belongs_to_a_part_and_every_part_can_be_had():
    untied = tiny_config(tts_adapter_layers=1).trunk.__class__(
        **{**tiny_config().trunk.__dict__, "tie_word_embeddings": False}
    )
    flat = traverse_util.flatten_dict(params(tts_adapter_layers=1, trunk=untied))
    assert {module_of(path) for path in flat} == set(MODULES)


def test_divide_takes_the_named_parts_and_unite_undoes_it():
    whole = params()
    learning, frozen = partition(whole, ["adapter", "audio_embedding"])
    assert set(learning) == {"adapter", "embed"}
    assert set(learning["embed"]) == {"audio"}
    assert set(frozen["embed"]) == {"text"}
    assert set(frozen) == {"audio_encoder", "embed", "norm", "trunk"}
    united = combine(learning, frozen)
    assert set(traverse_util.flatten_dict(united)) == set(traverse_util.flatten_dict(whole))


def test_a_part_the_model_has_not_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match="tts_adapter"):
        partition(params(), ["adapter", "tts_adapter"])
    with pytest.raises(ConfigError, match="text_head"):
        partition(params(), ["text_head"])


def test_a_tied_head_may_be_named_beside_its_embedding():
    learning, _ = partition(params(), ["text_embedding", "text_head"])
    assert set(learning["embed"]) == {"text"}
