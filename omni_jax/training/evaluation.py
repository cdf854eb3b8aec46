"""Evaluation on held-out exchanges during training: losses, the accuracy of answers, WER, and a few sample answers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from omni_jax import sharding
from omni_jax.api import Omni, Request, Turn
from omni_jax.audio.io import SAMPLE_RATE
from omni_jax.codec.snac import make_decoder
from omni_jax.data import pipeline
from omni_jax.data.cached_features import CachedFeatures
from omni_jax.data.records import Exchange, Records, from_bytes, serves
from omni_jax.errors import AudioError, ConfigError, RecordError
from omni_jax.evaluation import metrics
from omni_jax.tasks import Task
from omni_jax.training.batches import shard_batch
from omni_jax.training.feature_cache import open_held_out_caches
from omni_jax.training.goodput import log_once
from omni_jax.training.loss import HEADS, Sums
from omni_jax.training.metrics import HELD_OUT_LOSS, MetricsWriter
from omni_jax.training.release import write_release
from omni_jax.training.setup import TrainingSetup, row_share
from omni_jax.training.stages import Params
from omni_jax.training.step import Batch, forward

logger = logging.getLogger(__name__)

MAX_SAMPLE_STEPS = 256
"""Decode steps of the longest answer: 21 s."""
BEST = "best"
"""Folder of the release of the best evaluation."""


class HeldOutEvaluation:
    """Evaluates parameters on the held-out records of a run; does nothing if the run has none."""

    def __init__(self, setup: TrainingSetup, out: Path):
        """Prepare the evaluations of a run.

        Args:
            setup: of the run.
            out: its folder, for the best model.
        """
        self.setup = setup
        self.out = out

        def sums(params: Params, batch: Batch) -> Sums:
            # The sums depend neither on the weights of the heads in the loss nor on the number of targets.
            return forward(nnx.merge(setup.graph, params), batch, jnp.ones(len(HEADS)), setup.config)[1]

        self.sums = jax.jit(sums, out_shardings=sharding.replicated(setup.mesh))

    def is_due(self, step: int) -> bool:
        """Whether the run is evaluated after a step."""
        config = self.setup.config
        interval = config.evaluation.interval_steps
        at_interval = interval is not None and step % interval == 0
        return bool(config.data.held_out) and (at_interval or step == config.optimizer.steps)

    def is_missing(self, step: int, writer: MetricsWriter) -> bool:
        """Whether the run was killed after the checkpoint of a step and before its evaluation; for all processes."""
        missing = writer.active and not any(line["step"] == step for line in writer.evaluations)
        return _on_all_processes(missing)

    def __call__(self, step: int, params: Params, writer: MetricsWriter) -> None:
        """Evaluate all parameters of the model, write the metrics and sample answers, and keep the model if it is best.

        Args:
            step: number of steps done.
            params: all parameters of the model.
            writer: where to.
        """
        numbers = self._losses(params)
        config = self.setup.config.evaluation
        # Decoding is driven by one process: on a pod, the release is evaluated after training.
        if jax.process_count() == 1 and (config.num_answers or config.num_samples):
            start = self.setup.start
            omni = Omni(nnx.merge(self.setup.graph, params), self._decode_audio, start.tokenizer)
            numbers |= self._answers(omni)
            self._write_samples(step, omni, writer)
        if config.keep_best and self._is_best(f"held_out/{config.keep_best}", numbers, writer):
            write_release(self.setup, params, self.out / BEST)
            log_once(f"best {config.keep_best} so far: {self.out / BEST}")
        writer.scalars(step, numbers)
        log_once("held out: " + ", ".join(f"{name} {value}" for name, value in _shown(numbers).items()))

    @cached_property
    def _caches(self) -> list[CachedFeatures | None] | None:
        """Features of the held-out recordings, where the run caches features; computed in the first evaluation."""
        return open_held_out_caches(self.setup)

    @cached_property
    def _decode_audio(self) -> Any:
        return make_decoder(self.setup.start.codec())

    def _losses(self, params: Params) -> dict[str, float]:
        """Losses and accuracies of each task and head, and the loss over all, which weighs them as training does."""
        config = self.setup.config
        numbers: dict[str, float] = {}
        total, shares = 0.0, 0.0
        weights = np.array([*config.loss.audio, config.loss.text])
        for task, share in config.data.tasks.items():
            sums = self._total(task, params)
            if not sums:
                continue
            means = sums["loss"] / np.maximum(sums["count"], 1)
            total, shares = total + share * float(weights @ means), shares + share
            for index, name in enumerate(HEADS):
                if sums["count"][index]:
                    numbers[f"held_out/{task}/loss/{name}"] = float(means[index])
                    numbers[f"held_out/{task}/accuracy/{name}"] = float(sums["correct"][index] / sums["count"][index])
        return {HELD_OUT_LOSS: total / shares, **numbers} if shares else {}

    def _total(self, task: str, params: Params) -> dict[str, np.ndarray]:
        """The sums of one task over the held-out records; empty if none serves it."""
        config, start, mesh = self.setup.config, self.setup.start, self.setup.mesh
        share, num_shares = row_share(mesh, jax.process_index())
        data = replace(config.data, tasks={task: 1.0})
        batches = pipeline.held_out(
            data,
            start.config,
            start.tokenizer,
            process_index=share,
            process_count=num_shares,
            caches=self._caches,
        )
        total: dict[str, np.ndarray] = {}
        for batch in islice(batches, config.evaluation.max_batches):
            arrays = shard_batch(batch, mesh).arrays
            with jax.set_mesh(mesh):
                sums = self.sums(params, arrays)
            total = {name: total.get(name, 0.0) + value for name, value in jax.device_get(sums).items()}
        return total

    def _answers(self, omni: Omni) -> dict[str, float]:
        """Accuracy of the answers, and WER of the transcripts, by task and over all tasks."""
        numbers: dict[str, float] = {}
        right: list[float] = []
        for name in self.setup.config.data.tasks:
            task = Task(name)
            exchanges = list(islice(self._held_out_exchanges(task), self.setup.config.evaluation.num_answers))
            if not task.outputs_text or not exchanges:
                continue
            texts = _answer(omni, task, exchanges)
            if task is Task.A1T1:
                errors = [
                    metrics.word_errors(exchange.question_text, text)
                    for exchange, text in zip(exchanges, texts, strict=True)
                ]
                numbers["held_out/wer"] = metrics.error_rate(errors).value
            else:
                scores = [
                    metrics.exact_match([exchange.answer_text], text)
                    for exchange, text in zip(exchanges, texts, strict=True)
                ]
                numbers[f"held_out/{task}/answer_accuracy"] = float(np.mean(scores))
                right += scores
        if right:
            numbers["held_out/answer_accuracy"] = float(np.mean(right))
        return numbers

    def _held_out_exchanges(self, task: Task) -> Iterator[Exchange]:
        """The held-out exchanges that serve a task, in order; those that cannot be read are left out."""
        for source in self.setup.config.data.held_out:
            records = Records(source.path)
            if task not in source.tasks or not records.count(task):
                continue
            for index in range(len(records)):
                try:
                    exchange = from_bytes(records[index], codebook_size=self.setup.start.config.vocab.audio)
                except RecordError:
                    continue
                if task in serves(exchange):
                    yield exchange

    def _is_best(self, name: str, numbers: Mapping[str, float], writer: MetricsWriter) -> bool:
        """Whether a metric is better than in all evaluations before; the same on all processes."""
        value = numbers.get(name)
        if value is None:
            return False
        earlier = [line[name] for line in writer.evaluations if name in line]
        better = min if name in (HELD_OUT_LOSS, "held_out/wer") else max
        return _on_all_processes(not earlier or better([value, *earlier]) == value != better(earlier))

    def _write_samples(self, step: int, omni: Omni, writer: MetricsWriter) -> None:
        config = self.setup.config
        records = Records(config.data.held_out[0].path)
        for index in range(min(config.evaluation.num_samples, len(records))):
            exchange = from_bytes(records[index], codebook_size=self.setup.start.config.vocab.audio)
            try:
                reply = omni.generate(_request(exchange), max_steps=MAX_SAMPLE_STEPS)
            except (AudioError, ConfigError) as error:
                logger.warning("sample %d is skipped: %s", index, error)
                continue
            writer.sample(step, str(index), exchange.question_text, exchange.answer_text, reply)


def _answer(omni: Omni, task: Task, exchanges: list[Exchange]) -> list[str]:
    """The text of the answer to each exchange's question; empty where the question is refused."""
    texts = [""] * len(exchanges)
    requests = {}
    for index, exchange in enumerate(exchanges):
        request = (
            Request(audio=exchange.question_audio, sample_rate=SAMPLE_RATE, task=task)
            if task.takes_audio
            else Request(text=exchange.question_text, task=task)
        )
        try:
            requests[index] = omni.prepare(request, max_steps=MAX_SAMPLE_STEPS)
        except (AudioError, ConfigError) as error:
            logger.warning("held-out question %d of %s counts as wrong: %s", index, task, error)
    for index, reply in zip(requests, omni.run(list(requests.values())), strict=True):
        texts[index] = reply.text
    return texts


def _request(exchange: Exchange) -> Request:
    """The question of an exchange; without one, its answer to be read aloud."""
    history = [Turn(turn.question, turn.answer) for turn in exchange.history]
    if exchange.question_audio is not None:
        audio = exchange.question_audio
        return Request(audio=audio, sample_rate=SAMPLE_RATE, system=exchange.system, history=history)
    if exchange.question_text:
        return Request(text=exchange.question_text, system=exchange.system, history=history)
    return Request(text=exchange.answer_text, task=Task.T1A1)


def _on_all_processes(value: bool) -> bool:
    """What process 0 has found."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _shown(numbers: Mapping[str, float]) -> dict[str, str]:
    """The metrics over all tasks, for the log."""
    shown = {"loss": f"{numbers[HELD_OUT_LOSS]:.3f}"} if HELD_OUT_LOSS in numbers else {}
    rates = {"answer accuracy": "held_out/answer_accuracy", "WER": "held_out/wer"}
    return shown | {heading: f"{numbers[name]:.1%}" for heading, name in rates.items() if name in numbers}
