from __future__ import annotations

import numpy as np
import pytest

from omni_jax.audio.tempo import TempoStream

TONE = (0.3 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 24_000)).astype(np.float32)


@pytest.mark.parametrize("speed", [0.25, 0.7, 1.5, 4.0])
def test_speed_changes_the_duration_and_not_the_pitch(speed: float) -> None:
    audio = TempoStream(24_000, speed).push(TONE, last=True)
    assert audio.dtype == np.float32
    assert len(audio) / 24_000 == pytest.approx(2 / speed, abs=0.05)
    pitch = np.argmax(np.abs(np.fft.rfft(audio))) * 24_000 / len(audio)
    assert pitch == pytest.approx(440, abs=3)
    assert np.abs(audio).max() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("speed", [0.3, 1.0, 2.0])
def test_pieces_joined_are_the_whole(speed: float) -> None:
    whole = TempoStream(24_000, speed).push(TONE, last=True)
    stream = TempoStream(24_000, speed)
    pieces = [stream.push(piece) for piece in np.array_split(TONE, 37)]
    assert sum(map(len, pieces)) > 0.8 * len(whole)
    np.testing.assert_array_equal(np.concatenate([*pieces, stream.push(TONE[:0], last=True)]), whole)


def test_speed_one_changes_nothing() -> None:
    np.testing.assert_array_equal(TempoStream(24_000, 1).push(TONE, last=True), TONE)


def test_nothing_stays_nothing() -> None:
    assert len(TempoStream(24_000, 2).push(TONE[:0], last=True)) == 0
