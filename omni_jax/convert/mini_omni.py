"""Mini-Omni's published format: a folder with lit_model.pth, model_config.yaml and the tokenizer.

`lit_model.pth` is a state dict of the litgpt-style module: one table of all tokens, attention with q, k and v in
one matrix, whose rows are grouped by key/value head. Whisper and SNAC are not in it.

Letters: D hidden, N query heads, K key/value heads, G = N/K, H head dim, F intermediate, C codebooks, Vt and Va rows
of the text table and of one codebook's, E inputs of the adapter.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from omni_jax.checkpoint.release import MINI_OMNI_CONFIG
from omni_jax.checkpoint.safetensors_io import LazyTensor, Tensors
from omni_jax.config.load import build_config
from omni_jax.config.model import AudioEncoderConfig, CodecConfig, ModelConfig, TrunkConfig
from omni_jax.convert.files import open_state_dict, refuse_wrong_types, write_state_dict
from omni_jax.convert.table import (
    Entry,
    pad,
    rename,
    reshape,
    to_ours,
    to_theirs,
    without_tied_head,
)
from omni_jax.errors import ConfigError, ConversionError
from omni_jax.input_files import read_yaml
from omni_jax.vocab import NUM_CODEBOOKS, Vocab

WEIGHTS = "lit_model.pth"
CONFIG = MINI_OMNI_CONFIG

TEXT_SPECIALS = 64
"""A constant of the published code, which its config does not hold.

`hf_config`, the one free field of the config, holds what the published code has no field for: another number of text
specials, an adapter that stacks feature frames, one that is narrower than the trunk's MLPs.
"""

EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
_TTS_ADAPTER = "transformer.post_adapter"

_REQUIRED = ("n_layer", "n_head", "n_embd", "intermediate_size", "padded_vocab_size")

_FIXED: dict[str, tuple[Any, Any]] = {
    "scale_embeddings": (False, False),
    "rotary_percentage": (1.0, 0.25),
    "parallel_residual": (False, True),
    "bias": (False, True),
    "lm_head_bias": (False, False),
    "shared_attention_norm": (False, False),
    "norm_class_name": ("RMSNorm", "LayerNorm"),
    "mlp_class_name": ("LLaMAMLP", "GptNeoxMLP"),
    "rope_condense_ratio": (1, 1),
    "n_expert": (0, 0),
    "pos_type": ("rope", "rope"),
}
"""Fields for which our model supports one value: that value, and the published code's default."""

_OPTIONAL: dict[str, Any] = {
    "n_query_groups": None,
    "head_size": None,
    "add_qkv_bias": None,
    "norm_eps": 1e-5,
    "rope_base": 10000,
    "block_size": 4096,
    "text_vocab_size": 152000,
    "audio_vocab_size": 4160,
    "cat_audio_vocab_size": 29120,
    "whisper_adapter_dim": 768,
    "asr_adapter": "llamamlp",
    "tie_word_embeddings": False,
    "post_adapter": False,
    "post_adapter_layers": 6,
    "hf_config": None,
    "name": "",
}
"""Fields that we read, and the published code's defaults."""

_IGNORED = (
    "attn_dropout",
    "force_align",
    "gelu_approximate",
    "n_expert_per_token",
    "padding_multiple",
    "prompt_vocab_size",
    "use_pretrain_phoneme_emb",
    "vocab_size",
)
"""Fields without effect on the loaded model."""


@refuse_wrong_types
def config_from_yaml(
    values: Mapping[str, Any], audio_encoder: AudioEncoderConfig, codec: CodecConfig, *, tts_adapter: bool, source: str
) -> ModelConfig:
    """The config of a model from the content of `model_config.yaml`.

    Args:
        values: the content.
        audio_encoder: Whisper's config, which the file does not hold.
        codec: the codec's config.
        tts_adapter: whether the weights have a TTS adapter. A config may announce one that the weights lack; the
            published code then switches it off.
        source: the file's name, for errors.

    Raises:
        ConversionError: lists every field that is missing, unknown, inconsistent or has a value that our model does
            not support.
    """
    field = with_defaults(values)
    hints = field["hf_config"] or {}
    stack = hints.get("adapter_stack", 1)
    # Each check relies on the ones before it.
    for wrong in (
        lambda: _unsupported_fields(values),
        lambda: _wrong_types(field),
        lambda: _inconsistent_sizes(field, audio_encoder.hidden_size * stack),
    ):
        if lines := wrong():
            raise ConversionError(f"{source}:\n" + "\n".join(lines))
    text_specials = hints.get("text_specials", TEXT_SPECIALS)
    ours = {
        "audio_encoder": audio_encoder,
        "adapter": {
            "kind": field["asr_adapter"],
            # Before 0.2 the hint had another name.
            "intermediate_size": hints.get(
                "adapter_intermediate_size", hints.get("adapter_ffn", field["intermediate_size"])
            ),
            "stack": stack,
        },
        "trunk": _trunk_values(field),
        "vocab": {
            "text": field["text_vocab_size"] - text_specials,
            "text_specials": text_specials,
            "audio": codec.codebook_size,
            "audio_specials": field["audio_vocab_size"] - codec.codebook_size,
        },
        "codec": codec,
        "tts_adapter_layers": field["post_adapter_layers"] if field["post_adapter"] and tts_adapter else 0,
    }
    try:
        return build_config(ModelConfig, ours, source)
    except ConfigError as error:
        raise ConversionError(str(error)) from None


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `model_config.yaml` with the published code's defaults for what it leaves out."""
    return {**_OPTIONAL, **values}


def _trunk_values(field: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": field["n_embd"],
        "num_layers": field["n_layer"],
        "num_heads": field["n_head"],
        "num_kv_heads": field["n_query_groups"] or field["n_head"],
        "head_dim": field["head_size"] or field["n_embd"] // field["n_head"],
        "intermediate_size": field["intermediate_size"],
        "rope_theta": field["rope_base"],
        "norm_eps": field["norm_eps"],
        "qkv_bias": field["add_qkv_bias"] or False,
        "tie_word_embeddings": field["tie_word_embeddings"],
        "max_position": field["block_size"],
    }


def _unsupported_fields(values: Mapping[str, Any]) -> list[str]:
    wrong = [f"{name}: missing" for name in _REQUIRED if name not in values]
    known = {*_REQUIRED, *_FIXED, *_OPTIONAL, *_IGNORED}
    wrong += [f"{name}: unknown field" for name in values if name not in known]
    for name, (only, default) in _FIXED.items():
        if (found := values.get(name, default)) != only:
            wrong.append(f"{name}: expected {only!r}, found {found!r}" + ("" if name in values else " (default)"))
    if "Gemma" in str(values.get("name")):
        wrong.append(f"name: expected no Gemma, whose norms add one to their scale, found {values['name']!r}")
    return wrong


def _wrong_types(field: Mapping[str, Any]) -> list[str]:
    sizes = ("text_vocab_size", "audio_vocab_size", "cat_audio_vocab_size", "padded_vocab_size", "n_embd", "n_head")
    return [f"{name}: expected a number, found {field[name]!r}" for name in sizes if type(field[name]) is not int]


def _inconsistent_sizes(field: Mapping[str, Any], adapter_inputs: int) -> list[str]:
    expected = {
        "cat_audio_vocab_size": NUM_CODEBOOKS * field["audio_vocab_size"],
        "padded_vocab_size": field["text_vocab_size"] + field["cat_audio_vocab_size"],
        "whisper_adapter_dim": adapter_inputs,
    }
    return [f"{name}: expected {size}, found {field[name]!r}" for name, size in expected.items() if field[name] != size]


_TRUNK_FIELDS = (
    "family",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "rope_theta",
    "norm_eps",
    "qkv_bias",
    "tie_word_embeddings",
    "max_position",
)
"""What may differ from the defaults of TrunkConfig."""


def unsupported(config: ModelConfig) -> list[str]:
    """One line for each property of a model that the published code does not support."""
    trunk, wrong = config.trunk, []
    if config.adapter.kind == "llamamlp" and config.adapter.intermediate_size > trunk.intermediate_size:
        wrong.append(
            "adapter.intermediate_size: expected at most trunk.intermediate_size, which is "
            f"{trunk.intermediate_size}, found {config.adapter.intermediate_size}"
        )
    if (trunk.sliding_window or 0) >= trunk.max_position or not trunk.sliding_layers:
        # A window as long as the context changes nothing.
        trunk = replace(trunk, sliding_window=None, sliding_layers=())
    for name in (field.name for field in fields(TrunkConfig) if field.name not in _TRUNK_FIELDS):
        if (found := getattr(trunk, name)) != (expected := getattr(TrunkConfig(), name)):
            wrong.append(f"trunk.{name}: expected {expected}, found {found}")
    return wrong


def config_to_yaml(config: ModelConfig) -> dict[str, Any]:
    """The content of `model_config.yaml` for a model; the inverse of `config_from_yaml`.

    The published code has no field for some properties. They are in `hf_config`, and it computes the same: it sees an
    adapter that stacks feature frames as one for a wider encoder, to be given stacked frames, and an adapter that is
    narrower than the trunk's MLPs as one padded with zeros.

    Raises:
        ConversionError: lists every property of the model that the published code does not support.
    """
    trunk, vocab = config.trunk, Vocab(config.vocab)
    gated = config.adapter.kind == "llamamlp"
    if wrong := unsupported(config):
        raise ConversionError("the published Mini-Omni code has no such model:\n" + "\n".join(wrong))
    hints: dict[str, Any] = {}
    if config.vocab.text_specials != TEXT_SPECIALS:
        hints["text_specials"] = config.vocab.text_specials
    if config.adapter.stack != 1:
        hints["adapter_stack"] = config.adapter.stack
    if gated and config.adapter.intermediate_size != trunk.intermediate_size:
        hints["adapter_intermediate_size"] = config.adapter.intermediate_size
    theta = trunk.rope_theta
    return {
        "name": "mini-omni",
        "hf_config": hints,
        "block_size": trunk.max_position,
        "vocab_size": config.vocab.text,
        "padded_vocab_size": vocab.rows,
        "n_layer": trunk.num_layers,
        "n_head": trunk.num_heads,
        "n_query_groups": trunk.num_kv_heads,
        "n_embd": trunk.hidden_size,
        "head_size": trunk.head_dim,
        "intermediate_size": trunk.intermediate_size,
        "add_qkv_bias": trunk.qkv_bias,
        "norm_eps": trunk.norm_eps,
        "rope_base": int(theta) if theta == int(theta) else theta,
        **{name: only for name, (only, _) in _FIXED.items()},
        "text_vocab_size": vocab.text_rows,
        "audio_vocab_size": vocab.audio_rows,
        "cat_audio_vocab_size": NUM_CODEBOOKS * vocab.audio_rows,
        "whisper_adapter_dim": config.audio_encoder.hidden_size * config.adapter.stack,
        "asr_adapter": config.adapter.kind,
        "tie_word_embeddings": trunk.tie_word_embeddings,
        "post_adapter": config.tts_adapter_layers > 0,
        "post_adapter_layers": config.tts_adapter_layers or _OPTIONAL["post_adapter_layers"],
    }


def from_state(state: Tensors, config: ModelConfig, source: str) -> dict[str, LazyTensor]:
    """The tensors of a state dict in our layout, each of its own type; the audio encoder is not among them.

    Raises:
        ConversionError: lists every tensor that is missing, unknown or misshapen; or the config ties the head to the
            embedding and they differ.
    """
    table = _table(config)
    if config.trunk.tie_word_embeddings:
        state = without_tied_head(table, state, source, head=HEAD, embedding=EMBEDDING)
    return to_ours(table, state, source)


def to_state(tensors: Tensors, config: ModelConfig, source: str) -> dict[str, LazyTensor]:
    """A model's tensors as the published state dict; the inverse of `from_state`. The audio encoder is left out.

    A tied head is in the result under both names, as the same object.

    Raises:
        ConversionError: lists every tensor that is missing, unknown or misshapen.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("audio_encoder.")}
    state = to_theirs(_table(config), tensors, source)
    if config.trunk.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    return state


def has_tts_adapter(state: Tensors) -> bool:
    """Whether a state dict has a TTS adapter."""
    return any(name.startswith(_TTS_ADAPTER) for name in state)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `model_config.yaml`.

    Raises:
        ConversionError: it is not YAML with named fields.
    """
    file = folder / CONFIG
    values = read_yaml(file, ConversionError)
    if not isinstance(values, dict):
        raise ConversionError(f"{file}: expected fields and values, found {type(values).__name__}")
    return values


def read_state(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of `lit_model.pth`; none is read yet.

    Raises:
        ConversionError: the file is not a state dict, or holds more than tensors.
        MissingExtraError: torch is not installed.
    """
    return open_state_dict(folder / WEIGHTS)


def write(folder: Path, config: ModelConfig, state: Tensors, original: Path | None = None) -> None:
    """Write `lit_model.pth` and `model_config.yaml`; memory holds the whole state once, which torch needs.

    Args:
        folder: exists.
        config: the model's config.
        state: see `to_state`.
        original: the `model_config.yaml` that the model was imported with, which is written as it is unless the model
            has become another one.

    Raises:
        ConversionError: the published code has no such model, or `original` is damaged.
        MissingExtraError: torch is not installed.
    """
    values = config_to_yaml(config)
    if original is not None and _describes(original, config):
        shutil.copyfile(original, folder / CONFIG)
    else:
        (folder / CONFIG).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    write_state_dict(folder / WEIGHTS, state)


def _describes(file: Path, config: ModelConfig) -> bool:
    """Whether a `model_config.yaml` is one of this model."""
    encoder, codec, tts_adapter = config.audio_encoder, config.codec, config.tts_adapter_layers > 0
    values = read_config(file.parent)
    try:
        found = config_from_yaml(values, encoder, codec, tts_adapter=tts_adapter, source=str(file))
    except ConversionError:
        return False
    return config_to_yaml(found) == config_to_yaml(config)


def _table(config: ModelConfig) -> list[Entry]:
    """Every tensor except Whisper's and a tied head."""
    trunk, adapter, vocab = config.trunk, config.adapter, Vocab(config.vocab)
    D, C, Va = trunk.hidden_size, NUM_CODEBOOKS, vocab.audio_rows
    table = [_tokens(EMBEDDING, "embed", vocab, D), rename("transformer.ln_f.weight", "norm.scale", (D,))]
    if not trunk.tie_word_embeddings:
        table.append(_tokens(HEAD, "head", vocab, D))
    E = config.audio_encoder.hidden_size * adapter.stack
    if adapter.kind == "llamamlp":
        sizes = (E, adapter.intermediate_size, D)
        table += _gated_mlp("whisper_adapter", "adapter.map", *sizes, padded=trunk.intermediate_size)
    else:
        table.append(rename("whisper_adapter.weight", "adapter.map.weight", (D, E)))
        table.append(rename("whisper_adapter.bias", "adapter.map.bias", (D,)))
    for layer in range(trunk.num_layers):
        table += _block(f"transformer.h.{layer}", f"trunk.layers.{layer}", trunk)
    for layer in range(config.tts_adapter_layers):
        table += _block(f"{_TTS_ADAPTER}.{layer}", f"tts_adapter.blocks.layers.{layer}", trunk)
    if config.tts_adapter_layers:
        table.append(rename(f"{_TTS_ADAPTER}_audio_ln.weight", "tts_adapter.norm.scale", (D,)))
        table.append(reshape(f"{_TTS_ADAPTER}_audio_lm_head.weight", "tts_adapter.head", (C * Va, D), (C, Va, D)))
    return table


def _tokens(theirs: str, ours: str, vocab: Vocab, D: int) -> Entry:
    """One table of all tokens: the text rows, then those of each codebook."""
    Vt, Va, C = vocab.text_rows, vocab.audio_rows, NUM_CODEBOOKS
    return Entry(
        {theirs: (vocab.rows, D)},
        {f"{ours}.text": (Vt, D), f"{ours}.audio": (C, Va, D)},
        lambda rows: (rows[:Vt], rows[Vt:].reshape(C, Va, D)),
        lambda text, audio: (np.concatenate([text, audio.reshape(C * Va, D)]),),
    )


def _block(theirs: str, ours: str, trunk: TrunkConfig) -> list[Entry]:
    D, N, H, F = trunk.hidden_size, trunk.num_heads, trunk.head_dim, trunk.intermediate_size
    return [
        rename(f"{theirs}.norm_1.weight", f"{ours}.attention_norm.scale", (D,)),
        _fused(f"{theirs}.attn.attn", f"{ours}.attention", "weight", trunk, (D,)),
        *([_fused(f"{theirs}.attn.attn", f"{ours}.attention", "bias", trunk, ())] if trunk.qkv_bias else []),
        reshape(f"{theirs}.attn.proj.weight", f"{ours}.attention.out.weight", (D, N * H), (D, N, H)),
        rename(f"{theirs}.norm_2.weight", f"{ours}.mlp_norm.scale", (D,)),
        *_gated_mlp(f"{theirs}.mlp", f"{ours}.mlp", D, F, D, padded=F),
    ]


def _fused(theirs: str, ours: str, kind: str, trunk: TrunkConfig, inputs: tuple[int, ...]) -> Entry:
    """Rows [(K, G + 2, H)]: of each key/value head its query heads, its key, its value."""
    N, K, H = trunk.num_heads, trunk.num_kv_heads, trunk.head_dim
    G = N // K

    def split(fused: np.ndarray) -> tuple[np.ndarray, ...]:
        heads = fused.reshape(K, G + 2, H, *inputs)
        return heads[:, :G].reshape(N, H, *inputs), heads[:, G], heads[:, G + 1]

    def fuse(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> tuple[np.ndarray]:
        heads = [query.reshape(K, G, H, *inputs), key[:, None], value[:, None]]
        return (np.concatenate(heads, axis=1).reshape(-1, *inputs),)

    shapes = {"q": (N, H, *inputs), "k": (K, H, *inputs), "v": (K, H, *inputs)}
    return Entry(
        {f"{theirs}.{kind}": ((N + 2 * K) * H, *inputs)},
        {f"{ours}.{name}.{kind}": shape for name, shape in shapes.items()},
        split,
        fuse,
    )


def _gated_mlp(theirs: str, ours: str, inputs: int, F: int, outputs: int, *, padded: int) -> list[Entry]:
    """A gated MLP whose F intermediate units are padded to `padded` in theirs."""
    return [
        pad(f"{theirs}.fc_1.weight", f"{ours}.gate.weight", (padded, inputs), (F, inputs)),
        pad(f"{theirs}.fc_2.weight", f"{ours}.up.weight", (padded, inputs), (F, inputs)),
        pad(f"{theirs}.proj.weight", f"{ours}.down.weight", (outputs, padded), (outputs, F)),
    ]
