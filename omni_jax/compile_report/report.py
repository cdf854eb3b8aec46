"""Compiles any of our programs for any slice of TPUs, and says what the compiler made of it.

Everything here comes from the compiler and from the chips' data sheets; nothing has run. A predicted time is the
largest of what the products, the memory and the links need at their peak, each as if it were alone.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omni_jax import sharding
from omni_jax.checkpoint.tensors import abstract_model
from omni_jax.codec.snac import Snac
from omni_jax.compile_report import flops, hlo
from omni_jax.compile_report.topology import Topology
from omni_jax.config.model import PRESETS, ModelConfig
from omni_jax.config.run import RunConfig
from omni_jax.errors import ConfigError
from omni_jax.inference.decode import CACHE_AXES, MAX_CHUNK_STEPS, Routing
from omni_jax.inference.runner import ModelRunner, quantize_weights
from omni_jax.model.layers import Int8
from omni_jax.prompts import speech_positions
from omni_jax.training.setup import TrainingSetup, compile_step
from omni_jax.vocab import NUM_STREAMS

PROGRAMS = ("train", "prefill", "decode", "batch", "codec")
PROMPT = 256
"""Positions of the prompts of `prefill`."""
CODEC_FRAMES = 16
"""Frames of each row of `codec`."""


@dataclass(frozen=True)
class Report:
    """What one program needs on one chip, unless it says otherwise. `decode` and `batch` are counted per step."""

    program: str
    model: str
    topology: str
    batch: int
    """Rows over all chips."""
    int8: bool
    """Whether decoding's weights have eight bits."""
    mesh: dict[str, int]
    compile_seconds: float
    memory_per_chip_bytes: int
    arguments_bytes: int
    temporary_bytes: int
    hbm_bytes: int
    fits: bool
    flops: float
    bytes: float
    bytes_ideal: float
    """What must be read and written at least: the weights and the cache once, the state of a training step twice."""
    bytes_ratio: float
    roofline_seconds: float
    bound_by: str
    collective_bytes: dict[str, float]
    """By kind, over the links."""
    beside_bytes: float
    """Of `collective_bytes`, what is sent beside other work; for the rest everything waits."""
    aliased_bytes: int
    """Of arguments that the results overwrite: a donated cache or state."""
    flop_utilisation: float
    """Share of the peak that the predicted time leaves the products."""

    def table(self) -> str:
        """For reading."""
        giga = 2**30
        mesh = " x ".join(f"{name} {size}" for name, size in self.mesh.items())
        links = ", ".join(f"{kind} {amount / 1e6:.1f} MB" for kind, amount in self.collective_bytes.items())
        links += (
            f"; {self.beside_bytes / sum(self.collective_bytes.values()):.0%} beside other work" if links else "none"
        )
        verdict = "fits" if self.fits else "DOES NOT FIT"
        left = (self.hbm_bytes - self.memory_per_chip_bytes) / giga
        per = " per step" if self.program in ("decode", "batch") else ""
        rows = {
            "program": f"{self.program}, {self.model}{' in 8 bits' * self.int8}, batch {self.batch} on "
            f"{self.topology} ({mesh})",
            "compiled in": f"{self.compile_seconds:.1f} s",
            "memory per chip": f"{self.memory_per_chip_bytes / giga:.2f} of {self.hbm_bytes / giga:.0f} GiB: "
            f"{verdict}, {left:.2f} GiB left (arguments {self.arguments_bytes / giga:.2f}, temporary "
            f"{self.temporary_bytes / giga:.2f}, overwritten in place {self.aliased_bytes / giga:.2f})",
            f"work per chip{per}": f"{self.flops / 1e9:.3f} GFLOP",
            f"HBM per chip{per}": f"{self.bytes / 1e6:.1f} MB, {self.bytes_ratio:.2f} x the least of "
            f"{self.bytes_ideal / 1e6:.1f} MB",
            f"links per chip{per}": links,
            f"predicted{per}": f"at least {self.roofline_seconds * 1e3:.3f} ms, bound by {self.bound_by}; "
            f"{self.flop_utilisation:.0%} of the peak FLOP/s",
        }
        wide = max(map(len, rows))
        return "\n".join(f"{name:{wide}}  {value}" for name, value in rows.items())


@dataclass(frozen=True)
class Program:
    """Something to compile: a jitted function and the shapes and places of its arguments."""

    function: Any
    arguments: tuple[Any, ...]
    ideal_bytes: float
    """Per chip and call."""
    keywords: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 1
    """How often a loop of unknown length runs in a call; figures are given per step."""


def examine(
    program: str,
    topology: Topology,
    *,
    model: str = "mini_omni",
    config: RunConfig | None = None,
    batch: int | None = None,
    tensor: int = 1,
    int8: bool = False,
) -> Report:
    """Compile one program.

    Args:
        program: one of `PROGRAMS`.
        topology: the slice.
        model: a preset.
        config: of the run, for `train`.
        batch: rows over all chips; None: what the config says, otherwise one per group of chips.
        tensor: chips that share a row, for all but `train`.
        int8: weights of eight bits, for `prefill`, `decode` and `batch`.

    Raises:
        ConfigError: something does not fit.
    """
    if program not in PROGRAMS:
        raise ConfigError(f"program: expected one of {', '.join(PROGRAMS)}, found {program!r}")
    if model not in PRESETS:
        raise ConfigError(f"model: expected one of {', '.join(PRESETS)}, found {model!r}")
    if int8 and program not in ("prefill", "decode", "batch"):
        raise ConfigError(f"int8: expected with prefill, decode or batch, found with {program}")
    devices = topology.devices()
    if program == "train":
        if config is None:
            raise ConfigError("train: expected --config, the configuration of a run")
        model, batch = config.start.removeprefix("preset:"), batch or config.data.batch_size
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch))
        mesh, made = _train(config, devices)
    else:
        if len(devices) % tensor:
            raise ConfigError(f"tensor: expected a divisor of {len(devices)} chips, found {tensor}")
        groups = len(devices) // tensor
        batch = batch or groups
        if batch % groups:
            raise ConfigError(f"batch: expected a multiple of {groups} groups of {tensor} chips, found {batch}")
        mesh = sharding.make_mesh(groups, 1, tensor, devices)
        options = {"int8": True} if int8 else {}
        made = _BUILDERS[program](PRESETS[model], mesh, batch, **options)
    return _report(program, model, topology, batch, mesh, made, int8=int8)


def _report(
    program: str, model: str, topology: Topology, batch: int, mesh: Mesh, made: Program, *, int8: bool
) -> Report:
    start = time.perf_counter()
    traced = made.function.trace(*made.arguments, **made.keywords)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    cost = hlo.parse(compiled.as_text(), unknown_trips=made.steps).cost
    work = flops.count(traced.jaxpr, made.steps)
    chip = topology.chip
    per_chip, moved = work / topology.chips / made.steps, cost.hbm / made.steps
    links = {kind: amount / made.steps for kind, amount in cost.collectives.items()}
    times = {
        "compute": per_chip / chip.flops,
        "memory": moved / chip.hbm_bandwidth,
        "links": sum(links.values()) / chip.ici_bandwidth,
    }
    bound_by = max(times, key=lambda name: times[name])
    needed = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return Report(
        program=program,
        model=model,
        topology=topology.name,
        batch=batch,
        int8=int8,
        mesh=dict(mesh.shape),
        compile_seconds=seconds,
        memory_per_chip_bytes=needed,
        arguments_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        hbm_bytes=chip.hbm_bytes,
        fits=needed <= chip.hbm_bytes,
        flops=per_chip,
        bytes=moved,
        bytes_ideal=made.ideal_bytes,
        bytes_ratio=moved / made.ideal_bytes,
        roofline_seconds=times[bound_by],
        bound_by=bound_by,
        collective_bytes=links,
        beside_bytes=cost.beside / made.steps,
        aliased_bytes=memory.alias_size_in_bytes,
        flop_utilisation=times["compute"] / times[bound_by],
    )


def _train(config: RunConfig, devices: list[Any]) -> tuple[Mesh, Program]:
    setup = TrainingSetup.of(config, devices)
    shapes, places = setup.state_shapes()
    _, frozen = setup.split(setup.shapes)
    _, frozen_places = setup.split(setup.shardings)
    model, data = setup.start.config, config.data
    B, T = data.batch_size, data.max_length
    arrays = {
        "tokens": ((B, NUM_STREAMS, T), jnp.int32),
        "targets": ((B, NUM_STREAMS, T), jnp.int32),
        "mask": ((B, NUM_STREAMS, T), jnp.bool_),
        "positions": ((B, T), jnp.int32),
        "segments": ((B, T), jnp.int32),
        "speech_index": ((B, T), jnp.int32),
        "sound": ((B, data.max_clips, model.audio_encoder.max_samples), jnp.int16),
    }
    rows = sharding.rows(setup.mesh)
    batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=rows) for name, (shape, kind) in arrays.items()}
    state = _placed(shapes, places)
    # Parameters and two moments of what learns are read and written; what is frozen is read.
    ideal = 2 * _share(state) + _share(_placed(frozen, frozen_places))
    return setup.mesh, Program(compile_step(setup, places), (state, _placed(frozen, frozen_places), batch), ideal)


def _programs(config: ModelConfig, mesh: Mesh, *, int8: bool) -> ModelRunner:
    """As for a loaded model, with shapes and places for weights."""
    graph, state = nnx.split(abstract_model(config, stacked=True, dtype=jnp.bfloat16))
    places = sharding.of_state(state, mesh)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), nnx.to_pure_dict(state))
    weights = _placed(shapes, places)
    nnx.update(abstract := nnx.merge(graph, state), weights)
    programs = ModelRunner(abstract)
    if int8:
        programs.weights = quantize_weights(programs.weights, _int8)
    return programs


def _int8(weight: jax.ShapeDtypeStruct, inputs: int) -> Int8:
    """Shapes and places of a weight's eight bits and scales."""
    shape, place = weight.shape[:-inputs], weight.sharding
    parts = (*place.spec, *[None] * (len(weight.shape) - len(place.spec)))[: len(shape)]
    scales = NamedSharding(place.mesh, PartitionSpec(*parts))
    values: Any = jax.ShapeDtypeStruct(weight.shape, jnp.int8, sharding=place)
    scale: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=scales)
    return Int8(values, scale)


def _decode(config: ModelConfig, mesh: Mesh, batch: int, *, parallel: bool, int8: bool = False) -> Program:
    """A chunk of steps of a full batch that writes and speaks; with `parallel`, each request has its second row."""
    programs = _programs(config, mesh, int8=int8)
    S = config.trunk.max_position
    state = jax.eval_shape(lambda weights: programs.empty(weights, batch, S), programs.weights)
    if parallel:
        cache = jax.eval_shape(lambda weights: programs.shadows(weights, batch, S), programs.weights)
        state = dataclasses.replace(state, shadows=cache)

    def place(x: Any) -> Any:
        axes = (None, *CACHE_AXES) if x.ndim == 5 else ("batch", *[None] * (x.ndim - 1))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, sharding.spec(x.shape, axes, mesh)))

    state = jax.tree.map(place, state)
    whole = sharding.replicated(mesh)
    idle: list[Any] = [
        jax.ShapeDtypeStruct((size,), jnp.int32, sharding=whole) for size in (batch * parallel, batch, batch, batch)
    ]
    steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    caches = [state.caches, state.shadows]
    # Of an embedding that is not the head as well only a row for each token is read.
    unread = {"audio_encoder", "adapter"} | ({"embed"} if "head" in programs.weights else set())
    needed = {name: value for name, value in programs.weights.items() if name not in unread}
    ideal = _share(needed) + _share(caches)
    return Program(programs.chunk, (programs.weights, state, Routing(*idle), steps), ideal, steps=MAX_CHUNK_STEPS)


def _prefill(config: ModelConfig, mesh: Mesh, batch: int, *, int8: bool = False) -> Program:
    programs = _programs(config, mesh, int8=int8)
    rows = NamedSharding(mesh, PartitionSpec(sharding.RULES["batch"]))
    positions = speech_positions(
        config.audio_encoder.max_samples, config.audio_encoder.max_position, config.adapter.stack
    )
    tokens = jax.ShapeDtypeStruct((batch, NUM_STREAMS, PROMPT), jnp.int32, sharding=rows)
    speech = jax.ShapeDtypeStruct((batch, positions, config.trunk.hidden_size), jnp.bfloat16, sharding=rows)
    count = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=rows)
    arguments = (programs.weights, tokens, speech, count)
    used = {name: value for name, value in programs.weights.items() if name in ("trunk", "tts_adapter")}
    cache = jax.eval_shape(partial(programs.prefill, audio=True), *arguments)
    ideal = _share(used) + _share((tokens, speech)) + _bytes(cache) / mesh.devices.size
    return Program(programs.prefill, arguments, ideal, {"audio": True})


def _codec(config: ModelConfig, mesh: Mesh, batch: int) -> Program:
    graph, state = nnx.split(nnx.eval_shape(lambda: Snac(config.codec, rngs=nnx.Rngs(0))))
    whole = sharding.replicated(mesh)
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), nnx.to_pure_dict(state))
    rows = sharding.rows(mesh)
    codes = jax.ShapeDtypeStruct((batch, CODEC_FRAMES, 7), jnp.int32, sharding=rows)
    function = jax.jit(lambda weights, codes: nnx.merge(graph, weights).decode(codes), out_shardings=rows)
    sound = 4 * batch * CODEC_FRAMES * config.codec.frame_size / mesh.devices.size
    return Program(function, (weights, codes), _share(weights) + _share(codes) + sound)


_BUILDERS: dict[str, Callable[..., Program]] = {
    "prefill": _prefill,
    "decode": partial(_decode, parallel=False),
    "batch": partial(_decode, parallel=True),
    "codec": _codec,
}


def _placed(shapes: Any, places: Any) -> Any:
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def _bytes(tree: Any) -> float:
    return float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def _share(tree: Any) -> float:
    """Bytes of it that lie on each chip."""
    total = 0
    for x in jax.tree.leaves(tree):
        local = x.sharding.shard_shape(x.shape)
        total += x.dtype.itemsize * math.prod(local)
    return float(total)
