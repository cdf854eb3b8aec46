"""Rows per second of `omni-jax prepare` against the `datasets` library: `python -m benchmarks.prepare`.

A corpus in the layout of VoiceAssistant-400K, questions of 3 to 6 s at 22.05 kHz. Both sides read the parquet file,
decode the question with soundfile, resample it to 16 kHz with soxr and parse the answer's codes. `datasets` writes an
arrow file with 16-bit samples, this project records with FLAC. Each run is a process of its own, its start included;
the sides take turns. Needs `pip install datasets`.
"""

from __future__ import annotations

import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import soxr

ROWS = 4800
GROUP = 100
ROUNDS = 3


def corpus(folder: Path) -> float:
    """Write the corpus. Returns its size in megabytes."""
    rng = np.random.default_rng(0)
    path = folder / "train-00000-of-00001.parquet"
    writer = None
    for start in range(0, ROWS, GROUP):
        rows = [row(rng, number) for number in range(start, start + GROUP)]
        table = pa.Table.from_pylist(rows)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    return path.stat().st_size / 1e6


def row(rng: np.random.Generator, number: int) -> dict[str, Any]:
    # Filtered noise of varying loudness, which FLAC compresses about as well as speech.
    samples = int(rng.uniform(3, 6) * 22_050)
    noise = np.convolve(rng.normal(0, 1, samples + 15), np.hanning(16), "valid")
    sound = (noise * 1500 * (1 + np.sin(np.arange(samples) / 2700))).clip(-32768, 32767).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, sound, 22_050, format="WAV")
    codes = rng.integers(0, 4096, (int(rng.integers(20, 101)), 7))
    return {
        "split_name": "synthetic",
        "index": str(number),
        "round": "1",
        "question": f"What is {number}?",
        "question_audio": {"bytes": buffer.getvalue(), "path": "q.wav"},
        "answer": "A number.",
        "answer_snac": " ".join("# " + " ".join(map(str, frame)) for frame in codes),
    }


def theirs(source: str, out: str, workers: int) -> None:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("parquet", data_files=f"{source}/*.parquet", split="train", cache_dir=f"{out}/cache")
    rows.map(decoded, num_proc=workers if workers > 1 else None, remove_columns=["question_audio", "answer_snac"])


def decoded(row: dict[str, Any]) -> dict[str, Any]:
    sound, rate = soundfile.read(io.BytesIO(row["question_audio"]["bytes"]), dtype="float32")
    sound = soxr.resample(sound, rate, 16_000)
    codes = [int(code) for code in row["answer_snac"].split() if code != "#"]
    return {"audio": (sound * 32767).clip(-32768, 32767).astype(np.int16), "codes": np.array(codes, np.int16)}


def ours(source: str, out: str, workers: int) -> None:
    from omni_jax.data.prepare import prepare
    from omni_jax.data.sources import VoiceAssistant

    index = prepare(VoiceAssistant(Path(source)), out, workers=workers)
    assert index["exchanges"] == ROWS, index


def main() -> None:
    names = ("ours", "theirs")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "corpus"
        source.mkdir()
        print(f"{ROWS} rows, {corpus(source):.0f} MB of parquet; medians of {ROUNDS} runs, process start included")
        print(f"{'':>10}{'workers':>8}{'seconds':>9}{'rows/s':>8}")
        taken: dict[tuple[str, int], list[float]] = {(name, workers): [] for workers in (1, 2) for name in names}
        for turn in range(ROUNDS):
            for (name, workers), seconds in taken.items():
                command = [sys.executable, "-m", "benchmarks.prepare", name, str(source)]
                start = time.perf_counter()
                subprocess.run([*command, f"{folder}/{name}-{workers}-{turn}", str(workers)], check=True)
                seconds.append(time.perf_counter() - start)
    for (name, workers), seconds in taken.items():
        middle = statistics.median(seconds)
        print(f"{'omni-jax' if name == 'ours' else 'datasets':>10}{workers:>8}{middle:>9.1f}{ROWS / middle:>8.0f}")
    for workers in (1, 2):
        ratio = statistics.median(taken["theirs", workers]) / statistics.median(taken["ours", workers])
        print(f"with {workers}: {ratio:.2f} times as many rows a second as datasets")
    scaling = statistics.median(taken["ours", 1]) / statistics.median(taken["ours", 2])
    print(f"two workers against one: {scaling:.2f} times as fast")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        {"ours": ours, "theirs": theirs}[sys.argv[1]](sys.argv[2], sys.argv[3], int(sys.argv[4]))
