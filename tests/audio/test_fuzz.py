"""Damaged files of ten formats, in a child process with limits: sound or a clear error, soon, in little memory."""

from __future__ import annotations

import logging
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omni_jax.audio import io as audio_io
from omni_jax.errors import AudioError
from tests.audio.recordings import Kind, encode
from tests.mutation import mutate

KINDS = [
    Kind("wav", "pcm_s16le", 16_000),
    Kind("wav", "adpcm_ms", 8000),
    Kind("flac", "flac", 16_000),
    Kind("mp3", "libmp3lame", 16_000),
    Kind("ogg", "libopus", 16_000),
    Kind("ogg", "vorbis", 44_100, 2),
    Kind("ipod", "aac", 16_000),
    Kind("webm", "libopus", 48_000),
    Kind("adts", "aac", 16_000),
    Kind("matroska", "aac", 44_100, video="mpeg4"),
]
NUM_FILES = 2000
"""Of each kind."""
MAX_SECONDS = 2.0
"""Of processor time, for one file."""
MAX_MEGABYTES = 500


def read_mutants(index: int) -> None:
    """The child process: prints a line for whatever is wrong, and "done"."""
    logging.disable(logging.WARNING)
    original = encode(KINDS[index], 1.0)
    audio_io.read_audio(original)
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    num_read = 0
    for seed in range(NUM_FILES):
        data = mutate(original, random.Random(f"{index} {seed}"))
        start = time.process_time()
        try:
            num_read += len(audio_io.read_audio(data, max_seconds=30.0)) > 0
        except AudioError as error:
            if "\n" in str(error) or "expected" not in str(error):
                print(f"{seed}: unclear: {error}")
        if time.process_time() - start > MAX_SECONDS:
            print(f"{seed}: {time.process_time() - start:.1f} s")
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 - megabytes
    if megabytes > MAX_MEGABYTES:
        print(f"{megabytes} MB")
    print(f"done {num_read}")


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(KINDS)), ids=[str(kind) for kind in KINDS])
def test_fuzz_read_audio(index: int) -> None:
    root = Path(__file__).parents[2]
    code = f"from tests.audio.test_fuzz import read_mutants; read_mutants({index})"
    command = [sys.executable, "-W", "error", "-c", code]
    child = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    assert child.stdout.startswith("done "), child.stdout
    assert child.stdout != "done 0\n"
