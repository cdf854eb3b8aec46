"""Configuration: published numbers, errors that name the field, overrides, YAML there and back."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from omni_jax.config.load import build_config, load_config, save_config, to_dict
from omni_jax.config.model import PRESETS, ModelConfig, RopeScaling, TrunkConfig
from omni_jax.config.run import RunConfig
from omni_jax.errors import ConfigError
from omni_jax.vocab import Vocab


def test_preset_mini_omni_has_the_published_sizes() -> None:
    mini = PRESETS["mini_omni"]
    vocab = Vocab(mini.vocab)
    assert (vocab.text_rows, vocab.audio_rows, vocab.rows) == (152000, 4160, 181120)
    trunk = mini.trunk
    assert (trunk.num_layers, trunk.hidden_size, trunk.num_heads, trunk.num_kv_heads, trunk.head_dim) == (
        24,
        896,
        14,
        2,
        64,
    )
    assert (trunk.intermediate_size, trunk.rope_theta, trunk.norm_eps, trunk.max_position) == (4864, 1e6, 1e-6, 2048)
    assert trunk.qkv_bias
    assert trunk.tie_word_embeddings
    assert trunk.rope_scaling is None
    encoder = mini.audio_encoder
    assert (
        encoder.num_mel_bins,
        encoder.hidden_size,
        encoder.num_layers,
        encoder.num_heads,
        encoder.intermediate_size,
        encoder.max_position,
    ) == (
        80,
        768,
        12,
        12,
        3072,
        1500,
    )
    assert encoder.max_samples == 30 * 16000
    assert (mini.adapter.kind, mini.adapter.intermediate_size, mini.adapter.stack) == ("llamamlp", 4864, 1)
    assert (mini.codec.sample_rate, mini.codec.hop_length, mini.codec.frame_size) == (24000, 512, 2048)
    assert mini.tts_adapter_layers == 0


def test_preset_mini_omni_tts_adapter_differs_in_its_six_blocks_only() -> None:
    assert PRESETS["mini_omni_tts_adapter"] == dataclasses.replace(PRESETS["mini_omni"], tts_adapter_layers=6)


def test_preset_tiny_takes_two_seconds() -> None:
    assert PRESETS["tiny"].audio_encoder.max_samples == 2 * 16000


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_fit_their_own_context(name: str) -> None:
    preset = PRESETS[name]
    assert -(-preset.audio_encoder.max_position // preset.adapter.stack) + 3 < preset.trunk.max_position


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    save_config(PRESETS[name], tmp_path / "model.yaml")
    assert load_config(ModelConfig, tmp_path / "model.yaml") == PRESETS[name]


def test_yaml_round_trip_with_rope_scaling(tmp_path: Path) -> None:
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
    whole = ModelConfig(trunk=TrunkConfig(rope_scaling=scaling, norm_eps=1e-5, tie_word_embeddings=False))
    save_config(whole, tmp_path / "model.yaml")
    again = load_config(ModelConfig, tmp_path / "model.yaml")
    assert again == whole
    assert again.trunk.rope_scaling == scaling


def test_to_dict_has_only_types_of_yaml_and_json() -> None:
    def check(value: object) -> None:
        if isinstance(value, dict):
            assert all(type(key) is str for key in value)
            for item in value.values():
                check(item)
        elif isinstance(value, list):
            for item in value:
                check(item)
        else:
            assert value is None or type(value) in (str, int, float, bool)

    check(to_dict(PRESETS["mini_omni"]))


@pytest.mark.parametrize(
    ("values", "name", "found"),
    [
        ({"trunk": {"hidden_size": -3}}, "trunk.hidden_size", "-3"),
        ({"trunk": {"num_layers": "many"}}, "trunk.num_layers", "'many'"),
        ({"trunk": {"num_heads": 3, "num_kv_heads": 2}}, "trunk", "3 and 2"),
        ({"trunk": {"head_dim": 7}}, "trunk", "7"),
        ({"trunk": {"norm_eps": 0}}, "trunk.norm_eps", "0"),
        ({"trunk": {"depth": 4}}, "trunk.depth", "4"),
        (
            {"trunk": {"rope_scaling": {"factor": 8}}},
            "trunk.rope_scaling",
            "original_max_position: expected a value with kind llama3",
        ),
        (
            {"trunk": {"rope_scaling": {"kind": "linear", "factor": 2, "beta_fast": 1}}},
            "trunk",
            "expected none with kind",
        ),
        (
            {"trunk": {"num_layers": 2, "no_rope_layers": [1, 2]}},
            "trunk",
            "no_rope_layers: expected layers from 0 to 1",
        ),
        ({"trunk": {"sliding_layers": [1]}}, "trunk", "sliding_layers need a sliding_window"),
        ({"trunk": {"norms_before": False}}, "trunk", "expected norms_before, norms_after or both"),
        ({"trunk": {"partial_rotary_factor": 0.05}}, "trunk", "must be even for rope, found 64 * 0.05"),
        ({"audio_encoder": {"hidden_size": 10, "num_heads": 4}}, "audio_encoder", "10 and 4"),
        ({"adapter": {"kind": "conv"}}, "adapter.kind", "'conv'"),
        ({"vocab": {"text_specials": 5}}, "vocab.text_specials", "5"),
        ({"vocab": {"audio_specials": 4}}, "vocab.audio_specials", "4"),
        ({"vocab": {"audio": 100}}, "vocab.audio", "100 and 4096"),
        ({"codec": {"vq_strides": [8, 4, 2]}}, "codec", "(8, 4, 2)"),
        ({"codec": {"encoder_rates": [2, 2]}}, "codec", "4 and 512"),
        ({"tts_adapter_layers": -1}, "tts_adapter_layers", "-1"),
        ({"color": "red"}, "color", "'red'"),
        (None, "(whole)", ""),
    ],
)
def test_build_config_names_a_wrong_field_and_its_value(values: object, name: str, found: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_config(ModelConfig, values, "here.yaml")
    assert f"here.yaml: {name}" in str(error.value) or f" {name} must" in str(error.value)
    assert found in str(error.value)


def test_build_config_lists_every_wrong_field() -> None:
    with pytest.raises(ConfigError) as error:
        build_config(
            ModelConfig,
            {"trunk": {"hidden_size": 0, "intermediate_size": 0}, "audio_encoder": {"num_mel_bins": 0}},
            "x",
        )
    lines = str(error.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "audio_encoder.num_mel_bins",
        "trunk.hidden_size",
        "trunk.intermediate_size",
    ]


@pytest.mark.parametrize("high", [1.0, 0.5])
def test_rope_scaling_bands_must_not_be_empty(high: float) -> None:
    """The blend between the two bands divides by their distance."""
    scaling = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": high, "original_max_position": 64}
    with pytest.raises(ConfigError, match="high_freq_factor"):
        build_config(ModelConfig, {"trunk": {"rope_scaling": scaling}}, "x")


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().trunk.hidden_size = 5  # type: ignore[misc]


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("trunk:\n  hidden_size: 64\n")
    loaded = load_config(
        ModelConfig,
        path,
        [
            "trunk.hidden_size=32",
            "trunk.norm_eps=1e-5",
            "adapter.kind=mlp",
            "trunk.tie_word_embeddings=false",
            "audio_encoder.num_layers = 3",
        ],
    )
    assert loaded.trunk.hidden_size == 32
    assert loaded.trunk.norm_eps == 1e-5
    assert loaded.adapter.kind == "mlp"
    assert loaded.trunk.tie_word_embeddings is False
    assert loaded.audio_encoder.num_layers == 3


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trunk.hidden_size", "expected field=value"),
        ("=3", "expected field=value"),
        ("trunk.hidden_size.deep=3", "trunk.hidden_size.deep"),
        ("trunk.hidden_size=[1", "trunk.hidden_size"),
        ("trunk.wdth=3", "trunk.wdth"),
    ],
)
def test_load_config_names_a_wrong_override(tmp_path: Path, override: str, says: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("trunk:\n  hidden_size: 64\n")
    with pytest.raises(ConfigError) as error:
        load_config(ModelConfig, path, [override])
    assert says in str(error.value)


def test_overrides_fill_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("trunk:\n# nothing yet\n")
    assert load_config(ModelConfig, path, ["trunk.num_layers=2"]).trunk.num_layers == 2
    path.write_text("")
    assert load_config(ModelConfig, path, ["trunk.num_layers=2"]).trunk.num_layers == 2


@pytest.mark.parametrize("content", [b"a: [1", b"\xff\xfe\x00bad", b"just words"])
def test_load_config_names_a_file_that_is_no_config(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.yaml"):
        load_config(ModelConfig, path)


def test_load_config_names_a_missing_file_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: .*no such file"):
        load_config(ModelConfig, tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=tmp_path.name):
        load_config(ModelConfig, tmp_path)


def test_config_needs_no_jax() -> None:
    """A configuration can be read and printed where no accelerator library is."""
    command = (
        "import sys, omni_jax.config.load, omni_jax.config.model, omni_jax.config.run; assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", command], check=True)


RUN = """
out: out
start: preset:tiny
trainable: [adapter]
data: {sources: [{path: records}], tasks: {A1T1: 1}}
optimizer: {steps: 10, peak_lr: 1.0e-3}
"""


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.batch_size=1000000000000", "data.batch_size: Input should be less than or equal to 1048576"),
        ("data.max_length=1000000000000", "data.max_length: Input should be less than or equal to 16777216"),
        ("data.num_workers=1000000", "data.num_workers: Input should be less than or equal to 1024"),
        ("optimizer.steps=1e400", "optimizer.steps: Input should be a valid integer"),
        ("optimizer.peak_lr=.inf", "optimizer.peak_lr: Input should be a finite number, found inf"),
        ("optimizer.eps=.nan", "optimizer.eps: Input should be a finite number, found nan"),
        ("seed=" + "9" * 40, "a number of 40 digits"),
        ("out=" + "[" * 1000, "more than 64 levels"),
        ("out=&a [*a, *a]", "the alias or anchor 'a'"),
        ("out=" + str(["x" * 100] * 30), "found ['xxxx"),
    ],
)
def test_load_config_refuses_what_no_run_has(tmp_path: Path, override: str, says: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    assert load_config(RunConfig, path).data.batch_size == 8
    with pytest.raises(ConfigError) as error:
        load_config(RunConfig, path, [override])
    assert says in str(error.value)
    assert len(str(error.value)) < 1500


def test_build_config_lists_some_of_many_wrong_fields() -> None:
    with pytest.raises(ConfigError) as error:
        build_config(ModelConfig, {f"field{number}": "x\n" * 1000 for number in range(1000)}, "here.yaml")
    lines = str(error.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "here.yaml: 980 more"
    assert max(map(len, lines)) < 400


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"keep_best": "wer"}, "evaluation: Value error, keep_best: wer needs answers: expected num_answers above 0"),
        ({"keep_best": "wer", "num_answers": 1}, "wer is measured on A1T1, which data.tasks does not have"),
        ({"keep_best": "loss", "held_out": False}, "loss is measured on data.held_out, which has no source"),
    ],
)
def test_keep_best_needs_what_it_is_measured_on(evaluation: dict[str, Any], message: str) -> None:
    held_out = [{"path": "held"}] if evaluation.pop("held_out", True) else []
    values = {
        "out": "out",
        "start": "preset:tiny",
        "trainable": ["adapter"],
        "data": {"sources": [{"path": "data"}], "tasks": {"A1T2": 1}, "held_out": held_out},
        "optimizer": {"steps": 1, "peak_lr": 1e-3},
        "evaluation": evaluation,
    }
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_config(RunConfig, values, "run.yaml")
