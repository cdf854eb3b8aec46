"""Training on this machine: the step against torch, the memory of the loss, and how long a run waits for its data.

The step is that of a slice of Mini-Omni: its width, its whole vocabulary, 6 of its 24 layers; rows of spoken answers,
no ear; in float32, and with products in bfloat16. Ours is the step that runs train with (forward, backward, clip,
AdamW, and in one of ten the norms it reports); the other is transformers' Qwen2 with its tied head of 181120 rows,
eight cross entropies over slices of the logits, `clip_grad_norm_` and torch's fused AdamW, bfloat16 by autocast. All
four begin with the same weights, are in memory together (15 GB) and take turns; their medians are compared; that they
do the same is shown by their losses.

The loss alone, forward and backward, is run in chunks and with whole logits, each way in a process of its own, whose
peak memory (VmHWM) beyond weights, hidden states and compiled program is what counts. At the size of a real step, for
which this machine is too small, the compiler's own account of temporary memory stands in.

Waiting is what a run reports of itself: the fraction of its time that the loop spends in asking for the next batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from benchmarks.decode import alternate
from benchmarks.pipeline import exchange
from omni_jax import config as configs
from omni_jax import sharding
from omni_jax.checkpoint.safetensors_io import LazyTensor
from omni_jax.checkpoint.tensors import init_model, model_tensors
from omni_jax.config import TASKS
from omni_jax.config.model import PRESETS, AudioEncoderConfig, ModelConfig
from omni_jax.config.run import LossConfig, RunConfig
from omni_jax.convert import qwen2
from omni_jax.data.records import RecordWriter
from omni_jax.sharding import default_layout
from omni_jax.training import loop, loss
from omni_jax.training.stages import partition
from omni_jax.training.step import Batch, TrainState, optimizer, train_step
from omni_jax.vocab import NUM_CODEBOOKS, TEXT_STREAM, Vocab

LAYERS_OF_SLICE = 6
ROWS, LENGTH, PROMPT = 2, 256, 64
OPTIMIZER = {"steps": 1000, "peak": 1e-4, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}


def main() -> None:
    step()
    memory()
    waiting()


def step() -> None:
    """The train step against torch, in float32 and with products in bfloat16."""
    config = slice_of_mini_omni()
    arrays = rows_of_answers(config)
    runs: dict[str, Ours | Torch] = {"ours": Ours(config, arrays, "float32")}
    runs["torch"] = Torch(config, runs["ours"].weights(), arrays, "float32")
    runs["ours, bfloat16"] = Ours(config, arrays, "bfloat16")
    runs["torch, bfloat16"] = Torch(config, runs["ours"].weights(), arrays, "bfloat16")
    count = sum(x.size for x in jax.tree.leaves(runs["ours"].state.learning))
    print(f"train step, {ROWS} rows of {LENGTH} positions, {count / 1e6:.0f}M parameters; ", end="")
    print(f"torch threads {torch.get_num_threads()}")
    # The first step of each is the warm-up's.
    milliseconds = alternate(*(run.step for run in runs.values()))
    print(f"{'':>16} {'seconds':>8} {'of the first':>13} {'first loss':>11} {'last':>8}")
    for (name, run), taken in zip(runs.items(), milliseconds, strict=True):
        ratio = milliseconds[0] / taken
        print(
            f"{name:>16} {taken / 1e3:>8.2f} {ratio:>12.2f}x {run.losses[0]:>11.5f} {run.losses[-1]:>8.5f}", flush=True
        )


def slice_of_mini_omni() -> ModelConfig:
    whole = PRESETS["mini_omni"]
    # The step wants an ear; the batch gives it nothing to hear, and one of this size costs nothing.
    ear = AudioEncoderConfig(hidden_size=32, num_layers=1, num_heads=1, intermediate_size=32, max_position=2)
    trunk = dataclasses.replace(whole.trunk, num_layers=LAYERS_OF_SLICE)
    return dataclasses.replace(
        whole, audio_encoder=ear, adapter=dataclasses.replace(whole.adapter, intermediate_size=32), trunk=trunk
    )


def rows_of_answers(config: ModelConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    limits = np.array([config.vocab.audio] * NUM_CODEBOOKS + [config.vocab.text])[:, None]
    mask = np.zeros((ROWS, 8, LENGTH), bool)
    mask[..., PROMPT:] = True
    return {
        "tokens": rng.integers(0, limits, (ROWS, 8, LENGTH), dtype=np.int32),
        "targets": rng.integers(0, limits, (ROWS, 8, LENGTH), dtype=np.int32),
        "mask": mask,
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "segments": np.ones((ROWS, LENGTH), np.int32),
        "speech_index": np.full((ROWS, LENGTH), -1, np.int32),
        "sound": np.zeros((ROWS, 1, config.audio_encoder.max_samples), np.int16),
    }


class Ours:
    """The step as a run compiles it."""

    def __init__(self, config: ModelConfig, arrays: dict[str, np.ndarray], dtype: str):
        run = configs.build(
            RunConfig,
            {
                "out": "unused",
                "start": "unused",
                "learn": ["trunk", "text_embedding", "audio_embedding"],
                "data": {"sources": [{"path": "unused"}], "tasks": {"T1A2": 1}, "batch": ROWS, "length": LENGTH},
                "optimizer": OPTIMIZER,
                "remat": "none",
                "loss": {"chunk": 128 * ROWS},
            },
            "benchmark",
        )
        stacked, _ = default_layout()
        model = init_model(config, stacked=stacked, dtype=jnp.dtype(dtype), seed=0)
        model.lay_on(sharding.make_mesh())
        self.graph, params = nnx.split(model)
        learning, self.frozen = partition(nnx.to_pure_dict(params), run.trainable)
        self.state = TrainState(
            jnp.int32(0), learning, jax.jit(optimizer(run.optimizer).init)(learning), jnp.int32(0), jnp.int32(0)
        )
        self.batch: Batch = {name: jnp.asarray(x) for name, x in arrays.items()}
        self.run = jax.jit(partial(train_step, self.graph, run), donate_argnums=0)
        self.losses: list[float] = []

    def weights(self) -> dict[str, np.ndarray]:
        """The weights it begins with, as a release names them."""
        model = nnx.merge(self.graph, {**self.frozen, **self.state.learning})
        return {name: tensor.read() for name, tensor in model_tensors(model).items()}

    def step(self) -> None:
        """One step on the same batch."""
        self.state, metrics = self.run(self.state, self.frozen, self.batch)
        self.losses.append(float(metrics["loss"]))
        jax.block_until_ready(self.state)


class Torch:
    """The same model and step in PyTorch."""

    def __init__(self, config: ModelConfig, weights: dict[str, np.ndarray], arrays: dict[str, np.ndarray], dtype: str):
        vocab, D = Vocab(config.vocab), config.trunk.hidden_size
        # One table, the audio layers' rows after the text's, as published.
        named = {name: x for name, x in weights.items() if name.startswith(("trunk.", "norm."))}
        named["embed.text"] = np.concatenate([weights["embed.text"], weights["embed.audio"].reshape(-1, D)])
        with tempfile.TemporaryDirectory() as folder:
            qwen2.write(Path(folder), config.trunk, vocab.rows, {k: LazyTensor.of(x) for k, x in named.items()})
            self.model = transformers.Qwen2ForCausalLM.from_pretrained(folder).train()
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        decay = OPTIMIZER["weight_decay"]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=OPTIMIZER["peak"],
            betas=(OPTIMIZER["b1"], OPTIMIZER["b2"]),
            eps=OPTIMIZER["eps"],
            fused=True,
        )
        offsets = [*(vocab.text_rows + layer * vocab.audio_rows for layer in range(NUM_CODEBOOKS)), 0]
        sizes = [vocab.audio_rows] * NUM_CODEBOOKS + [vocab.text_rows]
        self.slices = [slice(at, at + size) for at, size in zip(offsets, sizes, strict=True)]
        self.ids = torch.from_numpy(arrays["tokens"].astype(np.int64)) + torch.tensor(offsets)[:, None]
        # What does not count is -100, which cross_entropy leaves out.
        self.targets = torch.from_numpy(np.where(arrays["mask"], arrays["targets"], -100).astype(np.int64))
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
        self.losses: list[float] = []

    def step(self) -> None:
        """One step on the same batch."""
        self.optimizer.zero_grad()
        with self.autocast:
            x = self.model.model.embed_tokens(self.ids).mean(1)
            logits = self.model(inputs_embeds=x, use_cache=False).logits
            total = sum(
                torch.nn.functional.cross_entropy(logits[..., rows].flatten(0, 1), self.targets[:, head].flatten())
                for head, rows in enumerate(self.slices)
            )
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER["clip"])
        self.optimizer.step()
        self.losses.append(total.item())


MEMORY_ROWS, MEMORY_LENGTH = 1, 1024
MEMORY = """
import sys
from benchmarks import train
train.measure_loss(int(sys.argv[1]))
"""
REAL_ROWS, REAL_LENGTH = 8, 2048


def memory() -> None:
    """The loss in chunks against whole logits."""
    print(f"loss forward and backward, {MEMORY_ROWS} row of {MEMORY_LENGTH} positions, each in a process of its own")
    print(f"{'chunk':>6} {'seconds':>8} {'peak GB':>8}")
    peaks = {}
    for chunk in (128, MEMORY_LENGTH):
        command = [sys.executable, "-c", MEMORY, str(chunk)]
        seconds, peak = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        peaks[chunk] = peak
        print(f"{chunk:>6} {seconds:>8.2f} {peak / 1e9:>8.2f}", flush=True)
    print(f"whole logits take {peaks[MEMORY_LENGTH] / peaks[128]:.1f}x the memory of chunks")
    print(f"{REAL_ROWS} rows of {REAL_LENGTH} positions, temporary memory by the compiler's account: ", end="")
    chunked, whole = (compiled_loss(chunk, REAL_ROWS, REAL_LENGTH) for chunk in (128, REAL_LENGTH))
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (chunked, whole)]
    print(
        f"chunks {sizes[0] / 1e9:.1f} GB, whole logits {sizes[1] / 1e9:.1f} GB, {sizes[1] / sizes[0]:.1f}x", flush=True
    )


def loss_arguments(rows: int, length: int) -> tuple[tuple[Any, Any], Any, Any, Any]:
    """Shapes of tables, hidden states, targets and mask of the published model."""
    config = PRESETS["mini_omni"]
    vocab, D = Vocab(config.vocab), config.trunk.hidden_size
    f32 = jnp.float32
    tables = (
        jax.ShapeDtypeStruct((vocab.text_rows, D), f32),
        jax.ShapeDtypeStruct((NUM_CODEBOOKS, vocab.audio_rows, D), f32),
    )
    shape = (rows, TEXT_STREAM + 1, length)
    hidden = jax.ShapeDtypeStruct((rows, length, D), f32)
    return tables, hidden, jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)


def compiled_loss(chunk: int, rows: int, length: int) -> jax.stages.Compiled:
    """The gradient of the loss in tables and hidden states."""

    def value(tables: Any, hidden: Any, targets: Any, mask: Any) -> Any:
        heads: Any = SimpleNamespace(head_tables=lambda: tables, mesh=None)
        config = LossConfig(chunk_size=chunk * rows)
        return loss.of_batch(heads, hidden, hidden, targets, mask, jnp.ones(TEXT_STREAM + 1), config)[0]

    return jax.jit(jax.value_and_grad(value, (0, 1))).lower(*loss_arguments(rows, length)).compile()


def measure_loss(chunk: int) -> None:
    """Print seconds, and bytes of this process's peak beyond what it held before."""
    program = compiled_loss(chunk, MEMORY_ROWS, MEMORY_LENGTH)
    arguments = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), loss_arguments(MEMORY_ROWS, MEMORY_LENGTH))
    jax.block_until_ready(arguments)

    def kilobytes(line: str) -> int:
        return int(Path("/proc/self/status").read_text().split(line)[1].split()[0])

    # The peak so far may be the compiler's.
    Path("/proc/self/clear_refs").write_text("5")
    before, start = kilobytes("VmRSS:"), time.perf_counter()
    jax.block_until_ready(program(*arguments))
    print(time.perf_counter() - start, (kilobytes("VmHWM:") - before) * 1024)


def waiting() -> None:
    """What a run says of its own waiting."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        with RecordWriter(Path(folder) / "records") as writer:
            for _ in range(100):
                made = exchange(rng)
                codes = made.answer_codes % PRESETS["nano"].vocab.audio
                writer.write(dataclasses.replace(made, answer_codes=codes))
        run = configs.build(
            RunConfig,
            {
                "out": f"{folder}/run",
                "start": "preset:nano",
                "learn": ["adapter", "trunk", "text_embedding", "audio_embedding"],
                "data": {
                    "sources": [{"path": f"{folder}/records"}],
                    "tasks": dict.fromkeys(TASKS, 1),
                    "batch": 4,
                    "length": 512,
                    "clips": 6,
                    "workers": 1,
                },
                "optimizer": {"steps": 30, "peak": 1e-3},
                "checkpoint": {"every": 1000},
                "remat": "none",
                "log_every": 10,
            },
            "benchmark",
        )
        with contextlib.redirect_stderr(io.StringIO()):
            loop.train(run)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    # The first ten steps compile.
    later = [line for line in lines if line["step"] > 10]
    seconds, wait, padding = (
        float(np.mean([line[name] for line in later])) for name in ("seconds_per_step", "waiting_for_data", "padding")
    )
    print(f"a run of nano's shape, all tasks: {seconds:.2f} s a step, {wait:.1%} of it waiting for data, ", end="")
    print(f"{padding:.1%} padding")


if __name__ == "__main__":
    main()
