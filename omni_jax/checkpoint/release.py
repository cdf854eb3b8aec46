"""Release folders: everything a model needs, read straight onto the devices it will live on.

A release folder holds
    config.json             `omni_jax.config.model.ModelConfig`, and `model_type`
    model.safetensors       the model, a tensor per layer and weight, such as `trunk.layers.0.attention.q.weight`
    codec.safetensors       the codec, named as `omni_jax.codec.snac.Snac.params` does
    tokenizer.json, tokenizer_config.json
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from omni_jax import sharding
from omni_jax.checkpoint.hub import fetch
from omni_jax.checkpoint.quantize import quantize_tensors
from omni_jax.checkpoint.safetensors_io import LazyTensor, SafetensorsFile, Tensors, aligned_empty, write_safetensors
from omni_jax.codec.snac import Snac
from omni_jax.config.load import build_config, read_yaml, to_dict
from omni_jax.config.model import PRESETS, SHIPPED_RELEASES, ModelConfig
from omni_jax.errors import CheckpointError, ConfigError
from omni_jax.model.omni import OmniModel
from omni_jax.shapes import shape_mismatches

CONFIG = "config.json"
MODEL_TYPE = "omni_jax"
MODEL = "model.safetensors"
CODEC = "codec.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
FILES = (CONFIG, MODEL, CODEC, *TOKENIZER_FILES)
RUN, RELEASE = "checkpoints", "release"
"""Folders in that of a training run; the second is there once the run has finished."""
ParamPath = tuple[Any, ...]
"""Where a parameter lives in a module: attribute names and layer numbers."""


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which appears under its name only once it is complete.

    Raises:
        CheckpointError: as `require_free`.
    """
    path = Path(path)
    require_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_free(path: str | Path) -> None:
    """Make sure that a new folder can take this place and overwrites nothing.

    Raises:
        CheckpointError: `path` exists and is not an empty folder, or is the current one.
    """
    path = Path(path)
    if path.resolve() == Path.cwd():
        raise CheckpointError(f"{path}: expected a new folder, found the current one, which cannot be replaced")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path}: expected a new or an empty folder, found something there already")


def require_files(folder: Path, files: Sequence[str], what: str) -> None:
    """Make sure a folder is what it should be.

    Raises:
        CheckpointError: names the files that are not there.
    """
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder}: expected {what} with {', '.join(files)}; found no {', '.join(missing)}")


def is_release(source: str | Path) -> bool:
    """Whether `open_release` is meant for this: a folder here, whole or not, or a model that comes with the package."""
    return str(source) in SHIPPED_RELEASES or _is_folder_of_release(source)


def _is_folder_of_release(source: str | Path) -> bool:
    return (Path(source) / CONFIG).is_file() or (Path(source) / RUN).is_dir()


def load_model_config(path: Path) -> ModelConfig:
    """Read the `config.json` of a release.

    Raises:
        ConfigError: the file is not there, is not JSON, is of another kind of model, or a field is wrong.
    """
    values = read_yaml(path)  # JSON is YAML
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
    """The release that a model name stands for; None if it is a preset without trained weights.

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
            package (a folder of that name comes first), or a hub repository.
        revision: see `omni_jax.checkpoint.hub.fetch`.
        cache_dir: see `omni_jax.checkpoint.hub.fetch`.

    Raises:
        CheckpointError: it is not there, a file of it is missing or damaged, or the run has not finished.
        ConfigError: `config.json` is wrong.
    """
    if str(source) in SHIPPED_RELEASES and not _is_folder_of_release(source):
        source = SHIPPED_RELEASES[str(source)]
    if (Path(source) / RUN).is_dir():
        if not (Path(source) / RELEASE).is_dir():
            raise CheckpointError(f"{source}: a training run that has not finished: there is no release in it yet")
        source = Path(source) / RELEASE
    folder = fetch(source, FILES, "a release", revision=revision, cache_dir=cache_dir)
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
            CheckpointError: the file is not a tokenizer, or has more tokens than the model has rows for.
        """
        import tokenizers

        file = self.folder / TOKENIZER_FILES[0]
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing more precise
            raise CheckpointError(f"{file}: expected a tokenizer, found {error}") from None
        if tokenizer.get_vocab_size() > self.config.vocab.text:
            raise CheckpointError(
                f"{file}: expected at most {self.config.vocab.text} tokens (vocab.text of {CONFIG}), "
                f"found {tokenizer.get_vocab_size()}"
            )
        return tokenizer

    def load_model(self, *, stacked: bool, dtype: Any, param_dtype: Any = None, mesh: Mesh | None = None) -> OmniModel:
        """Read the weights straight to where they will live.

        Each device's part of each parameter is read on its own, layers are stacked on the way. No parameter
        ever exists unsharded on a mesh, and memory holds at most one parameter more than the model.

        Args:
            stacked: see `omni_jax.model.trunk`.
            dtype: what matrix products run in.
            param_dtype: what the parameters are kept in, whatever the file has; None is the same as `dtype`.
            mesh: where the parameters live; None is the first device.

        Raises:
            CheckpointError: lists every tensor that is missing, unknown or misshapen.
        """
        graph, state = nnx.split(abstract_model(self.config, stacked=stacked, dtype=dtype))
        file = SafetensorsFile(self.folder / MODEL)
        self._check(file, _tensor_shapes(state))
        shardings = _shardings(state, mesh)
        kept = np.dtype(dtype if param_dtype is None else param_dtype)

        def load(path: ParamPath, variable: Any) -> jax.Array:
            layers = _unstacked(path, variable.shape)
            stack = layers != [path]
            names = [dotted_name(layer) for layer in layers]

            def read(index: tuple[slice, ...]) -> np.ndarray:
                shape = tuple(len(range(*part.indices(size))) for part, size in zip(index, variable.shape, strict=True))
                out = aligned_empty(shape, kept)
                if not stack:
                    file.read_into(names[0], out, index)
                    return out
                for name, row in zip(names[index[0]], out, strict=True):
                    file.read_into(name, row, index[1:])
                return out

            return jax.make_array_from_callback(variable.shape, shardings[path], _memoize_shards(read))

        arrays = {path: load(path, variable) for path, variable in nnx.to_flat_state(state)}
        return nnx.merge(graph, traverse_util.unflatten_dict(arrays))

    def load_codec(self) -> Snac:
        """The codec, in float32.

        Raises:
            CheckpointError: lists every tensor that is missing, unknown or misshapen.
        """
        file = SafetensorsFile(self.folder / CODEC)
        params = {name: tensor.read().astype(np.float32, copy=False) for name, tensor in file.tensors.items()}
        try:
            return Snac.from_params(self.config.codec, params)
        except ValueError as error:
            raise CheckpointError(f"{file.path}: {error}") from None

    def model_tensors(self) -> dict[str, LazyTensor]:
        """The model's tensors as they are in the file, to be read one by one.

        Raises:
            CheckpointError: lists every tensor that is missing, unknown or misshapen.
        """
        file = SafetensorsFile(self.folder / MODEL)
        self._check(file, parameter_shapes(self.config))
        return file.tensors

    def fingerprint(self) -> str:
        """Tells releases apart by what is in them, wherever they are.

        Of each tensor the first row counts: training moves them all, and reading no more takes no time.

        Raises:
            CheckpointError: a file is damaged.
        """
        digest = hashlib.sha256()
        for name in (CONFIG, *TOKENIZER_FILES):
            digest.update((self.folder / name).read_bytes())
        for name in (MODEL, CODEC):
            file = SafetensorsFile(self.folder / name)
            for tensor, known in sorted(file.tensors.items()):
                digest.update(f"{tensor} {known.dtype} {known.shape}".encode())
                digest.update(file.read(tensor, (slice(0, 1),) if known.shape else ()).tobytes())
        return digest.hexdigest()

    def codec_tensors(self) -> dict[str, LazyTensor]:
        """The codec's tensors as they are in the file, to be read one by one."""
        return SafetensorsFile(self.folder / CODEC).tensors

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files, to be copied."""
        return [self.folder / name for name in TOKENIZER_FILES]

    def inspect(self) -> dict[str, LazyTensor]:
        """Every tensor of the release, the codec's under `codec.`; nothing is read but shapes and types."""
        codec = {f"codec.{name}": tensor for name, tensor in self.codec_tensors().items()}
        return {**SafetensorsFile(self.folder / MODEL).tensors, **codec}

    def _check(self, file: SafetensorsFile, expected: Mapping[str, tuple[int, ...]]) -> None:
        if wrong := shape_mismatches(file.tensors, expected):
            raise CheckpointError(f"{file.path} does not fit {CONFIG}:\n" + "\n".join(wrong))


def save_release(
    folder: str | Path,
    config: ModelConfig,
    tensors: Tensors,
    codec_tensors: Tensors,
    tokenizer_files: Sequence[Path],
    *,
    int8: bool = False,
) -> None:
    """Write a release folder; it appears under its name only when complete.

    With several processes all must call this together, as tensors may be gathered from all; the first writes.

    Args:
        folder: new or empty.
        config: the model's shape.
        tensors: the model, as `model_tensors` gives it; produced one after the other.
        codec_tensors: the codec, named as `Snac.params` does.
        tokenizer_files: copied under their names.
        int8: keep the model's matrices in eight bits, a quarter of float32; the codec stays as it is.

    Raises:
        CheckpointError: `folder` has something in it, tensors do not fit the config, or a tokenizer file is
            missing.
    """
    if wrong := shape_mismatches(tensors, parameter_shapes(config)):
        raise CheckpointError(f"{folder}: the tensors do not fit the config:\n" + "\n".join(wrong))
    if missing := set(TOKENIZER_FILES) - {path.name for path in tokenizer_files if path.is_file()}:
        raise CheckpointError(f"{folder}: expected {', '.join(TOKENIZER_FILES)}; got no {', '.join(missing)}")
    if jax.process_index() != 0:
        for tensor in tensors.values():
            tensor.read()
    else:
        with new_folder(folder) as partial:
            write_safetensors(partial / MODEL, quantize_tensors(tensors) if int8 else tensors)
            write_safetensors(partial / CODEC, codec_tensors)
            for path in tokenizer_files:
                shutil.copyfile(path, partial / path.name)
            save_model_config(config, partial / CONFIG)
    multihost_utils.sync_global_devices("save_release")


def init_model(config: ModelConfig, *, stacked: bool, dtype: Any, seed: int, mesh: Mesh | None = None) -> OmniModel:
    """A model with random float32 weights, made where they will live: no unsharded copy ever exists.

    The same seed gives the same weights on any mesh, to float rounding.

    Args:
        config: the shape.
        stacked: see `omni_jax.model.trunk`.
        dtype: what matrix products run in.
        seed: draws the weights.
        mesh: where they live; None is the first device.
    """

    def make(rngs: nnx.Rngs) -> OmniModel:
        return OmniModel(config, stacked=stacked, dtype=dtype, rngs=rngs)

    if mesh is None:
        # Compiling hundreds of draws as one program takes longer than running them one by one.
        return make(nnx.Rngs(seed))
    graph, state = nnx.split(abstract_model(config, stacked=stacked, dtype=dtype))
    # On CPU, optimizing a program that runs once takes ten times as long as all the rest.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    draw = jax.jit(
        lambda key: nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)))),
        out_shardings=sharding.of_state(state, mesh),
        compiler_options=quick if mesh.devices.flat[0].platform == "cpu" else None,
    )
    return nnx.merge(graph, draw(jax.random.key(seed)))


def model_tensors(model: OmniModel) -> dict[str, LazyTensor]:
    """The tensors of a model as a release names them, one per layer, fetched from the devices when read.

    With several processes all must read the same tensors in the same order.
    """

    def tensor(array: jax.Array, layer: int | None) -> LazyTensor:
        shape = array.shape if layer is None else array.shape[1:]
        return LazyTensor(shape, np.dtype(array.dtype), lambda: _fetch(array if layer is None else array[layer]))

    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        paths = _unstacked(path, variable.shape)
        stack = paths != [path]
        for layer, part in enumerate(paths):
            tensors[dotted_name(part)] = tensor(variable[...], layer if stack else None)
    return tensors


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of this config has in a release."""
    return _tensor_shapes(nnx.state(abstract_model(config, stacked=False, dtype=jnp.float32)))


def dotted_name(path: ParamPath) -> str:
    """The name of a parameter in a release."""
    return ".".join(str(part) for part in path)


class _SameKey:
    """Stands in for `nnx.Rngs` where only shapes matter: counting draws is most of the time of a long trace."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


def abstract_model(config: ModelConfig, *, stacked: bool, dtype: Any) -> OmniModel:
    """The module without arrays."""

    def make() -> OmniModel:
        # Stacking by nnx.vmap insists on real ones; its trace is short.
        rngs: Any = nnx.Rngs(0) if stacked else _SameKey()
        return OmniModel(config, stacked=stacked, dtype=dtype, rngs=rngs)

    return nnx.eval_shape(make)


def _tensor_shapes(state: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape in a release of every parameter of a state."""
    shapes = {}
    for path, variable in nnx.to_flat_state(state):
        layers = _unstacked(path, variable.shape)
        for layer in layers:
            shapes[dotted_name(layer)] = variable.shape if layers == [path] else variable.shape[1:]
    return shapes


def _unstacked(path: ParamPath, shape: tuple[int, ...]) -> list[ParamPath]:
    """The paths of each layer of a stacked parameter; the path itself of any other."""
    if "layers" not in path:
        return [path]
    at = path.index("layers") + 1
    if isinstance(path[at], int):
        return [path]
    return [(*path[:at], layer, *path[at:]) for layer in range(shape[0])]


def _shardings(state: Any, mesh: Mesh | None) -> dict[ParamPath, Sharding]:
    """The sharding of each parameter of an abstract state."""
    if mesh is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        return {path: device for path, _ in nnx.to_flat_state(state)}
    return traverse_util.flatten_dict(sharding.of_state(state, mesh))


def _memoize_shards(read: Callable[[tuple[slice, ...]], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """Devices that hold the same shard of an array ask for it one by one: read it for the first only."""
    parts: dict[Any, np.ndarray] = {}

    def cached(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((part.start, part.stop) for part in index)
        if key not in parts:
            parts[key] = read(index)
        return parts[key]

    return cached


def _fetch(array: jax.Array) -> np.ndarray:
    """A whole array on the host, wherever its parts are."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
