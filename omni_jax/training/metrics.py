"""What a run reports: a progress bar, metrics.jsonl, TensorBoard, and Weights & Biases if configured."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from omni_jax.errors import ConfigError, TrainingError
from omni_jax.hardware import CHIPS
from omni_jax.inference.answer import Reply
from omni_jax.training.batches import ShardedBatch
from omni_jax.training.loss import HEADS
from omni_jax.training.setup import TrainingSetup, row_share
from omni_jax.training.stages import module_of
from omni_jax.vocab import NUM_CODEBOOKS

METRICS = "metrics.jsonl"
"""Name of the metrics file in the folder of a run."""
MIN_SAMPLE_LENGTH = 400
"""Samples of the shortest answer that is written as audio and as a spectrogram: one window of the features."""


class MetricsWriter:
    """Writes on process 0; does nothing on the others.

    metrics.jsonl gets one JSON object per log step or evaluation. It is appended to, so that a resumed run continues
    the same file.
    """

    def __init__(self, config: RunConfig, first_step: int):
        self.active = jax.process_index() == 0
        if not self.active:
            return
        out = Path(config.out)
        self.wandb: Any = None
        if config.wandb:
            self.wandb = _init_wandb(config, out)
        _drop_half_line(out / METRICS)
        self.file = (out / METRICS).open("a", encoding="utf-8")
        self.board = SummaryWriter(str(out / "tensorboard"))
        self.bar = tqdm(total=config.optimizer.steps, initial=first_step, unit="step", dynamic_ncols=True)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write the numbers of a step everywhere."""
        if not self.active:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def progress(self, step: int, shown: dict[str, str]) -> None:
        """Move the progress bar to a step."""
        if self.active:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(step - self.bar.n)

    def sample(self, step: int, name: str, question: str, expected: str, reply: Reply) -> None:
        """Write a held-out question and the model's answer to TensorBoard: text, audio, spectrogram."""
        if not self.active:
            return
        self.board.add_text(f"samples/{name}", f"**{question}**\n\n{reply.text}\n\n(expected: {expected})", step)
        if reply.audio is not None and len(reply.audio) > MIN_SAMPLE_LENGTH:
            self.board.add_audio(f"samples/{name}", reply.audio, step, reply.sample_rate)
            mel = np.asarray(log_mel(jnp.asarray(reply.audio[None])))[0, ::-1]
            low, high = float(mel.min()), float(mel.max())
            self.board.add_image(f"samples/{name}", ((mel - low) / max(high - low, 1e-6))[None], step)

    def close(self) -> None:
        """Flush and close everything."""
        if self.active:
            self.bar.close()
            self.board.close()
            self.file.close()
            if self.wandb is not None:
                self.wandb.finish()


def _drop_half_line(path: Path) -> None:
    """Drop what a full disk left at the end of a file of lines."""
    text = path.read_bytes() if path.exists() else b""
    if text and not text.endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])


def _init_wandb(config: RunConfig, out: Path) -> Any:
    try:
        import wandb
    except ModuleNotFoundError:
        raise ConfigError("wandb: the package is not installed: pip install wandb", field="wandb") from None
    return wandb.init(project=config.wandb, config=to_dict(config), dir=str(out), resume="allow")


@dataclass
class Tally:
    """What went through the steps since the last log step, and how long it took."""

    steps: int = 0
    positions: int = 0
    """Positions that an example filled, in the rows of this process."""
    capacity: int = 0
    """All positions of these rows."""
    waited: float = 0.0
    """Seconds spent waiting for the data."""
    start: float = field(default_factory=time.perf_counter)

    def add(self, batch: ShardedBatch) -> None:
        """Count a batch."""
        self.steps += 1
        self.positions += batch.positions
        self.capacity += batch.capacity

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time within as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def rates(self, num_readers: int) -> dict[str, float]:
        """The metrics that come from counts and time, given how many processes read different rows."""
        seconds = time.perf_counter() - self.start
        return {
            "seconds_per_step": seconds / self.steps,
            "positions_per_second": self.positions / seconds * num_readers,
            "padding_fraction": 1 - self.positions / self.capacity,
            "data_wait_fraction": self.waited / seconds,
        }


def log_step(
    setup: TrainingSetup,
    writer: MetricsWriter,
    step: int,
    metrics: dict[str, jax.Array],
    tally: Tally,
    skipped_records: Mapping[str, int],
) -> None:
    """Wait for the device and write the metrics of a step.

    Args:
        setup: of the run.
        writer: where to.
        step: number of steps done.
        metrics: of the last step, from `omni_jax.training.step.train_step`.
        tally: of the steps since the last log step.
        skipped_records: records that were skipped, by reason.

    Raises:
        TrainingError: too many consecutive steps had a loss or gradient that was not finite.
    """
    values = jax.device_get(metrics)
    _check_skipped(setup.config, step, int(values["num_skipped_in_a_row"]))
    _, num_readers = row_share(setup.mesh, jax.process_index())
    rates = tally.rates(num_readers)
    codec = setup.start.config.codec
    # A frame is one target of the first codebook.
    audio_seconds = float(values["counts"][0]) * codec.frame_size / codec.sample_rate
    numbers = {
        "loss": float(values["loss"]),
        **{f"loss/{name}": float(x) for name, x in zip(HEADS, values["head_losses"], strict=True)},
        **{f"accuracy/{name}": float(x) for name, x in zip(HEADS, values["head_accuracies"], strict=True)},
        **{name: float(values[name]) for name in ("grad_norm", "update_norm", "param_norm", "learning_rate")},
        "skipped_steps": float(values["num_skipped"]),
        **rates,
        "audio_seconds_per_second": audio_seconds / rates["seconds_per_step"],
        **{f"skipped_records/{reason}": float(count) for reason, count in skipped_records.items()},
        "model_flops_per_second": model_flops(setup, rates["positions_per_second"]),
    }
    peak = peak_flops(setup.mesh)
    if peak is not None:
        numbers["model_flop_utilization"] = numbers["model_flops_per_second"] / peak
    writer.scalars(step, numbers)
    writer.progress(step, _shown(numbers))


def _check_skipped(config: RunConfig, step: int, num_skipped: int) -> None:
    if num_skipped >= config.max_skipped_steps:
        raise TrainingError(
            f"steps {step - num_skipped + 1} to {step}: the loss or its gradient was not finite {num_skipped} times in "
            f"a row (max_skipped_steps is {config.max_skipped_steps}); another seed gives the records in another order"
        )


def _shown(numbers: Mapping[str, float]) -> dict[str, str]:
    """What the progress bar shows."""
    audio = np.mean([numbers[f"loss/{name}"] for name in HEADS[:NUM_CODEBOOKS]])
    shown = {"loss": f"{numbers['loss']:.3f}", "text": f"{numbers['loss/text']:.3f}", "audio": f"{audio:.3f}"}
    shown["pos/s"] = f"{numbers['positions_per_second']:.0f}"
    shown["audio s/s"] = f"{numbers['audio_seconds_per_second']:.1f}"
    if "model_flop_utilization" in numbers:
        shown["mfu"] = f"{numbers['model_flop_utilization']:.0%}"
    return shown


def model_flops(setup: TrainingSetup, positions_per_second: float) -> float:
    """Model FLOP/s: per position 6 for each trainable weight, 4 for each frozen one that gradients pass through.

    The usual count (arXiv 2204.02311, appendix B) without attention and recomputation. The audio encoder, which runs
    on recordings and not on positions, is left out.
    """
    trainable = set(setup.config.trainable)
    total = 0.0
    for path, shape in traverse_util.flatten_dict(setup.shapes).items():
        module = module_of(path)
        looked_up = module.endswith("_embedding") and not setup.start.config.trunk.tie_word_embeddings
        if module != "audio_encoder" and not looked_up:
            total += (6.0 if module in trainable else 4.0) * float(np.prod(shape.shape))
    return total * positions_per_second


def peak_flops(mesh: Mesh) -> float | None:
    """Peak bfloat16 FLOP/s of the mesh's devices; None if it is not known."""
    kind = mesh.devices.flat[0].device_kind
    chip = next((chip for chip in CHIPS.values() if kind in (chip.device_kind, f"{chip.device_kind}p")), None)
    return None if chip is None else chip.flops * mesh.devices.size
