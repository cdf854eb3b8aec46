"""Families of language models: transformers' `config.json` of each to our trunk's config and back.

A family is data: which keys its `config.json` has beyond those that all have, what transformers takes for a key that is
missing, and what all models of the family share. What the keys mean is in the functions below, once for all families.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from omni_jax.config.load import build_config
from omni_jax.config.model import ROPE_FIELDS, RopeScaling, TrunkConfig
from omni_jax.convert.files import refuse_wrong_types
from omni_jax.errors import ConfigError, ConversionError

MAX_POSITION = 2048
"""Longest context of a new speech model, as in Mini-Omni. Language models announce far more, and caches have that
length."""

_SIZES = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
}
"""Fields of TrunkConfig that every file has to state, and their names in transformers."""

_ROPE_KEYS = {"original_max_position": "original_max_position_embeddings"}
"""Fields of RopeScaling that have another name in transformers."""


@dataclass(frozen=True)
class Family:
    """What one family has that Llama has not."""

    architecture: str
    """The model's class in transformers."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes for keys that are missing, where it is not what it takes for a Llama."""
    shared: Mapping[str, Any] = field(default_factory=dict)
    """Fields of TrunkConfig that all its models have."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Further fields of TrunkConfig, and their keys; a key that is missing has the field's default."""
    biases: Sequence[str] = ()
    """Keys that switch biases on: `attention_bias`, `mlp_bias`."""
    act_key: str = "hidden_act"
    windows: Literal["none", "all", "optional", "pattern"] = "none"
    """Which layers have the sliding window: none; all, if there is a window; some, if `use_sliding_window` says so; or
    those of a pattern."""
    gemma: bool = False
    """Whether embeddings are multiplied with the root of their size, and `query_pre_attn_scalar` scales attention."""
    partial_rotary: bool = False
    """Whether `partial_rotary_factor` may be less than 1."""
    fused: bool = False
    """Whether query, key and value are one tensor, and so are gate and up."""


_GEMMA_SHARED = {"norm_unit_offset": True, "norms_after": True}
_GEMMA_DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_SOFTCAPS = {"attention_softcap": "attn_logit_softcapping", "logits_softcap": "final_logit_softcapping"}

FAMILIES = {
    "qwen2": Family("Qwen2ForCausalLM", shared={"qkv_bias": True}, windows="optional"),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        defaults={"head_dim": 128},
        shared={"qk_norm": "head"},
        biases=("attention_bias",),
        windows="optional",
    ),
    "llama": Family("LlamaForCausalLM", biases=("attention_bias", "mlp_bias")),
    "mistral": Family("MistralForCausalLM", defaults={"num_key_value_heads": 8, "sliding_window": 4096}, windows="all"),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        defaults={"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2e6},
        biases=("attention_bias", "mlp_bias"),
        windows="optional",
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        defaults={
            **_GEMMA_DEFAULTS,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
        },
        shared=_GEMMA_SHARED,
        keys=_SOFTCAPS,
        biases=("attention_bias",),
        act_key="hidden_activation",
        windows="pattern",
        gemma=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        defaults={
            **_GEMMA_DEFAULTS,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window_pattern": 6,
        },
        shared={**_GEMMA_SHARED, "qk_norm": "head"},
        keys=_SOFTCAPS,
        biases=("attention_bias",),
        act_key="hidden_activation",
        windows="pattern",
        gemma=True,
    ),
    "phi3": Family("Phi3ForCausalLM", defaults={"rms_norm_eps": 1e-5}, windows="all", partial_rotary=True, fused=True),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        defaults={"rms_norm_eps": 1e-5},
        shared={"norms_before": False, "norms_after": True, "qk_norm": "projection"},
        biases=("attention_bias",),
    ),
    "granite": Family(
        "GraniteForCausalLM",
        defaults={"attention_multiplier": 1.0},
        keys={
            "embedding_multiplier": "embedding_multiplier",
            "residual_multiplier": "residual_multiplier",
            "logits_scaling": "logits_scaling",
            "attention_scale": "attention_multiplier",
        },
        biases=("attention_bias", "mlp_bias"),
    ),
}
"""By `model_type`."""


def family_of(trunk: TrunkConfig) -> str:
    """The `model_type` that a trunk is exported as.

    Raises:
        ConversionError: the trunk names a family that is unknown.
    """
    family = trunk.family or ("qwen2" if trunk.qkv_bias else "llama")
    if family not in FAMILIES:
        raise ConversionError(f"trunk.family: expected one of {', '.join(FAMILIES)}, found {family!r}")
    return family


@refuse_wrong_types
def config_from_json(values: Mapping[str, Any], source: str) -> tuple[TrunkConfig, int]:
    """A trunk's config and the rows of its vocabulary, from the content of transformers' `config.json`.

    Args:
        values: the content. Of a Gemma 3 that also sees, the part about text is taken.
        source: the file's name, for errors.

    Raises:
        ConversionError: lists every field that is missing, or that asks for something our trunk does not support.
    """
    if values.get("model_type") == "gemma3" and isinstance(values.get("text_config"), Mapping):
        values = {**values["text_config"], "model_type": "gemma3_text"}
    name = values.get("model_type")
    family = FAMILIES.get(str(name), Family(""))
    wrong = [] if family.architecture else [f"model_type: expected one of {', '.join(FAMILIES)}, found {name!r}"]
    values = {**family.defaults, **values}
    needed = (*_SIZES.values(), "max_position_embeddings", "vocab_size")
    wrong += [f"{key}: missing" for key in needed if key not in values]
    if values.get("use_bidirectional_attention"):
        wrong.append("use_bidirectional_attention: expected false, found true")
    if quantized := values.get("quantization_config"):
        method = quantized.get("quant_method", quantized) if isinstance(quantized, Mapping) else quantized
        wrong.append(f"quantization_config: expected weights in float32, bfloat16 or float16, found {method}")
    if wrong:
        raise ConversionError(f"{source}:\n" + "\n".join(wrong))
    sizes = {ours: values[theirs] for ours, theirs in _SIZES.items()}
    attention_bias, mlp_bias = (
        key in family.biases and bool(values.get(key, False)) for key in ("attention_bias", "mlp_bias")
    )
    trunk = {
        "family": name,
        **sizes,
        "num_kv_heads": values.get("num_key_value_heads") or sizes["num_heads"],
        "head_dim": values.get("head_dim") or sizes["hidden_size"] // sizes["num_heads"],
        "hidden_act": values.get(family.act_key) or "silu",
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "qkv_bias": attention_bias,
        "out_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
        **{ours: values[theirs] for ours, theirs in family.keys.items() if theirs in values},
        **_windows(values, family, sizes["num_layers"], wrong),
        **_rope(values, family, wrong),
        **family.shared,
    }
    if family.gemma:
        trunk["embedding_multiplier"] = sizes["hidden_size"] ** 0.5
        trunk["attention_scale"] = values["query_pre_attn_scalar"] ** -0.5
    if name == "smollm3":
        interval = values.get("no_rope_layer_interval", 4)
        layers = range(sizes["num_layers"])
        uses_rope = values.get("no_rope_layers") or [(layer + 1) % interval for layer in layers]
        trunk["no_rope_layers"] = tuple(layer for layer in layers if not uses_rope[layer])
    original = (trunk["rope_scaling"] or {}).get("original_max_position")
    is_longrope = original is not None and trunk["rope_scaling"]["kind"] == "longrope"
    trunk["max_position"] = min(
        MAX_POSITION, values["max_position_embeddings"], original if is_longrope else MAX_POSITION
    )
    if not wrong:
        try:
            return build_config(TrunkConfig, trunk, source), values["vocab_size"]
        except ConfigError as error:
            wrong.append(str(error))
    raise ConversionError(f"{source}:\n" + "\n".join(wrong))


def config_to_json(trunk: TrunkConfig, rows: int) -> dict[str, Any]:
    """The content of a `config.json` for transformers, of the trunk's own family; `rows` is that of the vocabulary.

    Raises:
        ConversionError: lists every property of the trunk that its family does not have.
    """
    name = family_of(trunk)
    family = FAMILIES[name]
    max_position = trunk.max_position
    if (scaling := trunk.rope_scaling) and scaling.original_max_position:
        # transformers warns of a maximum below the original one.
        max_position = max(max_position, round(scaling.original_max_position * scaling.factor))
    values = {
        "architectures": [family.architecture],
        "model_type": name,
        "vocab_size": rows,
        **{theirs: getattr(trunk, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": trunk.num_kv_heads,
        "head_dim": trunk.head_dim,
        family.act_key: trunk.hidden_act,
        "max_position_embeddings": max_position,
        "rms_norm_eps": trunk.norm_eps,
        "tie_word_embeddings": trunk.tie_word_embeddings,
        # Where it is missing, some families take a token that a small vocabulary does not have.
        "pad_token_id": None,
        **{key: getattr(trunk, field) for key, field in _BIAS_FIELDS.items() if key in family.biases},
        **{theirs: getattr(trunk, ours) for ours, theirs in family.keys.items()},
        **_windows_to_json(trunk, family),
        **_rope_to_json(trunk, name),
    }
    if family.gemma and trunk.attention_scale is not None:
        values["query_pre_attn_scalar"] = round(trunk.attention_scale**-2)
    if name == "smollm3":
        values["no_rope_layers"] = [int(layer not in trunk.no_rope_layers) for layer in range(trunk.num_layers)]
    if name == "granite" and trunk.attention_scale is None:
        values["attention_multiplier"] = trunk.head_dim**-0.5
    again, _ = config_from_json(values, "the exported config.json")
    again = replace(again, family=trunk.family, max_position=trunk.max_position)
    if lost := [f.name for f in fields(TrunkConfig) if getattr(again, f.name) != getattr(trunk, f.name)]:
        raise ConversionError(
            f"transformers' {name} has no such trunk:\n"
            + "\n".join(f"trunk.{f}: expected {getattr(again, f)}, found {getattr(trunk, f)}" for f in lost)
        )
    return values


_BIAS_FIELDS = {"attention_bias": "qkv_bias", "mlp_bias": "mlp_bias"}


def _windows(values: Mapping[str, Any], family: Family, layers: int, wrong: list[str]) -> dict[str, Any]:
    """`sliding_window` and `sliding_layers`, as transformers finds them."""
    kinds, window = values.get("layer_types"), values.get("sliding_window")
    known = {"full_attention"} if family.windows == "none" else {"full_attention", "sliding_attention"}
    if strange := set(kinds or ()) - known:
        wrong.append(f"layer_types: expected {' or '.join(sorted(known))}, found {', '.join(map(str, strange))}")
    if window is None or family.windows == "none":
        return {}
    if family.windows == "optional" and not values.get("use_sliding_window", False):
        return {}
    if family.windows == "all":
        sliding: Sequence[bool] = [True] * layers
    elif kinds:
        sliding = [kind == "sliding_attention" for kind in kinds]
    elif family.windows == "pattern":
        sliding = [bool((layer + 1) % values["sliding_window_pattern"]) for layer in range(layers)]
    else:
        sliding = [layer >= values.get("max_window_layers", 28) for layer in range(layers)]
    return {"sliding_window": window, "sliding_layers": tuple(i for i, slides in enumerate(sliding) if slides)}


def _windows_to_json(trunk: TrunkConfig, family: Family) -> dict[str, Any]:
    sliding = [layer in trunk.sliding_layers for layer in range(trunk.num_layers)]
    match family.windows:
        case "none":
            return {}
        case "all":
            return {"sliding_window": trunk.sliding_window if all(sliding) else None}
        case "optional":
            values: dict[str, Any] = {"use_sliding_window": any(sliding)}
        case "pattern":
            values = {}
    kinds = ["sliding_attention" if slides else "full_attention" for slides in sliding]
    return {**values, "sliding_window": trunk.sliding_window, "layer_types": kinds}


def _rope(values: Mapping[str, Any], family: Family, wrong: list[str]) -> dict[str, Any]:
    """The fields about rope, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    name = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    rope, local_theta = values.get(name) or {}, values.get("rope_local_base_freq")
    if "full_attention" in rope:
        local_theta = (rope.get("sliding_attention") or {}).get("rope_theta", local_theta)
        rope = rope["full_attention"] or {}
    factor = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if factor not in (None, 1) and not family.partial_rotary:
        wrong.append(f"partial_rotary_factor: expected 1, found {factor}")
    found = {
        "rope_theta": rope.get("rope_theta", values.get("rope_theta", 10000.0)),
        "rope_local_theta": local_theta,
        "partial_rotary_factor": factor or 1.0,
        "rope_scaling": None,
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    # Early Phi-3 files call it by the name of the method's first version.
    kind = "longrope" if kind == "su" else kind
    if kind == "default":
        return found
    if kind not in ROPE_FIELDS:
        kinds = ", ".join(ROPE_FIELDS)
        wrong.append(f"{name}.rope_type: expected default, {kinds}, found {kind!r}")
        return found
    if rope.get("truncate", True) is not True:
        wrong.append(f"{name}.truncate: expected true, found {rope['truncate']}")
    stated = {ours: rope.get(_ROPE_KEYS.get(ours, ours)) for ours in ROPE_FIELDS[kind]}
    factor = rope.get("factor")
    if kind in ("yarn", "longrope"):
        original = stated["original_max_position"] = (
            stated["original_max_position"]
            or values.get("original_max_position_embeddings")
            or values["max_position_embeddings"]
        )
        factor = factor or values["max_position_embeddings"] / original
        stated["attention_factor"] = stated["attention_factor"] or _attention_factor(kind, factor, original, rope)
    if kind == "yarn":
        stated |= {"beta_fast": stated["beta_fast"] or 32.0, "beta_slow": stated["beta_slow"] or 1.0}
    scaling = {"kind": kind, "factor": factor, **stated}
    try:
        build_config(RopeScaling, scaling, name)
    except ConfigError as error:
        wrong.append(str(error))
    return {**found, "rope_scaling": scaling}


def _attention_factor(kind: str, factor: float, original: int, rope: Mapping[str, Any]) -> float:
    """What transformers multiplies queries and keys with where the file does not say."""
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    one, other = (0.1 * (rope.get(key) or 0) * math.log(factor) + 1 for key in ("mscale", "mscale_all_dim"))
    return one / other if rope.get("mscale") and rope.get("mscale_all_dim") else 0.1 * math.log(factor) + 1


def _rope_to_json(trunk: TrunkConfig, name: str) -> dict[str, Any]:
    """For transformers 5, which reads `rope_parameters`, and for those before, which read the others."""
    scaling: dict[str, Any] = {"rope_type": "default"}
    if rope := trunk.rope_scaling:
        stated = {ours: getattr(rope, ours) for ours in ROPE_FIELDS[rope.kind]}
        stated = {ours: list(value) if isinstance(value, tuple) else value for ours, value in stated.items()}
        scaling = {"rope_type": rope.kind, "factor": rope.factor}
        scaling |= {_ROPE_KEYS.get(ours, ours): value for ours, value in stated.items()}
    old = {"rope_theta": trunk.rope_theta, "rope_scaling": scaling if trunk.rope_scaling else None}
    parameters = {"rope_theta": trunk.rope_theta, **scaling}
    if FAMILIES[name].partial_rotary:
        old["partial_rotary_factor"] = parameters["partial_rotary_factor"] = trunk.partial_rotary_factor
        if trunk.rope_scaling:
            old["original_max_position_embeddings"] = trunk.rope_scaling.original_max_position
    if trunk.rope_local_theta is None:
        return {**old, "rope_parameters": parameters}
    local = {"rope_type": "default", "rope_theta": trunk.rope_local_theta}
    return {
        **old,
        "rope_local_base_freq": trunk.rope_local_theta,
        "rope_parameters": {"full_attention": parameters, "sliding_attention": local},
    }
