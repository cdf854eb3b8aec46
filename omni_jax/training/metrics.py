"""What a run tells: a progress bar, metrics.jsonl, TensorBoard, and Weights & Biases if asked."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from tensorboardX import SummaryWriter
from tqdm import tqdm

from omni_jax.audio.features import log_mel
from omni_jax.config.load import to_dict
from omni_jax.config.run import RunConfig
from omni_jax.hardware import CHIPS
from omni_jax.inference.answer import Reply
from omni_jax.training.batches import ShardedBatch
from omni_jax.training.setup import TrainingSetup
from omni_jax.training.stages import module_of

HEADS = (*(f"audio_{layer}" for layer in range(7)), "text")
"""Names of the eight heads, in the order of the metrics' arrays."""


class MetricsWriter:
    """Writes on the first process, is silent on the others.

    metrics.jsonl is the record: one JSON object per log step or evaluation, appended, so that a resumed run goes
    on in the same file.
    """

    def __init__(self, config: RunConfig, first_step: int):
        self.active = jax.process_index() == 0
        self.last = (time.perf_counter(), first_step)
        self.waited = 0.0
        if not self.active:
            return
        out = Path(config.out)
        self.file = (out / "metrics.jsonl").open("a", encoding="utf-8")
        self.board = SummaryWriter(str(out / "tensorboard"))
        self.bar = tqdm(total=config.optimizer.steps, initial=first_step, unit="step", dynamic_ncols=True)
        self.wandb: Any = None
        if config.wandb:
            import wandb

            self.wandb = wandb.init(project=config.wandb, config=to_dict(config), dir=str(out), resume="allow")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write numbers of a step everywhere."""
        if not self.active:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def progress(self, step: int, shown: dict[str, str]) -> None:
        """Move the bar to a step."""
        if self.active:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(step - self.bar.n)

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self.active:
            self.bar.write(line)

    def rate(self, step: int) -> tuple[float, float]:
        """Seconds per step since the last call, and the part of that time spent waiting for data."""
        now, (before, since) = time.perf_counter(), self.last
        seconds = now - before
        waiting, self.waited = self.waited / max(seconds, 1e-9), 0.0
        self.last = (now, step)
        return seconds / max(step - since, 1), waiting

    def sample(self, step: int, name: str, question: str, expected: str, reply: Reply) -> None:
        """A held-out question and what the model answered: text, sound, spectrogram."""
        if not self.active:
            return
        self.board.add_text(f"samples/{name}", f"**{question}**\n\n{reply.text}\n\n(expected: {expected})", step)
        if reply.audio is not None and len(reply.audio) > 400:
            self.board.add_audio(f"samples/{name}", reply.audio, step, reply.sample_rate)
            mel = np.asarray(log_mel(jnp.asarray(reply.audio[None])))[0, ::-1]
            low, high = float(mel.min()), float(mel.max())
            self.board.add_image(f"samples/{name}", ((mel - low) / max(high - low, 1e-6))[None], step)

    def close(self) -> None:
        """Write out what is buffered."""
        if self.active:
            self.bar.close()
            self.board.close()
            self.file.close()
            if self.wandb is not None:
                self.wandb.finish()


class TrainingError(RuntimeError):
    """A run that cannot go on: says at which step and why."""


@dataclasses.dataclass
class Tally:
    """What went through the steps since the last log."""

    positions: int = 0
    capacity: int = 0
    steps: int = 0

    def add(self, batch: ShardedBatch) -> None:
        """Count a batch."""
        self.positions += batch.positions
        self.capacity += batch.capacity
        self.steps += 1


def log(
    setup: TrainingSetup,
    report: MetricsWriter,
    step: int,
    metrics: dict[str, jax.Array],
    tally: Tally,
    left_out: Mapping[str, int],
) -> None:
    """Wait for the device, write what a step measured.

    Raises:
        TrainingError: too many steps in a row were not finite.
    """
    values = jax.device_get(metrics)
    in_a_row = int(values["skipped_in_a_row"])
    if in_a_row >= setup.config.max_skipped_steps:
        raise TrainingError(
            f"steps {step - in_a_row + 1} to {step}: the loss or its gradient was not finite {in_a_row} times in a "
            f"row (max_skipped_steps is {setup.config.max_skipped_steps}); with another seed other records come next"
        )
    seconds, waiting = report.rate(step)
    processes = jax.process_count()
    rate = tally.positions / tally.steps / seconds * processes
    codec = setup.start.config.codec
    numbers = {
        "loss": float(values["loss"]),
        **{f"loss/{name}": float(x) for name, x in zip(HEADS, values["heads"], strict=True)},
        **{f"accuracy/{name}": float(x) for name, x in zip(HEADS, values["accuracy"], strict=True)},
        "gradient_norm": float(values["gradient_norm"]),
        "update_norm": float(values["update_norm"]),
        "parameter_norm": float(values["parameter_norm"]),
        "learning_rate": float(values["learning_rate"]),
        "skipped_steps": float(values["skipped"]),
        "seconds_per_step": seconds,
        "positions_per_second": rate,
        # A frame is one target of the first audio layer.
        "speech_seconds_per_second": float(values["counts"][0]) * codec.frame_size / codec.sample_rate / seconds,
        "padding": 1 - tally.positions / tally.capacity,
        "waiting_for_data": waiting,
        **{f"skipped_records/{reason}": float(count) for reason, count in left_out.items()},
    }
    flops = model_flops(setup, rate)
    numbers["model_flops_per_second"] = flops
    peak = peak_flops(setup.mesh)
    if peak:
        numbers["model_flop_utilisation"] = flops / peak
    report.scalars(step, numbers)
    audio = float(np.mean(values["heads"][:7]))
    shown = {"loss": f"{numbers['loss']:.3f}", "text": f"{values['heads'][7]:.3f}", "audio": f"{audio:.3f}"}
    shown |= {"pos/s": f"{rate:.0f}", "speech s/s": f"{numbers['speech_seconds_per_second']:.1f}"}
    if peak:
        shown["mfu"] = f"{flops / peak:.0%}"
    report.progress(step, shown)


def model_flops(setup: TrainingSetup, positions_per_second: float) -> float:
    """Model FLOP/s: 6 per parameter and position for matrices that learn, 4 for frozen ones gradients pass through.

    The usual count (arXiv 2204.02311, appendix B) without attention and recomputation; the ear, which runs on
    recordings and not on positions, is left out.
    """
    learning = set(setup.config.trainable)
    total = 0.0
    for path, shape in traverse_util.flatten_dict(setup.shapes).items():
        part = module_of(path)
        if part == "audio_encoder" or (
            part.endswith("_embedding") and not setup.start.config.trunk.tie_word_embeddings
        ):
            continue
        total += (6.0 if part in learning else 4.0) * float(np.prod(shape.shape))
    return total * positions_per_second


def peak_flops(mesh: Mesh) -> float | None:
    """Peak bfloat16 FLOP/s of the mesh's devices; None where it is not known."""
    kind = mesh.devices.flat[0].device_kind
    chip = next((chip for chip in CHIPS.values() if kind in (chip.kind, f"{chip.kind}p")), None)
    return None if chip is None else chip.flops * mesh.devices.size
