"""The parameters of LoRA that a run starts with."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from omni_jax.checkpoint.safetensors_io import Tensors
from omni_jax.checkpoint.tensors import is_stacked, tensor_names
from omni_jax.config.run import LORA, PROJECTIONS
from omni_jax.convert import peft
from omni_jax.errors import ConfigError
from omni_jax.shapes import shape_mismatches
from omni_jax.training.setup import TrainingSetup
from omni_jax.training.stages import Params, module_of


def init_lora(setup: TrainingSetup) -> Params:
    """The parameters of LoRA that a run starts with, float32 on the mesh; empty if it has none.

    B is 0 and A drawn from N(0, 1 / inputs), each by its name: a seed means the same weights on any mesh. Or both are
    those of `lora.start`.

    Raises:
        ConfigError, ConversionError, CheckpointError: `lora.start` cannot be used.
    """
    lora = setup.config.lora
    if lora is None:
        return {}
    adapter = None if lora.start is None else read_start(setup)

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if adapter is not None:
            return adapter[name].read()
        if name.endswith(".b"):
            return np.zeros(shape, np.float32)
        draw = np.random.default_rng([setup.config.seed, zlib.crc32(name.encode())])
        return draw.standard_normal(shape, np.float32) / np.float32(math.sqrt(math.prod(shape[1:])))

    def param(path: tuple[str | int, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
        names = tensor_names(path, shape.shape)
        if is_stacked(path):
            value = np.stack([tensor(name, shape.shape[1:]) for name in names])
        else:
            value = tensor(names[0], shape.shape)
        return jax.make_array_from_callback(shape.shape, shape.sharding, value.__getitem__)

    flat = traverse_util.flatten_dict(setup.shapes)
    params = {path: param(path, shape) for path, shape in flat.items() if module_of(path) == LORA}
    return traverse_util.unflatten_dict(params)


def read_start(setup: TrainingSetup) -> Tensors:
    """The tensors of `lora.start`, by our names.

    Raises:
        ConfigError: it has another rank, alpha or other targets than the run.
        ConversionError, CheckpointError: it is no adapter of this trunk.
    """
    lora, trunk = setup.config.lora, setup.start.config.trunk
    assert lora is not None
    assert lora.start is not None
    adapter = peft.read(Path(lora.start), trunk)
    there = {name.split(".")[-3] for name in adapter.tensors}
    for field, mine, theirs in (
        ("targets", [x for x in PROJECTIONS if x in lora.targets], [x for x in PROJECTIONS if x in there]),
        ("rank", lora.rank, adapter.rank),
        ("alpha", lora.alpha, adapter.alpha),
    ):
        if mine != theirs:
            shown, found = (", ".join(x) if isinstance(x, list) else x for x in (theirs, mine))
            raise ConfigError(f"lora.{field}: expected {shown}, as in {lora.start}, found {found}", field="lora")
    flat = traverse_util.flatten_dict(setup.shapes).items()
    expected = {
        name: shape.shape[1:] if is_stacked(path) else shape.shape
        for path, shape in flat
        if module_of(path) == LORA
        for name in tensor_names(path, shape.shape)
    }
    if wrong := shape_mismatches(adapter.tensors, expected):
        raise ConfigError(f"lora.start: {lora.start}:\n" + "\n".join(wrong), field="lora.start")
    return adapter.tensors
