"""Qwen2 and Llama folders of transformers to our trunk and back."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import AutoModelForCausalLM

from omni_jax.checkpoint.release import open_release
from omni_jax.checkpoint.safetensors_io import LazyTensor
from omni_jax.config.model import RopeScaling
from omni_jax.convert import qwen2
from omni_jax.convert.release import export_transformers, init_release
from omni_jax.errors import ConversionError
from tests import models

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
    "rope_theta": 5e4,
}
MODELS = {
    "qwen2": ("qwen2", {"tied": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2 untied": ("qwen2", {"tied": False}),
    "llama": ("llama", {"tied": True, "head_dim": 16, "rope_parameters": LLAMA3}),
    "llama untied": ("llama", {"tied": False, "rms_norm_eps": 1e-5}),
}


def make(folder, parts, **options):
    init_release(
        folder.parent / "release",
        lm_source=str(folder),
        whisper_source=str(parts / "whisper"),
        snac_source=str(parts / "snac"),
        **options,
    )
    return open_release(folder.parent / "release")


@partial(jax.jit, compiler_options=models.QUICK)
def text_logits(model, ids):
    """Plain text through the trunk: no average of eight streams."""
    x = model.embed.text[...][ids]
    hidden, _ = model.trunk(x, jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape))
    return model.text_logits(model.norm(hidden))[..., : model.config.vocab.text]


@pytest.mark.parametrize("name", MODELS)
def test_import_and_export_keep_the_logits(name, tiny_parts, tmp_path):
    family, options = MODELS[name]
    theirs = models.language_model_folder(tmp_path / "lm", family, **options)
    release = make(tmp_path / "lm", tiny_parts, adapter="mlp")
    ids = np.random.default_rng(0).integers(0, 300, (2, 60))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    model = release.load_model(stacked=True, dtype=jnp.float32)
    np.testing.assert_allclose(text_logits(model, ids), expected, atol=1e-4, rtol=0)

    export_transformers(release, tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(back) is type(theirs)
    with torch.no_grad():
        np.testing.assert_allclose(back(torch.from_numpy(ids)).logits.numpy(), expected, atol=1e-4, rtol=0)
    before = safetensors.numpy.load_file(tmp_path / "lm" / "model.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert set(before) == set(after)
    for tensor in before:
        np.testing.assert_array_equal(before[tensor], after[tensor])
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (tmp_path / "lm" / "tokenizer.json").read_bytes()


def test_import_of_bfloat16_shards_is_bit_exact(tiny_parts, tmp_path):
    model = models.language_model("qwen2", tied=False).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "lm", max_shard_size="40KB")
    models.tokenizer_files(tmp_path / "lm")
    assert len(list((tmp_path / "lm").glob("*.safetensors"))) > 2
    release = make(tmp_path / "lm", tiny_parts)
    tensors = release.model_tensors()
    assert tensors["embed.text"].dtype == tensors["head.audio"].dtype == np.dtype(ml_dtypes.bfloat16)
    export_transformers(release, tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert back.dtype == torch.bfloat16
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_extend_draws_new_rows_like_the_old(tiny_parts, tmp_path):
    models.language_model_folder(tmp_path / "lm", "qwen2", tied=False)
    release = make(tmp_path / "lm", tiny_parts, seed=1)
    vocab = release.config.vocab
    assert (vocab.text, vocab.text_specials, vocab.audio, vocab.audio_specials) == (300, 64, 64, 64)
    old = safetensors.numpy.load_file(tmp_path / "lm" / "model.safetensors")
    new = {name: tensor.read() for name, tensor in release.model_tensors().items()}
    for name, source in (("embed", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        table = old[source]
        np.testing.assert_array_equal(new[f"{name}.text"][:300], table)
        for drawn in (new[f"{name}.text"][300:], new[f"{name}.audio"]):
            np.testing.assert_allclose(drawn.std(), np.sqrt(np.mean(table**2)), rtol=0.05)
            np.testing.assert_allclose(drawn.mean(), 0, atol=0.01)
    assert not np.array_equal(new["embed.audio"], new["head.audio"])
    assert np.unique(new["embed.audio"][:, :, 0]).size == 7 * 128


def test_init_release_depends_on_the_seed(tiny_parts, tmp_path):
    made = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        models.language_model_folder(tmp_path / name / "lm", "llama", tied=True)
        release = make(tmp_path / name / "lm", tiny_parts, seed=seed, adapter="mlp", tts_adapter_layers=1)
        made[name] = {tensor: lazy.read() for tensor, lazy in release.model_tensors().items()}
    for tensor in made["a"]:
        np.testing.assert_array_equal(made["a"][tensor], made["b"][tensor])
    fresh = ("embed.text", "embed.audio", "adapter.map.weight", "tts_adapter.head")
    for tensor in (*fresh, "tts_adapter.blocks.layers.0.mlp.up.weight"):
        assert not np.array_equal(made["a"][tensor], made["c"][tensor])


# Configs.


def values_of(**changes):
    return {**models.language_model("llama", tied=False).config.to_dict(), **changes}


def read_values(values, state=None):
    return qwen2.config_from_json(values, state or {}, "config.json")


def test_rope_config_of_transformers_4_and_5():
    scaling = RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=48)
    new, _ = read_values(values_of(rope_parameters=LLAMA3))
    assert (new.rope_theta, new.rope_scaling) == (5e4, scaling)
    values = values_of(rope_theta=5e4)
    del values["rope_parameters"]
    old = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    assert read_values({**values, "rope_scaling": old})[0] == new
    assert read_values({**values, "rope_scaling": None})[0].rope_scaling is None
    assert read_values({**values, "rope_scaling": {"type": "default"}})[0].rope_scaling is None
    with pytest.raises(ConversionError, match=r"rope_scaling\.rope_type: expected default or llama3, found 'yarn'"):
        read_values({**values, "rope_scaling": {"type": "yarn", "factor": 2.0}})
    with pytest.raises(ConversionError, match=r"rope_parameters: factor.*found None"):
        read_values(values_of(rope_parameters={**LLAMA3, "factor": None}))


def test_config_error_lists_all_fields():
    values = values_of(
        model_type="mistral",
        hidden_act="gelu",
        mlp_bias=True,
        use_sliding_window=True,
        layer_types=["full_attention", "sliding_attention"],
        rope_parameters={"rope_type": "linear", "factor": 2.0},
    )
    del values["vocab_size"]
    with pytest.raises(ConversionError) as error:
        read_values(values)
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "config.json",
        "model_type",
        "vocab_size",
        "hidden_act",
        "mlp_bias",
        "use_sliding_window",
        "layer_types",
        "rope_parameters.rope_type",
    ]


def test_attention_bias():
    assert read_values(values_of())[0].qkv_bias is False
    assert read_values(values_of(model_type="qwen2"))[0].qkv_bias is True
    assert read_values(values_of(attention_bias=True))[0].qkv_bias is True
    state = {"model.layers.0.self_attn.o_proj.bias": LazyTensor.of(np.zeros(48, np.float32))}
    with pytest.raises(ConversionError, match="attention_bias: expected biases of q, k and v at most"):
        read_values(values_of(attention_bias=True), state)


def test_max_position_is_capped():
    assert read_values(values_of(max_position_embeddings=32768))[0].max_position == 2048
    assert read_values(values_of())[0].max_position == 192


# Wrong files.


def test_import_error_lists_all_tensors(tiny_parts, tmp_path):
    models.language_model_folder(tmp_path / "lm", "qwen2", tied=False)
    file = tmp_path / "lm" / "model.safetensors"
    state = safetensors.numpy.load_file(file)
    state["strange"] = state.pop("model.norm.weight")
    state["lm_head.weight"] = state["lm_head.weight"][:5]
    # Old files hold the frequencies of rope.
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(6, np.float32)
    safetensors.numpy.save_file(state, file)
    with pytest.raises(ConversionError) as error:
        make(tmp_path / "lm", tiny_parts)
    assert str(error.value).splitlines() == [
        f"{tmp_path / 'lm'}:",
        "model.norm.weight: missing, expected (48,)",
        "lm_head.weight: expected (300, 48), found (5, 48)",
        "strange: unknown, found (48,)",
    ]


def test_tied_head_in_the_file(tiny_parts, tmp_path):
    models.language_model_folder(tmp_path / "lm", "qwen2", tied=True)
    file = tmp_path / "lm" / "model.safetensors"
    state = safetensors.numpy.load_file(file)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(state, file)
    assert "head.text" not in qwen2.read(tmp_path / "lm")[2]
    state["lm_head.weight"][0, 0] += 1
    safetensors.numpy.save_file(state, file)
    with pytest.raises(ConversionError, match=r"lm_head\.weight: expected the values of model\.embed_tokens"):
        qwen2.read(tmp_path / "lm")


def test_read_names_missing_files(tmp_path):
    models.language_model_folder(tmp_path / "lm", "qwen2", tied=True)
    (tmp_path / "lm" / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"expected model\.safetensors or .*index\.json, found neither"):
        qwen2.read(tmp_path / "lm")
    (tmp_path / "lm" / "config.json").write_text("[]")
    with pytest.raises(ConversionError, match=r"config\.json: expected a JSON object, found list"):
        qwen2.read(tmp_path / "lm")


def test_export_keeps_the_original_context_of_llama3():
    trunk, rows = read_values(values_of(rope_parameters=LLAMA3))
    values = qwen2.config_to_json(trunk, rows)
    assert values["max_position_embeddings"] == 192
    longer = replace(trunk, rope_scaling=replace(trunk.rope_scaling, original_max_position=100))
    assert qwen2.config_to_json(longer, rows)["max_position_embeddings"] == 400
    assert read_values(values) == (trunk, rows)
