"""Trains nano's audio encoder, in the shape of Whisper's, by CTC on letters.

    python -m recipes.nano.audio_encoder --records build/nano/records --out build/nano/audio_encoder

A linear head over the encoder's features predicts a letter every 20 ms (CTC, Graves et al. 2006). The head is dropped
afterwards; the language model reads the features. The recordings have many voices, rooms and noise already. Each time
one is drawn, it is resampled to another speed, its spectrum is warped as by another vocal tract length, and masked
(SpecAugment, Park et al. 2019, arXiv 1904.08779).

By itself, CTC predicts letter frequencies for thousands of steps. Two measures shorten that. Every attention head
starts by attending to a few positions before or after its own, see `init_local_attention`. And for the first steps a
second loss takes the letters as spread evenly over the recording, see `even_alignment`.

The encoder takes its full length, silence included. Most recordings are short, so those of a step are padded to a
common shorter length; only the last steps are padded to the full one.

The run resumes from its last checkpoint. Its result, `audio_encoder.safetensors`, is the moving average of the
encoder's parameters, named as in a release.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import jiwer
import numpy as np
import optax
import typer
from flax import nnx, traverse_util

from omni_jax.audio import io as audio_io
from omni_jax.audio.features import HOP, log_mel, spec_augment
from omni_jax.config.model import PRESETS, AudioEncoderConfig
from omni_jax.config.run import SpecAugmentConfig
from omni_jax.data.records import Records, from_bytes
from omni_jax.model.layers import Linear
from omni_jax.model.whisper_encoder import WhisperEncoder
from recipes.nano import training
from recipes.nano.questions import normalize

CONFIG = PRESETS["nano"].audio_encoder
AUDIO_ENCODER = "audio_encoder.safetensors"
STEPS = 10_000
TRAIN_RECORDS = ("train", "dictation_train", "dictation_free")
HELD_OUT_RECORDS = ("held_out_seen", "held_out_unseen", "dictation_seen", "dictation_unseen")

LETTERS = " 'abcdefghijklmnopqrstuvwxyz"
"""The alphabet; labels begin at 1, 0 is CTC's blank."""
MAX_LETTERS = 160

BATCH_SIZE = 16
OFFSETS = (-5.0, -1.5, 1.5, 5.0)
"""Where each head of a block attends at first, in positions from its own."""
EVEN_STEPS = 500
"""Steps in which the even alignment has a weight, which falls linearly."""
EVEN_WEIGHT = 2.0
"""Of the even alignment's loss at step 0; CTC's is 1."""
EDGE_SECONDS = 0.2
"""Silence at either end of a recording, roughly."""
PEAK_LR = 2e-3
"""After the warm-up, of Muon (Jordan et al. 2024)."""
ADAM_PEAK_LR = 1e-3
"""Of the parameters that are not matrices."""
WARMUP_STEPS = 200
LENGTHS = (0.36, 0.46, 0.6)
"""Shares of the full length that recordings are padded to; each has those that fit it and no shorter one."""
FULL_LENGTH_START = 0.95
"""Share of the run after which all recordings are padded to the full length."""
AVERAGE_DECAY = 0.998
"""Per step, of the parameters' moving average."""
INTERVALS = training.Intervals(log_steps=50, eval_steps=500)
SPEED = (0.9, 1.1)
AUGMENTATION = SpecAugmentConfig(max_warp=0.1, num_masks=2, max_time_mask=10, max_mel_mask=12)

Array = jax.Array


class CtcModel(nnx.Module):
    """The audio encoder and its head."""

    def __init__(self, config: AudioEncoderConfig, *, rngs: nnx.Rngs) -> None:
        self.audio_encoder = WhisperEncoder(config, stacked=False, rngs=rngs)
        self.head = Linear((config.hidden_size,), (len(LETTERS) + 1,), axes=(None, None), bias=True, rngs=rngs)

    def __call__(self, mel: Array) -> Array:
        """F32 [B, M, 2 positions] -> logits f32 [B, positions, letters + 1]."""
        return self.head(self.audio_encoder(mel))


class State(NamedTuple):
    """What changes in training."""

    step: Array
    params: Any
    average: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Clip:
    """A recording and its transcript."""

    audio: np.ndarray
    """int16 [samples] at 16 kHz."""
    text: str
    """Normalized."""


def read_clips(folder: Path) -> Iterator[Clip]:
    """The questions of a folder of records."""
    records = Records(folder)
    for index in range(len(records)):
        exchange = from_bytes(records[index])
        if exchange.question_audio is not None:
            yield Clip(exchange.question_audio, normalize(exchange.question_text))


def encode_labels(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Letters as labels, in the format of `optax.ctc_loss`.

    Returns:
        int32 [B, MAX_LETTERS], and f32 of the same shape that is 1 after the end of the text.

    Raises:
        ValueError: a text is too long or has another letter.
    """
    labels = np.zeros((len(texts), MAX_LETTERS), np.int32)
    padding = np.ones((len(texts), MAX_LETTERS), np.float32)
    for row, text in enumerate(texts):
        if len(text) > MAX_LETTERS or set(text) - set(LETTERS):
            raise ValueError(f"expected at most {MAX_LETTERS} of {LETTERS!r}, found {text!r}")
        labels[row, : len(text)] = [LETTERS.index(letter) + 1 for letter in text]
        padding[row, : len(text)] = 0
    return labels, padding


def decode_greedy(logits: np.ndarray) -> list[str]:
    """Texts of f32 [B, positions, letters + 1]: repeated letters joined, blanks removed."""
    best = np.argmax(logits, axis=-1)
    changes = np.diff(best, axis=1, prepend=0) != 0
    return [
        "".join(LETTERS[label - 1] for label in row[kept & (row > 0)]) for row, kept in zip(best, changes, strict=True)
    ]


def make_batch(
    clips: Sequence[Clip], samples: int, size: int, seed: list[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Random clips at random speeds.

    Args:
        clips: to draw from; none is longer than `samples`.
        samples: of every row.
        size: rows.
        seed: the same gives the same batch.

    Returns:
        f32 [size, samples], int32 [size] with the length of each recording, and the labels as `encode_labels`.
    """
    rng = np.random.default_rng(seed)
    drawn = [clips[index] for index in rng.integers(0, len(clips), size)]
    audio, lengths = np.zeros((size, samples), np.float32), np.zeros(size, np.int32)
    for row, clip in enumerate(drawn):
        # Not so slow that it would no longer fit.
        speed = max(rng.uniform(*SPEED), len(clip.audio) / samples)
        times = np.arange(0, len(clip.audio) - 1, speed)
        audio[row, : len(times)] = np.interp(times, np.arange(len(clip.audio)), audio_io.from_pcm16(clip.audio))
        lengths[row] = len(times)
    return audio, lengths, *encode_labels([clip.text for clip in drawn])


def group_by_length(clips: Sequence[Clip], lengths: Sequence[int]) -> list[tuple[int, list[Clip]]]:
    """Clips by the shortest of the ascending lengths, in samples, that they fit; without empty groups."""
    groups: dict[int, list[Clip]] = {length: [] for length in lengths}
    for clip in clips:
        fitting = bisect.bisect_left(lengths, len(clip.audio))
        if fitting < len(lengths):
            groups[lengths[fitting]].append(clip)
    return [(length, group) for length, group in groups.items() if group]


def even_alignment(lengths: Array, labels: Array, padding: Array, positions: int) -> Array:
    """The label of each position if letters were spread evenly, blank before and after: int32 [B, positions]."""
    seconds = 2 * HOP / audio_io.SAMPLE_RATE
    first, last = EDGE_SECONDS, lengths[:, None] / audio_io.SAMPLE_RATE - EDGE_SECONDS
    share = ((jnp.arange(positions) + 0.5) * seconds - first) / jnp.maximum(last - first, seconds)
    count = (1 - padding).sum(axis=1, keepdims=True)
    index = jnp.clip(jnp.floor(share * count), 0, count - 1).astype(jnp.int32)
    return jnp.where((share >= 0) & (share < 1), jnp.take_along_axis(labels, index, axis=1), 0)


def init_local_attention(params: Any, config: AudioEncoderConfig) -> Any:
    """Make every head start by attending around the position at one of `OFFSETS` from its own.

    Queries and keys read the fastest sinusoids from the residual stream, a query shifted by its offset: their
    product is largest where the two agree.

    Args:
        params: of a `CtcModel` that has just been initialized.
        config: of its encoder.
    """
    half, size = config.hidden_size // 2, config.hidden_size // config.num_heads
    rates = np.exp(-np.arange(size // 2) * np.log(10_000) / (half - 1))
    sines, cosines = np.arange(size // 2), half + np.arange(size // 2)
    even = 2 * np.arange(size // 2)
    encoder = params["audio_encoder"]
    layers = {}
    for number, block in encoder["layers"].items():
        query, key = (np.array(block[name]["weight"]) * 0.3 for name in "qk")
        for head in range(config.num_heads):
            sine, cosine = (function(rates * OFFSETS[head % len(OFFSETS)]) for function in (np.sin, np.cos))
            key[head, even, sines] += 1
            key[head, even + 1, cosines] += 1
            query[head, even, sines] += cosine
            query[head, even, cosines] += sine
            query[head, even + 1, cosines] += cosine
            query[head, even + 1, sines] -= sine
        new = {name: {**block[name], "weight": jnp.asarray(weight)} for name, weight in (("q", query), ("k", key))}
        layers[number] = {**block, **new}
    return {**params, "audio_encoder": {**encoder, "layers": layers}}


def muon_axes(params: Any) -> Any:
    """Input and output axes of the encoder's matrices, which Muon trains; None for all other parameters."""
    axes: dict[tuple[Any, ...], optax.contrib.MuonDimensionNumbers | None] = {}
    for keys, leaf in traverse_util.flatten_dict(params).items():
        rank = len(getattr(leaf, "shape", ()))
        if keys[0] != "audio_encoder" or keys[-1] != "weight":
            axes[keys] = None
        elif keys[-2].startswith("conv"):
            axes[keys] = optax.contrib.MuonDimensionNumbers((0, 1), (2,))
        else:
            outputs = 2 if keys[-2] in ("q", "k", "v") else 1
            axes[keys] = optax.contrib.MuonDimensionNumbers(tuple(range(outputs, rank)), tuple(range(outputs)))
    return traverse_util.unflatten_dict(axes)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The compiled steps of a run; equal trainers share their programs."""

    config: AudioEncoderConfig
    steps: int
    seed: int

    @cached_property
    def learning_rate(self) -> optax.Schedule:
        """By step."""
        warmup = min(WARMUP_STEPS, self.steps // 10)
        return optax.warmup_cosine_decay_schedule(0.0, PEAK_LR, warmup, self.steps, PEAK_LR / 100)

    @cached_property
    def tx(self) -> optax.GradientTransformation:
        """Muon for the encoder's matrices, Adam for the head, norms and biases."""
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.contrib.muon(
                self.learning_rate,
                weight_decay=0.05,
                adam_b2=0.98,
                adam_learning_rate=lambda step: self.learning_rate(step) * ADAM_PEAK_LR / PEAK_LR,
                muon_weight_dimension_numbers=muon_axes,
                consistent_rms=0.2,
            ),
        )

    def init(self) -> State:
        """The state of step 0."""
        _, variables = nnx.split(CtcModel(self.config, rngs=nnx.Rngs(self.seed)))
        params = init_local_attention(nnx.to_pure_dict(variables), self.config)
        average = jax.tree.map(jnp.copy, params)
        return State(jnp.zeros((), jnp.int32), params, average, self.tx.init(params))

    def logits(self, params: Any, mel: Array) -> Array:
        """Of the model with these parameters, for mel of any length: no parameter depends on it."""
        config = dataclasses.replace(self.config, max_position=mel.shape[2] // 2)
        graph, _ = nnx.split(nnx.eval_shape(lambda: CtcModel(config, rngs=nnx.Rngs(0))))
        model: CtcModel = nnx.merge(graph, params)
        return model(mel)

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(
        self, state: State, audio: Array, lengths: Array, labels: Array, padding: Array
    ) -> tuple[State, dict[str, Array]]:
        """One step on a batch of `make_batch`."""
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        mel = spec_augment(log_mel(audio, self.config.num_mel_bins), key, AUGMENTATION)
        even_weight = EVEN_WEIGHT * jnp.maximum(0, 1 - state.step / EVEN_STEPS)

        def loss(params: Any) -> tuple[Array, Array]:
            logits = self.logits(params, mel)
            ctc = optax.ctc_loss(logits, jnp.zeros(logits.shape[:2]), labels, padding).sum() / (1 - padding).sum()
            aligned = even_alignment(lengths, labels, padding, logits.shape[1])
            even = optax.softmax_cross_entropy_with_integer_labels(logits, aligned).mean()
            return ctc + even_weight * even, ctc

        (_, ctc), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = self.tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = training.moving_average(state.average, params, state.step, AVERAGE_DECAY)
        rate = self.learning_rate(state.step)
        values = {"loss": ctc, "gradient": optax.tree.norm(gradients), "learning_rate": rate}
        return State(state.step + 1, params, average, opt_state), values

    @partial(jax.jit, static_argnums=0)
    def transcribe(self, params: Any, audio: Array) -> Array:
        """Logits for f32 [B, samples]."""
        return self.logits(params, log_mel(audio, self.config.num_mel_bins))

    def evaluate(self, params: Any, clips: Sequence[Clip]) -> dict[str, float]:
        """Character and word error rate, and the share of texts without an error."""
        found: list[str] = []
        for first in range(0, len(clips), BATCH_SIZE):
            rows = clips[first : first + BATCH_SIZE]
            audio = np.zeros((BATCH_SIZE, self.config.max_samples), np.float32)
            for row, clip in enumerate(rows):
                audio[row, : len(clip.audio)] = audio_io.from_pcm16(clip.audio)
            texts = decode_greedy(np.asarray(self.transcribe(params, audio)))[: len(rows)]
            found += [" ".join(text.split()) for text in texts]
        expected = [clip.text for clip in clips]
        return {
            "cer": float(jiwer.cer(expected, found)),
            "wer": float(jiwer.wer(expected, found)),
            "exact": float(np.mean([a == b for a, b in zip(expected, found, strict=True)])),
        }


def train(
    clips: Sequence[Clip],
    held_out: Mapping[str, Sequence[Clip]],
    out: Path,
    *,
    config: AudioEncoderConfig = CONFIG,
    steps: int = STEPS,
    seed: int = 0,
    max_eval_clips: int = 128,
    intervals: training.Intervals = INTERVALS,
) -> None:
    """Train, or resume.

    Args:
        clips: to train on, none longer than the encoder takes.
        held_out: clips to evaluate on, by name.
        out: folder of the run.
        config: the encoder's shape.
        steps: of the whole run.
        seed: of the parameters, the batches and the augmentation.
        max_eval_clips: of each name, but for the last evaluation, which takes all.
        intervals: see `training.run`.
    """
    trainer = Trainer(config, steps, seed)
    state = trainer.init()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params["audio_encoder"]))
    hours = sum(len(clip.audio) for clip in clips) / audio_io.SAMPLE_RATE / 3600
    typer.echo(f"{parameters} parameters, {len(clips)} recordings, {hours:.1f} hours, {steps} steps")
    groups = group_by_length(clips, [int(share * config.max_position) * 2 * HOP for share in LENGTHS])
    sizes = np.array([len(group) for _, group in groups], float)

    def step(state: State, number: int) -> tuple[State, dict[str, Any]]:
        samples, group = config.max_samples, clips
        if groups and number < FULL_LENGTH_START * steps:
            rng = np.random.default_rng([seed, number, 1])
            samples, group = groups[rng.choice(len(groups), p=sizes / sizes.sum())]
        return trainer.step(state, *make_batch(group, samples, BATCH_SIZE, [seed, number]))

    def validate(state: State, done: int) -> dict[str, float]:
        outcome = {}
        for name, some in held_out.items():
            measures = trainer.evaluate(state.average, some if done == steps else some[:max_eval_clips])
            outcome.update({f"{name}_{measure}": value for measure, value in measures.items()})
        return outcome

    state = training.run(out, state, steps, step, validate, intervals)
    training.draw_curves(out, ("loss", *(f"{name}_cer" for name in held_out)))
    training.export(out / AUDIO_ENCODER, {"audio_encoder": state.average["audio_encoder"]})


def main(
    records: Annotated[Path, typer.Option(help="What recipes.nano.speech wrote.")] = Path("build/nano/records"),
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("build/nano/audio_encoder"),
    steps: Annotated[int, typer.Option(min=1, help="Steps of the whole run.")] = STEPS,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Train the audio encoder on the spoken questions and dictations."""
    clips = [clip for name in TRAIN_RECORDS for clip in read_clips(records / name)]
    train(clips, {name: list(read_clips(records / name)) for name in HELD_OUT_RECORDS}, out, steps=steps, seed=seed)


if __name__ == "__main__":
    typer.run(main)
