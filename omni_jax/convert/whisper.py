"""Whisper's encoder: folders of transformers to and from our audio encoder. No torch.

Our names are the paths of `omni_jax.model.whisper_encoder.WhisperEncoder`, one tensor per layer, such as
`layers.0.q.weight`. Theirs are those of `WhisperForConditionalGeneration` (`model.encoder.*`) or of `WhisperModel`
(`encoder.*`). The position table is a tensor like the others: the published ones are sinusoids that were rounded to
float16, up to 2.9e-4 from exact ones.

Letters: D hidden, N heads, H head dim, F intermediate, M mel bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni_jax.checkpoint.safetensors_io import LazyTensor, Tensors, write_safetensors
from omni_jax.config.load import build_config
from omni_jax.config.model import AudioEncoderConfig
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
    transpose,
)
from omni_jax.errors import ConfigError, ConversionError

PREFIXES = ("model.encoder.", "encoder.")
"""Prefixes of the encoder's tensors; the first is used when writing."""

IGNORED = ("model.decoder.", "decoder.", "proj_out.")
"""Prefixes of the other tensors of a Whisper, which are skipped."""

_FIELDS = {
    "num_mel_bins": "num_mel_bins",
    "hidden_size": "d_model",
    "num_layers": "encoder_layers",
    "num_heads": "encoder_attention_heads",
    "intermediate_size": "encoder_ffn_dim",
    "max_position": "max_source_positions",
}
"""Fields of AudioEncoderConfig and their names in transformers' config.json."""


def from_transformers(
    tensors: Tensors, config: AudioEncoderConfig, source: str = "Whisper's tensors"
) -> dict[str, LazyTensor]:
    """Transformers' tensors in our layout, each of its own type.

    Args:
        tensors: by their names; the decoder and its head are ignored.
        config: the encoder's config.
        source: where the tensors come from, for errors.

    Raises:
        ConversionError: lists every tensor that is missing, unknown, misshapen or of another type.
    """
    return to_ours(_table(config), _encoder(tensors), source)


def to_transformers(tensors: Tensors, config: AudioEncoderConfig) -> dict[str, LazyTensor]:
    """Our tensors in transformers' layout, as `model.encoder.*`; the inverse of `from_transformers`.

    Raises:
        ConversionError: lists every tensor that is missing, unknown, misshapen or of another type.
    """
    state = to_theirs(_table(config), tensors, "Whisper encoder to transformers")
    return {PREFIXES[0] + name: tensor for name, tensor in state.items()}


@refuse_wrong_types
def config_from_json(values: Mapping[str, Any], source: str = "config.json") -> AudioEncoderConfig:
    """The encoder's config from the content of transformers' Whisper `config.json`; `source` is its name, for errors.

    Raises:
        ConversionError: lists every field that is missing or that asks for something our encoder does not support.
    """
    wrong = [f"{name}: missing" for name in _FIELDS.values() if name not in values]
    for name, expected in (
        ("model_type", "whisper"),
        ("activation_function", "gelu"),
        ("scale_embedding", False),
    ):
        if values.get(name, expected) != expected:
            wrong.append(f"{name}: expected {expected!r}, found {values[name]!r}")
    if not wrong:
        try:
            return build_config(
                AudioEncoderConfig, {ours: values[theirs] for ours, theirs in _FIELDS.items()}, "encoder"
            )
        except ConfigError as error:
            wrong.append(str(error))
    raise ConversionError(f"{source}, expected to be a Whisper's:\n" + "\n".join(wrong))


def read(folder: str | Path) -> tuple[AudioEncoderConfig, dict[str, LazyTensor]]:
    """Read the encoder from a folder as `save_pretrained` writes it.

    Returns:
        The encoder's config and the tensors by our names; none is read yet.

    Raises:
        ConversionError: a file is missing, or its content is not a Whisper.
        CheckpointError: a file of weights is damaged.
    """
    folder = Path(folder)
    config = config_from_json(read_json(folder / CONFIG), str(folder / CONFIG))
    return config, from_transformers(open_safetensors(folder), config, str(folder))


def write(folder: Path, config: AudioEncoderConfig, tensors: Tensors) -> None:
    """Write `config.json` and `model.safetensors` of a Whisper without layers in its decoder.

    transformers' `WhisperModel.from_pretrained` reads it and draws the decoder's embeddings and norm.

    Args:
        folder: exists.
        config: the encoder's config.
        tensors: by our names; each is written in its own type.

    Raises:
        ConversionError: lists every tensor that is missing, unknown, misshapen or of another type.
    """
    values = {
        "architectures": ["WhisperModel"],
        "model_type": "whisper",
        **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
        "decoder_layers": 0,
        "decoder_attention_heads": config.num_heads,
        "decoder_ffn_dim": config.intermediate_size,
    }
    # Where it is not stated, transformers takes that of the first tensor, which may be the smallest.
    values["dtype"] = values["torch_dtype"] = common_dtype(tensors) or "float32"
    write_safetensors(folder / WEIGHTS, to_transformers(tensors, config))
    write_json(folder / CONFIG, values)


def _encoder(tensors: Tensors) -> dict[str, LazyTensor]:
    """The encoder's tensors, without the prefix; unknown ones keep their whole name."""
    encoder = {}
    for name, tensor in tensors.items():
        if name.startswith(IGNORED):
            continue
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        encoder[name[len(prefix) :] if prefix else f"(outside the encoder) {name}"] = tensor
    return encoder


def _table(config: AudioEncoderConfig) -> list[Entry]:
    """Every tensor of the encoder."""
    D, N, F = config.hidden_size, config.num_heads, config.intermediate_size
    H = D // N
    table = [
        transpose("conv1.weight", "conv1.weight", (D, config.num_mel_bins, 3), (2, 1, 0)),
        rename("conv1.bias", "conv1.bias", (D,)),
        transpose("conv2.weight", "conv2.weight", (D, D, 3), (2, 1, 0)),
        rename("conv2.bias", "conv2.bias", (D,)),
        rename("embed_positions.weight", "positions", (config.max_position, D)),
    ]
    for layer in range(config.num_layers):
        block = f"layers.{layer}"
        attention = f"{block}.self_attn"
        table += _norm(f"{block}.self_attn_layer_norm", f"{block}.attention_norm", D)
        for name in "qkv":
            table.append(reshape(f"{attention}.{name}_proj.weight", f"{block}.{name}.weight", (D, D), (N, H, D)))
            if name != "k":
                table.append(reshape(f"{attention}.{name}_proj.bias", f"{block}.{name}.bias", (D,), (N, H)))
        table += [
            reshape(f"{attention}.out_proj.weight", f"{block}.out.weight", (D, D), (D, N, H)),
            rename(f"{attention}.out_proj.bias", f"{block}.out.bias", (D,)),
            *_norm(f"{block}.final_layer_norm", f"{block}.mlp_norm", D),
            rename(f"{block}.fc1.weight", f"{block}.up.weight", (F, D)),
            rename(f"{block}.fc1.bias", f"{block}.up.bias", (F,)),
            rename(f"{block}.fc2.weight", f"{block}.down.weight", (D, F)),
            rename(f"{block}.fc2.bias", f"{block}.down.bias", (D,)),
        ]
    return table + _norm("layer_norm", "norm", D)


def _norm(theirs: str, ours: str, D: int) -> list[Entry]:
    return [rename(f"{theirs}.weight", f"{ours}.scale", (D,)), rename(f"{theirs}.bias", f"{ours}.bias", (D,))]
