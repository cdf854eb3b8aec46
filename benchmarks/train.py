"""Training on this machine: the step against torch, the optimizer against optax, the memory of the loss, data waiting.

The step is that of a part of Mini-Omni: its hidden size and vocabulary, 6 of its 24 layers; rows of spoken answers, no
audio input; in float32, and with products in bfloat16. Ours is the step of training runs (forward, backward, clip,
AdamW, norms). The other is transformers' Qwen2 with its tied head of 181120 rows, eight cross entropies over slices of
the logits, `clip_grad_norm_` and torch's fused AdamW, bfloat16 by autocast. All four start from the same weights, are
in memory together (15 GB) and take turns. Their medians are compared; their losses show that they compute the same.

The optimizer is compared in the same step: ours, and `optax.chain(clip_by_global_norm, adamw)`, by the memory that the
compiler reports and by time.

The loss alone, forward and backward, is run in chunks and with whole logits, each in a process of its own, whose peak
memory (VmHWM) beyond weights, hidden states and compiled program is measured. At the size of a real step, for which
this machine is too small, the compiler's report of temporary memory is printed instead.

Waiting is what a run reports: the fraction of its time that the loop spends in asking for the next batch.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers
from flax import nnx

from benchmarks.decode import alternate
from benchmarks.pipeline import exchange
from omni_jax import sharding
from omni_jax.checkpoint.safetensors_io import LazyTensor
from omni_jax.checkpoint.tensors import init_model, model_tensors
from omni_jax.config.load import build_config
from omni_jax.config.model import PRESETS, AudioEncoderConfig, ModelConfig
from omni_jax.config.run import LossConfig, OptimizerConfig, RunConfig
from omni_jax.convert import language_model
from omni_jax.data.records import RecordWriter
from omni_jax.tasks import Task
from omni_jax.training import step as training_step
from omni_jax.training.loop import train
from omni_jax.training.loss import batch_loss
from omni_jax.training.metrics import METRICS
from omni_jax.training.optimizer import adamw, decay_mask, learning_rate, zero_unless
from omni_jax.training.stages import partition
from omni_jax.training.step import Batch, TrainState, apply_gradient, train_step
from omni_jax.vocab import NUM_CODEBOOKS, TEXT_STREAM, Vocab

NUM_LAYERS = 6
ROWS, LENGTH, PROMPT = 2, 256, 64
OPTIMIZER = {
    "steps": 1000,
    "peak_lr": 1e-4,
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
}


def main() -> None:
    step()
    optimizer()
    memory()
    waiting()


def step() -> None:
    """The train step against torch, in float32 and with products in bfloat16."""
    config = shallow_mini_omni()
    arrays = rows_of_answers(config)
    ours = Ours(config, arrays, "float32")
    runs: dict[str, Ours | Torch] = {
        "ours": ours,
        "torch": Torch(config, ours.weights(), arrays, "float32"),
        "ours, bfloat16": Ours(config, arrays, "bfloat16"),
        "torch, bfloat16": Torch(config, ours.weights(), arrays, "bfloat16"),
    }
    count = sum(x.size for x in jax.tree.leaves(ours.state.trainable))
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


def optimizer() -> None:
    """The same step with our AdamW and with optax's: memory by the compiler's report, and time."""
    config = shallow_mini_omni()
    arrays = rows_of_answers(config)
    runs = {
        "ours": Ours(config, arrays, "float32"),
        "optax": Ours(config, arrays, "float32", optax_adamw, apply_gradient_of_optax),
    }
    milliseconds = alternate(*(run.step for run in runs.values()))
    peaks = []
    for (name, run), taken in zip(runs.items(), milliseconds, strict=True):
        size = run.program.memory_analysis()
        assert size is not None, "XLA:CPU reports memory"
        peaks.append(size.argument_size_in_bytes + size.temp_size_in_bytes)
        print(f"AdamW of {name:>5}: {taken / 1e3:.2f} s per step, {peaks[-1] / 1e9:.2f} GB of memory, ", end="")
        print(f"last loss {run.losses[-1]:.5f}", flush=True)
    print(f"optax takes {peaks[1] / peaks[0]:.2f}x the memory and {milliseconds[1] / milliseconds[0]:.2f}x the time")


def optax_adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """The reference: optax."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate(config), config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decay_mask
        ),
    )


def apply_gradient_of_optax(
    config: RunConfig, state: TrainState, gradient: Any, grad_norm: jax.Array, is_finite: jax.Array
) -> tuple[Any, Any, jax.Array, jax.Array]:
    """As `apply_gradient` in steps that are not logged, with the same handling of gradients that are not finite."""
    updates, new = optax_adamw(config.optimizer).update(gradient, state.opt_state, state.trainable)
    opt_state = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, state.opt_state)
    unknown = jnp.float32(jnp.nan)
    return optax.apply_updates(state.trainable, zero_unless(is_finite, updates)), opt_state, unknown, unknown


def shallow_mini_omni() -> ModelConfig:
    whole = PRESETS["mini_omni"]
    # The step needs an audio encoder; the batch has no audio, and one of this size costs nothing.
    encoder = AudioEncoderConfig(hidden_size=32, num_layers=1, num_heads=1, intermediate_size=32, max_position=2)
    trunk = dataclasses.replace(whole.trunk, num_layers=NUM_LAYERS)
    return dataclasses.replace(
        whole, audio_encoder=encoder, adapter=dataclasses.replace(whole.adapter, intermediate_size=32), trunk=trunk
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

    def __init__(
        self,
        config: ModelConfig,
        arrays: dict[str, np.ndarray],
        dtype: str,
        optimizer: Callable[[OptimizerConfig], optax.GradientTransformation] = adamw,
        apply: Callable[..., Any] = apply_gradient,
    ):
        run = build_config(
            RunConfig,
            {
                "out": "unused",
                "start": "unused",
                "trainable": ["trunk", "text_embedding", "audio_embedding"],
                "data": {
                    "sources": [{"path": "unused"}],
                    "tasks": {"T1A2": 1},
                    "batch_size": ROWS,
                    "max_length": LENGTH,
                },
                "optimizer": OPTIMIZER,
                "remat": "none",
                "loss": {"chunk_size": 128 * ROWS},
            },
            "benchmark",
        )
        stacked, _ = sharding.default_layout()
        mesh = sharding.make_mesh()
        model = init_model(config, stacked=stacked, dtype=jnp.dtype(dtype), seed=0, mesh=mesh)
        self.graph, params = nnx.split(model)
        trainable, self.frozen = partition(nnx.to_pure_dict(params), run.trainable)
        opt_state = jax.jit(optimizer(run.optimizer).init)(trainable)
        self.state = TrainState(jnp.int32(0), trainable, opt_state, jnp.int32(0), jnp.int32(0))
        self.batch: Batch = {name: jnp.asarray(x) for name, x in arrays.items()}
        program = jax.jit(partial(train_step, self.graph, run), donate_argnums=0)
        with jax.set_mesh(mesh), mock.patch.object(training_step, "apply_gradient", apply):
            self.program = program.lower(self.state, self.frozen, self.batch).compile()
        self.losses: list[float] = []

    def weights(self) -> dict[str, np.ndarray]:
        """The initial weights, as a release names them."""
        model = nnx.merge(self.graph, {**self.frozen, **self.state.trainable})
        return {name: tensor.read() for name, tensor in model_tensors(model).items()}

    def step(self) -> None:
        """One step on the same batch."""
        self.state, metrics = self.program(self.state, self.frozen, self.batch)
        self.losses.append(float(metrics["loss"]))
        jax.block_until_ready(self.state)


class Torch:
    """The same model and step in PyTorch."""

    def __init__(self, config: ModelConfig, weights: dict[str, np.ndarray], arrays: dict[str, np.ndarray], dtype: str):
        vocab, D = Vocab(config.vocab), config.trunk.hidden_size
        # One table, the rows of the codebooks after those of the text, as published.
        named = {name: x for name, x in weights.items() if name.startswith(("trunk.", "norm."))}
        named["embed.text"] = np.concatenate([weights["embed.text"], weights["embed.audio"].reshape(-1, D)])
        with tempfile.TemporaryDirectory() as folder:
            language_model.write(
                Path(folder), config.trunk, vocab.rows, {k: LazyTensor.of(x) for k, x in named.items()}
            )
            self.model = transformers.Qwen2ForCausalLM.from_pretrained(folder).train()
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        decay = OPTIMIZER["weight_decay"]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=OPTIMIZER["peak_lr"],
            betas=(OPTIMIZER["b1"], OPTIMIZER["b2"]),
            eps=OPTIMIZER["eps"],
            fused=True,
        )
        offsets = [*(vocab.text_rows + codebook * vocab.audio_rows for codebook in range(NUM_CODEBOOKS)), 0]
        sizes = [vocab.audio_rows] * NUM_CODEBOOKS + [vocab.text_rows]
        self.slices = [slice(at, at + size) for at, size in zip(offsets, sizes, strict=True)]
        self.ids = torch.from_numpy(arrays["tokens"].astype(np.int64)) + torch.tensor(offsets)[:, None]
        # cross_entropy ignores -100.
        self.targets = torch.from_numpy(np.where(arrays["mask"], arrays["targets"], -100).astype(np.int64))
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
        self.losses: list[float] = []

    def step(self) -> None:
        """One step on the same batch."""
        self.optimizer.zero_grad()
        with self.autocast:
            x = self.model.model.embed_tokens(self.ids).mean(1)
            logits = self.model(inputs_embeds=x, use_cache=False).logits
            losses = [
                torch.nn.functional.cross_entropy(logits[..., rows].flatten(0, 1), self.targets[:, head].flatten())
                for head, rows in enumerate(self.slices)
            ]
            total = torch.stack(losses).sum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER["max_grad_norm"])
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
    print(f"{REAL_ROWS} rows of {REAL_LENGTH} positions, temporary memory by the compiler's report: ", end="")
    chunked, whole = (compiled_loss(chunk, REAL_ROWS, REAL_LENGTH) for chunk in (128, REAL_LENGTH))
    reports = [program.memory_analysis() for program in (chunked, whole)]
    sizes = [report.temp_size_in_bytes for report in reports if report is not None]
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
        heads: Any = SimpleNamespace(head_tables=lambda: tables)
        config = LossConfig(chunk_size=chunk * rows)
        return batch_loss(heads, hidden, hidden, targets, mask, jnp.ones(TEXT_STREAM + 1), config)[0]

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
    """The waiting that a run reports."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        with RecordWriter(Path(folder) / "records") as writer:
            for _ in range(100):
                made = exchange(rng)
                assert made.answer_codes is not None
                codes = made.answer_codes % PRESETS["nano"].vocab.audio
                writer.write(dataclasses.replace(made, answer_codes=codes))
        run = build_config(
            RunConfig,
            {
                "out": f"{folder}/run",
                "start": "preset:nano",
                "trainable": ["adapter", "trunk", "text_embedding", "audio_embedding"],
                "data": {
                    "sources": [{"path": f"{folder}/records"}],
                    "tasks": dict.fromkeys(Task, 1),
                    "batch_size": 4,
                    "max_length": 512,
                    "max_clips": 6,
                    "num_workers": 1,
                },
                "optimizer": {"steps": 30, "peak_lr": 1e-3},
                "checkpoint": {"save_interval_steps": 1000},
                "remat": "none",
                "log_interval_steps": 10,
            },
            "benchmark",
        )
        with contextlib.redirect_stderr(io.StringIO()):
            train(run)
        lines = [json.loads(line) for line in (Path(folder) / "run" / METRICS).read_text().splitlines()]
    # The first ten steps compile.
    later = [line for line in lines if line["step"] > 10]
    seconds, wait, padding = (
        float(np.mean([line[name] for line in later]))
        for name in ("seconds_per_step", "data_wait_fraction", "padding_fraction")
    )
    print(f"a run of nano's shape, all tasks: {seconds:.2f} s per step, {wait:.1%} of it waiting for data, ", end="")
    print(f"{padding:.1%} padding")


if __name__ == "__main__":
    main()
