"""Every family of language models against transformers, and the configs of each."""

from dataclasses import replace

import pytest

from omni_jax.config.model import PRESETS, LayerKind, RopeScaling
from omni_jax.convert import families
from omni_jax.convert.families import config_from_json, config_to_json
from omni_jax.errors import ConversionError
from tests import models
from tests.convert.families import CASES, COLUMNS, LLAMA3, PAGE, Case, import_case, measure, stated, table

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)), ids=[case.title for case in CASES])
def test_family_equals_transformers_within_the_stated_errors(number: int, case: Case, tiny_parts, tmp_path):
    found = measure(case, tiny_parts, tmp_path, stacked=number % 2 == 0)
    limits = stated()[case.title]
    assert all(limit <= 1e-4 for limit in limits.values())
    assert {column: value for column, value in found.items() if value > limits[column]} == {}


def test_page_has_the_table_of_all_families():
    assert table(stated()) in PAGE.read_text(encoding="utf-8"), "run python -m tests.convert.families"
    assert {case.family for case in CASES} == set(families.FAMILIES)
    assert set(next(iter(stated().values()))) == set(COLUMNS)


def test_init_warns_of_what_mini_omni_cannot_have(tiny_parts, tmp_path, caplog):
    import_case(Case("", "olmo2"), tiny_parts, tmp_path)
    assert "it cannot be exported to it:\ntrunk.norms_before: expected True, found False\n" in caplog.text
    caplog.clear()
    # A window as long as the context changes nothing.
    import_case(Case("", "mistral", changes={"sliding_window": 192}), tiny_parts, tmp_path / "other")
    assert caplog.text == ""


# Configs.


def values_of(family="llama", **changes):
    return {**models.language_model_config(family, tied=False).to_dict(), **changes}


def read(values):
    return config_from_json(values, "config.json")[0]


def test_rope_config_of_transformers_4_and_5():
    scaling = RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=48)
    new = read(values_of(rope_parameters=LLAMA3))
    assert (new.rope_theta, new.rope_scaling) == (5e4, scaling)
    values = values_of(rope_theta=5e4)
    del values["rope_parameters"]
    old = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    assert read({**values, "rope_scaling": old}) == new
    assert read({**values, "rope_scaling": None}).rope_scaling is None
    assert read({**values, "rope_scaling": {"type": "default"}}).rope_scaling is None
    with pytest.raises(ConversionError, match=r"rope_scaling\.rope_type: expected default, .*found 'dynamic'"):
        read({**values, "rope_scaling": {"type": "dynamic", "factor": 2.0}})
    with pytest.raises(ConversionError, match=r"rope_parameters: factor.*found None"):
        read(values_of(rope_parameters={**LLAMA3, "factor": None}))


def test_yarn_config_with_and_without_what_may_be_left_out():
    short = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    found = read(values_of("qwen3", rope_parameters={"rope_theta": 1e6, **short})).rope_scaling
    assert (found.beta_fast, found.beta_slow, found.original_max_position) == (32.0, 1.0, 32768)
    assert found.attention_factor == pytest.approx(1.1386294)
    stated = {**short, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5}
    found = read(values_of("qwen3", rope_parameters={"rope_theta": 1e6, **stated})).rope_scaling
    assert (found.beta_fast, found.beta_slow, found.attention_factor) == (16.0, 2.0, 1.5)
    scaled = {**short, "mscale": 2.0, "mscale_all_dim": 1.0}
    found = read(values_of("qwen3", rope_parameters={"rope_theta": 1e6, **scaled})).rope_scaling
    assert found.attention_factor == pytest.approx(1.2772589 / 1.1386294)


def test_config_error_lists_all_fields():
    values = values_of(model_type="bloom", quantization_config={"quant_method": "fp8"})
    del values["vocab_size"]
    with pytest.raises(ConversionError) as error:
        read(values)
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "config.json",
        "model_type",
        "vocab_size",
        "quantization_config",
    ]
    with pytest.raises(ConversionError) as error:
        read(
            values_of(
                hidden_act="relu",
                layer_types=["full_attention", "sliding_attention"],
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.5},
            )
        )
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "config.json",
        "layer_types",
        "partial_rotary_factor",
        "rope_parameters.rope_type",
    ]
    with pytest.raises(ConversionError, match=r"hidden_act: .*found 'relu'"):
        read(values_of(hidden_act="relu"))


def test_biases():
    assert not read(values_of()).qkv_bias
    assert read(values_of(model_type="qwen2", attention_bias=False)).qkv_bias
    trunk = read(values_of(attention_bias=True))
    assert (trunk.qkv_bias, trunk.out_bias, trunk.mlp_bias) == (True, True, False)


def test_max_position_is_capped():
    assert read(values_of(max_position_embeddings=32768)).max_position == 2048
    assert read(values_of()).max_position == 192


def test_sliding_layers_of_files_without_layer_types():
    sizes = {"num_hidden_layers": 6, "vocab_size": 300, "sliding_window": 512}
    assert read({"model_type": "gemma2", **sizes}).sliding_layers == (0, 2, 4)
    gemma3 = read({"model_type": "gemma3_text", **sizes})
    assert gemma3.sliding_layers == (0, 1, 2, 3, 4)
    assert gemma3.layer_kind(5) == LayerKind(rope=True, sliding=False)
    assert (gemma3.rope_theta, gemma3.rope_local_theta) == (1e6, 1e4)
    qwen2 = {**values_of("qwen2"), **sizes, "layer_types": None, "max_window_layers": 4}
    assert read(qwen2).sliding_layers == ()
    assert read({**qwen2, "use_sliding_window": True}).sliding_layers == (4, 5)
    assert read(values_of("mistral", sliding_window=None)).sliding_layers == ()
    smollm3 = {**values_of("smollm3"), "num_hidden_layers": 6, "no_rope_layers": None, "layer_types": None}
    assert read(smollm3).no_rope_layers == (3,)


def test_text_part_of_a_gemma3_that_sees():
    text = {"model_type": "gemma3_text", "num_hidden_layers": 34, "hidden_size": 2560, "intermediate_size": 10240}
    text |= {"sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    trunk, rows = config_from_json({"model_type": "gemma3", "text_config": text}, "config.json")
    assert (trunk.family, trunk.num_layers, trunk.num_heads, rows) == ("gemma3_text", 34, 8, 262208)
    assert trunk.rope_scaling == RopeScaling(kind="linear", factor=8.0)
    assert trunk.tie_word_embeddings


@pytest.mark.parametrize("case", CASES, ids=[case.title for case in CASES])
def test_config_to_json_is_the_inverse(case: Case):
    trunk = read(models.language_model_config(case.family, tied=case.tied, **case.changes).to_dict())
    assert read(config_to_json(trunk, 300)) == trunk


def test_config_to_json_of_a_trunk_without_a_family():
    trunk = replace(read(values_of()), family=None)
    assert config_to_json(trunk, 300)["model_type"] == "llama"
    assert config_to_json(replace(trunk, qkv_bias=True), 300)["model_type"] == "qwen2"
    with pytest.raises(ConversionError, match=r"llama has no such trunk:\ntrunk.qk_norm: expected None, found head"):
        config_to_json(replace(trunk, qk_norm="head"), 300)
    with pytest.raises(ConversionError, match=r"trunk\.family: expected one of qwen2, .*, found 'mamba'"):
        config_to_json(replace(trunk, family="mamba"), 300)


def test_config_to_json_keeps_the_original_context_of_llama3():
    trunk = read(values_of(rope_parameters=LLAMA3))
    assert config_to_json(trunk, 300)["max_position_embeddings"] == 192
    longer = replace(trunk, rope_scaling=replace(trunk.rope_scaling, original_max_position=100))
    assert config_to_json(longer, 300)["max_position_embeddings"] == 400


LLAMA_3_2 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("preset", "family", "sizes", "more"),
    [
        ("qwen3_0_6b", "qwen3", (1024, 28, 16, 8, 128, 3072), {"tie_word_embeddings": True}),
        ("qwen3_1_7b", "qwen3", (2048, 28, 16, 8, 128, 6144), {"tie_word_embeddings": True}),
        ("qwen3_8b", "qwen3", (4096, 36, 32, 8, 128, 12288), {}),
        (
            "llama3_2_1b",
            "llama",
            (2048, 16, 32, 8, 64, 8192),
            {
                "tie_word_embeddings": True,
                "rms_norm_eps": 1e-5,
                "rope_theta": 5e5,
                "vocab_size": 128256,
                "rope_scaling": {**LLAMA_3_2, "original_max_position_embeddings": 8192},
            },
        ),
    ],
)
def test_presets_are_what_published_configs_say(preset, family, sizes, more):
    """The values of the published config.json files."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    values = {"vocab_size": 151936, "rope_theta": 1e6, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6}
    values |= {"model_type": family, **dict(zip((*names, "intermediate_size"), sizes, strict=True)), **more}
    assert (PRESETS[preset].trunk, PRESETS[preset].vocab.text) == config_from_json(values, preset)
