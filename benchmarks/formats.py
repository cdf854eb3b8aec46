"""Every kind of recording, made of a shipped question: whether it is read whole, and what nano transcribes."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import soxr

import omni_jax
from omni_jax.api import Omni
from omni_jax.audio.io import SAMPLE_RATE, read_audio
from tests.audio.recordings import KINDS, Kind, encode, source

QUESTION = Path(omni_jax.__file__).parent / "assets" / "questions" / "sum.wav"


class Row(NamedTuple):
    """One kind of file."""

    kind: Kind
    seconds: float
    """That were read."""
    written: float
    """Seconds that were written."""
    promised: float | None
    """Duration that FFmpeg reports, as ffprobe does; None if it does not know."""
    transcript: str

    @property
    def is_whole(self) -> bool:
        """Whether it was read as long as it was written or as FFmpeg says it is, within 30 ms."""
        expected = [self.written, *([self.promised] if self.promised is not None else [])]
        return min(abs(self.seconds - seconds) for seconds in expected) <= 0.03


def rows(omni: Omni) -> Iterator[Row]:
    """Make, read and transcribe each kind."""
    question = read_audio(QUESTION)
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            sound = soxr.resample(question, SAMPLE_RATE, kind.rate, quality="HQ")
            seconds = len(sound) / kind.rate
            data = encode(kind, seconds, sound.astype(np.float32))
            found = read_audio(source(kind, data, Path(folder)))
            text = omni.transcribe(found, sample_rate=SAMPLE_RATE).text
            yield Row(kind, len(found) / SAMPLE_RATE, seconds, _promised(kind, data), text)


def _promised(kind: Kind, data: bytes) -> float | None:
    if kind.suffix:
        return None
    with av.open(io.BytesIO(data), "r") as container:
        return container.duration / av.time_base if container.duration else None


def main() -> None:
    """Print a line for each kind, and how many are read whole and transcribed as the original."""
    omni = Omni.from_pretrained("nano")
    clean, table = omni.transcribe(QUESTION).text, list(rows(omni))
    for row in table:
        promised = "?" if row.promised is None else f"{row.promised:.3f}"
        marks = (
            "whole" if row.is_whole else "NOT WHOLE",
            "as the original" if row.transcript == clean else row.transcript,
        )
        print(f"{row.kind!s:32} read {row.seconds:.3f} s, written {row.written:.3f}, ffprobe {promised:>6}  {marks}")
    whole, same = sum(row.is_whole for row in table), sum(row.transcript == clean for row in table)
    print(f"{len(table)} kinds: {whole} read whole, {same} transcribed as {clean!r}")
