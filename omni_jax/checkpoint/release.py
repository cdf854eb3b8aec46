"""Release folders: everything that a model needs, read straight onto its devices.

A release folder holds
    config.json             `omni_jax.config.model.ModelConfig`, and `model_type`
    model.safetensors       the model but its audio encoder; see `omni_jax.checkpoint.tensors`
    audio_encoder.safetensors   tensors of the audio encoder, named as in the model
    codec.safetensors       the codec, named as `omni_jax.codec.snac.Snac.params` does
    tokenizer.json, tokenizer_config.json
    model_config.yaml       of the Mini-Omni checkpoint that it was imported from, if any; kept for export
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx, traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from omni_jax import sharding
from omni_jax.checkpoint.folders import new_folder, require_files
from omni_jax.checkpoint.hub import fetch
from omni_jax.checkpoint.quantize import quantize_tensors
from omni_jax.checkpoint.safetensors_io import (
    LazyTensor,
    SafetensorsFile,
    SafetensorsFiles,
    Tensors,
    aligned_empty,
    slice_shape,
    write_safetensors,
)
from omni_jax.checkpoint.tensors import (
    ParamPath,
    abstract_model,
    is_stacked,
    parameter_shapes,
    tensor_names,
    tensor_shapes,
)
from omni_jax.codec.snac import Snac
from omni_jax.config.load import build_config, to_dict
from omni_jax.config.model import PRESETS, SHIPPED_RELEASES, ModelConfig
from omni_jax.errors import CheckpointError, ConfigError
from omni_jax.hardware import require_memory
from omni_jax.input_files import read_file, read_json
from omni_jax.model.omni import OmniModel
from omni_jax.model.whisper_encoder import sinusoids
from omni_jax.shapes import shape_mismatches
from omni_jax.tokenizer import load_tokenizer, num_rows

CONFIG = "config.json"
MODEL_TYPE = "omni_jax"
MODEL = "model.safetensors"
AUDIO_ENCODER = "audio_encoder.safetensors"
CODEC = "codec.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
MINI_OMNI_CONFIG = "model_config.yaml"
FILES = (CONFIG, MODEL, CODEC, *TOKENIZER_FILES)
"""Without these, a folder is no release."""

Convert = Callable[[ParamPath, Any], Any]
"""From the path of a parameter, and its array or `jax.ShapeDtypeStruct`, to what a model has in its place."""

AUDIO_ENCODER_PREFIX = "audio_encoder."
"""Of the names of the audio encoder's tensors."""

RUN, RELEASE = "checkpoints", "release"
"""Folders of a training run; the second exists once the run has finished."""


def is_release(source: str | Path) -> bool:
    """Whether `open_release` takes this for a release without the hub.

    True for the folder of a release, even an incomplete one, for that of a training run, and for the name of a model
    that ships with the package.
    """
    return str(source) in SHIPPED_RELEASES or _is_release_folder(Path(source))


def _is_release_folder(folder: Path) -> bool:
    if (folder / RUN).is_dir():
        return True
    try:
        # Folders of transformers and snac have a config.json, too.
        values = read_json(folder / CONFIG, ConfigError)
    except ConfigError:
        return False
    return isinstance(values, dict) and values.get("model_type") == MODEL_TYPE


def load_model_config(path: Path) -> ModelConfig:
    """Read the `config.json` of a release.

    Raises:
        ConfigError: the file is missing, is not JSON, is of another kind of model, or a field is wrong.
    """
    values = read_json(path, ConfigError)
    if not isinstance(values, dict) or values.pop("model_type", None) != MODEL_TYPE:
        raise ConfigError(f"{path}: expected the config of an omni_jax release, with model_type {MODEL_TYPE!r}")
    return build_config(ModelConfig, values, str(path))


def save_model_config(config: ModelConfig, path: Path) -> None:
    """Write the `config.json` of a release."""
    values = {"model_type": MODEL_TYPE, **to_dict(config)}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def find_release(
    name: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> Release | None:
    """The release of a model name; None for a preset without trained weights.

    Raises:
        ConfigError, CheckpointError: there is neither such a preset nor such a release.
    """
    if str(name) in PRESETS and not is_release(name):
        return None
    return open_release(name, revision=revision, cache_dir=cache_dir)


def open_release(source: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None) -> Release:
    """Open a release; weights are not read yet.

    Args:
        source: a release folder, the folder of a finished training run, the name of a model that ships with the
            package (a release folder of that name comes first), or a hub repository.
        revision: see `omni_jax.checkpoint.hub.fetch`.
        cache_dir: see `omni_jax.checkpoint.hub.fetch`.

    Raises:
        CheckpointError: it is not there, a file of it is missing or damaged, or the run has not finished.
        ConfigError: `config.json` is wrong.
    """
    folder = Path(source)
    if str(source) in SHIPPED_RELEASES and not _is_release_folder(folder):
        source = folder = SHIPPED_RELEASES[str(source)]
    if (folder / RUN).is_dir():
        if not (folder / RELEASE).is_dir():
            raise CheckpointError(f"{folder}: a training run that has not finished: there is no release in it yet")
        source = folder / RELEASE
    shipped = ", ".join(SHIPPED_RELEASES)
    folder = fetch(
        source,
        (*FILES, AUDIO_ENCODER, MINI_OMNI_CONFIG),
        f"a release ({shipped} is one)",
        revision=revision,
        cache_dir=cache_dir,
    )
    require_files(folder, FILES, "a release")
    return Release(folder, load_model_config(folder / CONFIG))


@dataclass(frozen=True)
class Release:
    """A release folder that has been opened."""

    folder: Path
    config: ModelConfig

    def tokenizer(self) -> Any:
        """The text tokenizer, a `tokenizers.Tokenizer`.

        Raises:
            CheckpointError: the file is not a tokenizer, or has more tokens than the model has rows.
        """
        file = self.folder / TOKENIZER_FILES[0]
        tokenizer = load_tokenizer(file)
        if (rows := num_rows(tokenizer)) > self.config.vocab.text:
            raise CheckpointError(
                f"{file}: expected at most {self.config.vocab.text} tokens (vocab.text of {CONFIG}), found {rows}"
            )
        return tokenizer

    def load_model(
        self,
        *,
        stacked: bool,
        dtype: Any,
        param_dtype: Any = None,
        mesh: Mesh | None = None,
        convert: Convert | None = None,
    ) -> OmniModel:
        """Read the weights straight onto their devices.

        Each device's shard of each parameter is read on its own, and layers are stacked while reading. No parameter
        ever exists unsharded on a mesh, and memory holds at most one parameter more than the model.

        Args:
            stacked: see `omni_jax.model.decoder`.
            dtype: of matrix products.
            param_dtype: of the parameters, whatever type the file has; None is the same as `dtype`.
            mesh: where the parameters are; None is the first device.
            convert: makes of each parameter on the mesh what the model has of it.

        Raises:
            CheckpointError: lists every tensor that is missing, unknown or misshapen; or names one with a value that is
                NaN or infinite.
            ConfigError: the model is larger than the memory of the devices.
        """
        graph, state = nnx.split(abstract_model(self.config, stacked=stacked, dtype=dtype))
        file = self._weights()
        shapes = tensor_shapes(state)
        self._check(file, shapes)
        shardings = _shardings(state, mesh)
        param_dtype = np.dtype(dtype if param_dtype is None else param_dtype)
        devices = jax.local_devices()[:1] if mesh is None else list(mesh.devices.flat)
        num_params = sum(map(math.prod, shapes.values()))

        def held(path: ParamPath, param: Any) -> Any:
            return param if convert is None else convert(path, param)

        abstract = [
            held(path, jax.ShapeDtypeStruct(variable.shape, param_dtype, sharding=shardings[path]))
            for path, variable in nnx.to_flat_state(state)
        ]
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
        require_memory(size, f"{self.folder}: {num_params} parameters", devices)

        def load(path: ParamPath, shape: tuple[int, ...]) -> jax.Array:
            names = tensor_names(path, shape)

            def read(index: tuple[slice, ...]) -> np.ndarray:
                out = aligned_empty(slice_shape(index, shape), param_dtype)
                if is_stacked(path):
                    for name, layer in zip(names[index[0]], out, strict=True):
                        file.read_into(name, layer, index[1:])
                else:
                    file.read_into(names[0], out, index)
                return out

            return jax.make_array_from_callback(shape, shardings[path], _memoize_shards(read))

        arrays = {path: held(path, load(path, variable.shape)) for path, variable in nnx.to_flat_state(state)}
        return nnx.merge(graph, traverse_util.unflatten_dict(arrays))

    def load_codec(self) -> Snac:
        """The codec, in float32.

        Raises:
            CheckpointError: lists every tensor that is missing, unknown or misshapen.
        """
        file = SafetensorsFile(self.folder / CODEC)
        num_params = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
        require_memory(4 * num_params, f"{file.path}: {num_params} parameters", jax.local_devices()[:1])
        params = {name: tensor.read().astype(np.float32, copy=False) for name, tensor in file.tensors.items()}
        try:
            return Snac.from_params(self.config.codec, params)
        except ValueError as error:
            raise CheckpointError(f"{file.path}: {error}") from None

    def model_tensors(self) -> dict[str, LazyTensor]:
        """The model's tensors as they are in the file; none is read yet.

        Raises:
            CheckpointError: lists every tensor that is missing, unknown or misshapen.
        """
        file = self._weights()
        self._check(file, parameter_shapes(self.config))
        return file.tensors

    def audio_encoder_tensors(self) -> dict[str, LazyTensor]:
        """The audio encoder's tensors by their names in it; none is read yet."""
        tensors = self.model_tensors()
        return {
            name.removeprefix(AUDIO_ENCODER_PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(AUDIO_ENCODER_PREFIX)
        }

    def codec_tensors(self) -> dict[str, LazyTensor]:
        """The codec's tensors as they are in the file; none is read yet."""
        return SafetensorsFile(self.folder / CODEC).tensors

    def tokenizer_files(self) -> list[Path]:
        """The files of the tokenizer."""
        return [self.folder / name for name in TOKENIZER_FILES]

    def mini_omni_config(self) -> Path | None:
        """`model_config.yaml` of the Mini-Omni checkpoint that it was imported from, if any."""
        file = self.folder / MINI_OMNI_CONFIG
        return file if file.is_file() else None

    def files_to_keep(self) -> list[Path]:
        """The files that a release made of this one has, too, whatever its weights."""
        config = self.mini_omni_config()
        return self.tokenizer_files() + ([] if config is None else [config])

    def inspect(self) -> dict[str, LazyTensor]:
        """Every tensor of the release, the codec's under `codec.`; only shapes and types are read."""
        codec = {f"codec.{name}": tensor for name, tensor in self.codec_tensors().items()}
        return {**self._weights().tensors, **codec}

    def fingerprint(self) -> str:
        """A hash of the content, wherever the folder is.

        It covers the first row of each tensor, which takes no time: training changes them all.

        Raises:
            CheckpointError: a file is damaged.
        """
        digest = hashlib.sha256()
        for name in (CONFIG, *TOKENIZER_FILES):
            digest.update(read_file(self.folder / name, CheckpointError, "a file of a release"))
        for path in (*self._weights().paths, self.folder / CODEC):
            file = SafetensorsFile(path)
            for tensor, known in sorted(file.tensors.items()):
                digest.update(f"{tensor} {known.dtype} {known.shape}".encode())
                digest.update(file.read(tensor, (slice(0, 1),) if known.shape else ()).tobytes())
        return digest.hexdigest()

    def _weights(self) -> SafetensorsFiles:
        if (self.folder / AUDIO_ENCODER).exists():
            return SafetensorsFiles([self.folder / MODEL, self.folder / AUDIO_ENCODER])
        # Up to version 0.2, releases had one file, and positions were computed.
        config = self.config.audio_encoder
        size = 8 * config.max_position * config.hidden_size
        require_memory(size, f"{self.folder}: {config.max_position} positions", jax.local_devices()[:1])
        positions = sinusoids(config.max_position, config.hidden_size)
        return SafetensorsFiles([self.folder / MODEL], {f"{AUDIO_ENCODER_PREFIX}positions": positions})

    def _check(self, files: SafetensorsFiles, expected: Mapping[str, tuple[int, ...]]) -> None:
        if wrong := shape_mismatches(files.tensors, expected):
            raise CheckpointError(f"{files.paths[0]} does not fit {CONFIG}:\n" + "\n".join(wrong))


def save_release(
    folder: str | Path,
    config: ModelConfig,
    tensors: Tensors,
    codec_tensors: Tensors,
    other_files: Sequence[Path],
    *,
    int8: bool = False,
) -> None:
    """Write a release folder; it appears under its name only when complete.

    With several processes all must call this together, as tensors may be gathered from all; the first writes.

    Args:
        folder: new or empty.
        config: the model's config.
        tensors: the model, as `omni_jax.checkpoint.tensors.model_tensors` gives it; read one after the other.
        codec_tensors: the codec, named as `Snac.params` does.
        other_files: those of the tokenizer, and any others, such as `Release.files_to_keep`; copied under their names.
        int8: store the model's matrices as int8 with scales, a quarter of float32; the codec stays as it is.

    Raises:
        CheckpointError: `folder` has something in it, tensors do not fit the config, or a tokenizer file is missing.
    """
    if wrong := shape_mismatches(tensors, parameter_shapes(config)):
        raise CheckpointError(f"{folder}: the tensors do not fit the config:\n" + "\n".join(wrong))
    if missing := set(TOKENIZER_FILES) - {path.name for path in other_files if path.is_file()}:
        raise CheckpointError(f"{folder}: expected {', '.join(TOKENIZER_FILES)}; got no {', '.join(missing)}")
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith(AUDIO_ENCODER_PREFIX)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in encoder}
    if jax.process_index() != 0:
        for tensor in (*rest.values(), *encoder.values()):
            tensor.read()
    else:
        with new_folder(folder) as partial:
            for file, part in ((MODEL, rest), (AUDIO_ENCODER, encoder)):
                write_safetensors(partial / file, quantize_tensors(part) if int8 else part)
            write_safetensors(partial / CODEC, codec_tensors)
            for path in other_files:
                shutil.copyfile(path, partial / path.name)
            save_model_config(config, partial / CONFIG)
    multihost_utils.sync_global_devices("save_release")


def _shardings(state: nnx.State, mesh: Mesh | None) -> dict[ParamPath, Sharding]:
    """The sharding of each parameter of an abstract state."""
    if mesh is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        return {path: device for path, _ in nnx.to_flat_state(state)}
    return traverse_util.flatten_dict(sharding.of_state(state, mesh))


def _memoize_shards(read: Callable[[tuple[slice, ...]], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """Read a shard once that several devices hold: JAX asks for it once per device."""
    shards: dict[Any, np.ndarray] = {}

    def memoized(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((axis.start, axis.stop) for axis in index)
        if key not in shards:
            shards[key] = read(index)
        return shards[key]

    return memoized
