"""The compiled programs of one model, bound to its weights and their mesh."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
from flax import nnx, traverse_util

from omni_jax import sharding
from omni_jax.config.model import ModelConfig
from omni_jax.hardware import require_memory
from omni_jax.inference import decode
from omni_jax.inference.decode import DecodeState, Routing
from omni_jax.model.layers import Int8
from omni_jax.model.omni import OmniModel
from omni_jax.model.pages import Cache, row_groups

Array = jax.Array

CACHE_AXES = ("batch", "kv_heads", None, None)
"""Logical axes of a layer's keys or values [R, K / P, S, P * H], of rows or of pages in groups."""
POOL_AXES = (None, *CACHE_AXES[1:])
"""Those of pages that are in one group: every device has all pages, as it has all rows."""

DECODE_MODULES = ("trunk", "tts_adapter", "embed", "head")
"""Modules that a decode step reads."""


class JittedFunctions(NamedTuple):
    """Jitted functions, to be called within the mesh; the first four take the weights first."""

    encode_audio: Any
    prefill: Any
    decode_chunk: Any
    init_state: Any
    insert: Any
    stop: Any


@lru_cache(maxsize=8)
def jitted_functions(graph: nnx.GraphDef[OmniModel], mesh: jax.sharding.Mesh) -> JittedFunctions:
    """The functions of all models of one shape on one mesh: the second model compiles nothing."""

    def sharded(function: Callable[..., Any]) -> Callable[..., Any]:
        """Fix the sharding of what a function returns, so that the next program is compiled for it once."""
        return function if mesh.size == 1 else lambda *args, **kwargs: constrain_state(function(*args, **kwargs))

    def bind(function: Callable[..., Any], **options: Any) -> Any:
        def call(weights: Any, *args: Any, **kwargs: Any) -> Any:
            return function(nnx.merge(graph, weights), *args, **kwargs)

        return jax.jit(call, **options)

    def decode_chunk(model: OmniModel, *args: Any) -> tuple[DecodeState, Array, Array]:
        state, tokens, status = decode.decode_chunk(model, *args)
        return (state if mesh.size == 1 else constrain_state(state)), tokens, status

    return JittedFunctions(
        encode_audio=bind(OmniModel.encode_audio),
        prefill=bind(sharded(decode.prefill), static_argnames="audio"),
        decode_chunk=bind(decode_chunk, donate_argnums=1),
        init_state=bind(sharded(decode.init_state), static_argnums=(1, 2, 3)),
        insert=jax.jit(sharded(decode.insert), donate_argnums=0),
        stop=jax.jit(sharded(decode.stop), donate_argnums=0),
    )


class ModelRunner:
    """A model's weights, as a plain dict (cheap to dispatch), and the programs that run on them.

    Each program is compiled once per shape: `encode_audio` per batch of recordings, `prefill` per rows and padded
    length, with and without a prefix, `decode_chunk` per batch size, pages and routing sizes. If the weights are
    sharded over a mesh, so is the running batch.

    Attributes:
        config: the model's shape.
        weights: nested dict of arrays, or of their shapes and shardings for programs that are compiled only.
        jitted: the jitted functions, for ahead-of-time compilation.
    """

    def __init__(self, model: OmniModel, *, int8: bool = False):
        """Take a model.

        Args:
            model: its weights are taken as they are.
            int8: quantize those that decoding reads to eight bits: half the bytes a step, good where reading them
                takes the time of a step. On a CPU, whose products want floats, it is slower.
        """
        graph, state = nnx.split(model)
        self._graph = graph
        self.config: ModelConfig = model.config
        self.weights: Any = nnx.to_pure_dict(state)
        # Before they are quantized: a scale has fewer axes.
        first = jax.tree.leaves(self.weights)[0]
        self._mesh = mesh = sharding.mesh_of(first)
        if mesh.size == 1 and isinstance(first, jax.Array):
            # On the mesh as what the programs return is: else each is compiled for both.
            self.weights = jax.device_put(self.weights, sharding.replicated(mesh))
        if int8:
            self.weights = quantize_weights(self.weights)

        self.jitted = jitted_functions(graph, mesh)

    def compiler(self) -> ModelRunner:
        """One whose methods compile the programs that they would run, and return the shapes of the results.

        The programs are this one's: it runs them without compiling them again. Shapes may be given for arrays.
        """
        runner = copy.copy(self)
        runner.jitted = JittedFunctions(*(partial(_compile, function) for function in self.jitted))
        return runner

    def module(self) -> OmniModel:
        """The model as a module, over the same arrays."""
        return nnx.merge(self._graph, self.weights)

    def encode_audio(self, audio: Array) -> Array:
        """See `OmniModel.encode_audio`."""
        with jax.set_mesh(self._mesh):
            return self.jitted.encode_audio(self.weights, audio)

    def prefill(self, tokens: Array, *args: Any, audio: bool) -> dict[str, Cache]:
        """See `omni_jax.inference.decode.prefill`."""
        with jax.set_mesh(self._mesh):
            return self.jitted.prefill(self.weights, tokens, *args, audio=audio)

    def decode_chunk(self, state: DecodeState, routing: Routing, steps: Array) -> tuple[DecodeState, Array, Array]:
        """See `omni_jax.inference.decode.decode_chunk`; `state` is donated."""
        with jax.set_mesh(self._mesh):
            return self.jitted.decode_chunk(self.weights, state, routing, steps)

    def row_groups(self, max_batch_size: int) -> int:
        """Into how many groups the batch slots are divided, each with the pages of its rows on its own devices."""
        return row_groups(max_batch_size, self._mesh)

    def page_bytes(self, page_len: int) -> int:
        """Bytes of a page in all caches and on all devices together."""
        with jax.set_mesh(self._mesh):
            state = jax.eval_shape(lambda weights: self.jitted.init_state(weights, 1, 1, page_len), self.weights)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.caches))

    def init_state(self, max_batch_size: int, num_pages: int, page_len: int) -> DecodeState:
        """See `omni_jax.inference.decode.init_state`.

        Raises:
            ConfigError: the cache is larger than the memory of the devices.
        """
        trunk = self.config.trunk
        values = 2 * num_pages * page_len * trunk.num_layers * trunk.num_kv_heads * trunk.head_dim
        what = f"a cache of {num_pages} x {page_len} positions"
        # No type of the cache is smaller than bfloat16.
        require_memory(2 * values, what, list(self._mesh.devices.flat))
        with jax.set_mesh(self._mesh):
            return self.jitted.init_state(self.weights, max_batch_size, num_pages, page_len)

    def insert(self, state: DecodeState, *args: Any) -> DecodeState:
        """See `omni_jax.inference.decode.insert`; `state` is donated."""
        with jax.set_mesh(self._mesh):
            return self.jitted.insert(state, *args)

    def stop(self, state: DecodeState, batch_slot: Array) -> DecodeState:
        """See `omni_jax.inference.decode.stop`; `state` is donated."""
        with jax.set_mesh(self._mesh):
            return self.jitted.stop(state, batch_slot)


def _compile(function: Any, *args: Any, **options: Any) -> Any:
    """The shapes and shardings of the results of a jitted function, which is compiled but not run."""
    compiled = function.lower(*args, **options).compile()
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        compiled.out_info,
        compiled.output_shardings,
    )


def cache_axes(tree: Any, mesh: Any) -> tuple[str | None, ...]:
    """Logical axes of the caches of a running batch or, without one, of rows.

    Pages are divided over the devices only if the batch slots are, however many pages there are.
    """
    return POOL_AXES if isinstance(tree, DecodeState) and row_groups(len(tree.positions), mesh) == 1 else CACHE_AXES


def constrain_state(tree: Any) -> Any:
    """Fix the sharding of caches and everything else that has a row per request: each row on its own devices."""
    axes = cache_axes(tree, jax.sharding.get_abstract_mesh())

    def constrain(x: Array) -> Array:
        # A stacked cache has its layers in front.
        layers = ("layers",) * (x.ndim - 4)
        return sharding.constrain(x, (*layers, *axes)) if x.ndim >= 4 else sharding.constrain_rows(x)

    return jax.tree.map(constrain, tree)


def quantize_weights(weights: Any, quantize: Callable[[Any, int], Int8] = Int8.of) -> Any:
    """The matrices of trunk, TTS adapter, embedding and heads as `Int8`; the rest of a model's weights as it is.

    Args:
        weights: nested, as `ModelRunner` has them.
        quantize: makes one of a weight and the number of its input axes.
    """
    flat = traverse_util.flatten_dict(weights)
    for path, weight in flat.items():
        if path[0] in DECODE_MODULES and path[-1] in ("weight", "text", "audio", "head"):
            flat[path] = quantize(weight, input_axes(path))
    return traverse_util.unflatten_dict(flat)


def input_axes(path: tuple[Any, ...]) -> int:
    """How many axes of a weight are those of its input: heads and head dim in the output projection of attention."""
    return 2 if path[-2:] == ("out", "weight") else 1
