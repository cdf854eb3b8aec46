"""Language models of the Qwen2 and Llama families: folders of transformers to and from our trunk. No torch.

Letters: D hidden, N query heads, K key/value heads, H head dim, F intermediate, V rows of the language model's own
vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.checkpoint.safetensors_io import LazyTensor, Tensors, write_safetensors
from omni_jax.config.load import build_config
from omni_jax.config.model import RopeScaling, TrunkConfig
from omni_jax.convert.files import (
    CONFIG,
    WEIGHTS,
    common_dtype,
    open_safetensors,
    read_json,
    refuse_wrong_types,
    write_json,
)
from omni_jax.convert.table import (
    Entry,
    rename,
    reshape,
    to_ours,
    to_theirs,
    without_tied_head,
)
from omni_jax.errors import ConfigError, ConversionError

MAX_POSITION = 2048
"""Longest context of a new speech model, as in Mini-Omni. Language models announce far more, and caches have that
length."""

_FIELDS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_position": "max_position_embeddings",
}
"""Required fields of TrunkConfig and their names in transformers."""

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position": "original_max_position_embeddings",
}
"""Fields of RopeScaling and their names in transformers."""


@refuse_wrong_types
def config_from_json(values: Mapping[str, Any], state: Tensors, source: str) -> tuple[TrunkConfig, int]:
    """A trunk's config and the rows of its vocabulary, from the content of transformers' `config.json`.

    Args:
        values: the content.
        state: the tensors, which show whether an `attention_bias` includes the output projection.
        source: the file's name, for errors.

    Raises:
        ConversionError: lists every field that is missing, or that asks for something our trunk does not support.
    """
    wrong: list[str] = []
    family = values.get("model_type")
    if family not in ("qwen2", "llama"):
        wrong.append(f"model_type: expected qwen2 or llama, found {family!r}")
    wrong += [f"{name}: missing" for name in (*_FIELDS.values(), "vocab_size") if name not in values]
    for name, only in (("hidden_act", "silu"), ("mlp_bias", False), ("use_sliding_window", False)):
        if values.get(name, only) != only:
            wrong.append(f"{name}: expected {only!r}, found {values[name]!r}")
    if strange := set(values.get("layer_types") or ()) - {"full_attention"}:
        wrong.append(f"layer_types: expected full_attention only, found {', '.join(map(str, strange))}")
    biased = family == "qwen2" or bool(values.get("attention_bias", False))
    if family == "llama" and biased and any(name.endswith(".self_attn.o_proj.bias") for name in state):
        wrong.append("attention_bias: expected biases of q, k and v at most, found one of the output")
    theta, scaling = _rope(values, wrong)
    if wrong:
        raise ConversionError(f"{source}:\n" + "\n".join(wrong))
    sizes = {ours: values[theirs] for ours, theirs in _FIELDS.items()}
    trunk = {
        **sizes,
        "max_position": min(MAX_POSITION, sizes["max_position"]),
        "num_kv_heads": values.get("num_key_value_heads") or sizes["num_heads"],
        "head_dim": values.get("head_dim") or sizes["hidden_size"] // sizes["num_heads"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "qkv_bias": biased,
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
    }
    try:
        return build_config(TrunkConfig, trunk, source), values["vocab_size"]
    except ConfigError as error:
        raise ConversionError(str(error)) from None


def config_to_json(trunk: TrunkConfig, rows: int) -> dict[str, Any]:
    """The content of a `config.json` for transformers: of a Qwen2 for a trunk with biases, of a Llama without."""
    family, name = ("qwen2", "Qwen2ForCausalLM") if trunk.qkv_bias else ("llama", "LlamaForCausalLM")
    rope: dict[str, Any] = {"rope_type": "default"}
    max_position = trunk.max_position
    if scaling := trunk.rope_scaling:
        rope = {"rope_type": "llama3", **{theirs: getattr(scaling, ours) for ours, theirs in _SCALING.items()}}
        # transformers warns of a maximum below the original one.
        max_position = max(max_position, round(scaling.original_max_position * scaling.factor))
    values = {
        "architectures": [name],
        "model_type": family,
        "vocab_size": rows,
        "hidden_size": trunk.hidden_size,
        "intermediate_size": trunk.intermediate_size,
        "num_hidden_layers": trunk.num_layers,
        "num_attention_heads": trunk.num_heads,
        "num_key_value_heads": trunk.num_kv_heads,
        "head_dim": trunk.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_position,
        "rms_norm_eps": trunk.norm_eps,
        # transformers 4 reads the first two, transformers 5 the third.
        "rope_theta": trunk.rope_theta,
        "rope_scaling": rope if trunk.rope_scaling else None,
        "rope_parameters": {"rope_theta": trunk.rope_theta, **rope},
        "tie_word_embeddings": trunk.tie_word_embeddings,
    }
    return values if trunk.qkv_bias else {**values, "attention_bias": False, "mlp_bias": False}


def read(folder: Path) -> tuple[TrunkConfig, int, dict[str, LazyTensor]]:
    """Read a folder as `save_pretrained` writes it.

    Returns:
        The trunk's config, the rows of the vocabulary (V), and the tensors by our names, none read yet: those of the
        trunk and the norm, `embed.text` [V, D], and `head.text` [V, D] unless the head is tied.

    Raises:
        ConversionError: lists what is missing, unknown, misshapen or not supported.
        CheckpointError: a file is damaged.
    """
    values = read_json(folder / CONFIG)
    # Old files hold the frequencies of rope, which follow from the config.
    state = {
        name: tensor for name, tensor in open_safetensors(folder).items() if not name.endswith("rotary_emb.inv_freq")
    }
    trunk, rows = config_from_json(values, state, str(folder / CONFIG))
    return trunk, rows, from_state(state, trunk, rows, str(folder))


def write(folder: Path, trunk: TrunkConfig, rows: int, tensors: Tensors) -> None:
    """Write `config.json` and `model.safetensors`; the inverse of `read`.

    Args:
        folder: exists.
        trunk: the config.
        rows: of the vocabulary.
        tensors: by our names, with `rows` rows in the tables.

    Raises:
        ConversionError: lists every tensor that is missing, unknown or misshapen.
    """
    state = to_theirs(_table(trunk, rows), tensors, "trunk")
    values = config_to_json(trunk, rows)
    # transformers 4 reads the second, transformers 5 the first, and takes that of some tensor where there is none.
    values["dtype"] = values["torch_dtype"] = common_dtype(state) or "float32"
    write_safetensors(folder / WEIGHTS, state)
    write_json(folder / CONFIG, values)


def from_state(state: Tensors, trunk: TrunkConfig, rows: int, source: str) -> dict[str, LazyTensor]:
    """A language model's tensors by our names; see `read`.

    Raises:
        ConversionError: lists every tensor that is missing, unknown or misshapen; or a tied head differs from the
            embedding.
    """
    table = _table(trunk, rows)
    if trunk.tie_word_embeddings and _HEAD in state:
        state = without_tied_head(table, state, source, head=_HEAD, embedding=_EMBEDDING)
    return to_ours(table, state, source)


def extend(tensor: LazyTensor, name: str, text_rows: int, audio: tuple[int, int], seed: int) -> Tensors:
    """Tables of a speech model from a language model's table; new rows are drawn from N(0, the old rows' deviation).

    Rows as large as the old ones weigh as much as any in the average of eight embeddings, and in a head they start
    with scores like those of other tokens.

    Args:
        tensor: [V, D].
        name: `embed` or `head`.
        text_rows: of the new text table; its first V rows are the old ones.
        audio: codebooks and rows per codebook of the new audio table.
        seed: the same seed draws the same rows.

    Returns:
        `{name}.text` [text_rows, D] and `{name}.audio` [codebooks, rows, D], of the type of `tensor`.
    """
    V, D = tensor.shape
    deviation = _deviation(tensor.read())

    def draw(table: str, shape: tuple[int, ...]) -> np.ndarray:
        generator = np.random.default_rng([seed, zlib.crc32(f"{name}.{table}".encode())])
        array = generator.standard_normal(shape, np.float32)
        array *= np.float32(deviation)
        return array.astype(tensor.dtype, copy=False)

    def text() -> np.ndarray:
        return np.concatenate([tensor.read(), draw("text", (text_rows - V, D))])

    return {
        f"{name}.text": LazyTensor((text_rows, D), tensor.dtype, text),
        f"{name}.audio": LazyTensor((*audio, D), tensor.dtype, lambda: draw("audio", (*audio, D))),
    }


def _deviation(table: np.ndarray) -> float:
    """Root mean square of a table, a few rows at a time: in float32 a table may be a quarter of the model."""
    total = sum(
        float(np.square(table[row : row + 4096].astype(np.float32)).sum(dtype=np.float64))
        for row in range(0, len(table), 4096)
    )
    return (total / table.size) ** 0.5


def _rope(values: Mapping[str, Any], wrong: list[str]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    name = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    rope = values.get(name) or {}
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", values.get("partial_rotary_factor")) not in (None, 1, 1.0):
        wrong.append("partial_rotary_factor: expected 1, found another")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        wrong.append(f"{name}.rope_type: expected default or llama3, found {kind!r}")
        return theta, None
    try:
        return theta, build_config(RopeScaling, {ours: rope.get(theirs) for ours, theirs in _SCALING.items()}, name)
    except ConfigError as error:
        wrong.append(str(error))
        return theta, None


def _table(trunk: TrunkConfig, rows: int) -> list[Entry]:
    """Every tensor except a tied head."""
    D, N, K, H, F = trunk.hidden_size, trunk.num_heads, trunk.num_kv_heads, trunk.head_dim, trunk.intermediate_size
    table = [rename(_EMBEDDING, "embed.text", (rows, D)), rename("model.norm.weight", "norm.scale", (D,))]
    if not trunk.tie_word_embeddings:
        table.append(rename(_HEAD, "head.text", (rows, D)))
    for layer in range(trunk.num_layers):
        theirs, ours = f"model.layers.{layer}", f"trunk.layers.{layer}"
        table.append(rename(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.scale", (D,)))
        for name, heads in (("q", N), ("k", K), ("v", K)):
            projection, linear = f"{theirs}.self_attn.{name}_proj", f"{ours}.attention.{name}"
            table.append(reshape(f"{projection}.weight", f"{linear}.weight", (heads * H, D), (heads, H, D)))
            if trunk.qkv_bias:
                table.append(reshape(f"{projection}.bias", f"{linear}.bias", (heads * H,), (heads, H)))
        table += [
            reshape(f"{theirs}.self_attn.o_proj.weight", f"{ours}.attention.out.weight", (D, N * H), (D, N, H)),
            rename(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.scale", (D,)),
            rename(f"{theirs}.mlp.gate_proj.weight", f"{ours}.mlp.gate.weight", (F, D)),
            rename(f"{theirs}.mlp.up_proj.weight", f"{ours}.mlp.up.weight", (F, D)),
            rename(f"{theirs}.mlp.down_proj.weight", f"{ours}.mlp.down.weight", (D, F)),
        ]
    return table
