"""Trains nano's codec, in the shape of SNAC: one voice at 24 kHz, seven codes of 512 per frame of 85 ms.

    python -m recipes.nano.codec --texts build/nano/texts --out build/nano/codec

The loss is the distance of the decoded audio's spectra from the original's, at several resolutions (Kumar et al. 2023,
arXiv 2306.06546, without the adversary). Codebooks are moving averages of the latents that choose them (van den Oord
et al. 2017, arXiv 1711.00937, appendix A.1). To keep all codes in use, nothing is quantized in the first steps, then
the codebooks are filled by k-means, and from then on a code that is hardly chosen is moved to a latent.

The run resumes from its last checkpoint. Its result, `codec.safetensors`, is the moving average of the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
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

from omni_jax.audio import io as audio_io
from omni_jax.codec.snac import Snac
from omni_jax.config.model import PRESETS, CodecConfig
from recipes.nano import speech, training

CONFIG = PRESETS["nano"].codec
CODEC = "codec.safetensors"
STEPS = 24_000
MAX_RECORDINGS = 6000
"""Of answers, and of sentences; more take memory and improve nothing."""
HELD_OUT_INTERVAL = 40
"""One recording of so many is for validation."""
VALIDATION_BATCHES = 8

CROP_FRAMES = 8
BATCH_SIZE = 6
PEAK_LR = 2e-3
WARMUP_STEPS = 300
UNQUANTIZED_STEPS = 1000
"""Steps before the codebooks are filled."""
FILL_BATCHES = 200
"""Batches that the codebooks are filled from."""

RESOLUTIONS = ((128, 10), (256, 20), (512, 40), (1024, 80), (2048, 160))
"""Samples per Fourier window, and mel bins of it."""
FLOOR = 1e-4
"""Added to magnitudes before the logarithm, in units of a sine of amplitude 2: -74 dB."""
COMMITMENT_WEIGHT = 0.1

CODEBOOK_DECAY = 0.99
"""Per step, of the codebooks' moving averages."""
RARE = 0.1
"""A code that is chosen less often than this share of the mean is moved."""
REVIVAL_END = 0.9
"""Share of the run after which no code is moved."""
AVERAGE_DECAY = 0.999
"""Per step, of the parameters' moving average."""
INTERVALS = training.Intervals(log_steps=100, eval_steps=1000)
CURVES = ("distance", "validation", "codes_0", "codes_1", "codes_2")

Array = jax.Array


class Usage(NamedTuple):
    """Moving averages of what the codes of a codebook represent."""

    counts: Array
    """f32 [codes]: how often each is chosen per step."""
    sums: Array
    """f32 [codes, codebook_dim]: of the projected latents that choose it."""


class State(NamedTuple):
    """What changes in training."""

    step: Array
    params: Any
    average: Any
    opt_state: Any
    usage: list[Usage]


def spectral_distance(audio: Array, target: Array) -> Array:
    """Mean absolute difference of log spectra and log mel spectra, averaged over the resolutions.

    Args:
        audio: f32 [B, samples].
        target: the same shape.
    """
    total = jnp.zeros(())
    both = jnp.concatenate([audio, target])
    for window, mels in RESOLUTIONS:
        magnitudes = _magnitudes(both, window)
        for levels in (magnitudes, magnitudes @ mel_filters(CONFIG.sample_rate, window, mels)):
            found, wanted = jnp.split(jnp.log(levels + FLOOR), 2)
            total += jnp.abs(found - wanted).mean()
    return total / len(RESOLUTIONS)


def _magnitudes(audio: Array, window: int) -> Array:
    """F32 [B, samples] -> [B, frames, window / 2 + 1], Hann windows with a hop of a quarter."""
    hop = window // 4
    rows = jnp.pad(audio, ((0, 0), (window // 2, window // 2))).reshape(len(audio), -1, hop)
    frames = rows.shape[1] - 3
    windows = jnp.concatenate([rows[:, start : start + frames] for start in range(4)], axis=-1)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    spectrum = jnp.fft.rfft(windows * (hann / hann.sum()).astype(np.float32))
    return jnp.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-12)


@lru_cache
def mel_filters(sample_rate: int, window: int, mels: int) -> np.ndarray:
    """Triangles evenly spaced in mel, 2595 log10(1 + f / 700), each the mean of its bins.

    Returns:
        f32 [window / 2 + 1, mels].
    """
    top = 2595 * np.log10(1 + sample_rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, mels + 2) / 2595) - 1)
    hz = np.linspace(0, sample_rate / 2, window // 2 + 1)[:, None]
    # A low triangle may fall between two bins: it extends at least one bin to either side.
    width = np.maximum(np.diff(corners), sample_rate / window)
    left, right = 1 - (corners[1:-1] - hz) / width[:-1], 1 - (hz - corners[1:-1]) / width[1:]
    filters = np.maximum(0, np.minimum(left, right))
    return (filters / filters.sum(0)).astype(np.float32)


def quantize(codec: Snac, latents: Array, quantized: bool) -> tuple[Array, Array, list[tuple[Array, Array]]]:
    """`Snac.quantize`, with what the codebooks are updated from.

    Args:
        codec: has the codebooks.
        latents: f32 [B, T, D].
        quantized: False passes latents through the projections only.

    Returns:
        The decoder's input; the commitment loss; for each codebook its inputs f32 [n, codebook_dim], and the codes
        they choose int32 [n].
    """
    total, residual, commitment, inputs = jnp.zeros_like(latents), latents, jnp.zeros(()), []
    for quantizer in codec.quantizers:
        output, codes, projected, codeword = quantizer(residual)
        if not quantized:
            output = jnp.repeat(quantizer.project_out(projected), quantizer.stride, axis=1)
        total, residual = total + output, residual - output
        commitment += jnp.mean((projected - jax.lax.stop_gradient(codeword)) ** 2)
        inputs.append((projected.reshape(-1, projected.shape[-1]), codes.reshape(-1)))
    return total, commitment, inputs


def update_codebook(usage: Usage, vectors: Array, codes: Array, key: Array, revive: Array) -> tuple[Usage, Array]:
    """One step of a codebook.

    Args:
        usage: so far.
        vectors: f32 [n, codebook_dim], its inputs.
        codes: int32 [n], chosen by the inputs.
        key: draws the inputs that rare codes are moved to.
        revive: bool [], whether rare codes are moved.

    Returns:
        The new averages, and the codebook f32 [codes, codebook_dim].
    """
    chosen = jax.nn.one_hot(codes, len(usage.counts))
    counts = CODEBOOK_DECAY * usage.counts + (1 - CODEBOOK_DECAY) * chosen.sum(0)
    sums = CODEBOOK_DECAY * usage.sums + (1 - CODEBOOK_DECAY) * (chosen.T @ vectors)
    rare = revive & (counts < RARE * counts.mean())
    drawn = vectors[jax.random.randint(key, counts.shape, 0, len(vectors))]
    counts = jnp.where(rare, counts.mean(), counts)
    sums = jnp.where(rare[:, None], drawn * counts[:, None], sums)
    return Usage(counts, sums), sums / jnp.maximum(counts, 1e-8)[:, None]


@dataclass(frozen=True)
class Trainer:
    """The compiled steps of a run; equal trainers share their programs."""

    config: CodecConfig
    steps: int
    seed: int

    @cached_property
    def learning_rate(self) -> optax.Schedule:
        """By step."""
        warmup = min(WARMUP_STEPS, self.steps // 10)
        return optax.warmup_cosine_decay_schedule(0.0, PEAK_LR, warmup, self.steps, PEAK_LR / 100)

    @cached_property
    def tx(self) -> optax.GradientTransformation:
        """AdamW, with a short memory as is usual for codecs."""
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(self.learning_rate, b1=0.8, b2=0.99))

    @cached_property
    def graph(self) -> Any:
        """The codec without its parameters."""
        return nnx.split(nnx.eval_shape(lambda: Snac(self.config, rngs=nnx.Rngs(0))))[0]

    def init(self) -> State:
        """The state of step 0."""
        _, variables = nnx.split(Snac(self.config, rngs=nnx.Rngs(self.seed)))
        params = nnx.to_pure_dict(variables)
        codes, width = self.config.codebook_size, self.config.codebook_dim
        usage = [Usage(jnp.ones(codes), jnp.zeros((codes, width))) for _ in self.config.vq_strides]
        average = jax.tree.map(jnp.copy, params)
        return State(jnp.zeros((), jnp.int32), params, average, self.tx.init(params), usage)

    def losses(self, params: Any, audio: Array, quantized: bool) -> tuple[Array, Any]:
        """The loss; its terms and the inputs of the codebooks."""
        codec: Snac = nnx.merge(self.graph, params)
        latents, commitment, inputs = quantize(codec, codec.encoder(audio[..., None]), quantized)
        distance = spectral_distance(codec.decoder(latents), audio)
        return distance + (COMMITMENT_WEIGHT * commitment if quantized else 0), (distance, commitment, inputs)

    @partial(jax.jit, static_argnums=(0, 3), donate_argnums=1)
    def step(self, state: State, audio: Array, quantized: bool) -> tuple[State, dict[str, Array]]:
        """One step on f32 [B, samples]."""
        gradient = jax.grad(self.losses, has_aux=True)
        gradients, (distance, commitment, inputs) = gradient(state.params, audio, quantized)
        updates, opt_state = self.tx.update(gradients, state.opt_state, state.params)
        params, usage = optax.apply_updates(state.params, updates), state.usage
        if quantized:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), state.step), len(usage))
            revive, usage = state.step < REVIVAL_END * self.steps, []
            for index, (vectors, codes) in enumerate(inputs):
                new, codebook = update_codebook(state.usage[index], vectors, codes, keys[index], revive)
                usage.append(new)
                params["quantizers"][index]["codebook"] = codebook
        average = training.moving_average(state.average, params, state.step, AVERAGE_DECAY)
        values = {"distance": distance, "commitment": commitment, "gradient": optax.tree.norm(gradients)}
        values |= {"learning_rate": self.learning_rate(state.step)}
        values |= {f"codes_{index}": _perplexity(book.counts) for index, book in enumerate(usage)}
        return State(state.step + 1, params, average, opt_state, usage), values

    @partial(jax.jit, static_argnums=(0, 3))
    def distance(self, params: Any, audio: Array, quantized: bool) -> Array:
        """The spectral distance alone."""
        return self.losses(params, audio, quantized)[1][0]

    @partial(jax.jit, static_argnums=0)
    def codebook_inputs(self, params: Any, audio: Array) -> list[Array]:
        """Of each codebook, f32 [n, codebook_dim]."""
        codec: Snac = nnx.merge(self.graph, params)
        return [vectors for vectors, _ in quantize(codec, codec.encoder(audio[..., None]), True)[2]]

    def fill_codebooks(self, state: State, batches: Sequence[np.ndarray]) -> State:
        """Codebooks by k-means, coarse to fine, each on the residual of those before."""
        params, usage = state.params, []
        for index in range(len(state.usage)):
            vectors = np.concatenate([np.asarray(self.codebook_inputs(params, audio)[index]) for audio in batches])
            codebook, counts = k_means(vectors, self.config.codebook_size, np.random.default_rng(self.seed))
            share = counts / counts.sum() * (len(vectors) / len(batches))
            usage.append(Usage(jnp.asarray(share), jnp.asarray(codebook * share[:, None])))
            params["quantizers"][index]["codebook"] = jnp.asarray(codebook)
        # The average so far is that of a codec that does not quantize.
        return state._replace(params=params, average=jax.tree.map(jnp.copy, params), usage=usage)


def k_means(
    vectors: np.ndarray, count: int, rng: np.random.Generator, rounds: int = 15
) -> tuple[np.ndarray, np.ndarray]:
    """Centers of clusters by cosine similarity, as the quantizer chooses.

    Args:
        vectors: f32 [n, D], n at least `count`.
        count: of clusters.
        rng: draws the first centers, and those that replace empty clusters.
        rounds: of Lloyd's algorithm.

    Returns:
        f32 [count, D], and the number of vectors of each center, at least 1.
    """
    centers = vectors[rng.choice(len(vectors), count, replace=False)]
    for _ in range(rounds):
        nearest = np.argmax(vectors @ (centers / np.linalg.norm(centers, axis=1, keepdims=True)).T, axis=1)
        counts = np.bincount(nearest, minlength=count)
        sums = np.zeros_like(centers)
        np.add.at(sums, nearest, vectors)
        drawn = vectors[rng.choice(len(vectors), count, replace=False)]
        centers = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], drawn)
    return centers, np.maximum(counts, 1).astype(np.float32)


class Crops:
    """Recordings of one voice, cropped at random."""

    def __init__(self, audio: Sequence[np.ndarray], samples: int):
        """Take recordings.

        Args:
            audio: int16 [samples] each; shorter ones than a crop are padded with silence.
            samples: of a crop.
        """
        self.samples = samples
        self.audio = [np.pad(one, (0, max(0, samples - len(one)))) for one in audio]
        # Every moment of all recordings is equally likely.
        lengths = np.array([len(one) for one in self.audio], float)
        self.shares = lengths / lengths.sum()

    def batch(self, size: int, seed: list[int]) -> np.ndarray:
        """F32 [size, samples], the same for the same seed."""
        rng = np.random.default_rng(seed)
        rows = []
        for index in rng.choice(len(self.audio), size, p=self.shares):
            start = rng.integers(0, len(self.audio[index]) - self.samples + 1)
            rows.append(self.audio[index][start : start + self.samples])
        return audio_io.from_pcm16(np.stack(rows))


def train(
    audio: Sequence[np.ndarray],
    out: Path,
    *,
    config: CodecConfig = CONFIG,
    steps: int = STEPS,
    seed: int = 0,
    unquantized_steps: int = UNQUANTIZED_STEPS,
    intervals: training.Intervals = INTERVALS,
) -> None:
    """Train, or resume.

    Args:
        audio: recordings, int16 [samples] each.
        out: folder of the run.
        config: the codec's shape.
        steps: of the whole run.
        seed: of the parameters, the crops and the codes that are moved.
        unquantized_steps: before the codebooks are filled.
        intervals: see `training.run`.
    """
    samples = CROP_FRAMES * config.frame_size
    crops = Crops([one for index, one in enumerate(audio) if index % HELD_OUT_INTERVAL], samples)
    held_out = Crops(audio[::HELD_OUT_INTERVAL], samples)
    batches = [held_out.batch(BATCH_SIZE, [seed, 2, index]) for index in range(VALIDATION_BATCHES)]
    trainer = Trainer(config, steps, seed)
    state = trainer.init()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    minutes = sum(map(len, audio)) / config.sample_rate / 60
    typer.echo(f"{parameters} parameters, {minutes:.0f} minutes of speech, {steps} steps")

    def step(state: State, number: int) -> tuple[State, dict[str, Any]]:
        if number == unquantized_steps:
            fill = [crops.batch(BATCH_SIZE, [seed, 1, index]) for index in range(FILL_BATCHES)]
            state = trainer.fill_codebooks(state, fill)
        return trainer.step(state, crops.batch(BATCH_SIZE, [seed, 0, number]), number >= unquantized_steps)

    def validate(state: State, done: int) -> dict[str, float]:
        distances = [float(trainer.distance(state.average, batch, done > unquantized_steps)) for batch in batches]
        return {"validation": float(np.mean(distances))}

    state = training.run(out, state, steps, step, validate, intervals)
    training.draw_curves(out, CURVES)
    training.export(out / CODEC, state.average)


def _perplexity(counts: Array) -> Array:
    """The number of codes, if all were in use equally often, that would have this entropy."""
    shares = counts / counts.sum()
    return jnp.exp(-(shares * jnp.log(shares + 1e-12)).sum())


def main(
    texts: Annotated[Path, typer.Option(help="What recipes.nano.texts wrote.")] = Path("build/nano/texts"),
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("build/nano/codec"),
    steps: Annotated[int, typer.Option(min=2, help="Steps of the whole run.")] = STEPS,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    trial: Annotated[bool, typer.Option("--trial", help="Speech by espeak-ng.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes that synthesize.")] = 2,
) -> None:
    """Train the codec on nano's voice."""
    answers, sentences = (speech.answer_texts(texts, name) for name in ("train", "read_train"))
    wanted = answers[:MAX_RECORDINGS] + sentences[:MAX_RECORDINGS]
    audio = speech.synthesize_answers(wanted, trial=trial, workers=workers)
    train(audio, out, steps=steps, seed=seed, unquantized_steps=min(UNQUANTIZED_STEPS, steps // 2))


if __name__ == "__main__":
    typer.run(main)
