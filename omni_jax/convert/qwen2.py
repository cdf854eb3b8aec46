"""Language models of the Qwen2 and Llama families between transformers' folders and our trunk. No torch.

Letters: D width, N query heads, K key/value heads, H head size, F ffn width, V rows of the language model's own
vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.checkpoint.safetensors_io import LazyTensor, SafetensorsFile, Tensors
from omni_jax.checkpoint.safetensors_io import write_safetensors as write_tensors
from omni_jax.config.load import build_config
from omni_jax.config.model import RopeScaling, TrunkConfig
from omni_jax.convert.table import (
    CONFIG,
    WEIGHTS,
    Entry,
    check,
    identical,
    read_json,
    same,
    to_ours,
    to_theirs,
    weight_files,
    write_json,
)
from omni_jax.errors import ConfigError, ConversionError

CONTEXT = 2048
"""Positions of a new speech model: Mini-Omni's. Language models announce far more, and caches have that length."""

_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
}
"""Fields of RopeScaling and their names in transformers."""


def config_from_json(values: Mapping[str, Any], state: Tensors, source: str) -> tuple[TrunkConfig, int]:
    """A trunk's shape and the rows of the vocabulary, from the content of transformers' `config.json`.

    Args:
        values: the content.
        state: the tensors, which tell whether an `attention_bias` includes the output.
        source: the file's name, for errors.

    Raises:
        ConversionError: names every field that is missing, or that asks for something our trunk does not do.
    """
    wrong: list[str] = []
    family = values.get("model_type")
    if family not in ("qwen2", "llama"):
        wrong.append(f"model_type: expected qwen2 or llama, found {family!r}")
    required = {
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "ffn": "intermediate_size",
        "rows": "vocab_size",
        "context": "max_position_embeddings",
    }
    wrong += [f"{name}: missing" for name in required.values() if name not in values]
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
    size = {ours: values[theirs] for ours, theirs in required.items()}
    rows = size.pop("rows")
    trunk = {
        **size,
        "num_kv_heads": values.get("num_key_value_heads") or size["heads"],
        "head_dim": values.get("head_dim") or size["width"] // size["heads"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "qkv_bias": biased,
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
        "context": min(CONTEXT, size["context"]),
    }
    try:
        return build_config(TrunkConfig, trunk, source), rows
    except ConfigError as error:
        raise ConversionError(str(error)) from None


def config_to_json(trunk: TrunkConfig, rows: int) -> dict[str, Any]:
    """The content of a `config.json` with which transformers loads a trunk: Qwen2 with biases, Llama without."""
    family, name = ("qwen2", "Qwen2ForCausalLM") if trunk.qkv_bias else ("llama", "LlamaForCausalLM")
    rope: dict[str, Any] = {"rope_type": "default"}
    context = trunk.max_position
    if scaling := trunk.rope_scaling:
        rope = {"rope_type": "llama3", **{theirs: getattr(scaling, ours) for ours, theirs in _SCALING.items()}}
        # What the scaling was made for; transformers complains about less than the original context.
        context = max(context, round(scaling.original_max_position * scaling.factor))
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
        "max_position_embeddings": context,
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
        The trunk's shape, the rows of the vocabulary (V), and its tensors by our names, to be read one by one:
        those of the trunk and the norm, `embed.text` [V, D], and `head.text` [V, D] when the head is not tied.

    Raises:
        ConversionError: names what is missing, unknown, misshapen or not supported.
        CheckpointError: a file is damaged.
    """
    values = read_json(folder / CONFIG)
    state: dict[str, LazyTensor] = {}
    for file in weight_files(folder):
        state.update(SafetensorsFile(folder / file).tensors)
    # Tables that follow from the config; older files have them.
    state = {name: tensor for name, tensor in state.items() if not name.endswith("rotary_emb.inv_freq")}
    trunk, rows = config_from_json(values, state, str(folder / CONFIG))
    return trunk, rows, from_state(state, trunk, rows, str(folder))


def write(folder: Path, trunk: TrunkConfig, rows: int, tensors: Tensors) -> None:
    """Write `config.json` and `model.safetensors`; the inverse of `read`.

    Args:
        folder: exists.
        trunk: its shape.
        rows: of the vocabulary.
        tensors: by our names, with `rows` rows in the tables.

    Raises:
        ConversionError: names every tensor that is missing, unknown or misshapen.
    """
    state = to_theirs(_table(trunk, rows), tensors, "trunk")
    write_tensors(folder / WEIGHTS, state)
    types = {tensor.dtype for tensor in state.values()}
    values = config_to_json(trunk, rows)
    if len(types) == 1:
        values["dtype"] = values["torch_dtype"] = str(types.pop())
    write_json(folder / CONFIG, values)


def from_state(state: Tensors, trunk: TrunkConfig, rows: int, source: str) -> dict[str, LazyTensor]:
    """A language model's tensors by our names; see `read`.

    Raises:
        ConversionError: names every tensor that is missing, unknown or misshapen; or a tied head differs from
            the embedding.
    """
    table = _table(trunk, rows)
    if trunk.tie_word_embeddings and _HEAD in state:
        expected = {entry.theirs: entry.shape for entry in table}
        check(state, {**expected, _HEAD: expected[_EMBED]}, source)
        if not identical(state[_HEAD], state[_EMBED]):
            raise ConversionError(
                f"{source}: {_HEAD}: expected the values of {_EMBED}, as tie_word_embeddings says, found others"
            )
        state = {name: tensor for name, tensor in state.items() if name != _HEAD}
    return to_ours(table, state, source)


def extend(tensor: LazyTensor, name: str, text_rows: int, audio: tuple[int, int], seed: int) -> Tensors:
    """Tables for a speech model from a language model's: new rows drawn from N(0, the old rows' deviation).

    New rows of the size of the old ones neither drown in the average of eight embeddings nor shout in it, and as
    a head they start with scores like any other token's.

    Args:
        tensor: [V, D].
        name: `embed` or `head`.
        text_rows: of the new text table; its first V rows are the old.
        audio: layers and rows per layer of the new audio table.
        seed: the same seed draws the same rows.

    Returns:
        `{name}.text` [text_rows, D] and `{name}.audio` [layers, rows, D], of the type of `tensor`.
    """
    V, D = tensor.shape
    deviation = _deviation(tensor.read())

    def draw(part: str, shape: tuple[int, ...]) -> np.ndarray:
        generator = np.random.default_rng([seed, zlib.crc32(f"{name}.{part}".encode())])
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
    """Every tensor but a tied head."""
    D, N, K, H, F = trunk.hidden_size, trunk.num_heads, trunk.num_kv_heads, trunk.head_dim, trunk.intermediate_size
    table = [same(_EMBED, "embed.text", (rows, D)), same("model.norm.weight", "norm.scale", (D,))]
    if not trunk.tie_word_embeddings:
        table.append(same(_HEAD, "head.text", (rows, D)))
    for layer in range(trunk.num_layers):
        theirs, ours = f"model.layers.{layer}", f"trunk.layers.{layer}"
        table.append(same(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.scale", (D,)))
        for name, heads in (("q", N), ("k", K), ("v", K)):
            projection = f"{theirs}.self_attn.{name}_proj"
            weight = same(f"{projection}.weight", f"{ours}.attention.{name}", (heads * H, D), (heads, H, D))
            table.append(weight)
            if trunk.qkv_bias:
                bias = same(f"{projection}.bias", f"{ours}.attention.{name}_bias", (heads * H,), (heads, H))
                table.append(bias)
        table += [
            same(f"{theirs}.self_attn.o_proj.weight", f"{ours}.attention.out", (D, N * H), (D, N, H)),
            same(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.scale", (D,)),
            same(f"{theirs}.mlp.gate_proj.weight", f"{ours}.mlp.gate", (F, D)),
            same(f"{theirs}.mlp.up_proj.weight", f"{ours}.mlp.up", (F, D)),
            same(f"{theirs}.mlp.down_proj.weight", f"{ours}.mlp.down", (D, F)),
        ]
    return table
