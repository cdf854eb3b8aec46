"""The programs that can be compiled without their weights: functions, and shapes and shardings of the arguments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from omni_jax import sharding
from omni_jax.checkpoint.tensors import abstract_model
from omni_jax.codec.snac import Snac
from omni_jax.config.model import ModelConfig
from omni_jax.config.run import RunConfig
from omni_jax.inference.decode import MAX_CHUNK_STEPS, Routing
from omni_jax.inference.runner import ModelRunner, cache_axes, quantize_weights
from omni_jax.model.layers import Int8
from omni_jax.model.pages import PAGE_LEN, PageTable, pages_for, read_sizes
from omni_jax.prompts import max_speech_positions
from omni_jax.training.batches import abstract_batch
from omni_jax.training.setup import TrainingSetup, compile_step
from omni_jax.vocab import NUM_CODEBOOKS, NUM_STREAMS

PROMPT_LENGTH = 256
"""Positions of each prompt of `prefill`."""
CODEC_FRAMES = 16
"""Frames of each row of `codec`."""


@dataclass(frozen=True)
class Program:
    """A jitted function with abstract arguments."""

    function: Any
    mesh: Mesh
    arguments: tuple[Any, ...]
    """Trees of `jax.ShapeDtypeStruct` with shardings."""
    ideal_bytes: float
    """Bytes of HBM that each chip must read and write at least in a call."""
    keywords: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 1
    """Trip count of a loop of unknown length; results are reported per step."""
    branch: int = -1
    """Which of `read_sizes` attention reads."""

    def compile(self) -> tuple[jax.stages.Traced, jax.stages.Compiled]:
        """Trace and compile it for its mesh."""
        with jax.set_mesh(self.mesh):
            traced = self.function.trace(*self.arguments, **self.keywords)
            return traced, traced.lower().compile()


def train_program(config: RunConfig, devices: Sequence[jax.Device]) -> Program:
    """One training step of a run.

    Raises:
        ConfigError: the run does not fit the devices.
    """
    setup = TrainingSetup.of(config, devices)
    state, frozen = setup.abstract()
    # Trained parameters and their two moments are read and written; frozen parameters are read.
    ideal = 2 * bytes_per_chip(state) + bytes_per_chip(frozen)
    return Program(compile_step(setup), setup.mesh, (state, frozen, abstract_batch(setup)), ideal)


def decode_program(
    config: ModelConfig,
    mesh: Mesh,
    batch: int,
    *,
    batch_parallel: bool = False,
    int8: bool = False,
    positions: int | None = None,
) -> Program:
    """A chunk of decode steps of a full batch whose requests all output text and audio.

    Args:
        config: the model's shape.
        mesh: what to shard it over.
        batch: requests over all chips.
        batch_parallel: whether each request has a companion row.
        int8: whether the weights are quantized.
        positions: how many positions each row has, which are half a page less than it has memory for; None: all of the
            context.
    """
    columns = pages_for(config.trunk.max_position)
    num_pages = batch * (1 + batch_parallel) * columns
    if positions is not None:
        num_pages = math.ceil(batch * (1 + batch_parallel) * mean_pages(config, positions))
    with jax.set_mesh(mesh):
        runner = _abstract_runner(config, mesh, int8=int8)
        programs = runner.jitted
        groups = runner.row_groups(batch)
        num_pages = -(-num_pages // groups) * groups
        state = jax.eval_shape(lambda weights: programs.init_state(weights, batch, num_pages, PAGE_LEN), runner.weights)

    of_cache = cache_axes(state, mesh)

    def shard(x: Any) -> jax.ShapeDtypeStruct:
        # The caches are stacked: their first axis is the layers.
        axes = ("layers", *of_cache) if x.ndim == 5 else ("batch", *[None] * (x.ndim - 1))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, sharding.spec(x.shape, axes, mesh)))

    state = jax.tree.map(shard, state)
    replicated = sharding.replicated(mesh)

    def ints(*shape: int, by_group: bool = False) -> Any:
        placed = sharding.rows(mesh) if by_group and groups > 1 else replicated
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placed)

    pages = PageTable(
        tuple(ints(batch, columns, by_group=True) for _ in range(1 + batch_parallel)),
        ints(num_pages, by_group=True),
        ints(num_pages, by_group=True),
        ints(),
        ints(),
    )
    routing = Routing(ints(batch * batch_parallel), ints(batch), ints(batch), ints(batch), pages)
    # Of an embedding that is not the head as well, a step reads only one row per token.
    skipped = {"audio_encoder", "adapter"} | ({"embed"} if "head" in runner.weights else set())
    read = {name: value for name, value in runner.weights.items() if name not in skipped}
    ideal = bytes_per_chip(read) + bytes_per_chip(state.caches)
    # All pages are in use.
    in_use, longest = num_pages // groups, columns if positions is None else pages_for(positions)
    sizes = read_sizes(in_use, columns, stacked=True)
    branch = next(index for index, (count, of_row) in enumerate(sizes) if count >= in_use and of_row >= longest)
    arguments = (runner.weights, state, routing, ints())
    return Program(programs.decode_chunk, mesh, arguments, ideal, steps=MAX_CHUNK_STEPS, branch=branch)


def mean_pages(config: ModelConfig, positions: float) -> float:
    """Pages of a row of so many positions, the mean over rows whose last page is filled by any part."""
    return min(positions / PAGE_LEN + 0.5, pages_for(config.trunk.max_position))


def encode_program(
    config: ModelConfig, mesh: Mesh, batch: int, *, int8: bool = False, samples: int | None = None
) -> Program:
    """Encoding `batch` recordings.

    Args:
        config: the model's shape.
        mesh: what to shard it over.
        batch: recordings over all chips.
        int8: whether the weights that decoding reads are quantized, which those of the encoder are not.
        samples: of each recording, at 16 kHz, before it is padded as the model has it; None: as many as it takes.
    """
    encoder = config.audio_encoder
    window = encoder.max_position if samples is None else encoder.window(samples)
    audio = jax.ShapeDtypeStruct((batch, 320 * window), jnp.float32, sharding=sharding.rows(mesh))
    with jax.set_mesh(mesh):
        runner = _abstract_runner(config, mesh, int8=int8)
        speech = jax.eval_shape(runner.jitted.encode_audio, runner.weights, audio)
    read = {name: value for name, value in runner.weights.items() if name in ("audio_encoder", "adapter")}
    ideal = bytes_per_chip(read) + bytes_per_chip(audio) + _bytes(speech) / mesh.devices.size
    return Program(runner.jitted.encode_audio, mesh, (runner.weights, audio), ideal)


def prefill_program(
    config: ModelConfig, mesh: Mesh, batch: int, *, int8: bool = False, length: int = PROMPT_LENGTH
) -> Program:
    """Prefill of `batch` prompts of `length` positions with speech."""
    rows = sharding.rows(mesh)
    positions = max_speech_positions(config)
    tokens = jax.ShapeDtypeStruct((batch, NUM_STREAMS, length), jnp.int32, sharding=rows)
    speech = jax.ShapeDtypeStruct((batch, positions, config.trunk.hidden_size), jnp.bfloat16, sharding=rows)
    count = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=rows)
    with jax.set_mesh(mesh):
        runner = _abstract_runner(config, mesh, int8=int8)
        arguments = (runner.weights, tokens, speech, count)
        cache = jax.eval_shape(partial(runner.jitted.prefill, audio=True), *arguments)
    read = {name: value for name, value in runner.weights.items() if name in ("trunk", "tts_adapter")}
    ideal = bytes_per_chip(read) + bytes_per_chip((tokens, speech)) + _bytes(cache) / mesh.devices.size
    return Program(runner.jitted.prefill, mesh, arguments, ideal, {"audio": True})


def codec_program(config: ModelConfig, mesh: Mesh, batch: int) -> Program:
    """Decoding `CODEC_FRAMES` frames of codes per row to audio, float32."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Snac(config.codec, rngs=nnx.Rngs(0))))
    replicated, rows = sharding.replicated(mesh), sharding.rows(mesh)
    weights = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), nnx.to_pure_dict(state)
    )
    codes = jax.ShapeDtypeStruct((batch, CODEC_FRAMES, NUM_CODEBOOKS), jnp.int32, sharding=rows)
    decode = jax.jit(lambda weights, codes: nnx.merge(graph, weights).decode(codes), out_shardings=rows)
    audio_bytes = 4 * batch * CODEC_FRAMES * config.codec.frame_size / mesh.devices.size
    ideal = bytes_per_chip(weights) + bytes_per_chip(codes) + audio_bytes
    return Program(decode, mesh, (weights, codes), ideal)


INFERENCE_PROGRAMS: dict[str, Callable[..., Program]] = {
    "encode": encode_program,
    "prefill": prefill_program,
    "decode": decode_program,
    "batch": partial(decode_program, batch_parallel=True),
    "codec": codec_program,
}
"""By name: functions of (model config, mesh, batch)."""


def _abstract_runner(config: ModelConfig, mesh: Mesh, *, int8: bool) -> ModelRunner:
    """A runner as for a loaded model in bfloat16, with shapes and shardings in place of weights."""
    graph, state = nnx.split(abstract_model(config, stacked=True, dtype=jnp.bfloat16))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), nnx.to_pure_dict(state))
    nnx.update(model := nnx.merge(graph, state), sharding.abstract(shapes, sharding.of_state(state, mesh)))
    runner = ModelRunner(model)
    if int8:
        runner.weights = quantize_weights(runner.weights, Int8.abstract)
    return runner


def _bytes(tree: Any) -> float:
    return float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def bytes_per_chip(tree: Any) -> float:
    """Bytes of the shards that each chip holds."""
    return float(sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)))
