"""The input audio buffer of a Realtime session: samples from the client, and the turns that are found in them."""

from __future__ import annotations

from typing import NamedTuple

import soxr

from omni_jax.audio.io import SAMPLE_RATE, from_pcm16
from omni_jax.audio.vad import SpeechDetector
from omni_jax.serve.realtime_schema import InputConfig

SLICE_SECONDS = 0.1
"""The buffer takes so much at once, so that other clients are served in between."""
NOTICE_SECONDS = 1.0
"""Speech that has begun is noticed sooner; what is older is dropped while nothing is said."""


class TurnEdge(NamedTuple):
    """A turn has begun or ended."""

    kind: str
    """`started` or `stopped`."""
    seconds: float
    """Where in all audio of the session the turn begins, padding included, or ends, silence included."""


class InputBuffer:
    """Samples that were not committed yet, in the client's format, and where speech is in them.

    Attributes:
        format: of the samples.
        start: where in all audio of the session the buffer begins, in seconds.
    """

    def __init__(self, config: InputConfig):
        self.start = 0.0
        self._data = bytearray()
        self._config = config
        self.format = config.format.raw
        self._restart()

    def configure(self, config: InputConfig) -> None:
        """Take other settings. Samples in another format are discarded, which the client has asked to change."""
        if config.format != self._config.format:
            self.clear()
        changed = config.turn_detection != self._config.turn_detection or config.format != self._config.format
        self._config, self.format = config, config.format.raw
        if changed:
            self._restart()

    def _restart(self) -> None:
        """Begin to look for speech, after all that is in the buffer."""
        detection = self._config.turn_detection
        # A message may end within a sample.
        self._detected = len(self._data) // self.format.sample_bytes * self.format.sample_bytes
        self._origin = self.start + self.format.seconds(self._detected)
        self._detector, self._resampler = None, None
        if detection is not None:
            self._detector = SpeechDetector(threshold=detection.threshold, silence_seconds=detection.silence_ms / 1000)
            # The detector does not need more, and this quality delays least.
            self._resampler = soxr.ResampleStream(self.format.rate, SAMPLE_RATE, 1, dtype="float32", quality="LQ")

    @property
    def end(self) -> float:
        """Where in all audio of the session the buffer ends, in seconds."""
        return self.start + self.seconds

    @property
    def seconds(self) -> float:
        """Duration of the samples in the buffer."""
        return self.format.seconds(len(self._data) // self.format.sample_bytes * self.format.sample_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes in the buffer."""
        return len(self._data)

    @property
    def speaking(self) -> bool:
        """Whether a turn has begun and not ended."""
        return self._detector is not None and self._detector.speaking

    def slices(self, data: bytes) -> list[bytes]:
        """The samples of an event in pieces for `push`."""
        size = max(self.format.size(SLICE_SECONDS), 1)
        return [data[start : start + size] for start in range(0, len(data), size)]

    def push(self, data: bytes) -> list[TurnEdge]:
        """Take samples; where turns have begun and ended. Without turn detection there are none."""
        self._data += data
        detection = self._config.turn_detection
        if self._detector is None or self._resampler is None or detection is None:
            return []
        whole = len(self._data) // self.format.sample_bytes * self.format.sample_bytes
        samples = from_pcm16(self.format.decode(bytes(self._data[self._detected : whole])))
        self._detected = whole
        edges = []
        for edge in self._detector.push(self._resampler.resample_chunk(samples)):
            seconds = self._origin + edge.sample / SAMPLE_RATE
            if edge.kind == "started":
                edges.append(TurnEdge("started", max(self.start, seconds - detection.prefix_padding_ms / 1000)))
            else:
                edges.append(TurnEdge("stopped", min(self.end, seconds + detection.silence_ms / 1000)))
        if not edges and not self._detector.speaking:
            self._drop(self.end - detection.prefix_padding_ms / 1000 - NOTICE_SECONDS)
        return edges

    def take(self, start: float, end: float) -> bytes:
        """The samples between two times; what is before the end leaves the buffer."""
        self._drop(start)
        size = self.format.size(max(0.0, end - self.start) + 0.5 / self.format.rate)
        data = bytes(self._data[:size])
        self._drop(end)
        return data

    def take_all(self) -> bytes:
        """All samples; speech is looked for in what follows."""
        data = self.take(self.start, self.end)
        self.clear()
        return data

    def clear(self) -> None:
        """Discard all samples; speech is looked for in what follows."""
        self.start = self.end
        self._data.clear()
        self._restart()

    def _drop(self, until: float) -> None:
        """Discard what is before a time."""
        size = min(self.format.size(max(0.0, until - self.start) + 0.5 / self.format.rate), len(self._data))
        size -= size % self.format.sample_bytes
        del self._data[:size]
        self._detected = max(0, self._detected - size)
        self.start += self.format.seconds(size)
