"""Teaches nano its ear: a Whisper-shaped encoder that learns to hear by writing down letters.

    python -m nano.audio_encoder                              # reads build/nano/questions, writes build/nano/ear

A linear head over the encoder's features names a letter every 20 ms, trained by CTC (Graves et al. 2006); the head is
thrown away afterwards, its features are what the language model listens to. The recordings are by many voices, noisy
and in rooms already; every time one is used it is played at another speed, its spectrum is warped as by a longer or
shorter throat, and stripes are cut out of it (SpecAugment, Park et al. 2019, arXiv 1904.08779).

Left alone, CTC spends thousands of steps naming the letters by how frequent they are. Two things shorten that: every
head of the encoder begins by looking a few positions before or after its own, which it would otherwise have to make
out from sinusoids, and for the first steps the letters are also taken as spread evenly over the recording, which is
wrong by two or three letters but says roughly what is heard where.

An ear always hears its full length, silence included. Most recordings are short, so those of a step are of about the
same length and most of the training hears little silence; only the last part hears all of it.

The run saves itself every two minutes and goes on from there when it is started again. Its result,
`ear.safetensors`, is the moving average of the encoder's parameters, named as in a release.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
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

from nano import facts, run
from nano.synthesize import ASKED, recordings
from omni_jax.audio import io as audio_io
from omni_jax.audio.features import HOP, log_mel, spec_augment
from omni_jax.checkpoint import safetensors_io
from omni_jax.checkpoint.release import dotted_name
from omni_jax.config.model import PRESETS, AudioEncoderConfig
from omni_jax.config.run import SpecAugmentConfig
from omni_jax.model.whisper_encoder import Linear, WhisperEncoder

CONFIG = PRESETS["nano"].audio_encoder
PARTS = (*ASKED, *(f"questions/dictation_{part}" for part in ("train", "free", "recorded")))
TESTS = (
    "questions/held_out_seen",
    "questions/held_out_unseen",
    "questions/dictation_seen",
    "questions/dictation_unseen",
)

LETTERS = " 'abcdefghijklmnopqrstuvwxyz"
"""What can be written; their numbers begin at 1, 0 is CTC's blank."""
LONGEST_TEXT = 160
"""Letters."""

BATCH = 16
OFFSETS = (-5.0, -1.5, 1.5, 5.0)
"""Where each head of a block looks at first, in positions from its own."""
EVEN_STEPS = 500
"""Steps in which letters are also taken as spread evenly; less and less."""
EVEN_WEIGHT = 2.0
"""Of that loss, at first; CTC has 1."""
EDGE = 0.2
"""Seconds of silence at either end of a recording, about."""
PEAK = 2e-3
"""Learning rate of an untaught ear after the warm-up, of Muon (Jordan et al. 2024). After 600 steps from nothing the
loss was 1.76; with AdamW alone it was 2.10 (one run each)."""
ADAM_PEAK = 1e-3
"""Of the parameters that are no matrices."""
WARMUP = 200
LENGTHS = (0.36, 0.46, 0.6)
"""Lengths that are heard at first, as shares of the full one; a step's recordings fit one of them and none before."""
FULL_FROM = 0.95
"""Share of the run after which the full length is heard, by recordings of any length."""
AVERAGE_DECAY = 0.998
"""Of the parameters' moving average, per step."""

SPEED = (0.9, 1.1)
AUGMENTATION = SpecAugmentConfig(max_warp=0.1, num_masks=2, max_time_mask=10, max_mel_mask=12)
"""Longer and shorter throats are those of voices that it never hears."""

Array = jax.Array


class Listener(nnx.Module):
    """The ear and the head that writes down what it hears."""

    def __init__(self, config: AudioEncoderConfig, *, rngs: nnx.Rngs):
        self.audio_encoder = WhisperEncoder(config, stacked=False, rngs=rngs)
        axes = (None, None)
        self.head = Linear((config.hidden_size,), (len(LETTERS) + 1,), axes=axes, dtype=jnp.float32, rngs=rngs)

    def __call__(self, mel: Array) -> Array:
        """F32 [B, M, 2 positions] -> logits f32 [B, positions, letters + 1]."""
        return self.head(self.audio_encoder(mel))


class State(NamedTuple):
    """All that changes in training."""

    step: Array
    params: Any
    average: Any
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class Clip:
    """A recording and what is said in it."""

    audio: np.ndarray
    """int16 [samples] at 16 kHz."""
    text: str


def load(folder: Path, parts: Sequence[str]) -> list[Clip]:
    """The recordings of each part that is there; texts as they are written down."""
    there = (part for part in parts if list(folder.glob(f"{part}-*.jsonl")))
    found = itertools.chain.from_iterable(recordings(folder, part) for part in there)
    return [Clip(one.audio, facts.normalize(one.utterance.text)) for one in found]


def numbers(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Letters as numbers.

    Returns:
        int32 [B, LONGEST_TEXT], and f32 of the same shape, 1 where the text has ended: as `optax.ctc_loss` wants
        them.

    Raises:
        ValueError: a text is too long or has another letter.
    """
    labels = np.zeros((len(texts), LONGEST_TEXT), np.int32)
    padding = np.ones((len(texts), LONGEST_TEXT), np.float32)
    for row, text in enumerate(texts):
        if len(text) > LONGEST_TEXT or set(text) - set(LETTERS):
            raise ValueError(f"expected at most {LONGEST_TEXT} of {LETTERS!r}, found {text!r}")
        labels[row, : len(text)] = [LETTERS.index(letter) + 1 for letter in text]
        padding[row, : len(text)] = 0
    return labels, padding


def decode_text(logits: np.ndarray) -> list[str]:
    """The likeliest letter of every position, repetitions joined, blanks left out: f32 [B, T, letters + 1]."""
    best = np.argmax(logits, axis=-1)
    changes = np.diff(best, axis=1, prepend=0) != 0
    return [
        "".join(LETTERS[number - 1] for number in row[kept & (row > 0)])
        for row, kept in zip(best, changes, strict=True)
    ]


def batch(
    clips: Sequence[Clip], samples: int, size: int, seed: list[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Clips drawn and played at random speeds.

    Args:
        clips: to draw from; none is longer than `samples`.
        samples: of every row.
        size: rows.
        seed: the same gives the same batch.

    Returns:
        f32 [size, samples], int32 [size] with how many samples each recording has, and the texts as `numbers` gives
        them.
    """
    rng = np.random.default_rng(seed)
    drawn = [clips[index] for index in rng.integers(0, len(clips), size)]
    audio, lengths = np.zeros((size, samples), np.float32), np.zeros(size, np.int32)
    for row, clip in enumerate(drawn):
        # One that fits just so is played no slower than it still does.
        speed = max(rng.uniform(*SPEED), len(clip.audio) / samples)
        places = np.arange(0, len(clip.audio) - 1, speed)
        audio[row, : len(places)] = np.interp(places, np.arange(len(clip.audio)), audio_io.from_pcm16(clip.audio))
        lengths[row] = len(places)
    return audio, lengths, *numbers([clip.text for clip in drawn])


def by_length(clips: Sequence[Clip], lengths: Sequence[int]) -> list[tuple[int, list[Clip]]]:
    """Clips that fit each of the rising lengths, in samples, and none before it; no length that nothing fits."""
    groups: dict[int, list[Clip]] = {length: [] for length in lengths}
    for clip in clips:
        fitting = bisect.bisect_left(lengths, len(clip.audio))
        if fitting < len(lengths):
            groups[lengths[fitting]].append(clip)
    return [(length, group) for length, group in groups.items() if group]


def spread(lengths: Array, labels: Array, padding: Array, outputs: int) -> Array:
    """The letter at each output if letters were spread evenly, blank before and after: int32 [B, outputs]."""
    every = 2 * HOP / audio_io.SAMPLE_RATE
    first, last = EDGE, lengths[:, None] / audio_io.SAMPLE_RATE - EDGE
    share = ((jnp.arange(outputs) + 0.5) * every - first) / jnp.maximum(last - first, every)
    count = (1 - padding).sum(axis=1, keepdims=True)
    index = jnp.clip(jnp.floor(share * count), 0, count - 1).astype(jnp.int32)
    return jnp.where((share >= 0) & (share < 1), jnp.take_along_axis(labels, index, axis=1), 0)


def look_nearby(params: Any, config: AudioEncoderConfig) -> Any:
    """Make every head of the encoder begin by attending around the position `OFFSETS` from its own.

    Queries and keys read the fastest sinusoids off the residual stream, a query as they will be or were at its
    offset: their product peaks where the two agree.

    Args:
        params: of a `Listener`, as they were drawn.
        config: its ear's shape.
    """
    half, size = config.hidden_size // 2, config.hidden_size // config.num_heads
    rates = np.exp(-np.arange(size // 2) * np.log(10_000) / (half - 1))
    sines, cosines = np.arange(size // 2), half + np.arange(size // 2)
    even = 2 * np.arange(size // 2)
    ear = params["audio_encoder"]
    layers = {}
    for number, block in ear["layers"].items():
        query, key = (np.array(block[name]["kernel"]) * 0.3 for name in "qk")
        for head in range(config.num_heads):
            sine, cosine = (turn(rates * OFFSETS[head % len(OFFSETS)]) for turn in (np.sin, np.cos))
            key[sines, head, even] += 1
            key[cosines, head, even + 1] += 1
            query[sines, head, even] += cosine
            query[cosines, head, even] += sine
            query[cosines, head, even + 1] += cosine
            query[sines, head, even + 1] -= sine
        parts = {name: {**block[name], "kernel": jnp.asarray(kernel)} for name, kernel in (("q", query), ("k", key))}
        layers[number] = {**block, **parts}
    return {**params, "audio_encoder": {**ear, "layers": layers}}


def matrices(params: Any) -> Any:
    """Which axes of a listener's parameters Muon is to see as rows and columns; None where there is no matrix."""
    axes: dict[tuple[str, ...], optax.contrib.MuonDimensionNumbers | None] = {}
    for keys, leaf in traverse_util.flatten_dict(params).items():
        rank = len(getattr(leaf, "shape", ()))
        if keys[0] != "audio_encoder" or rank < 2:
            axes[keys] = None
        else:
            inputs = rank - 1 if keys[-2] in ("conv1", "conv2", "out") else 1
            axes[keys] = optax.contrib.MuonDimensionNumbers(tuple(range(inputs)), tuple(range(inputs, rank)))
    return traverse_util.unflatten_dict(axes)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The compiled steps of a run; equal ones share their programs."""

    config: AudioEncoderConfig
    steps: int
    seed: int
    takes_audio: bool = False
    """Whether the ear hears already. Letters taken as spread evenly would mislead it, and at the full learning rate it
    would unlearn."""

    @cached_property
    def rate(self) -> optax.Schedule:
        """The learning rate by step."""
        peak = PEAK / 2 if self.takes_audio else PEAK
        return optax.warmup_cosine_decay_schedule(0.0, peak, min(WARMUP, self.steps // 10), self.steps, peak / 100)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """Muon for the encoder's matrices, Adam for the head, norms and biases."""
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.contrib.muon(
                self.rate,
                weight_decay=0.05,
                adam_b2=0.98,
                adam_learning_rate=lambda step: self.rate(step) * ADAM_PEAK / PEAK,
                muon_weight_dimension_numbers=matrices,
                consistent_rms=0.2,
            ),
        )

    def start(self) -> State:
        """A state before the first step."""
        _, variables = nnx.split(Listener(self.config, rngs=nnx.Rngs(self.seed)))
        params = look_nearby(nnx.to_pure_dict(variables), self.config)
        average = jax.tree.map(jnp.copy, params)
        return State(jnp.zeros((), jnp.int32), params, average, self.optimizer.init(params))

    def logits(self, params: Any, mel: Array) -> Array:
        """What a listener with these parameters writes, for any length of mel: no parameter depends on it."""
        config = dataclasses.replace(self.config, max_position=mel.shape[2] // 2)
        graph, _ = nnx.split(nnx.eval_shape(lambda: Listener(config, rngs=nnx.Rngs(0))))
        listener: Listener = nnx.merge(graph, params)
        return listener(mel)

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(
        self, state: State, audio: Array, lengths: Array, labels: Array, padding: Array
    ) -> tuple[State, dict[str, Array]]:
        """One step on what `batch` gives."""
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        mel = spec_augment(log_mel(audio, self.config.num_mel_bins), key, AUGMENTATION)

        even_weight = (not self.takes_audio) * EVEN_WEIGHT * jnp.maximum(0, 1 - state.step / EVEN_STEPS)

        def loss(params: Any) -> tuple[Array, Array]:
            logits = self.logits(params, mel)
            ctc = optax.ctc_loss(logits, jnp.zeros(logits.shape[:2]), labels, padding).sum() / (1 - padding).sum()
            letters = spread(lengths, labels, padding, logits.shape[1])
            even = optax.softmax_cross_entropy_with_integer_labels(logits, letters).mean()
            return ctc + even_weight * even, ctc

        (_, value), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(AVERAGE_DECAY, (1 + state.step) / (10 + state.step))
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.average, params)
        values = {"loss": value, "gradient": optax.tree.norm(gradients), "rate": self.rate(state.step)}
        return State(state.step + 1, params, average, optimizer), values

    @partial(jax.jit, static_argnums=0)
    def listen(self, params: Any, audio: Array) -> Array:
        """Logits for f32 [B, samples]."""
        return self.logits(params, log_mel(audio, self.config.num_mel_bins))

    def evaluate(self, params: Any, clips: Sequence[Clip]) -> dict[str, float]:
        """Share of wrong letters, of wrong words, and of texts without a fault."""
        heard: list[str] = []
        for first in range(0, len(clips), BATCH):
            rows = clips[first : first + BATCH]
            audio = np.zeros((BATCH, self.config.num_samples), np.float32)
            for row, clip in enumerate(rows):
                audio[row, : len(clip.audio)] = audio_io.from_pcm16(clip.audio)
            texts = decode_text(np.asarray(self.listen(params, audio)))[: len(rows)]
            heard += [" ".join(text.split()) for text in texts]
        said = [clip.text for clip in clips]
        return {
            "letters_wrong": float(jiwer.cer(said, heard)),
            "words_wrong": float(jiwer.wer(said, heard)),
            "exact": float(np.mean([a == b for a, b in zip(said, heard, strict=True)])),
        }


def begin_with(state: State, path: Path) -> State:
    """A state whose encoder, and the average of it, is that of an `ear.safetensors`; its head is new.

    Raises:
        omni_jax.tensorfile.CheckpointError: it is an encoder of another shape.
    """
    file = safetensors_io.TensorFile(path)
    drawn = traverse_util.flatten_dict({"audio_encoder": state.params["audio_encoder"]})
    if wrong := safetensors_io.differences(
        file.tensors, {dotted_name(keys): leaf.shape for keys, leaf in drawn.items()}
    ):
        raise safetensors_io.CheckpointError(f"{path}: another ear than this one:\n" + "\n".join(wrong))

    def taught(old: Any) -> Any:
        read = {keys: jnp.array(file.read(dotted_name(keys)), jnp.float32) for keys in drawn}
        return {**old, **traverse_util.unflatten_dict(read)}

    return state._replace(params=taught(state.params), average=taught(state.average))


def train(
    folder: Path,
    out: Path,
    *,
    config: AudioEncoderConfig = CONFIG,
    steps: int,
    seed: int = 0,
    start: Path | None = None,
    log_every: int = 50,
    validate_every: int = 500,
    validated: int = 128,
    save_seconds: float = 120,
) -> None:
    """Train, or go on training; at the end all held-out recordings are listened to.

    Args:
        folder: with `questions`, from `nano.synthesize`.
        out: of the run.
        config: the ear's shape.
        steps: of the whole run; the learning rate falls to its end.
        seed: of the parameters, the batches and the augmentation.
        start: an encoder to go on teaching, as this has written it; None begins anew.
        log_every: steps.
        validate_every: steps.
        validated: recordings of each held-out part.
        save_seconds: between states on disk.
    """
    clips = [clip for clip in load(folder, PARTS) if len(clip.audio) <= config.num_samples]
    tests = {part.partition("/")[2]: load(folder, [part]) for part in TESTS}
    tests = {name: held_out for name, held_out in tests.items() if held_out}
    if not clips:
        raise SystemExit(f"{folder}: expected recordings of {', '.join(PARTS)}, found none: python -m nano.synthesize")
    trainer = Trainer(config, steps, seed, takes_audio=start is not None)
    state = trainer.start() if start is None else begin_with(trainer.start(), start)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params["audio_encoder"]))
    hours = sum(len(clip.audio) for clip in clips) / audio_io.SAMPLE_RATE / 3600
    print(f"{parameters} parameters, {len(clips)} recordings, {hours:.1f} hours, {steps} steps", flush=True)
    groups = by_length(clips, [int(share * config.max_position) * 320 for share in LENGTHS])
    sizes = np.array([len(group) for _, group in groups], float)

    def step(state: State, number: int) -> tuple[State, dict[str, Any]]:
        samples, group = config.num_samples, clips
        if groups and number < FULL_FROM * steps:
            rng = np.random.default_rng([seed, number, 1])
            samples, group = groups[rng.choice(len(groups), p=sizes / sizes.sum())]
        return trainer.step(state, *batch(group, samples, BATCH, [seed, number]))

    def validate(state: State, done: int) -> dict[str, float]:
        outcome = {}
        for name, held_out in tests.items():
            measures = trainer.evaluate(state.average, held_out if done == steps else held_out[:validated])
            outcome.update({f"{name}_{measure}": value for measure, value in measures.items()})
        return outcome

    state = run.trainable(
        out,
        state,
        steps,
        {"seed": seed, "start": str(start) if start else None},
        step,
        validate,
        ["loss", *(f"{name}_letters_wrong" for name in tests)],
        log_interval_steps=log_every,
        validate_every=validate_every,
        save_seconds=save_seconds,
    )
    run.export(out / "audio_encoder.safetensors", {"audio_encoder": state.average["audio_encoder"]})


def main(
    folder: Annotated[Path, typer.Option(help="What nano.synthesize wrote.")] = Path("build/nano"),
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("build/nano/ear"),
    steps: Annotated[int, typer.Option(help="Steps of the whole run.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    start: Annotated[Path | None, typer.Option(help="An ear.safetensors to go on teaching.")] = None,
) -> None:
    """Teach nano its ear."""
    train(folder, out, steps=steps, seed=seed, start=start)


if __name__ == "__main__":
    typer.run(main)
