"""Folders of language models to our trunk and back; tests/convert/test_families.py has every family."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from omni_jax.checkpoint.release import open_release
from omni_jax.convert import language_model
from omni_jax.convert.release import export_transformers, init_release
from omni_jax.errors import ConversionError
from omni_jax.tokenizer import num_rows
from omni_jax.vocab import Vocab
from tests import models


def make(folder, parts, **options):
    init_release(
        folder.parent / "release",
        lm_source=str(folder),
        whisper_source=str(parts / "whisper"),
        snac_source=str(parts / "snac"),
        **options,
    )
    return open_release(folder.parent / "release")


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


@pytest.mark.parametrize("tied", [True, False])
def test_tokenizer_larger_than_the_embedding_grows_it(tied, tiny_parts, tmp_path):
    """As that of Gemma 3, which has one token more than the text model has rows; the old rows stay as they are."""
    models.language_model_folder(tmp_path / "lm", "llama", tied=tied)
    tokenizer = Tokenizer.from_file(str(tmp_path / "lm" / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<extra {number}>" for number in range(25)])
    tokenizer.save(str(tmp_path / "lm" / "tokenizer.json"))
    release = make(tmp_path / "lm", tiny_parts)
    assert (release.config.vocab.text, Vocab(release.config.vocab).text_rows) == (320, 384)
    assert num_rows(release.tokenizer()) == 305
    old = safetensors.numpy.load_file(tmp_path / "lm" / "model.safetensors")
    new = {name: tensor.read() for name, tensor in release.model_tensors().items()}
    tables = {"embed.text": "model.embed_tokens.weight"} | ({} if tied else {"head.text": "lm_head.weight"})
    assert {name for name in new if name.endswith(".text")} == set(tables)
    for name, source in tables.items():
        np.testing.assert_array_equal(new[name][:300], old[source])
        np.testing.assert_allclose(new[name][300:].std(), np.sqrt(np.mean(old[source] ** 2)), rtol=0.05)
    export_transformers(release, tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.get_input_embeddings().weight.shape == (320, 48)
    np.testing.assert_array_equal(back.get_output_embeddings().weight.detach(), new[list(tables)[-1]][:320])


def test_init_refuses_the_tokenizer_of_another_model(tiny_parts, tmp_path):
    models.language_model_folder(tmp_path / "lm", "llama", tied=True, vocab_size=130)
    with pytest.raises(ConversionError, match=r"expected a tokenizer of the language.*130 rows, found one of 280"):
        make(tmp_path / "lm", tiny_parts)
    assert not (tmp_path / "release").exists()


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


def test_read_pytorch_files_and_tensors_without_prefix(tiny_parts, tmp_path):
    model = models.language_model("qwen2", tied=True)
    model.model.save_pretrained(tmp_path / "lm")
    file = tmp_path / "lm" / "model.safetensors"
    state = safetensors.torch.load_file(file)
    assert not any(name.startswith("model.") for name in state)
    _, _, expected = language_model.read(tmp_path / "lm")
    file.unlink()
    torch.save(state, tmp_path / "lm" / "pytorch_model.bin")
    _, _, found = language_model.read(tmp_path / "lm")
    assert found.keys() == expected.keys()
    np.testing.assert_array_equal(
        found["trunk.layers.1.attention.out.weight"].read(),
        state["layers.1.self_attn.o_proj.weight"].numpy().reshape(48, 4, 12),
    )


def test_tied_head_in_the_file(tiny_parts, tmp_path):
    models.language_model_folder(tmp_path / "lm", "qwen2", tied=True)
    file = tmp_path / "lm" / "model.safetensors"
    state = safetensors.numpy.load_file(file)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(state, file)
    assert "head.text" not in language_model.read(tmp_path / "lm")[2]
    state["lm_head.weight"][0, 0] += 1
    safetensors.numpy.save_file(state, file)
    with pytest.raises(ConversionError, match=r"lm_head\.weight: expected the values of model\.embed_tokens.*--untied"):
        language_model.read(tmp_path / "lm")
    trunk, _, tensors = language_model.read(tmp_path / "lm", tied=False)
    assert not trunk.tie_word_embeddings
    np.testing.assert_array_equal(tensors["head.text"].read(), state["lm_head.weight"])
    trunk, _, tensors = language_model.read(tmp_path / "lm", tied=True)
    assert trunk.tie_word_embeddings
    assert "head.text" not in tensors


def test_read_names_missing_files(tmp_path):
    models.language_model_folder(tmp_path / "lm", "qwen2", tied=True)
    (tmp_path / "lm" / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"expected model\.safetensors or pytorch_model\.bin, .*, found none"):
        language_model.read(tmp_path / "lm")
    (tmp_path / "lm" / "config.json").write_text("[]")
    with pytest.raises(ConversionError, match=r"config\.json: expected a JSON object, found list"):
        language_model.read(tmp_path / "lm")
