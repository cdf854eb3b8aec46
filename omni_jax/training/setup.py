"""What a run is made of before any weight is loaded: its initial model, mesh, shapes and shardings, compiled step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util
from jax.sharding import Mesh
from tokenizers import Tokenizer

from omni_jax import sharding
from omni_jax.checkpoint import release as releases
from omni_jax.checkpoint.release import Convert
from omni_jax.checkpoint.tensors import ParamPath, init_model
from omni_jax.codec.snac import Snac
from omni_jax.config.model import PRESETS, ModelConfig
from omni_jax.config.run import RunConfig
from omni_jax.data.records import has_conversations
from omni_jax.errors import CheckpointError, ConfigError
from omni_jax.hardware import tpu_name
from omni_jax.inference.runner import input_axes
from omni_jax.model.layers import Int8
from omni_jax.model.lora import add_lora
from omni_jax.model.omni import OmniModel
from omni_jax.sharding import default_layout
from omni_jax.tokenizer import byte_tokenizer
from omni_jax.training.optimizer import adamw
from omni_jax.training.stages import Params, is_trained, partition
from omni_jax.training.step import TrainState, train_step

PRESET = "preset:"

COMPILER_OPTIONS = {
    # Products and collectives in one program of the cores. By default the compiler does so with the gathering of
    # weights, but not with the reduction of gradients. It accepts these options for this kind only.
    "v5e": {
        "xla_enable_async_reduce_scatter_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "true",
        # The reductions need a little more than the 16 MiB of on-chip memory that a fusion may use by default.
        "xla_tpu_scoped_vmem_limit_kib": "20480",
    },
    # SparseCores run the collectives while the other cores compute. By default nothing overlaps on this kind.
    "v5p": {
        "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
        "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    },
}
"""Compiler options of the step, by TPU."""


@dataclass(frozen=True)
class InitialModel:
    """What the weights of a run are initialized from: a release, or a preset with random weights."""

    config: ModelConfig
    tokenizer: Tokenizer
    release: releases.Release | None
    """None for a preset."""
    seed: int

    @classmethod
    def find(cls, name: str, seed: int) -> InitialModel:
        """Open `preset:NAME`, a release, or the run folder of a finished stage.

        Raises:
            ConfigError: there is no such preset.
            CheckpointError: it is not a release, or the run has not finished.
        """
        if name.startswith(PRESET):
            preset = name.removeprefix(PRESET)
            if preset not in PRESETS:
                raise ConfigError(
                    f"start: expected one of {', '.join(PRESETS)} after {PRESET}, found {preset!r}", field="start"
                )
            return cls(PRESETS[preset], byte_tokenizer(), None, seed)
        try:
            release = releases.open_release(name)
        except CheckpointError as error:
            if Path(name).exists():
                raise
            raise CheckpointError(
                f"start: {error}; to start from random weights, or for --dry-run, name a preset: start=preset:mini_omni"
            ) from None
        return cls(release.config, release.tokenizer(), release, seed)

    def for_conversations(self) -> InitialModel:
        """The same as a model of conversations; what is trained on them says so in its config.

        Raises:
            ConfigError: it has no token that begins a system text.
        """
        try:
            config = replace(self.config, conversation=True)
        except ValueError as error:
            raise ConfigError(f"start: {error}", field="start") from None
        return replace(self, config=config, release=self.release and replace(self.release, config=config))

    def model(self, *, stacked: bool, dtype: Any, mesh: Mesh, convert: Convert | None = None) -> OmniModel:
        """The model on the mesh, with float32 weights, or what `convert` makes of them."""
        if self.release is not None:
            return self.release.load_model(
                stacked=stacked, dtype=dtype, param_dtype=jnp.float32, mesh=mesh, convert=convert
            )
        model = init_model(self.config, stacked=stacked, dtype=dtype, seed=self.seed, mesh=mesh)
        if convert is None:
            return model
        graph, state = nnx.split(model)
        flat = traverse_util.flatten_dict(nnx.to_pure_dict(state))
        return nnx.merge(graph, traverse_util.unflatten_dict({path: convert(path, x) for path, x in flat.items()}))

    def codec(self) -> Snac:
        """The codec; untrained for a preset."""
        return Snac(self.config.codec, rngs=nnx.Rngs(self.seed)) if self.release is None else self.release.load_codec()


@dataclass(frozen=True)
class TrainingSetup:
    """A run that has been checked and laid out over the devices."""

    config: RunConfig
    start: InitialModel
    mesh: Mesh
    graph: nnx.GraphDef
    """Of the model; `nnx.merge(graph, params)` is the model."""
    shapes: Any
    """Abstract parameters as the run holds them, nested dict."""
    shardings: Any
    """Of the parameters, nested dict."""
    stacked: bool
    """Whether layers are stacked; see `omni_jax.model.decoder`."""
    dtype: Any
    """Of matrix products."""

    @classmethod
    def of(cls, config: RunConfig, devices: Sequence[jax.Device] | None = None) -> TrainingSetup:
        """Check a run and lay it out over the devices.

        Args:
            config: of the run.
            devices: None: all of this process's backend.

        Raises:
            ConfigError: something does not fit; names the field.
            CheckpointError: the initial model cannot be opened.
        """
        start = InitialModel.find(config.start, config.seed)
        if any(has_conversations(source.path) for source in config.data.sources):
            start = start.for_conversations()
        mesh = make_run_mesh(config, devices)
        stacked, dtype = default_layout(mesh.devices.flat[0].platform)
        if config.dtype != "auto":
            dtype = jnp.dtype(config.dtype)
        model = releases.abstract_model(start.config, stacked=stacked, dtype=dtype)
        if config.lora is not None:
            add_lora(model, config.lora)
        graph, state = nnx.split(model)
        shapes = sharding.abstract(nnx.to_pure_dict(state), sharding.of_state(state, mesh))
        partition(shapes, config.trained)
        shapes = all_to_frozen_dtype(shapes, config)
        return cls(config, start, mesh, graph, shapes, jax.tree.map(lambda x: x.sharding, shapes), stacked, dtype)

    def split(self, params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
        """Split parameters, shapes or shardings into those that are trained and those that are frozen."""
        return partition(params, self.config.trained)

    def state_shapes(self) -> tuple[TrainState, TrainState]:
        """The abstract train state and its shardings."""
        trainable, _ = self.split(self.shapes)
        shardings, _ = self.split(self.shardings)
        replicated = sharding.replicated(self.mesh)
        tx = adamw(self.config.optimizer)
        opt_state = jax.eval_shape(tx.init, trainable)
        opt_shardings = optax.tree.map_params(
            tx, lambda _, of_param: of_param, opt_state, shardings, transform_non_params=lambda _: replicated
        )
        number = jax.ShapeDtypeStruct((), jnp.int32)
        return (
            TrainState(number, trainable, opt_state, number, number),
            TrainState(replicated, shardings, opt_shardings, replicated, replicated),
        )

    def abstract(self) -> tuple[TrainState, Params]:
        """The train state and the frozen parameters, as `jax.ShapeDtypeStruct` with shardings."""
        frozen, frozen_shardings = (self.split(params)[1] for params in (self.shapes, self.shardings))
        return sharding.abstract(*self.state_shapes()), sharding.abstract(frozen, frozen_shardings)


def to_frozen_dtype(path: ParamPath, param: Any, config: RunConfig) -> Any:
    """A parameter as a run keeps it in memory: one that is frozen in `config.frozen_dtype`.

    Args:
        path: of the parameter.
        param: float32, on the mesh; or its `jax.ShapeDtypeStruct`, with a sharding over it.
        config: of the run.

    Returns:
        An array or `Int8`, of arrays or `jax.ShapeDtypeStruct` with shardings.
    """
    if config.frozen_dtype == "float32" or is_trained(path, config.trained):
        return param
    shape: Any = jax.ShapeDtypeStruct(param.shape, jnp.bfloat16, sharding=param.sharding)
    if config.frozen_dtype == "int8" and path[0] in ("trunk", "tts_adapter") and path[-1] == "weight":
        shape = Int8.abstract(shape, input_axes(path))
    if isinstance(param, jax.ShapeDtypeStruct):
        return shape
    converted = _quantize(param, input_axes(path)) if isinstance(shape, Int8) else param.astype(shape.dtype)
    return jax.device_put(converted, jax.tree.map(lambda x: x.sharding, shape))


_quantize = jax.jit(Int8.of, static_argnums=1)


def all_to_frozen_dtype(params: Params, config: RunConfig) -> dict[str, Any]:
    """`to_frozen_dtype` for nested parameters."""
    flat = traverse_util.flatten_dict(dict(params))
    return traverse_util.unflatten_dict({path: to_frozen_dtype(path, param, config) for path, param in flat.items()})


def make_run_mesh(config: RunConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that a run asks for, over all devices of all processes, or those given.

    Raises:
        ConfigError: it does not divide the devices or slices, or the rows do not divide over it.
    """
    sizes = config.mesh
    rest, count = sizes.fsdp * sizes.tensor, jax.device_count() if devices is None else len(devices)
    data = sizes.data if sizes.data > 0 else count // rest
    if data < 1 or data * rest != count:
        raise ConfigError(
            f"mesh: expected data * fsdp * tensor to be the {count} devices, "
            f"found {sizes.data} * {sizes.fsdp} * {sizes.tensor}",
            field="mesh",
        )
    shards = data * sizes.fsdp * config.optimizer.gradient_accumulation_steps
    if config.data.batch_size % shards:
        raise ConfigError(
            f"data.batch_size: expected a multiple of {shards} (data * fsdp * "
            f"optimizer.gradient_accumulation_steps), found {config.data.batch_size}",
            field="data.batch_size",
        )
    return sharding.make_mesh(data, sizes.fsdp, sizes.tensor, devices)


def row_share(mesh: Mesh, process: int) -> tuple[int, int]:
    """Which share of a batch's rows a process reads: (index, count).

    Its rows need not be adjacent: a mesh follows the links between chips, and the chips of a host form a square of
    it. Processes whose devices split rows between them (tensor parallelism across processes) read the same share.

    Raises:
        ConfigError: some rows of a process, but not all, are also those of another process.
    """
    rows: dict[int, set[int]] = {}
    for row, devices in enumerate(mesh.devices.reshape(sharding.num_shards("batch", mesh), -1)):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(row)
    shares = sorted({frozenset(share) for share in rows.values()}, key=min)
    if sum(map(len, shares)) != len(frozenset.union(*shares)) or len({len(share) for share in shares}) > 1:
        raise ConfigError(
            f"mesh: expected processes to have the same rows or none in common, found {rows}", field="mesh"
        )
    return shares.index(frozenset(rows[process])), len(shares)


def compile_step(setup: TrainingSetup) -> Any:
    """The jitted step of (state, frozen, batch), to be called or lowered within `jax.set_mesh(setup.mesh)`.

    Returns:
        A function that returns what `omni_jax.training.step.train_step` does; the state is donated.
    """
    _, shardings = setup.state_shapes()
    return jax.jit(
        partial(train_step, setup.graph, setup.config),
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(setup.mesh)),
        compiler_options=COMPILER_OPTIONS.get(tpu_name(setup.mesh.devices.flat[0].device_kind) or ""),
    )
