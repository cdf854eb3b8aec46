"""Where somebody speaks: the shipped questions, in rooms of several kinds."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import omni_jax
from omni_jax.audio import vad
from omni_jax.audio.io import SAMPLE_RATE, read_audio
from omni_jax.errors import NoSpeechError

QUESTIONS = Path(omni_jax.__file__).parent / "assets" / "questions"


@pytest.fixture(scope="module")
def questions() -> list[np.ndarray]:
    return [read_audio(QUESTIONS / f"{name}.wav") for name in ("day", "name", "sum")]


def room(seconds: float, level: float) -> np.ndarray:
    """White noise of so many dB of full scale."""
    noise = np.random.default_rng(0).standard_normal(int(seconds * SAMPLE_RATE))
    return (noise * 10 ** (level / 20)).astype(np.float32)


@pytest.mark.parametrize(("before", "after", "level"), [(3, 0, -200), (0, 3, -200), (1, 2, -60), (2, 1, -45)])
def test_find_speech_removes_the_room(questions: list[np.ndarray], before: int, after: int, level: float) -> None:
    for question in questions:
        start, end = vad.find_speech(question)
        padded = np.pad(question, (before * SAMPLE_RATE, after * SAMPLE_RATE))
        quiet = padded + room(len(padded) / SAMPLE_RATE + 1, level)[: len(padded)]
        found = vad.find_speech(quiet)
        expected = start + before * SAMPLE_RATE, end + before * SAMPLE_RATE
        # A margin that the recording cuts off where it is alone is there within the room.
        margin = vad.MARGIN_SECONDS * SAMPLE_RATE + 2 * vad.FRAME
        assert np.abs(np.subtract(found, expected)).max() <= margin
        assert found[0] >= before * SAMPLE_RATE - margin
        assert found[1] <= before * SAMPLE_RATE + len(question) + margin


@pytest.mark.parametrize("gain", [0.01, 0.1, 4.0])
def test_find_speech_does_not_depend_on_the_level(questions: list[np.ndarray], gain: float) -> None:
    for question in questions:
        assert vad.find_speech(question * np.float32(gain)) == vad.find_speech(question)


@pytest.mark.parametrize(
    "sound",
    [
        room(3, -20),
        room(3, -70),
        (0.3 * np.sin(np.arange(48_000) * 0.2)).astype(np.float32),
        np.eye(1, 32_000, 16_000, dtype=np.float32)[0],
        sum(0.1 * np.sin(np.arange(48_000) * 2 * np.pi * f / 16_000) for f in (262, 330, 392)).astype(np.float32),
    ],
    ids=["noise", "quiet noise", "tone", "click", "chord"],
)
def test_no_speech_in_other_sounds(sound: np.ndarray) -> None:
    for find in (vad.find_speech, lambda audio, name: vad.find_windows(audio, 16_000, name=name)):
        with pytest.raises(NoSpeechError, match=r"^hum\.wav: expected speech, found none$"):
            find(sound, name="hum.wav")


def test_windows_end_at_pauses(questions: list[np.ndarray]) -> None:
    pause = np.zeros(12_000, np.float32)
    whole = np.concatenate([piece for question in questions for piece in (question, pause)])
    windows = vad.find_windows(whole, 6 * SAMPLE_RATE)
    assert len(windows) == 3
    begin = 0
    for (start, end), question in zip(windows, questions, strict=True):
        first, last = vad.find_speech(question)
        assert begin - len(pause) / 2 <= start <= begin + first + vad.FRAME
        assert begin + last - 2 * vad.FRAME <= end <= begin + len(question) + len(pause) / 2
        begin += len(question) + len(pause)
    # All of it in one window, where that is long enough.
    assert vad.find_windows(whole, len(whole)) == [(windows[0][0], windows[-1][1])]


def test_windows_of_speech_without_pauses(questions: list[np.ndarray]) -> None:
    """Nothing of it is lost or repeated, no window is too long or tiny."""
    spoken = np.concatenate([question[slice(*vad.find_speech(question))] for question in questions] * 4)
    windows = vad.find_windows(spoken, 24_000)
    assert [end for _, end in windows[:-1]] == [start for start, _ in windows[1:]]
    assert windows[0][0] < 4000
    assert windows[-1][1] > len(spoken) - 4000
    assert max(end - start for start, end in windows) <= 24_000
    assert min(end - start for start, end in windows) >= 3000


def test_speech_spans_of_probabilities() -> None:
    probabilities = np.array([0.1, 0.6, 0.4, 0.3, 0.9, 0.4, 0.4, 0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.9, 0.2, 0.2, 0.2, 0.2])
    # Begins at 0.5, goes on at 0.35, a gap of one frame is closed; one frame alone is a click.
    assert vad.speech_spans(probabilities, 18 * 512) == [(512, 8 * 512)]
    assert vad.speech_spans(np.full(4, 0.9), 3 * 512 + 7) == [(0, 3 * 512 + 7)]
    assert vad.speech_spans(np.zeros(0), 0) == []


def test_margins_stay_apart() -> None:
    assert vad.with_margins([(5000, 9000), (10_000, 20_000)], 21_000) == [(2600, 9500), (9500, 21_000)]


def test_to_level_ignores_pauses(questions: list[np.ndarray]) -> None:
    for question in questions:
        level = vad.to_level(question, -20.0)
        assert 20 * np.log10(vad.speech_level(level)) == pytest.approx(-20, abs=1e-3)
        # Silence in between does not make the speech louder.
        paused = np.concatenate([question, np.zeros(4 * len(question) // 512 * 512, np.float32)])
        peaks = [np.abs(vad.to_level(audio, -20.0)).max() for audio in (question, paused)]
        assert 20 * np.log10(peaks[1] / peaks[0]) == pytest.approx(0, abs=3)


def test_speech_level_of_less_than_a_frame() -> None:
    assert vad.speech_level(np.full(100, 0.5, np.float32)) == pytest.approx(0.5)


def test_speech_probabilities_hold_no_second_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector is given it frame by frame, at the level it wants."""

    class Detector:
        def process_samples(self, samples: list[float]) -> float:
            assert len(samples) == vad.FRAME
            return max(samples)

    monkeypatch.setattr(vad, "_silero", Detector)
    monkeypatch.setattr(vad, "PIECE_FRAMES", 64)
    audio = np.full(30 * SAMPLE_RATE + 100, 0.5, np.float32)
    tracemalloc.start()
    try:
        probabilities = vad.speech_probabilities(audio)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(probabilities, 10 ** (vad.SPEECH_LEVEL / 20), rtol=1e-5)
    assert len(probabilities) == -(-len(audio) // vad.FRAME)
    assert peak < audio.nbytes / 2


def test_speech_is_detected_in_the_thread_of_the_caller() -> None:
    """In a process of its own: OpenMP starts its threads once."""
    program = """
import os
from concurrent.futures import ThreadPoolExecutor
import numpy as np, psutil
from omni_jax.audio import vad
with ThreadPoolExecutor(4) as pool:
    # At once: each is the first to need the library.
    detectors = list(pool.map(lambda _: vad._silero(), range(4)))
before = psutil.Process().num_threads()
vad.SpeechDetector().push(np.zeros(16_000, np.float32))
print(psutil.Process().num_threads() - before, vad.OPENMP_LIMIT in os.environ)
"""
    environment = {name: value for name, value in os.environ.items() if name != vad.OPENMP_LIMIT}
    run = [sys.executable, "-c", program]
    found = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    threads, limited = found.stdout.split()
    # Those of the pool may be about to end.
    assert int(threads) <= 0
    assert limited == "False"


def marks(question: np.ndarray) -> tuple[int, int]:
    """Where a clean recording is louder than 30 dB below its loud parts."""
    size = 80
    rms = np.sqrt(np.mean(np.square(question[: len(question) // size * size].reshape(-1, size)), axis=1))
    loud = np.flatnonzero(rms > np.quantile(rms, 0.95) * 10 ** (-30 / 20))
    return int(loud[0]) * size, (int(loud[-1]) + 1) * size


def push_all(detector: vad.SpeechDetector, audio: np.ndarray, size: int) -> list[vad.SpeechEdge]:
    return [edge for start in range(0, len(audio), size) for edge in detector.push(audio[start : start + size])]


def test_speech_detector_finds_marks_in_a_stream(questions: list[np.ndarray]) -> None:
    """Each question starts and stops within 150 ms of where it is loud, however the stream is cut."""
    pause = np.zeros(SAMPLE_RATE, np.float32)
    stream = np.concatenate([pause, *(piece for question in questions for piece in (question, pause))])
    stream += room(len(stream) / SAMPLE_RATE, -65)
    expected, position = [], len(pause)
    for question in questions:
        start, stop = marks(question)
        expected += [("started", position + start), ("stopped", position + stop)]
        position += len(question) + len(pause)
    detector = vad.SpeechDetector(silence_seconds=0.5)
    edges = push_all(detector, stream, 320)
    assert [edge.kind for edge in edges] == [kind for kind, _ in expected]
    for edge, (_, sample) in zip(edges, expected, strict=True):
        assert abs(edge.sample - sample) <= 0.15 * SAMPLE_RATE
    assert (detector.position, detector.speaking) == (len(stream), False)
    for size in (1000, len(stream)):
        assert push_all(vad.SpeechDetector(silence_seconds=0.5), stream, size) == edges


def test_speech_detector_waits_for_silence(questions: list[np.ndarray]) -> None:
    """A pause that is shorter than the silence does not end the speech."""
    stream = np.concatenate([questions[0], np.zeros(SAMPLE_RATE // 2, np.float32), questions[1]])
    stream = np.pad(stream, (0, 2 * SAMPLE_RATE))
    for silence, edges in ((0.3, 4), (1.0, 2)):
        assert len(push_all(vad.SpeechDetector(silence_seconds=silence), stream, 4000)) == edges


@pytest.mark.parametrize("silence", [0.2, 0.3, 0.5])
def test_speech_detector_waits_no_longer_than_for_silence(questions: list[np.ndarray], silence: float) -> None:
    detector = vad.SpeechDetector(silence_seconds=silence)
    stream = np.pad(questions[0], SAMPLE_RATE)
    noticed = [
        (detector.position - edge.sample) / SAMPLE_RATE
        for start in range(0, len(stream), 320)
        for edge in detector.push(stream[start : start + 320])
        if edge.kind == "stopped"
    ]
    frame, packet = vad.FRAME / SAMPLE_RATE, 0.02
    assert all(silence <= seconds <= silence + frame + packet for seconds in noticed)
    assert noticed


@pytest.mark.parametrize("gain", [0.02, 0.3, 4.0])
def test_speech_detector_takes_any_level(questions: list[np.ndarray], gain: float) -> None:
    for question in questions:
        stream = np.pad(question, (SAMPLE_RATE, SAMPLE_RATE)) * np.float32(gain)
        edges = push_all(vad.SpeechDetector(), stream, 320)
        assert [edge.kind for edge in edges] == ["started", "stopped"]
        for edge, mark in zip(edges, marks(question), strict=True):
            assert abs(edge.sample - SAMPLE_RATE - mark) <= 0.2 * SAMPLE_RATE


@pytest.mark.parametrize("level", [-20, -45, -70])
def test_speech_detector_finds_no_speech_in_noise(level: float) -> None:
    assert push_all(vad.SpeechDetector(), room(5, level), 320) == []


def test_speech_detector_threshold(questions: list[np.ndarray]) -> None:
    """No probability reaches 1."""
    stream = np.pad(questions[0], SAMPLE_RATE)
    assert push_all(vad.SpeechDetector(threshold=1.0), stream, 320) == []
