"""Whisper's encoder between transformers' names and ours, both ways. numpy only, no torch.

Ours are the dotted paths of `omni_jax.model.whisper.Whisper` with one module per layer (not stacked), such as
`layers.0.q.kernel`. Theirs are those of `WhisperForConditionalGeneration` (`model.encoder.*`) or of
`WhisperModel` (`encoder.*`). The position table is fixed sinusoids, so ours has none: it is checked on the
way in and made anew on the way out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from omni_jax.config.load import build_config
from omni_jax.config.model import AudioEncoderConfig
from omni_jax.convert.table import CONFIG, WEIGHTS, read_json, weight_files, write_json
from omni_jax.errors import ConfigError, ConversionError
from omni_jax.model.whisper_encoder import sinusoids
from omni_jax.shapes import shape_mismatches

PREFIXES = ("model.encoder.", "encoder.")
"""Where the encoder's tensors live; the first is used when writing."""

IGNORED = ("model.decoder.", "decoder.", "proj_out.")
"""The rest of a Whisper, which the ear has no use for."""

_FIELDS = {
    "mels": "num_mel_bins",
    "width": "d_model",
    "layers": "encoder_layers",
    "heads": "encoder_attention_heads",
    "ffn": "encoder_ffn_dim",
    "positions": "max_source_positions",
}
"""Names of the same things in AudioEncoderConfig and in transformers' config.json."""

POSITIONS = "embed_positions.weight"

POSITIONS_TOLERANCE = 5e-4
"""The published tables are sinusoids that went through float16 (half a step is 2.4e-4), plus float32 noise in
the angles; 2.9e-4 was measured on whisper-base. A trained or foreign table is off by far more."""


@dataclass(frozen=True)
class _Tensor:
    """One tensor in both layouts: ours is theirs, reshaped to `split`, then transposed by `order`."""

    theirs: str
    ours: str
    shape: tuple[int, ...]
    """Theirs."""
    split: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def our_shape(self) -> tuple[int, ...]:
        return tuple(self.split[axis] for axis in self.order)

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array.reshape(self.split).transpose(self.order), np.float32)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array.transpose(np.argsort(self.order)).reshape(self.shape), np.float32)


def _table(config: AudioEncoderConfig) -> list[_Tensor]:
    """Every learned tensor of the encoder."""
    D, N, F = config.hidden_size, config.num_heads, config.intermediate_size
    H = D // N

    def same(theirs: str, ours: str, size: int) -> _Tensor:
        return _Tensor(theirs, ours, (size,), (size,), (0,))

    def norm(theirs: str, ours: str) -> list[_Tensor]:
        return [same(f"{theirs}.weight", f"{ours}.scale", D), same(f"{theirs}.bias", f"{ours}.bias", D)]

    def conv(name: str, inputs: int) -> list[_Tensor]:
        # [out, in, 3] -> [3, in, out]
        shape = (D, inputs, 3)
        return [
            _Tensor(f"{name}.weight", f"{name}.kernel", shape, shape, (2, 1, 0)),
            same(f"{name}.bias", f"{name}.bias", D),
        ]

    def linear(theirs: str, ours: str, inputs: int, outputs: int) -> list[_Tensor]:
        shape = (outputs, inputs)
        return [
            _Tensor(f"{theirs}.weight", f"{ours}.kernel", shape, shape, (1, 0)),
            same(f"{theirs}.bias", f"{ours}.bias", outputs),
        ]

    table = [*conv("conv1", config.num_mel_bins), *conv("conv2", D)]
    for layer in range(config.num_layers):
        block = f"layers.{layer}"
        table += norm(f"{block}.self_attn_layer_norm", f"{block}.attention_norm")
        for name in "qkv":
            # [(N, H), D] -> [D, N, H]
            project = f"{block}.self_attn.{name}_proj"
            table.append(_Tensor(f"{project}.weight", f"{block}.{name}.kernel", (D, D), (N, H, D), (2, 0, 1)))
            if name != "k":
                table.append(_Tensor(f"{project}.bias", f"{block}.{name}.bias", (D,), (N, H), (0, 1)))
        # [D, (N, H)] -> [N, H, D]
        project = f"{block}.self_attn.out_proj"
        table.append(_Tensor(f"{project}.weight", f"{block}.out.kernel", (D, D), (D, N, H), (1, 2, 0)))
        table.append(same(f"{project}.bias", f"{block}.out.bias", D))
        table += norm(f"{block}.final_layer_norm", f"{block}.ffn_norm")
        table += linear(f"{block}.fc1", f"{block}.up", D, F)
        table += linear(f"{block}.fc2", f"{block}.down", F, D)
    return table + norm("layer_norm", "norm")


def from_transformers(
    state: Mapping[str, np.ndarray], config: AudioEncoderConfig, source: str = "Whisper's tensors"
) -> dict[str, np.ndarray]:
    """Transformers' tensors to our parameters.

    Args:
        state: tensors by name, of any floating point type; the decoder and its head are ignored.
        config: the encoder's shape.
        source: where they come from, for errors.

    Returns:
        f32 arrays by our names; bit-exact copies where theirs are float32.

    Raises:
        ConversionError: names every tensor that is missing, unknown or misshapen, and a position table that
            is not Whisper's sinusoids.
    """
    encoder = _encoder(state)
    table = _table(config)
    shapes = {tensor.theirs: tensor.shape for tensor in table}
    shapes[POSITIONS] = (config.max_position, config.hidden_size)
    problems = shape_mismatches(encoder, shapes)
    positions = encoder.get(POSITIONS)
    if positions is not None and positions.shape == shapes[POSITIONS]:
        apart = np.abs(positions.astype(np.float32) - sinusoids(*positions.shape)).max()
        if not apart <= POSITIONS_TOLERANCE:  # NaN is not
            problems.append(
                f"{POSITIONS}: expected Whisper's sinusoids to within {POSITIONS_TOLERANCE:g}, "
                f"found a difference of {apart:.3g}"
            )
    if problems:
        raise ConversionError(f"{source}:\n" + "\n".join(problems))
    return {tensor.ours: tensor.to_ours(encoder[tensor.theirs]) for tensor in table}


def to_transformers(params: Mapping[str, np.ndarray], config: AudioEncoderConfig) -> dict[str, np.ndarray]:
    """Our parameters to transformers' tensors, as `model.encoder.*`; the inverse of `from_transformers`.

    Raises:
        ConversionError: names every parameter that is missing, unknown or misshapen.
    """
    table = _table(config)
    if problems := shape_mismatches(params, {tensor.ours: tensor.our_shape for tensor in table}):
        raise ConversionError("Whisper encoder to transformers:\n" + "\n".join(problems))
    state = {PREFIXES[0] + tensor.theirs: tensor.to_theirs(np.asarray(params[tensor.ours])) for tensor in table}
    state[PREFIXES[0] + POSITIONS] = sinusoids(config.max_position, config.hidden_size)
    return state


def config_from_json(values: Mapping[str, Any], source: str = "config.json") -> AudioEncoderConfig:
    """The ear's shape from the content of transformers' Whisper `config.json`; `source` is its name for errors.

    Raises:
        ConversionError: names every field that is missing or that asks for something our encoder does not do.
    """
    problems = [f"{name}: missing" for name in _FIELDS.values() if name not in values]
    for name, expected in (
        ("model_type", "whisper"),
        ("activation_function", "gelu"),
        ("scale_embedding", False),
    ):
        if values.get(name, expected) != expected:
            problems.append(f"{name}: expected {expected!r}, found {values[name]!r}")
    if not problems:
        try:
            return build_config(
                AudioEncoderConfig, {ours: values[theirs] for ours, theirs in _FIELDS.items()}, "encoder"
            )
        except ConfigError as error:
            problems.append(str(error))
    raise ConversionError(f"{source}, expected to be a Whisper's:\n" + "\n".join(problems))


def read(folder: str | Path) -> tuple[AudioEncoderConfig, dict[str, np.ndarray]]:
    """Read the encoder from a folder as `save_pretrained` writes it; the decoder is never loaded.

    Args:
        folder: holds `config.json` and `model.safetensors`, or shards with `model.safetensors.index.json`.

    Returns:
        The ear's shape and f32 arrays by our names.

    Raises:
        ConversionError: a file is missing or damaged, or its content is not a Whisper.
    """
    folder = Path(folder)
    config = config_from_json(read_json(folder / CONFIG), str(folder / CONFIG))
    state = {}
    for shard in weight_files(folder):
        try:
            with safe_open(folder / shard, framework="numpy") as file:
                # Unknown names are read too, so that the check can list them.
                names = [name for name in file.keys() if not name.startswith(IGNORED)]  # noqa: SIM118
                state.update({name: file.get_tensor(name) for name in names})
        except (OSError, SafetensorError) as error:
            raise ConversionError(f"{folder / shard}: expected safetensors, found {error}") from None
    return config, from_transformers(state, config, str(folder))


def write(folder: Path, config: AudioEncoderConfig, params: Mapping[str, np.ndarray]) -> None:
    """Write `config.json` and `model.safetensors`, float32, of a Whisper without layers in its decoder.

    transformers' `WhisperModel.from_pretrained` reads it and draws what it wants beside the encoder.

    Args:
        folder: exists.
        config: the ear's shape.
        params: arrays by our names.

    Raises:
        ConversionError: names every parameter that is missing, unknown or misshapen.
    """
    values = {
        "architectures": ["WhisperModel"],
        "model_type": "whisper",
        **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
        "decoder_layers": 0,
        "decoder_attention_heads": config.num_heads,
        "decoder_ffn_dim": config.intermediate_size,
    }
    save_file(to_transformers(params, config), folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, values)


def _encoder(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors that matter, without the prefix; unknown ones keep their whole name."""
    encoder = {}
    for name, array in state.items():
        if name.startswith(IGNORED):
            continue
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        encoder[name[len(prefix) :] if prefix else f"(outside the encoder) {name}"] = array
    return encoder
