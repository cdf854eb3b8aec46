"""SNAC's weights between torch's state dict and our parameters, both ways, and snac's folder read.

torch stores each convolution as a direction (`original1`, or `weight_v` in older files) and a length per
index of its first dimension (`original0`, `weight_g`); we store the product. That first dimension is the
output channel, but for transposed convolutions the input channel, as torch lays those out input first.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import ArrayLike
from safetensors import SafetensorError

from omni_jax.codec.torch_snac import import_snac
from omni_jax.config.load import build_config
from omni_jax.config.model import CodecConfig
from omni_jax.convert.table import CONFIG, WEIGHTS, import_torch, read_json, write_json
from omni_jax.errors import ConversionError
from omni_jax.shapes import shape_mismatches

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
"""Names of the same things in snac's config.json and in CodecConfig."""

_PARTS = (
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
    (".weight_g", ".weight_v"),
)
"""Endings of length and direction: torch's present names, which we write, and those of older files."""


@dataclass(frozen=True)
class _Entry:
    """One parameter in both worlds. Ours is theirs with the axes permuted and those of size 1 left out."""

    ours: str
    theirs: str
    shape: tuple[int, ...]
    """Theirs."""
    axes: tuple[int, ...]
    """Their axes in our order; one that is missing has size 1."""
    split: bool
    """Whether torch stores length and direction."""

    @property
    def our_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def _order(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.axes) + self.axes

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array.transpose(self._order).reshape(self.our_shape))

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        order = self._order
        whole = array.reshape([self.shape[axis] for axis in order])
        return np.ascontiguousarray(whole.transpose(np.argsort(order)))


def from_torch(
    state: Mapping[str, np.ndarray], config: CodecConfig, source: str = "snac's tensors"
) -> dict[str, np.ndarray]:
    """Torch's state dict to our parameters, weight norm folded.

    Args:
        state: arrays by torch's names.
        config: the codec's.
        source: where they come from, for errors.

    Returns:
        Arrays by our names, see `omni_jax.codec.snac.Snac.params`.

    Raises:
        ConversionError: lists every tensor that is missing, unknown or misshapen.
    """
    expected: dict[str, tuple[int, ...]] = {}
    names: dict[str, tuple[str, ...]] = {}
    for entry in _table(config):
        if entry.split:
            lengths, directions = next(
                (pair for pair in _PARTS if any(entry.theirs + part in state for part in pair)), _PARTS[0]
            )
            names[entry.ours] = (entry.theirs + lengths, entry.theirs + directions)
            expected[entry.theirs + lengths] = (entry.shape[0], 1, 1)
            expected[entry.theirs + directions] = entry.shape
        else:
            names[entry.ours] = (entry.theirs,)
            expected[entry.theirs] = entry.shape
    if wrong := shape_mismatches(state, expected):
        raise ConversionError(f"{source}:\n" + "\n".join(wrong))
    params = {}
    for entry in _table(config):
        arrays = [np.asarray(state[name]) for name in names[entry.ours]]
        params[entry.ours] = entry.to_ours(_fold(*arrays) if entry.split else arrays[0])
    return params


def to_torch(params: Mapping[str, np.ndarray], config: CodecConfig) -> dict[str, np.ndarray]:
    """Our parameters to torch's state dict; the same weights to float rounding.

    Args:
        params: arrays by our names.
        config: the codec's.

    Returns:
        Arrays by torch's names, with length and direction of every convolution apart.

    Raises:
        ConversionError: lists every parameter that is missing, unknown or misshapen.
    """
    table = _table(config)
    if wrong := shape_mismatches(params, {entry.ours: entry.our_shape for entry in table}):
        raise ConversionError("codec parameters:\n" + "\n".join(wrong))
    state = {}
    for entry in table:
        array = entry.to_theirs(np.asarray(params[entry.ours]))
        if entry.split:
            lengths, directions = _PARTS[0]
            state[entry.theirs + lengths], state[entry.theirs + directions] = _unfold(array)
        else:
            state[entry.theirs] = array
    return state


def to_torch_module(config: CodecConfig, params: Mapping[str, ArrayLike]) -> Any:
    """A `snac.SNAC` with our parameters.

    Raises:
        MissingExtraError: torch or snac is not installed.
        ConversionError: lists every parameter that is missing, unknown or misshapen.
    """
    module = import_snac().SNAC(**config_to_json(config)).eval()
    import torch

    state = to_torch({name: np.asarray(array) for name, array in params.items()}, config)
    module.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in state.items()})
    return module


def config_from_json(values: Mapping[str, Any], source: str = "config.json") -> CodecConfig:
    """The content of snac's config.json to a CodecConfig; `source` is the file's name for errors.

    Raises:
        ConversionError: lists the fields that are missing or unknown, or that ask for what we don't have:
            attention, full convolutions, other strides.
        ConfigError: a field that we have holds a wrong value.
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
    if not wrong and (width := values.get("latent_dim")) is not None:
        natural = values["encoder_dim"] * 2 ** len(values["encoder_rates"])
        if width != natural:
            wrong.append(f"latent_dim: expected {natural}, the encoder's last width, found {width!r}")
    if wrong:
        raise ConversionError(f"{source}, expected to be a snac's:\n" + "\n".join(wrong))
    return build_config(CodecConfig, {ours: values[theirs] for theirs, ours in _FIELDS.items()}, source)


def config_to_json(config: CodecConfig) -> dict[str, Any]:
    """A CodecConfig as the content of snac's config.json, which are also the arguments of `snac.SNAC`."""
    values = {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {**values, "attn_window_size": None, "depthwise": True}


def read(folder: str | Path) -> tuple[CodecConfig, dict[str, np.ndarray]]:
    """Read a folder as snac publishes it: config.json with model.safetensors or pytorch_model.bin.

    Returns:
        The config, and the parameters by our names.

    Raises:
        ConversionError: a file is missing or damaged, or its content is not a codec of the kind we have.
        ImportError: the weights are pytorch_model.bin and torch is not installed.
    """
    folder = Path(folder)
    config = config_from_json(read_json(folder / CONFIG), str(folder / CONFIG))
    if (file := folder / WEIGHTS).is_file():
        try:
            state = safetensors.numpy.load_file(file)
        except SafetensorError as error:
            raise ConversionError(f"{file}: expected safetensors, found {error}") from None
    elif (file := folder / "pytorch_model.bin").is_file():
        state = _read_bin(file)
    else:
        raise ConversionError(f"{folder}: expected model.safetensors or pytorch_model.bin, found neither")
    return config, from_torch(state, config, str(file))


def write(folder: Path, config: CodecConfig, params: Mapping[str, np.ndarray]) -> None:
    """Write `config.json` and `pytorch_model.bin`, float32: what `snac.SNAC.from_pretrained` reads.

    Args:
        folder: exists.
        config: the codec's.
        params: arrays by our names.

    Raises:
        ConversionError: lists every parameter that is missing, unknown or misshapen.
        ImportError: torch is not installed.
    """
    file = folder / "pytorch_model.bin"
    torch = import_torch(file)
    exact = {name: np.asarray(array, np.float32) for name, array in params.items()}
    state = {name: torch.from_numpy(array.copy()) for name, array in to_torch(exact, config).items()}
    torch.save(state, file)
    write_json(folder / CONFIG, config_to_json(config))


def _read_bin(file: Path) -> dict[str, np.ndarray]:
    torch = import_torch(file)
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ConversionError(f"{file}: expected tensors saved by torch, found {error}") from None
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _table(config: CodecConfig) -> list[_Entry]:
    """Every parameter of the codec, with its name and shape in torch."""
    table: list[_Entry] = []

    def plain(ours: str, theirs: str, *shape: int) -> None:
        table.append(_Entry(ours, theirs, shape, tuple(range(len(shape))), split=False))

    def snake(ours: str, theirs: str, D: int) -> None:
        table.append(_Entry(f"{ours}.alpha", f"{theirs}.alpha", (1, D, 1), (1,), split=False))

    def conv(ours: str, theirs: str, shape: tuple[int, int, int], axes: tuple[int, ...], bias: int) -> None:
        table.append(_Entry(f"{ours}.weight", theirs, shape, axes, split=True))
        if bias:
            plain(f"{ours}.bias", f"{theirs}.bias", bias)

    def depthwise(ours: str, theirs: str, D: int) -> None:
        conv(ours, theirs, (D, 1, 7), (2, 0), D)

    def pointwise(ours: str, theirs: str, inputs: int, outputs: int, bias: bool = True) -> None:
        conv(ours, theirs, (outputs, inputs, 1), (1, 0), outputs if bias else 0)

    def units(ours: str, theirs: str, first: int, D: int) -> None:
        for index in range(3):
            unit, block = f"{ours}.units.{index}", f"{theirs}.{first + index}.block"
            snake(f"{unit}.snake_in", f"{block}.0", D)
            depthwise(f"{unit}.depthwise", f"{block}.1", D)
            snake(f"{unit}.snake_out", f"{block}.2", D)
            pointwise(f"{unit}.pointwise", f"{block}.3", D, D)

    D = config.encoder_dim
    depthwise("encoder.conv_in", "encoder.block.0", D)
    for index, rate in enumerate(config.encoder_rates):
        block, theirs = f"encoder.blocks.{index}", f"encoder.block.{index + 1}.block"
        units(block, theirs, 0, D)
        snake(f"{block}.snake", f"{theirs}.3", D)
        conv(f"{block}.down", f"{theirs}.4", (2 * D, D, 2 * rate), (2, 1, 0), 2 * D)
        D *= 2
    depthwise("encoder.conv_out", f"encoder.block.{len(config.encoder_rates) + 1}", D)

    for index in range(len(config.vq_strides)):
        quantizer, theirs = f"quantizers.{index}", f"quantizer.quantizers.{index}"
        pointwise(f"{quantizer}.project_in", f"{theirs}.in_proj", D, config.codebook_dim)
        plain(f"{quantizer}.codebook", f"{theirs}.codebook.weight", config.codebook_size, config.codebook_dim)
        pointwise(f"{quantizer}.project_out", f"{theirs}.out_proj", config.codebook_dim, D)

    depthwise("decoder.conv_in", "decoder.model.0", D)
    pointwise("decoder.project", "decoder.model.1", D, config.decoder_dim)
    D = config.decoder_dim
    for index, rate in enumerate(config.decoder_rates):
        block, theirs = f"decoder.blocks.{index}", f"decoder.model.{index + 2}.block"
        snake(f"{block}.snake", f"{theirs}.0", D)
        conv(f"{block}.up", f"{theirs}.1", (D, D // 2, 2 * rate), (0, 2, 1), D // 2)
        D //= 2
        if config.noise:
            pointwise(f"{block}.noise", f"{theirs}.2.linear", D, D, bias=False)
        units(block, theirs, 3 if config.noise else 2, D)
    after = len(config.decoder_rates) + 2
    snake("decoder.snake", f"decoder.model.{after}", D)
    conv("decoder.conv_out", f"decoder.model.{after + 1}", (1, D, 7), (1, 2), 1)
    return table


def _fold(lengths: np.ndarray, directions: np.ndarray) -> np.ndarray:
    return directions * (lengths / _norm(directions))


def _unfold(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lengths = _norm(weight)
    # Zeros have no direction, and torch would divide by zero: any direction of length zero is the same
    # weight.
    return lengths, np.where(lengths == 0, np.ones((), weight.dtype), weight)


def _norm(array: np.ndarray) -> np.ndarray:
    return np.sqrt(np.sum(array * array, axis=(1, 2), keepdims=True))
