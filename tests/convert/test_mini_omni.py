"""The published Mini-Omni checkpoint to our model and back."""

import pickle
import shutil
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from transformers import WhisperModel

from omni_jax.audio.features import log_mel
from omni_jax.checkpoint import release as checkpoint
from omni_jax.checkpoint.safetensors_io import LazyTensor
from omni_jax.config.model import AdapterConfig, RopeScaling, VocabConfig
from omni_jax.convert import mini_omni
from omni_jax.convert.release import export_mini_omni, import_mini_omni
from omni_jax.convert.torch_mini_omni import MiniOmni
from omni_jax.errors import ConversionError
from omni_jax.vocab import Vocab
from tests import models

# Tied or not, which adapter, blocks of the TTS adapter.
KINDS = [(True, "llamamlp", 0), (False, "mlp", 2), (True, "mlp", 1), (False, "llamamlp", 0)]


def config_of(kind):
    tied, adapter, blocks = kind
    config = models.tiny_config(tts_adapter_layers=blocks)
    adapter = AdapterConfig(kind=adapter, intermediate_size=config.trunk.intermediate_size)
    return replace(config, trunk=replace(config.trunk, tie_word_embeddings=tied), adapter=adapter)


def import_(source, parts, out):
    import_mini_omni(str(source), out, whisper_source=str(parts / "whisper"), snac_source=str(parts / "snac"))
    return checkpoint.open_release(out)


def state_of(folder):
    return torch.load(folder / "lit_model.pth", weights_only=True)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_import_gives_the_published_logits(kind, tiny_parts, tmp_path):
    """From audio to all eight heads, with a spoken and a text prompt."""
    config = config_of(kind)
    vocab = Vocab(config.vocab)
    models.mini_omni_folder(tmp_path / "theirs", config)
    release = import_(tmp_path / "theirs", tiny_parts, tmp_path / "release")
    reference = MiniOmni(yaml.safe_load((tmp_path / "theirs" / "model_config.yaml").read_text())).eval()
    reference.load_state_dict(state_of(tmp_path / "theirs"), strict=True)
    encoder = WhisperModel.from_pretrained(tiny_parts / "whisper").encoder.eval()

    B, T, A = 2, 14, 6
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, vocab.audio_rows, (B, 8, T))
    tokens[:, 7] = generator.integers(0, vocab.text_rows, (B, T))
    sound = jnp.asarray(models.sound(config.audio_encoder, B))
    mel = torch.from_numpy(np.array(log_mel(sound, config.audio_encoder.num_mel_bins)))
    with torch.no_grad():
        features = encoder(mel).last_hidden_state[:, :A]
        spoken = reference(torch.from_numpy(tokens), features)
        text_only = reference(torch.from_numpy(tokens))

    index = np.full((B, T), -1)
    index[:, 1 : 1 + A] = np.arange(A)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    nowhere = np.full((B, T), -1)
    for stacked, where, expected in ((False, index, spoken), (True, index, spoken), (True, nowhere, text_only)):
        model = release.load_model(stacked=stacked, dtype=jnp.float32)
        text, audio = logits(model, tokens, positions, sound, where)
        np.testing.assert_allclose(text, expected[0].numpy(), atol=1e-4, rtol=0)
        np.testing.assert_allclose(audio, expected[1].numpy(), atol=1e-4, rtol=0)


@partial(jax.jit, compiler_options=models.QUICK)
def logits(model, tokens, positions, sound=None, index=None):
    text, audio, _ = model(tokens, positions, None if sound is None else model.encode_audio(sound), index)
    return model.text_logits(text), model.audio_logits(audio)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_import_then_export_is_bit_exact(kind, dtype, tiny_parts, tmp_path):
    config = config_of(kind)
    models.mini_omni_folder(tmp_path / "theirs", config, dtype)
    release = import_(tmp_path / "theirs", tiny_parts, tmp_path / "release")
    assert release.config == config
    export_mini_omni(release, tmp_path / "back")
    before, after = state_of(tmp_path / "theirs"), state_of(tmp_path / "back")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype == getattr(torch, dtype)
        assert after[name].shape == tensor.shape
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    for name in checkpoint.TOKENIZER_FILES:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    name = "model_config.yaml"
    assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    tied = after["lm_head.weight"].data_ptr() == after["transformer.wte.weight"].data_ptr()
    assert tied == config.trunk.tie_word_embeddings


def test_export_loads_in_the_published_code(tmp_path):
    config = config_of((False, "llamamlp", 2))
    models.release_folder(tmp_path / "release", config)
    release = checkpoint.open_release(tmp_path / "release")
    export_mini_omni(release, tmp_path / "out")
    values = yaml.safe_load((tmp_path / "out" / "model_config.yaml").read_text())
    model = MiniOmni(values).eval()
    model.load_state_dict(state_of(tmp_path / "out"), strict=True)
    tokens = np.random.default_rng(0).integers(0, Vocab(config.vocab).audio_rows, (1, 8, 9))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens))
    text, audio = logits(release.load_model(stacked=True, dtype=jnp.float32), tokens, jnp.arange(9)[None])
    np.testing.assert_allclose(text, expected[0].numpy(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(audio, expected[1].numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["llamamlp", "mlp"])
def test_export_of_an_adapter_that_stacks_frames_and_is_narrow(kind, tmp_path):
    """As in nano: the published code computes the same from stacked frames."""
    config = replace(models.tiny_config(), adapter=AdapterConfig(kind=kind, intermediate_size=40, stack=3))
    models.release_folder(tmp_path / "release", config)
    release = checkpoint.open_release(tmp_path / "release")
    export_mini_omni(release, tmp_path / "out")
    reference = MiniOmni(yaml.safe_load((tmp_path / "out" / "model_config.yaml").read_text())).eval()
    reference.load_state_dict(state_of(tmp_path / "out"), strict=True)

    generator = np.random.default_rng(0)
    features = generator.normal(size=(1, 9, 32)).astype(np.float32)
    model = release.load_model(stacked=False, dtype=jnp.float32)
    with torch.no_grad():
        expected = reference.whisper_adapter(torch.from_numpy(features.reshape(1, 3, 96)))
    np.testing.assert_allclose(model.adapter(jnp.asarray(features)), expected, atol=1e-4, rtol=0)

    # The format has no audio encoder and no codec: those of the release are taken.
    source = str(tmp_path / "release")
    import_mini_omni(str(tmp_path / "out"), tmp_path / "again", whisper_source=source, snac_source=source)
    again = checkpoint.open_release(tmp_path / "again")
    assert again.config == (
        config if kind == "llamamlp" else replace(config, adapter=replace(config.adapter, intermediate_size=96))
    )
    found = {**again.model_tensors(), **again.codec_tensors()}
    for name, tensor in {**release.model_tensors(), **release.codec_tensors()}.items():
        assert found[name].read().tobytes() == tensor.read().tobytes(), name


def test_layout_of_fused_attention_and_token_table(tiny_config):
    """Literal layout: 2 key/value heads with 2 query heads each, 16 rows per head."""
    numbers = np.arange(8 * 16, dtype=np.float32)
    expected = {"q": [0, 1, 4, 5], "k": [2, 6], "v": [3, 7]}
    state = published_state(tiny_config)
    name = "transformer.h.1.attn.attn.bias"
    state[name] = LazyTensor.of(numbers)
    rows = np.zeros((Vocab(tiny_config.vocab).rows, 48), np.float32)
    rows[:, 0] = np.arange(len(rows))
    state["transformer.wte.weight"] = state["lm_head.weight"] = LazyTensor.of(rows)
    ours = mini_omni.from_state(state, tiny_config, "test")
    for letter, heads in expected.items():
        found = ours[f"trunk.layers.1.attention.{letter}.bias"].read()
        np.testing.assert_array_equal(found, numbers.reshape(8, 16)[heads])
    assert ours["embed.text"].read()[311, 0] == 311
    # 312 text rows, then 72 of each codebook.
    assert ours["embed.audio"].read()[3, 5, 0] == 312 + 3 * 72 + 5


def published_state(config):
    model = MiniOmni(mini_omni.config_to_yaml(config))
    return {name: LazyTensor.of(tensor.numpy()) for name, tensor in model.state_dict().items()}


# Configs.


def test_published_config_gives_the_preset():
    from omni_jax.config.model import PRESETS

    preset = PRESETS["mini_omni_tts_adapter"]
    values = mini_omni.config_to_yaml(preset)
    expected = {
        "n_layer": 24,
        "n_head": 14,
        "n_query_groups": 2,
        "n_embd": 896,
        "head_size": 64,
        "intermediate_size": 4864,
        "padded_vocab_size": 181120,
        "text_vocab_size": 152000,
        "audio_vocab_size": 4160,
        "cat_audio_vocab_size": 29120,
        "whisper_adapter_dim": 768,
        "asr_adapter": "llamamlp",
        "add_qkv_bias": True,
        "bias": False,
        "lm_head_bias": False,
        "norm_eps": 1e-6,
        "rope_base": 1000000,
        "rotary_percentage": 1.0,
        "rope_condense_ratio": 1,
        "scale_embeddings": False,
        "tie_word_embeddings": True,
        "post_adapter": True,
        "post_adapter_layers": 6,
        "block_size": 2048,
        "norm_class_name": "RMSNorm",
        "mlp_class_name": "LLaMAMLP",
        "parallel_residual": False,
        "hf_config": {},
    }
    assert {name: values[name] for name in expected} == expected
    again = mini_omni.config_from_yaml(values, preset.audio_encoder, preset.codec, tts_adapter=True, source="x")
    assert again == preset


def read_values(values, config, **options):
    return mini_omni.config_from_yaml(
        values, config.audio_encoder, config.codec, **{"tts_adapter": True, "source": "model_config.yaml", **options}
    )


def test_announced_tts_adapter_without_weights_is_left_out(tiny_config):
    values = {**mini_omni.config_to_yaml(tiny_config), "post_adapter": True}
    assert read_values(values, tiny_config, tts_adapter=False) == tiny_config
    assert read_values(values, tiny_config).tts_adapter_layers == 6


def test_absent_fields_have_the_published_defaults(tiny_config):
    values = mini_omni.config_to_yaml(tiny_config)
    del values["rotary_percentage"], values["n_query_groups"], values["head_size"], values["add_qkv_bias"]
    with pytest.raises(ConversionError, match=r"rotary_percentage: expected 1.0, found 0.25 \(default\)"):
        read_values(values, tiny_config)
    trunk = read_values({**values, "rotary_percentage": 1}, tiny_config).trunk
    assert (trunk.num_kv_heads, trunk.head_dim, trunk.qkv_bias) == (4, 12, False)


def test_config_error_lists_all_fields(tiny_config):
    values = mini_omni.config_to_yaml(tiny_config)
    del values["n_layer"]
    values |= {"scale_embeddings": True, "norm_class_name": "LayerNorm", "color": "red", "name": "Gemma-2b"}
    with pytest.raises(ConversionError) as error:
        read_values(values, tiny_config)
    assert str(error.value).splitlines() == [
        "model_config.yaml:",
        "n_layer: missing",
        "color: unknown field",
        "scale_embeddings: expected False, found True",
        "norm_class_name: expected 'RMSNorm', found 'LayerNorm'",
        "name: expected no Gemma, whose norms add one to their scale, found 'Gemma-2b'",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padded_vocab_size": 900}, "padded_vocab_size: expected 816, found 900"),
        ({"whisper_adapter_dim": 768}, "whisper_adapter_dim: expected 32, found 768"),
        ({"n_embd": "wide"}, "n_embd: expected a number, found 'wide'"),
        ({"asr_adapter": "lstm"}, "adapter.kind"),
        ({"n_query_groups": 3}, "num_heads must be a multiple of num_kv_heads"),
        ({"audio_vocab_size": 66, "cat_audio_vocab_size": 462, "padded_vocab_size": 774}, "audio_specials"),
    ],
)
def test_config_error_names_wrong_values(tiny_config, change, message):
    values = {**mini_omni.config_to_yaml(tiny_config), **change}
    with pytest.raises(ConversionError, match=message):
        read_values(values, tiny_config)


def test_config_to_yaml_lists_what_the_published_code_lacks(tiny_config):
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)
    config = replace(
        tiny_config,
        adapter=AdapterConfig(intermediate_size=100),
        trunk=replace(tiny_config.trunk, rope_scaling=scaling, qk_norm="head", sliding_window=191, sliding_layers=(0,)),
    )
    with pytest.raises(ConversionError) as error:
        mini_omni.config_to_yaml(config)
    assert [line.split(":")[0] for line in str(error.value).splitlines()[1:]] == [
        "adapter.intermediate_size",
        "trunk.rope_scaling",
        "trunk.sliding_window",
        "trunk.sliding_layers",
        "trunk.qk_norm",
    ]
    # A window as long as the context changes nothing.
    trunk = replace(tiny_config.trunk, sliding_window=192, sliding_layers=(0,))
    assert mini_omni.unsupported(replace(tiny_config, trunk=trunk)) == []


def test_published_number_of_specials_needs_no_hint():
    vocab = VocabConfig(text=300, audio=64, text_specials=64, audio_specials=8)
    config = replace(models.tiny_config(), vocab=vocab)
    values = mini_omni.config_to_yaml(config)
    assert values["hf_config"] == {}
    assert read_values(values, config) == config


def test_model_config_of_an_import_is_exported_as_it_came(tiny_parts, tmp_path):
    """Also one with fields that mean nothing to us, or that announces a TTS adapter without having its weights."""
    shutil.copytree(tiny_parts / "mini_omni", tmp_path / "theirs")
    file = tmp_path / "theirs" / "model_config.yaml"
    values = yaml.safe_load(file.read_text())
    values |= {"post_adapter": True, "force_align": False, "hf_config": {"name": "Qwen2-0.5B", **values["hf_config"]}}
    file.write_text("# Mini-Omni\n" + yaml.safe_dump(values, default_flow_style=True))
    release = import_(tmp_path / "theirs", tiny_parts, tmp_path / "release")
    export_mini_omni(release, tmp_path / "back")
    assert (tmp_path / "back" / "model_config.yaml").read_bytes() == file.read_bytes()

    # A model that has become another one has a config of its own.
    trunk = replace(release.config.trunk, norm_eps=1e-5)
    other = replace(release, config=replace(release.config, trunk=trunk))
    export_mini_omni(other, tmp_path / "other")
    values = yaml.safe_load((tmp_path / "other" / "model_config.yaml").read_text())
    assert values == mini_omni.config_to_yaml(other.config)
    assert values["norm_eps"] == 1e-5


# Wrong files.


@pytest.fixture
def folder(tiny_parts, tmp_path):
    """A copy of the checkpoint to break."""
    return shutil.copytree(tiny_parts / "mini_omni", tmp_path / "mini_omni")


def test_import_error_lists_all_tensors(folder, tiny_parts, tmp_path):
    state = state_of(folder)
    state["strange"] = state.pop("transformer.ln_f.weight")
    state["transformer.h.0.attn.attn.bias"] = torch.zeros(3)
    state["transformer.h.0.norm_1.weight"] = torch.zeros(48, dtype=torch.int32)
    torch.save(state, folder / "lit_model.pth")
    with pytest.raises(ConversionError) as error:
        import_(folder, tiny_parts, tmp_path / "out")
    assert str(error.value).splitlines() == [
        f"{folder / 'lit_model.pth'}:",
        "transformer.ln_f.weight: missing, expected (48,)",
        "transformer.h.0.attn.attn.bias: expected (128,), found (3,)",
        "strange: unknown, found (48,)",
        "transformer.h.0.norm_1.weight: expected float32, bfloat16, float16, found int32",
    ]
    assert not (tmp_path / "out").exists()


def test_tied_head_that_differs_is_refused(folder, tiny_parts, tmp_path):
    state = state_of(folder)
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    torch.save(state, folder / "lit_model.pth")
    import_(folder, tiny_parts, tmp_path / "equal")
    state["lm_head.weight"][-1, -1] += 1
    torch.save(state, folder / "lit_model.pth")
    with pytest.raises(ConversionError, match=r"lm_head\.weight: expected the values of transformer\.wte"):
        import_(folder, tiny_parts, tmp_path / "out")


class Malicious:
    def __reduce__(self):
        return (print, ("this must never be printed",))


@pytest.mark.parametrize("content", [{"a": Malicious()}, {"a": [1, 2]}, [1, 2], {"b": {"a": torch.zeros(2)}}])
def test_import_executes_nothing_and_takes_tensors_only(content, folder, tiny_parts, tmp_path, capfd):
    torch.save(content, folder / "lit_model.pth")
    with pytest.raises(ConversionError, match=r"lit_model\.pth: expected"):
        import_(folder, tiny_parts, tmp_path / "out")
    assert "never be printed" not in capfd.readouterr().out


def test_import_refuses_a_bare_pickle(folder, tiny_parts, tmp_path):
    (folder / "lit_model.pth").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ConversionError, match=r"lit_model\.pth: expected a state dict"):
        import_(folder, tiny_parts, tmp_path / "out")


def test_import_refuses_yaml_without_fields(folder, tiny_parts, tmp_path):
    (folder / "model_config.yaml").write_text("- 1")
    with pytest.raises(ConversionError, match=r"model_config\.yaml: expected fields and values, found list"):
        import_(folder, tiny_parts, tmp_path / "out")
