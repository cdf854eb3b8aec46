"""The input pipeline alone: examples per second and core, the fraction of padding, and where the time goes.

Synthetic exchanges of Mini-Omni's shape: questions of 2 to 8 s, answers of 20 to 100 frames with about two words of
text a second, all tasks in equal shares, rows of 2048 positions.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from omni_jax.config.model import PRESETS
from omni_jax.config.run import DataConfig, SourceConfig
from omni_jax.data.examples import TASKS
from omni_jax.data.packing import padding
from omni_jax.data.pipeline import Batches, batches
from omni_jax.data.records import Exchange, RecordWriter, from_bytes, to_bytes

EXCHANGES = 400
BATCH = 8
BATCHES = 16
WORDS = ["the", "of", "to", "and", "in", "is", "you", "that", "was", "for", "on", "are", "with", "his", "they", "what"]


def main() -> None:
    model = PRESETS["mini_omni"]
    rng = np.random.default_rng(0)
    tokenizer = word_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        with RecordWriter(folder) as writer:
            for _ in range(EXCHANGES):
                writer.write(exchange(rng))
        size = sum(file.stat().st_size for file in Path(folder).iterdir()) / EXCHANGES
        print(f"{EXCHANGES} exchanges of {size / 1000:.0f} kB; {BATCHES} batches of {BATCH} rows of 2048 positions")
        data = to_bytes(exchange(rng))
        print(f"reading a record: {milliseconds(lambda: from_bytes(data)):.2f} ms of one core, ", end="")
        print(f"without its sound {milliseconds(lambda: from_bytes(data, audio=False)):.2f} ms")
        print(f"{'tasks':>5} {'workers':>7} {'examples/s':>11} {'per core':>9} {'clips/row':>10} {'padding':>8}")
        for name, tasks in (("all", TASKS), ("A1A2", TASKS[:1]), ("T1T2", TASKS[4:5])):
            for workers in (0, 1, 2):
                shares = {task.value: 1.0 for task in tasks}
                config = DataConfig(
                    sources=(SourceConfig(folder),), tasks=shares, batch_size=BATCH, num_workers=workers
                )
                speed = run(batches(config, model, tokenizer, seed=0))
                print(
                    f"{name:>5} {workers:>7} {speed.examples / speed.seconds:>11.0f} "
                    f"{speed.examples / speed.core_seconds:>9.0f} {speed.clips:>10.2f} {speed.padding:>8.1%}",
                    flush=True,
                )


class Speed(NamedTuple):
    """What drawing some batches took."""

    examples: int
    seconds: float
    core_seconds: float
    """Of this process and its workers, added up: independent of what else the machine does."""
    clips: float
    """Recordings per row."""
    padding: float


def run(iterator: Batches) -> Speed:
    """Draws some batches, the workers being at work already."""
    # Half as many untimed: workers start, and rows that were ready before would count as free.
    for _ in range(BATCHES // 2):
        next(iterator)
    drawn = []
    wall, core = time.perf_counter(), core_seconds()
    for _ in range(BATCHES):
        batch = next(iterator)
        drawn.append((batch["examples"].sum(), batch["clips"].mean(), padding(batch)))
    wall, core = time.perf_counter() - wall, core_seconds() - core
    iterator.close()
    examples, clips, pad = np.array(drawn).T
    return Speed(int(examples.sum()), wall, core, float(clips.mean()), float(pad.mean()))


def core_seconds() -> float:
    """Used so far by this process and its children that are alive (Linux)."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def exchange(rng: np.random.Generator) -> Exchange:
    samples, frames = int(rng.uniform(2, 8) * 16000), int(rng.integers(20, 101))
    # Filtered noise that comes and goes, which FLAC packs about as well as speech: to half its size.
    noise = np.convolve(rng.normal(0, 1, samples + 15), np.hanning(16), "valid")
    loud = 1500 * (1 + np.sin(np.arange(samples) / 2000))
    return Exchange(
        question_text=sentence(rng, samples / 16000),
        question_audio=(noise * loud).clip(-32768, 32767).astype(np.int16),
        answer_text=sentence(rng, frames / 11.7),
        answer_codes=rng.integers(0, 4096, (frames, 7)),
        source="synthetic",
        voice="none",
    )


def sentence(rng: np.random.Generator, seconds: float) -> str:
    return " ".join(rng.choice(WORDS, max(1, int(2 * seconds))))


def word_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE that knows the words, as a trained one does."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return tokenizer


def milliseconds(call: Callable[[], object], rounds: int = 50) -> float:
    call()
    start = time.process_time()
    for _ in range(rounds):
        call()
    return 1000 * (time.process_time() - start) / rounds


if __name__ == "__main__":
    main()
