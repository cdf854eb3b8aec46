"""What a run tells: a progress bar, metrics.jsonl, TensorBoard, and Weights & Biases if asked."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from omni_jax.api import Reply
from omni_jax.audio.features import log_mel
from omni_jax.config import RunConfig, plain

HEADS = (*(f"audio_{layer}" for layer in range(7)), "text")
"""Names of the eight heads, in the order of the metrics' arrays."""


class Reporter:
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

            self.wandb = wandb.init(project=config.wandb, config=plain(config), dir=str(out), resume="allow")

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
