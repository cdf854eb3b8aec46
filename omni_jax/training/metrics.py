"""What a run reports: its progress, metrics.jsonl, TensorBoard, and Weights & Biases if configured."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from tensorboardX import SummaryWriter

from omni_jax import hardware
from omni_jax.audio.features import log_mel
from omni_jax.config.load import to_dict
from omni_jax.config.run import RunConfig
from omni_jax.errors import TrainingError
from omni_jax.inference.answer import Reply
from omni_jax.training.batches import ShardedBatch
from omni_jax.training.goodput import WAITING, Goodput
from omni_jax.training.loss import HEADS
from omni_jax.training.progress import Progress
from omni_jax.training.setup import TrainingSetup, row_share
from omni_jax.training.stages import module_of
from omni_jax.vocab import NUM_CODEBOOKS

METRICS = "metrics.jsonl"
"""Name of the metrics file in the folder of a run."""
HELD_OUT_LOSS = "held_out/loss"
"""The loss over all tasks, which every evaluation has."""
WANDB_ID = "wandb_id"
"""Name of the file with the id of the run at Weights & Biases."""
MIN_SAMPLE_LENGTH = 400
"""Samples of the shortest answer that is written as audio and as a spectrogram: one window of the features."""


class MetricsWriter:
    """Writes on process 0; does nothing on the others.

    metrics.jsonl gets one JSON object per log step or evaluation. A resumed run continues the same file, without the
    lines of steps after its checkpoint: it takes these steps again.
    """

    def __init__(self, config: RunConfig, first_step: int):
        self.active = jax.process_index() == 0
        self.evaluations: list[dict[str, float]] = []
        """The lines of all evaluations so far; empty on other processes."""
        if not self.active:
            return
        out = Path(config.out)
        self.wandb: Any = None
        if config.wandb:
            self.wandb = _init_wandb(config, out)
        lines = read_metrics(out / METRICS, first_step)
        self.evaluations = [line for line in lines if HELD_OUT_LOSS in line]
        partial = out / f".{METRICS}.part"
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        partial.replace(out / METRICS)
        self.file = (out / METRICS).open("a", encoding="utf-8")
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        self.shown = Progress(first_step, config.optimizer.steps)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write the numbers of a step everywhere."""
        if not self.active:
            return
        line = {"step": step, **values}
        if HELD_OUT_LOSS in line:
            self.evaluations.append(line)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def progress(self, step: int, seconds_per_step: float, shown: dict[str, str]) -> None:
        """Show how far the run is; see `omni_jax.training.progress.Progress.update`."""
        if self.active:
            self.shown.update(step, seconds_per_step, shown)

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
            self.shown.close()
            self.board.close()
            self.file.close()
            if self.wandb is not None:
                self.wandb.finish()


def read_metrics(path: Path, last_step: int) -> list[dict[str, Any]]:
    """The lines of a metrics file up to a step; a line that a kill has cut, or that is damaged, is left out."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            if line["step"] <= last_step:
                lines.append(line)
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return lines


def _init_wandb(config: RunConfig, out: Path) -> Any:
    """Start the run at Weights & Biases, or go on with the one whose id is in the folder."""
    import wandb

    file = out / WANDB_ID
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    run_id = file.read_text(encoding="utf-8").strip()
    return wandb.init(project=config.wandb, id=run_id, resume="allow", config=to_dict(config), dir=str(out))


class Tally:
    """What goes through the steps from its construction on, and how long it takes."""

    def __init__(self, goodput: Goodput):
        self.steps = 0
        self.positions = 0
        """Positions that an example filled, in the rows of this process."""
        self.capacity = 0
        """All positions of these rows."""
        self._goodput = goodput
        self._start = goodput.step_seconds()
        self._waited = goodput.seconds[WAITING]

    def add(self, batch: ShardedBatch) -> None:
        """Count a batch."""
        self.steps += 1
        self.positions += batch.positions
        self.capacity += batch.capacity

    def rates(self, num_readers: int) -> dict[str, float]:
        """The metrics that come from counts and time, given how many processes read different rows."""
        seconds = self._goodput.step_seconds() - self._start
        return {
            "seconds_per_step": seconds / self.steps,
            "positions_per_second": self.positions / seconds * num_readers,
            "padding_fraction": 1 - self.positions / self.capacity,
            "data_wait_fraction": (self._goodput.seconds[WAITING] - self._waited) / seconds,
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
    writer.progress(step, rates["seconds_per_step"], _shown(numbers))


def _check_skipped(config: RunConfig, step: int, num_skipped: int) -> None:
    if num_skipped >= config.max_skipped_steps:
        raise TrainingError(
            f"steps {step - num_skipped + 1} to {step}: the loss or its gradient was not finite {num_skipped} times in "
            f"a row (max_skipped_steps is {config.max_skipped_steps}); another seed gives the records in another order"
        )


def _shown(numbers: Mapping[str, float]) -> dict[str, str]:
    """What the progress shows."""
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
    trainable = set(setup.config.trained)
    total = 0.0
    for path, shape in traverse_util.flatten_dict(setup.shapes).items():
        module = module_of(path)
        looked_up = module.endswith("_embedding") and not setup.start.config.trunk.tie_word_embeddings
        if module != "audio_encoder" and not looked_up:
            total += (6.0 if module in trainable else 4.0) * float(np.prod(shape.shape))
    return total * positions_per_second


def peak_flops(mesh: Mesh) -> float | None:
    """Peak bfloat16 FLOP/s of the mesh's devices; None if it is not known."""
    peak = hardware.peak_flops(mesh.devices.flat[0].device_kind)
    return None if peak is None else peak * mesh.devices.size
