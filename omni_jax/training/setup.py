"""TODO: omni_jax/training/setup.py"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, traverse_util
from jax.sharding import Mesh
from tokenizers import Tokenizer

from omni_jax import sharding
from omni_jax.checkpoint import release as checkpoint
from omni_jax.checkpoint.tensors import abstract_model, init_model
from omni_jax.codec.snac import Snac
from omni_jax.config.model import PRESETS, ModelConfig
from omni_jax.config.run import RunConfig
from omni_jax.errors import ConfigError
from omni_jax.hardware import CHIPS
from omni_jax.sharding import default_layout
from omni_jax.tokenizer import byte_tokenizer
from omni_jax.training.stages import Params, module_of, partition
from omni_jax.training.step import TrainState, optimizer, train_step
from omni_jax.vocab import Vocab

PRESET = "preset:"


@dataclasses.dataclass(frozen=True)
class InitialModel:
    """Where a run's weights come from: the parts of a release, or of an untrained preset."""

    config: ModelConfig
    tokenizer: Tokenizer
    release: checkpoint.Release | None
    seed: int

    @classmethod
    def find(cls, name: str, seed: int) -> InitialModel:
        """Open `preset:NAME`, a release folder, or the run folder of a finished stage.

        Raises:
            ConfigError: there is no such preset.
            CheckpointError: it is not a release, or the run has not finished.
        """
        if name.startswith(PRESET):
            preset = name.removeprefix(PRESET)
            if preset not in PRESETS:
                raise ConfigError(f"start: expected one of {', '.join(PRESETS)} after {PRESET}, found {preset!r}")
            return cls(PRESETS[preset], byte_tokenizer(), None, seed)
        release = checkpoint.open_release(name)
        return cls(release.config, release.tokenizer(), release, seed)

    def model(self, *, stacked: bool, dtype: Any, mesh: Mesh) -> Any:
        """The model with float32 weights on the mesh."""
        if self.release is None:
            return init_model(self.config, stacked=stacked, dtype=dtype, seed=self.seed, mesh=mesh)
        return self.release.load_model(stacked=stacked, dtype=dtype, param_dtype=jnp.float32, mesh=mesh)

    def codec(self) -> Snac:
        """The codec; untrained for a preset."""
        return Snac(self.config.codec, rngs=nnx.Rngs(self.seed)) if self.release is None else self.release.load_codec()


@dataclasses.dataclass
class TrainingSetup:
    """Everything a run is made of before any weight is there."""

    config: RunConfig
    start: InitialModel
    mesh: Mesh
    graph: nnx.GraphDef
    shapes: Any
    """Abstract parameters, nested dict."""
    shardings: Any
    stacked: bool
    dtype: Any

    @classmethod
    def of(cls, config: RunConfig, devices: Sequence[jax.Device] | None = None) -> TrainingSetup:
        """Check a run and lay it out over the devices.

        Args:
            config: of the run.
            devices: all of this process's backend if None.

        Raises:
            ConfigError: something does not fit: names the field.
        """
        start = InitialModel.find(config.start, config.seed)
        mesh = make_run_mesh(config, devices)
        stacked, dtype = default_layout(mesh.devices.flat[0].platform)
        if config.dtype != "auto":
            dtype = jnp.dtype(config.dtype)
        model = abstract_model(start.config, stacked=stacked, dtype=dtype)
        model.lay_on(mesh)
        graph, state = nnx.split(model)
        partition(nnx.to_pure_dict(state), config.trainable)
        return cls(config, start, mesh, graph, nnx.to_pure_dict(state), sharding.of_state(state, mesh), stacked, dtype)

    def split(self, params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters, shapes or shardings: what learns and what does not."""
        return partition(params, self.config.trainable)

    def state_shapes(self) -> tuple[TrainState, TrainState]:
        """The abstract train state and its shardings."""
        learning, _ = self.split(self.shapes)
        places, _ = self.split(self.shardings)
        whole = sharding.replicated(self.mesh)
        tx = optimizer(self.config.optimizer)
        moments = jax.eval_shape(tx.init, learning)
        moment_places = optax.tree.map_params(
            tx, lambda _, place: place, moments, places, transform_non_params=lambda _: whole
        )
        number = jax.ShapeDtypeStruct((), jnp.int32)
        return (
            TrainState(number, learning, moments, number, number),
            TrainState(whole, places, moment_places, whole, whole),
        )


def make_run_mesh(config: RunConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh a run asks for, over all devices of all processes, or those given.

    Raises:
        ConfigError: it does not divide the devices or slices, or the rows do not divide over it.
    """
    sizes = config.mesh
    rest, count = sizes.fsdp * sizes.tensor, jax.device_count() if devices is None else len(devices)
    data = sizes.data if sizes.data > 0 else count // rest
    if data < 1 or data * rest != count:
        raise ConfigError(
            f"mesh: expected data * fsdp * tensor to be the {count} devices, "
            f"found {sizes.data} * {sizes.fsdp} * {sizes.tensor}"
        )
    ways = data * sizes.fsdp * config.optimizer.gradient_accumulation_steps
    if config.data.batch_size % ways:
        raise ConfigError(
            f"data.batch_size: expected a multiple of {ways} (data * fsdp * optimizer.gradient_accumulation_steps), found {config.data.batch_size}"
        )
    return sharding.make_mesh(data, sizes.fsdp, sizes.tensor, devices)


def row_share(mesh: Mesh, process: int) -> tuple[int, int]:
    """Which share of a batch's rows a process reads: (index, count).

    Its rows need not be neighbors: where a mesh is laid out for the wires between chips, those of a host are a square
    of it. Processes whose devices split rows between them (tensor parallelism across processes) read the same share.

    Raises:
        ConfigError: some rows, but not all, are those of another process, too.
    """
    rows: dict[int, set[int]] = {}
    for row, devices in enumerate(mesh.devices.reshape(sharding.ways("batch", mesh), -1)):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(row)
    shares = sorted({frozenset(share) for share in rows.values()}, key=min)
    if sum(map(len, shares)) != len(frozenset.union(*shares)) or len({len(share) for share in shares}) > 1:
        raise ConfigError(f"mesh: expected processes to have the same rows or none in common, found {rows}")
    return shares.index(frozenset(rows[process])), len(shares)


COMPILER_OPTIONS = {
    # Left to itself the compiler gathers weights beside other work, but waits while gradients are summed. It refuses
    # to do otherwise on any other kind.
    CHIPS["v5e"].kind: {
        "xla_enable_async_reduce_scatter_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "true",
        # The sums need a little more than the 16 MiB that a fusion may take of the chip's own memory.
        "xla_tpu_scoped_vmem_limit_kib": "20480",
    },
}
"""What the compiler is told of a step, by kind of device."""


def compile_step(setup: TrainingSetup, places: TrainState) -> Any:
    """The step as it is compiled: of (state, frozen, batch), the state donated and placed as `state_shapes` says.

    What it gives is that of `omni_jax.training.step.train_step`.
    """
    return jax.jit(
        partial(train_step, setup.graph, setup.config),
        donate_argnums=0,
        out_shardings=(places, sharding.replicated(setup.mesh)),
        compiler_options=COMPILER_OPTIONS.get(setup.mesh.devices.flat[0].device_kind),
    )


def describe(config: RunConfig) -> str:
    """What a run would do, without doing it: parts, parameters, shapes, mesh, memory.

    Raises:
        ConfigError: it cannot be run.
    """
    setup = TrainingSetup.of(config)
    flat = traverse_util.flatten_dict(setup.shapes)
    places = traverse_util.flatten_dict(setup.shardings)
    lines = [f"mesh {dict(setup.mesh.shape)} over {setup.mesh.devices.size} {setup.mesh.devices.flat[0].device_kind}"]
    lines.append(f"{'part':<16} {'parameters':>12}  {'':<8} {'bytes per device':>17}")
    parts: dict[str, list[float]] = {}
    for path, shape in flat.items():
        local = np.prod(places[path].shard_shape(shape.shape)) * 4
        # Weights; what learns also has two moments and a gradient.
        local *= 4 if module_of(path) in config.trainable else 1
        entry = parts.setdefault(module_of(path), [0, 0])
        entry[0] += np.prod(shape.shape)
        entry[1] += local
    for part, (count, local) in parts.items():
        kind = "learns" if part in config.trainable else "frozen"
        lines.append(f"{part:<16} {int(count):>12,}  {kind:<8} {int(local):>17,}")
    learns = sum(count for part, (count, _) in parts.items() if part in config.trainable)
    total = sum(count for count, _ in parts.values())
    memory = sum(local for _, local in parts.values())
    lines.append(f"{'all':<16} {int(total):>12,}  {int(learns):,} learn; {memory / 2**30:.2f} GiB a device")
    model, trunk, rows = setup.start.config, setup.start.config.trunk, config.data.batch_size
    width = np.dtype(setup.dtype).itemsize
    here = rows // config.optimizer.gradient_accumulation_steps / (setup.mesh.shape["data"] * setup.mesh.shape["fsdp"])
    per_layer = here * config.data.max_length * trunk.hidden_size * width
    logits = here * config.loss.chunk_size * Vocab(model.vocab).text_rows * 4 * 2
    lines.append(
        f"a step: {rows} rows of {config.data.max_length} positions, {config.optimizer.gradient_accumulation_steps} part(s); estimated "
        f"activations {per_layer * (trunk.num_layers + 8) / 2**30:.2f} GiB (remat {config.remat}), "
        f"logits {logits / 2**30:.2f} GiB a device"
    )
    lines.append(f"steps {config.optimizer.steps}, learning rate up to {config.optimizer.peak_lr:g}; into {config.out}")
    return "\n".join(lines)
