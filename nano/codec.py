"""Teaches nano its codec: one voice at 24 kHz, seven codes of 512 a frame of 85 ms.

    python -m nano.codec                            # reads build/nano/answers, writes build/nano/codec

One loss: how far the decoded sound's spectra are from the original's, at several resolutions (Kumar et al. 2023,
arXiv 2306.06546, without the adversary). Two thirds of a codec's time go into its layers at 24 kHz; the shape below
has eight channels there, and its capacity where it costs nothing, below 400 Hz.

Codebooks learn by moving averages of what they stand for (van den Oord et al. 2017, arXiv 1711.00937, appendix A.1).
Three things keep all codes in use: for the first steps nothing is rounded; then the codebooks are filled by k-means
with what the encoder makes by now; and from then on a code that is hardly chosen any more is moved onto a latent.

The run saves itself every two minutes and goes on from there when it is started again. Its result,
`codec.safetensors`, is the moving average of its parameters.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx

from nano import run
from nano.synthesize import recordings
from omni_jax.audio import io as audio_io
from omni_jax.checkpoint import safetensors_io
from omni_jax.codec.snac import Snac
from omni_jax.config.model import PRESETS, CodecConfig

CONFIG = PRESETS["nano"].codec
PARTS = ("answers/train", "answers/read_train")
MOST = 6000
"""Recordings of a part that are read: more would take memory and teach it nothing."""
HELD_BACK = 40
"""One recording of so many is for validation."""
VALIDATION = 8
"""Batches of them."""

CROP = 8
"""Frames of each example."""
BATCH = 6
PEAK = 2e-3
"""Learning rate after the warm-up."""
WARMUP = 300
UNROUNDED = 1000
"""Steps before the codebooks are filled."""
FILL = 200
"""Batches they are filled from."""

RESOLUTIONS = ((128, 10), (256, 20), (512, 40), (1024, 80), (2048, 160))
"""Samples per Fourier window and mel bins of it."""
FLOOR = 1e-4
"""Magnitude added before the logarithm, of a sine of amplitude 2: what is fainter than -74 dB doesn't matter."""
COMMITMENT = 0.1

CODE_DECAY = 0.99
"""Of the codebooks' moving averages, per step."""
RARE = 0.1
"""A code chosen less than so often as the average one is moved."""
REVIVED_UNTIL = 0.9
"""Share of the run after which codes stay where they are."""
AVERAGE_DECAY = 0.999
"""Of the parameters' moving average, per step."""

Array = jax.Array


class Usage(NamedTuple):
    """Moving averages of what each code of a codebook stands for."""

    counts: Array
    """f32 [codes]: how often it is chosen in a step."""
    sums: Array
    """f32 [codes, codebook_dim]: of the projected latents it is chosen for."""


class State(NamedTuple):
    """All that changes in training."""

    step: Array
    params: Any
    average: Any
    optimizer: Any
    usage: list[Usage]


def spectral_distance(audio: Array, target: Array) -> Array:
    """Mean absolute difference of log mel spectra and of log spectra, over the resolutions.

    Args:
        audio: f32 [B, samples].
        target: the same.
    """
    total = jnp.zeros(())
    both = jnp.concatenate([audio, target])
    for window, mels in RESOLUTIONS:
        magnitudes = _magnitudes(both, window)
        for levels in (magnitudes, magnitudes @ mel_filters(CONFIG.sample_rate, window, mels)):
            heard, wanted = jnp.split(jnp.log(levels + FLOOR), 2)
            total += jnp.abs(heard - wanted).mean()
    return total / len(RESOLUTIONS)


def _magnitudes(audio: Array, window: int) -> Array:
    """F32 [B, samples] -> [B, frames, window / 2 + 1]; four windows overlap everywhere."""
    hop = window // 4
    rows = jnp.pad(audio, ((0, 0), (window // 2, window // 2))).reshape(len(audio), -1, hop)
    frames = rows.shape[1] - 3
    windows = jnp.concatenate([rows[:, part : part + frames] for part in range(4)], axis=-1)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    spectrum = jnp.fft.rfft(windows * (hann / hann.sum()).astype(np.float32))
    return jnp.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-12)


@lru_cache
def mel_filters(sample_rate: int, window: int, mels: int) -> np.ndarray:
    """Triangles evenly spaced in mel, 2595 log10(1 + f / 700), each the mean of the bins under it.

    Returns:
        f32 [window / 2 + 1, mels].
    """
    top = 2595 * np.log10(1 + sample_rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, mels + 2) / 2595) - 1)
    hz = np.linspace(0, sample_rate / 2, window // 2 + 1)[:, None]
    # A low triangle may lie between two bins: no narrower than a bin to either side.
    width = np.maximum(np.diff(corners), sample_rate / window)
    left, right = 1 - (corners[1:-1] - hz) / width[:-1], 1 - (hz - corners[1:-1]) / width[1:]
    filters = np.maximum(0, np.minimum(left, right))
    return (filters / filters.sum(0)).astype(np.float32)


def quantize(codec: Snac, latents: Array, rounded: bool) -> tuple[Array, Array, list[tuple[Array, Array]]]:
    """`Snac.quantize`, with what the codebooks learn from.

    Args:
        codec: whose codebooks.
        latents: f32 [B, T, D].
        rounded: False passes latents through the projections only.

    Returns:
        The decoder's input; the commitment loss; per codebook what it was given, f32 [n, codebook_dim], and the
        codes it chose, int32 [n].
    """
    total, residual, commitment, given = jnp.zeros_like(latents), latents, jnp.zeros(()), []
    for quantizer in codec.quantizers:
        part, codes, projected, codeword = quantizer(residual)
        if not rounded:
            part = jnp.repeat(quantizer.project_out(projected), quantizer.stride, axis=1)
        total, residual = total + part, residual - part
        commitment += jnp.mean((projected - jax.lax.stop_gradient(codeword)) ** 2)
        given.append((projected.reshape(-1, projected.shape[-1]), codes.reshape(-1)))
    return total, commitment, given


def learn_codes(usage: Usage, vectors: Array, codes: Array, key: Array, revive: Array) -> tuple[Usage, Array]:
    """One step of a codebook.

    Args:
        usage: so far.
        vectors: f32 [n, codebook_dim], what it was given.
        codes: int32 [n], what it chose.
        key: draws the vectors that rare codes are moved to.
        revive: bool [], whether rare codes are moved.

    Returns:
        The new averages, and the codebook, f32 [codes, codebook_dim].
    """
    chosen = jax.nn.one_hot(codes, len(usage.counts))
    counts = CODE_DECAY * usage.counts + (1 - CODE_DECAY) * chosen.sum(0)
    sums = CODE_DECAY * usage.sums + (1 - CODE_DECAY) * (chosen.T @ vectors)
    rare = revive & (counts < RARE * counts.mean())
    places = vectors[jax.random.randint(key, counts.shape, 0, len(vectors))]
    counts = jnp.where(rare, counts.mean(), counts)
    sums = jnp.where(rare[:, None], places * counts[:, None], sums)
    return Usage(counts, sums), sums / jnp.maximum(counts, 1e-8)[:, None]


@dataclass(frozen=True)
class Trainer:
    """The compiled steps of a run; equal ones share their programs."""

    config: CodecConfig
    steps: int
    seed: int

    @cached_property
    def rate(self) -> optax.Schedule:
        """The learning rate by step."""
        return optax.warmup_cosine_decay_schedule(0.0, PEAK, min(WARMUP, self.steps // 10), self.steps, PEAK / 100)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam, with short memory as is usual for codecs."""
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(self.rate, b1=0.8, b2=0.99))

    @cached_property
    def graph(self) -> Any:
        """The codec without its parameters."""
        return nnx.split(nnx.eval_shape(lambda: Snac(self.config, rngs=nnx.Rngs(0))))[0]

    def start(self) -> State:
        """A state before the first step."""
        _, variables = nnx.split(Snac(self.config, rngs=nnx.Rngs(self.seed)))
        params = nnx.to_pure_dict(variables)
        codes, width = self.config.codebook_size, self.config.codebook_dim
        usage = [Usage(jnp.ones(codes), jnp.zeros((codes, width))) for _ in self.config.vq_strides]
        average = jax.tree.map(jnp.copy, params)
        return State(jnp.zeros((), jnp.int32), params, average, self.optimizer.init(params), usage)

    def module(self, params: Any) -> Snac:
        """The codec with these parameters."""
        return nnx.merge(self.graph, params)

    def losses(self, params: Any, audio: Array, rounded: bool) -> tuple[Array, Any]:
        """What is minimised; and its parts, with what the codebooks learn from."""
        codec = self.module(params)
        latents, commitment, given = quantize(codec, codec.encoder(audio[..., None]), rounded)
        distance = spectral_distance(codec.decoder(latents), audio)
        return distance + (COMMITMENT * commitment if rounded else 0), (distance, commitment, given)

    @partial(jax.jit, static_argnums=(0, 3), donate_argnums=1)
    def step(self, state: State, audio: Array, rounded: bool) -> tuple[State, dict[str, Array]]:
        """One step on f32 [B, samples]."""
        gradient = jax.grad(self.losses, has_aux=True)
        gradients, (distance, commitment, given) = gradient(state.params, audio, rounded)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
        params, usage = optax.apply_updates(state.params, updates), state.usage
        if rounded:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), state.step), len(usage))
            revive, usage = state.step < REVIVED_UNTIL * self.steps, []
            for index, (vectors, codes) in enumerate(given):
                new, codebook = learn_codes(state.usage[index], vectors, codes, keys[index], revive)
                usage.append(new)
                params["quantizers"][index]["codebook"] = codebook
        decay = jnp.minimum(AVERAGE_DECAY, (1 + state.step) / (10 + state.step))
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.average, params)
        values = {"distance": distance, "commitment": commitment, "gradient": optax.tree.norm(gradients)}
        values |= {"rate": self.rate(state.step)}
        values |= {f"codes_{index}": _perplexity(book.counts) for index, book in enumerate(usage)}
        return State(state.step + 1, params, average, optimizer, usage), values

    @partial(jax.jit, static_argnums=(0, 3))
    def distance(self, params: Any, audio: Array, rounded: bool) -> Array:
        """The spectral distance alone."""
        return self.losses(params, audio, rounded)[1][0]

    @partial(jax.jit, static_argnums=0)
    def given(self, params: Any, audio: Array) -> list[Array]:
        """What each codebook is given, f32 [n, codebook_dim]."""
        codec = self.module(params)
        return [vectors for vectors, _ in quantize(codec, codec.encoder(audio[..., None]), True)[2]]

    def fill_codebooks(self, state: State, batches: list[np.ndarray]) -> State:
        """Codebooks by k-means, coarse to fine, each on what the ones before leave over."""
        params, usage = state.params, []
        for index in range(len(state.usage)):
            vectors = np.concatenate([np.asarray(self.given(params, audio)[index]) for audio in batches])
            codebook, counts = k_means(vectors, self.config.codebook_size, np.random.default_rng(self.seed))
            share = counts / counts.sum() * (len(vectors) / len(batches))
            usage.append(Usage(jnp.asarray(share), jnp.asarray(codebook * share[:, None])))
            params["quantizers"][index]["codebook"] = jnp.asarray(codebook)
        # The average so far is of a codec that didn't round.
        return state._replace(params=params, average=jax.tree.map(jnp.copy, params), usage=usage)


def k_means(
    vectors: np.ndarray, count: int, rng: np.random.Generator, rounds: int = 15
) -> tuple[np.ndarray, np.ndarray]:
    """Centres of clusters of like direction, as the quantizer chooses.

    Args:
        vectors: f32 [n, D], n at least `count`.
        count: of clusters.
        rng: draws the first centres and those in place of empty clusters.
        rounds: of Lloyd's algorithm.

    Returns:
        f32 [count, D], and how many vectors each center got, at least 1 each.
    """
    centres = vectors[rng.choice(len(vectors), count, replace=False)]
    for _ in range(rounds):
        nearest = np.argmax(vectors @ (centres / np.linalg.norm(centres, axis=1, keepdims=True)).T, axis=1)
        counts = np.bincount(nearest, minlength=count)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, vectors)
        strays = vectors[rng.choice(len(vectors), count, replace=False)]
        centres = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], strays)
    return centres, np.maximum(counts, 1).astype(np.float32)


class Corpus:
    """Recordings of one voice, cut at random."""

    def __init__(self, audio: list[np.ndarray], crop: int):
        """Take recordings.

        Args:
            audio: int16 [samples] each.
            crop: samples of an example; shorter recordings are followed by silence.
        """
        self.crop = crop
        self.audio = [np.pad(one, (0, max(0, crop - len(one)))) for one in audio]
        # Every moment of all recordings is drawn as often.
        lengths = np.array([len(one) for one in self.audio], float)
        self.shares = lengths / lengths.sum()

    def batch(self, size: int, seed: list[int]) -> np.ndarray:
        """F32 [size, crop], the same for the same seed."""
        rng = np.random.default_rng(seed)
        rows = []
        for index in rng.choice(len(self.audio), size, p=self.shares):
            start = rng.integers(0, len(self.audio[index]) - self.crop + 1)
            rows.append(self.audio[index][start : start + self.crop])
        return audio_io.from_pcm16(np.stack(rows))


def load(folder: Path, parts: tuple[str, ...] = PARTS) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Recordings to learn from and recordings held back, int16 [samples] each."""
    every = [recording.audio for part in parts for recording in itertools.islice(recordings(folder, part), MOST)]
    return [one for i, one in enumerate(every) if i % HELD_BACK], every[::HELD_BACK]


def read(path: Path, config: CodecConfig = CONFIG) -> Snac:
    """The codec that `run.export` has written."""
    file = safetensors_io.TensorFile(path)
    return Snac.from_params(config, {name: file.read(name).astype(np.float32) for name in file.tensors})


def train(
    folder: Path,
    out: Path,
    *,
    config: CodecConfig = CONFIG,
    steps: int,
    seed: int = 0,
    unrounded: int = UNROUNDED,
    log_every: int = 100,
    validate_every: int = 1000,
    save_seconds: float = 120,
) -> None:
    """Train, or go on training.

    Args:
        folder: with `answers`, from `nano.synthesize`.
        out: of the run.
        config: the codec's shape.
        steps: of the whole run; the learning rate falls to its end.
        seed: of the parameters, the crops and the codes that are moved.
        unrounded: steps before the codebooks are filled.
        log_every: steps.
        validate_every: steps.
        save_seconds: between states on disk.
    """
    train_audio, held_back = load(folder)
    corpus = Corpus(train_audio, CROP * config.frame_size)
    validation = [
        Corpus(held_back, CROP * config.frame_size).batch(BATCH, [seed, 2, index]) for index in range(VALIDATION)
    ]
    trainer = Trainer(config, steps, seed)
    state = trainer.start()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    minutes = sum(map(len, train_audio)) / config.sample_rate / 60
    print(f"{parameters} parameters, {minutes:.0f} minutes of speech, {steps} steps", flush=True)

    def step(state: State, number: int) -> tuple[State, dict[str, Any]]:
        if number == unrounded:
            state = trainer.fill_codebooks(state, [corpus.batch(BATCH, [seed, 1, index]) for index in range(FILL)])
        return trainer.step(state, corpus.batch(BATCH, [seed, 0, number]), number >= unrounded)

    def validate(state: State, done: int) -> dict[str, float]:
        distances = [float(trainer.distance(state.average, audio, done > unrounded)) for audio in validation]
        return {"validation": float(np.mean(distances))}

    state = run.trainable(
        out,
        state,
        steps,
        {"seed": seed},
        step,
        validate,
        ["distance", "validation", "codes_0", "codes_1", "codes_2"],
        log_interval_steps=log_every,
        validate_every=validate_every,
        save_seconds=save_seconds,
    )
    run.export(out / "codec.safetensors", state.average)


def _perplexity(counts: Array) -> Array:
    """How many codes would be in use if all were used alike."""
    shares = counts / counts.sum()
    return jnp.exp(-(shares * jnp.log(shares + 1e-12)).sum())


def main(
    folder: Annotated[Path, typer.Option(help="What nano.synthesize wrote.")] = Path("build/nano"),
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("build/nano/codec"),
    steps: Annotated[int, typer.Option(help="Steps of the whole run.")] = 24_000,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Teach nano its codec."""
    train(folder, out, steps=steps, seed=seed)


if __name__ == "__main__":
    typer.run(main)
