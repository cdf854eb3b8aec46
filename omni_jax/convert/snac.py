"""SNAC: snac's folders and torch modules to and from our codec.

snac stores the weight of each convolution as a direction (`original1`, or `weight_v` in older files) and a length for
each index of its first axis (`original0`, `weight_g`): weight normalization, arXiv 1602.07868. We store the product.
The first axis is the output channel, except for transposed convolutions, where it is the input channel.

Letters: D channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from omni_jax.checkpoint.safetensors_io import LazyTensor, Tensors
from omni_jax.config.load import build_config
from omni_jax.config.model import CodecConfig
from omni_jax.convert.files import (
    CONFIG,
    TORCH_WEIGHTS,
    open_weights,
    read_json,
    refuse_wrong_types,
    to_torch_tensor,
    write_json,
    write_state_dict,
)
from omni_jax.convert.table import Entry, Shape, rename, reshape, to_ours, to_theirs
from omni_jax.errors import ConversionError

_FIELDS = {
    "sampling_rate": "sample_rate",
    "encoder_dim": "encoder_dim",
    "encoder_rates": "encoder_rates",
    "decoder_dim": "decoder_dim",
    "decoder_rates": "decoder_rates",
    "codebook_size": "codebook_size",
    "codebook_dim": "codebook_dim",
    "vq_strides": "vq_strides",
    "noise": "noise",
}
"""Fields of snac's config.json and their names in CodecConfig."""

_LENGTH, _DIRECTION = ".parametrizations.weight.original0", ".parametrizations.weight.original1"
_OLD_NAMES = {".weight_g": _LENGTH, ".weight_v": _DIRECTION}
"""What older versions of torch call the two."""


def from_state(state: Tensors, config: CodecConfig, source: str) -> dict[str, LazyTensor]:
    """The tensors of a state dict by our names, each of its own type; weight norm is folded in float32.

    Args:
        state: by snac's names.
        config: the codec's config.
        source: where the tensors come from, for errors.

    Returns:
        Tensors as `omni_jax.codec.snac.Snac.params` names them.

    Raises:
        ConversionError: lists every tensor that is missing, unknown, misshapen or of another type; the tensors of
            weight norm under the names of the present torch.
    """
    return to_ours(_table(config), {_present_name(name): tensor for name, tensor in state.items()}, source)


def to_state(tensors: Tensors, config: CodecConfig) -> dict[str, LazyTensor]:
    """Our tensors as snac's state dict, with a length and a direction of each convolution.

    `from_state` makes the same weights of it to float rounding.

    Raises:
        ConversionError: lists every tensor that is missing, unknown, misshapen or of another type.
    """
    return to_theirs(_table(config), tensors, "codec parameters")


def from_torch(
    state: Mapping[str, np.ndarray], config: CodecConfig, source: str = "snac's tensors"
) -> dict[str, np.ndarray]:
    """`from_state` for arrays in memory, such as those of a `snac.SNAC`."""
    tensors = from_state({name: LazyTensor.of(array) for name, array in state.items()}, config, source)
    return {name: tensor.read() for name, tensor in tensors.items()}


def to_torch_module(config: CodecConfig, params: Mapping[str, ArrayLike]) -> Any:
    """A `snac.SNAC` in evaluation mode with our weights, its weight norm in place.

    Args:
        config: the codec's config.
        params: as `omni_jax.codec.snac.Snac.params` gives them.

    Raises:
        ConversionError: lists every parameter that is missing, unknown or misshapen.
        MissingExtraError: torch or snac is not installed.
    """
    from omni_jax.codec.torch_snac import import_snac

    snac = import_snac()
    import torch

    state = to_state({name: LazyTensor.of(np.asarray(value, np.float32)) for name, value in params.items()}, config)
    module = snac.SNAC(**config_to_json(config)).eval()
    module.load_state_dict({name: to_torch_tensor(tensor, torch) for name, tensor in state.items()})
    return module


@refuse_wrong_types
def config_from_json(values: Mapping[str, Any], source: str = "config.json") -> CodecConfig:
    """The content of snac's config.json to a CodecConfig; `source` is the file's name for errors.

    Raises:
        ConversionError: lists the fields that are missing or unknown, or that ask for something our codec does not
            support: attention, full convolutions, other strides.
        ConfigError: a field has a wrong value.
    """
    wrong = [f"{name}: missing" for name in _FIELDS if name not in values]
    known = {*_FIELDS, "attn_window_size", "depthwise", "latent_dim"}
    wrong += [f"{name}: unknown field" for name in values if name not in known]
    # Absent, these two have the values of snac's 44 kHz models.
    if (window := values.get("attn_window_size", 32)) is not None:
        wrong.append(f"attn_window_size: expected null, as attention is not supported, found {window!r}")
    if (depthwise := values.get("depthwise", True)) is not True:
        wrong.append(f"depthwise: expected true, as full convolutions are not supported, found {depthwise!r}")
    if "vq_strides" in values and list(values["vq_strides"]) != [4, 2, 1]:
        wrong.append(f"vq_strides: expected [4, 2, 1], seven codes a frame, found {values['vq_strides']!r}")
    if not wrong and (latent_dim := values.get("latent_dim")) is not None:
        channels = values["encoder_dim"] * 2 ** len(values["encoder_rates"])
        if latent_dim != channels:
            wrong.append(f"latent_dim: expected {channels}, the encoder's last channels, found {latent_dim!r}")
    if wrong:
        raise ConversionError(f"{source}, expected to be a snac's:\n" + "\n".join(wrong))
    return build_config(CodecConfig, {ours: values[theirs] for theirs, ours in _FIELDS.items()}, source)


def config_to_json(config: CodecConfig) -> dict[str, Any]:
    """The content of snac's config.json for a codec, which are also the arguments of `snac.SNAC`."""
    values = {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {**values, "attn_window_size": None, "depthwise": True}


def read(folder: str | Path) -> tuple[CodecConfig, dict[str, LazyTensor]]:
    """Read a folder as snac publishes it: config.json with model.safetensors or pytorch_model.bin.

    Returns:
        The config, and the tensors by our names; none is read yet.

    Raises:
        ConversionError: a file is missing or damaged, or its content is not a codec that we support.
        CheckpointError: model.safetensors is damaged.
        MissingExtraError: the weights are pytorch_model.bin and torch is not installed.
    """
    folder = Path(folder)
    config = config_from_json(read_json(folder / CONFIG), str(folder / CONFIG))
    return config, from_state(open_weights(folder), config, str(folder))


def write(folder: Path, config: CodecConfig, tensors: Tensors) -> None:
    """Write `config.json` and `pytorch_model.bin`, which `snac.SNAC.from_pretrained` reads.

    All tensors are float32, as in the published files: a length times a rounded direction would be another weight.

    Args:
        folder: exists.
        config: the codec's config.
        tensors: by our names, of any floating point type.

    Raises:
        ConversionError: lists every tensor that is missing, unknown or misshapen.
        MissingExtraError: torch is not installed.
    """
    exact = {name: tensor.cast(np.float32) for name, tensor in tensors.items()}
    write_state_dict(folder / TORCH_WEIGHTS, to_state(exact, config))
    write_json(folder / CONFIG, config_to_json(config))


def _present_name(name: str) -> str:
    ending = next((ending for ending in _OLD_NAMES if name.endswith(ending)), "")
    return name.removesuffix(ending) + _OLD_NAMES[ending] if ending else name


def _table(config: CodecConfig) -> list[Entry]:
    return [*_encoder(config), *_quantizers(config), *_decoder(config)]


def _encoder(config: CodecConfig) -> list[Entry]:
    D = config.encoder_dim
    table = _depthwise("encoder.block.0", "encoder.conv_in", D)
    for index, rate in enumerate(config.encoder_rates):
        theirs, ours = f"encoder.block.{index + 1}.block", f"encoder.blocks.{index}"
        table += _residual_units(theirs, ours, D, first=0)
        table.append(_snake(f"{theirs}.3", f"{ours}.snake", D))
        table += _conv(f"{theirs}.4", f"{ours}.down", (2 * D, D, 2 * rate), (2, 1, 0), bias=2 * D)
        D *= 2
    return table + _depthwise(f"encoder.block.{len(config.encoder_rates) + 1}", "encoder.conv_out", D)


def _quantizers(config: CodecConfig) -> list[Entry]:
    D, size = config.encoder_dim * 2 ** len(config.encoder_rates), config.codebook_dim
    table = []
    for index in range(len(config.vq_strides)):
        theirs, ours = f"quantizer.quantizers.{index}", f"quantizers.{index}"
        table += _pointwise(f"{theirs}.in_proj", f"{ours}.project_in", D, size)
        table.append(rename(f"{theirs}.codebook.weight", f"{ours}.codebook", (config.codebook_size, size)))
        table += _pointwise(f"{theirs}.out_proj", f"{ours}.project_out", size, D)
    return table


def _decoder(config: CodecConfig) -> list[Entry]:
    latent, D = config.encoder_dim * 2 ** len(config.encoder_rates), config.decoder_dim
    table = _depthwise("decoder.model.0", "decoder.conv_in", latent)
    table += _pointwise("decoder.model.1", "decoder.project", latent, D)
    for index, rate in enumerate(config.decoder_rates):
        theirs, ours = f"decoder.model.{index + 2}.block", f"decoder.blocks.{index}"
        table.append(_snake(f"{theirs}.0", f"{ours}.snake", D))
        table += _conv(f"{theirs}.1", f"{ours}.up", (D, D // 2, 2 * rate), (0, 2, 1), bias=D // 2)
        D //= 2
        if config.noise:
            table += _pointwise(f"{theirs}.2.linear", f"{ours}.noise", D, D, bias=False)
        table += _residual_units(theirs, ours, D, first=3 if config.noise else 2)
    last = len(config.decoder_rates) + 2
    table.append(_snake(f"decoder.model.{last}", "decoder.snake", D))
    return table + _conv(f"decoder.model.{last + 1}", "decoder.conv_out", (1, D, 7), (0, 1, 2), (D, 7), bias=1)


def _residual_units(theirs: str, ours: str, D: int, first: int) -> list[Entry]:
    """Three units, which are the layers `first` to `first + 2` of a block of theirs."""
    table = []
    for index in range(3):
        block, unit = f"{theirs}.{first + index}.block", f"{ours}.units.{index}"
        table.append(_snake(f"{block}.0", f"{unit}.snake_in", D))
        table += _depthwise(f"{block}.1", f"{unit}.depthwise", D)
        table.append(_snake(f"{block}.2", f"{unit}.snake_out", D))
        table += _pointwise(f"{block}.3", f"{unit}.pointwise", D, D)
    return table


def _snake(theirs: str, ours: str, D: int) -> Entry:
    return reshape(f"{theirs}.alpha", f"{ours}.alpha", (1, D, 1), (D,))


def _depthwise(theirs: str, ours: str, D: int) -> list[Entry]:
    return _conv(theirs, ours, (D, 1, 7), (2, 1, 0), (7, D), bias=D)


def _pointwise(theirs: str, ours: str, inputs: int, outputs: int, *, bias: bool = True) -> list[Entry]:
    return _conv(theirs, ours, (outputs, inputs, 1), (2, 1, 0), (inputs, outputs), bias=outputs if bias else 0)


def _conv(
    theirs: str, ours: str, shape: Shape, order: tuple[int, ...], our_shape: Shape | None = None, *, bias: int
) -> list[Entry]:
    """The two tensors of a weight and our one: their product, transposed to `order`, then reshaped; and a bias.

    Args:
        theirs: their name of the layer.
        ours: our name.
        shape: of their weight.
        order: their axes in our order.
        our_shape: of our weight, if axes of size 1 are left out.
        bias: its size; 0 for none.
    """
    transposed = tuple(shape[axis] for axis in order)
    our_shape = our_shape or transposed

    def fold(length: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray]:
        direction = direction.astype(np.float32, copy=False)
        weight = direction * (length.astype(np.float32) / _norm(direction))
        return (np.ascontiguousarray(weight.transpose(order).reshape(our_shape)),)

    def unfold(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        array = array.astype(np.float32, copy=False).reshape(transposed)
        weight = np.ascontiguousarray(array.transpose(np.argsort(order)))
        length = _norm(weight)
        # Zeros have no direction, and torch would divide by zero: any direction of length zero is the same weight.
        return length, np.where(length == 0, np.ones((), weight.dtype), weight)

    pair = {theirs + _LENGTH: (shape[0], 1, 1), theirs + _DIRECTION: shape}
    weight = Entry(pair, {f"{ours}.weight": our_shape}, fold, unfold)
    return [weight, *([rename(f"{theirs}.bias", f"{ours}.bias", (bias,))] if bias else [])]


def _norm(array: np.ndarray) -> np.ndarray:
    return np.sqrt(np.sum(array * array, axis=(1, 2), keepdims=True))
