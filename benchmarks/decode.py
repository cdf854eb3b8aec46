"""A decode step of the published shape: this project, transformers, and reading the weights once.

Float32, random weights. Every row goes through the trunk, the text head and the seven audio heads.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from benchmarks.torch_reference import TorchOmni
from omni_jax.config.model import PRESETS
from omni_jax.inference.decode import DecodeState, Routing
from omni_jax.inference.runner import ModelRunner
from omni_jax.model.omni import OmniModel
from omni_jax.model.pages import PAGE_LEN, PageTable, pages_for

MAX_LEN = 512
POSITION = 150
STEPS = 4
"""Steps of a chunk; figures are per step."""
ROUNDS = 7


def main() -> None:
    config = PRESETS["mini_omni"]
    runner = ModelRunner(jax.jit(lambda: OmniModel(config, stacked=False, dtype=jnp.float32, rngs=nnx.Rngs(0)))())
    reference = TorchOmni(config, MAX_LEN)
    weights = [runner.weights[module] for module in ("embed", "trunk", "norm")]
    size = sum(x.nbytes for x in jax.tree.leaves(weights))

    @jax.jit
    def read(weights: object) -> jax.Array:
        return sum(jnp.sum(x) for x in jax.tree.leaves(weights))  # type: ignore[return-value]

    print(
        f"weights {size / 1e9:.2f} GB; cache of {MAX_LEN} positions, at position {POSITION}; median of {ROUNDS} rounds"
    )
    print(f"{'batch':>5} {'ours ms':>8} {'torch ms':>9} {'read ms':>8} {'torch/ours':>10} {'read/ours':>9}")
    for B in (1, 2, 8):
        batch = Batch(runner, B)
        reference.start(B, POSITION)

        def torch_steps(tokens: torch.Tensor = torch.zeros(B, 8, dtype=torch.long)) -> None:  # noqa: B008
            for _ in range(STEPS):
                tokens = reference.step(tokens)

        times = alternate(batch.decode, torch_steps, lambda: read(weights).block_until_ready())
        ours, other, once = times[0] / STEPS, times[1] / STEPS, times[2]
        print(
            f"{B:>5} {ours:>8.1f} {other:>9.1f} {once:>8.1f} {other / ours:>9.2f}x {once / ours:>9.0%}",
            flush=True,
        )


class Batch:
    """A batch in which every row outputs text and audio and never ends."""

    def __init__(self, runner: ModelRunner, max_batch_size: int):
        self.runner, self.max_batch_size = runner, max_batch_size
        columns = pages_for(MAX_LEN)
        state = runner.init_state(max_batch_size, max_batch_size * columns, PAGE_LEN)
        max_steps = jnp.full(max_batch_size, MAX_LEN, jnp.int32)
        self.state: DecodeState = dataclasses.replace(
            state,
            positions=jnp.full(max_batch_size, POSITION, jnp.int32),
            params=dataclasses.replace(state.params, outputs_audio=self._all(), max_steps=max_steps),
        )
        rows = jnp.arange(max_batch_size, dtype=jnp.int32)
        # Those that hold the positions of the benchmark, the first of the pool.
        used = pages_for(POSITION + STEPS)
        table = np.full((max_batch_size, columns), max_batch_size * columns)
        table[:, :used] = np.arange(max_batch_size * used).reshape(max_batch_size, used)
        pages = PageTable.of([table], max_batch_size * columns)
        self.routing = Routing(jnp.zeros(0, jnp.int32), text_slot=rows, text_row=rows, audio_slot=rows, pages=pages)

    def _all(self) -> jax.Array:
        """True for every slot; a new array each time, as a state is donated."""
        return jnp.ones(self.max_batch_size, bool)

    def decode(self) -> None:
        """Decode STEPS steps."""
        # Random weights may sample an end at any time.
        state = dataclasses.replace(self.state, running=self._all(), text_pending=self._all())
        self.state, tokens, _ = self.runner.decode_chunk(state, self.routing, jnp.int32(STEPS))
        tokens.block_until_ready()


def alternate(*functions: Callable[[], object]) -> list[float]:
    """Median milliseconds of each after one warm-up; they take turns, so that the machine's drift affects all alike."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(ROUNDS):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            taken.append((time.perf_counter() - start) * 1e3)
    return [float(np.median(taken)) for taken in times]


if __name__ == "__main__":
    main()
